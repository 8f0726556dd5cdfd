"""A task from outside the package: of an installed distribution, and of a module that a YAML file names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from riddles import RIDDLES

from loftq_exp.errors import UserError
from loftq_exp.tasks import task_settings
from loftq_exp.tasks.arithmetic import generate

ROOT = Path(__file__).parents[2]
MODULE = RIDDLES.replace("self.config.hints\n", "self.config.hints + tokenizer.eos_token\n").replace(
    "Judgement(None, None,", 'Judgement("a text", row["answer"],'
)
"""The task of tests/riddles.py, with the tokenizer in its prompt and text in its samples."""


def command(folder: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])}
    return subprocess.run([sys.executable, "-m", "loftq_exp", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip


def installed(folder: Path, module: str, text: str) -> Path:
    """A folder with a module and the metadata of its distribution, as pip installs them."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[loftq_exp.tasks]\nriddles = {module}\n")
    (folder / f"{module}.py").write_text(text)
    return folder


def test_an_installed_package_brings_a_task(tmp_path: Path, tiny_llama_dir: Path) -> None:
    site = installed(tmp_path / "site", "riddles_package", MODULE)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in islice(generate("train", 0), 3)))
    done = command(
        tmp_path, site, "task=riddles", "task.hints=2", "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4",
        "task.eval_file=rows.jsonl", "task.max_target_length=8", "device=cpu", "stages=[quantize,evaluate]",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"].endswith(" Hint. Hint.</s>") for sample in samples] == [True] * 3
    assert {sample["predicted"] for sample in samples} == {"a text"}


def test_a_yaml_file_in_config_dir_names_a_module_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "my_riddles.py").write_text(MODULE)
    (tmp_path / "mine" / "task" / "riddles.yaml").write_text(
        "kind: riddles\nmodule: my_riddles\nmax_source_length: 64\n"
    )
    done = command(tmp_path, tmp_path, "--config-dir", "mine", "task=riddles", "task.hints=3", "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  hints: 3\n" in done.stdout
    assert "  max_source_length: 64\n" in done.stdout
    done = command(tmp_path, tmp_path, "--config-dir", "mine", "task=riddles", "task.hint=3")
    assert done.returncode != 0
    assert "task.hint=3: there is no such setting; did you mean 'task.hints'?" in done.stdout + done.stderr


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^task.module=no_such: cannot be imported \(ModuleNotFoundError: No module"):
        task_settings("gsm8k", module="no_such")
    site = installed(tmp_path / "site", "broken_package", "raise RuntimeError('no good')")
    done = command(tmp_path, site, "task=gsm8k", "--cfg", "job")
    assert done.returncode == 0
    assert "task riddles (broken_package): cannot be imported (RuntimeError: no good)" in done.stderr
