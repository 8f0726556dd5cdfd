"""A task owns its settings: what each accepts and ignores, and a task made of one module and one YAML file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from riddles import RIDDLES

from loftq_exp.commands.run import compose
from loftq_exp.config import TaskConfig
from loftq_exp.config.schema import RESULTS, defaults
from loftq_exp.errors import UserError
from loftq_exp.tasks import TASKS, load_task, task_settings
from loftq_exp.tasks.arithmetic import generate

ROOT = Path(__file__).parents[2]
LENGTHS = {
    "lm_eval": {"include_path", "num_fewshot", "apply_chat_template"},
    "commonsense": {"max_source_length", "max_target_length", "sets", "eval_folder", "num_beams"},
    "anli": {"max_source_length"},
    "arithmetic": {"max_source_length", "max_target_length", "data_seed", "problems"},
    "glue": {"max_source_length"},
    "gsm8k": {"max_source_length", "max_target_length"},
    "instruct": {"max_length", "max_target_length", "packing", "eval_share", "data_seed", "score", "reference"},
    "metamath": {"max_source_length", "max_target_length"},
    "squad": {"max_source_length", "doc_stride", "n_best_size", "max_answer_length"},
    "summarization": {"max_source_length", "max_target_length", "source_prefix", "num_beams", "length_penalty",
                      "no_repeat_ngram_size"},
    "wikitext": {"block_size", "start_token"},
}  # fmt: skip
NAMES = {"lm_eval": {"name": ("gsm8k",)}, "glue": {"name": "rte"}, "summarization": {"name": "xsum"}}


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_each_task_has_the_fields_that_it_uses() -> None:
    assert {kind: fields(settings) - fields(TaskConfig) for kind, settings in TaskConfig.variants().items()} == LENGTHS


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_every_setting_says_what_it_is_and_what_it_shapes(kind: str) -> None:
    for field in dataclasses.fields(TaskConfig.variants()[kind]):
        assert field.metadata["doc"]
        assert set(field.metadata["shapes"]) <= set(RESULTS)


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_settings_make_their_task(kind: str) -> None:
    settings = task_settings(kind, max_eval_samples="7", **NAMES.get(kind, {}))
    assert (settings.kind, settings.max_eval_samples) == (kind, 7)
    task = load_task(settings)
    assert (type(task), task.config) == (TASKS[kind], settings)


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_every_setting_of_the_chosen_task_can_be_set_without_a_plus(kind: str) -> None:
    cls = TaskConfig.variants()[kind]
    other = {"name": NAMES.get(kind, {}).get("name"), "train_file": "a.jsonl", "eval_split": "dev", "max_source_length": 77,
             "num_beams": 3, "length_penalty": 0.5, "block_size": 33, "doc_stride": 9, "data_seed": 4}  # fmt: skip
    if kind == "lm_eval":  # it refuses a place of rows that are scored
        del other["eval_split"]
    values = {name: value for name, value in {**defaults(cls), **other}.items() if name in fields(cls)}
    found = compose([f"task={kind}", *(f"task.{name}={json.dumps(value)}" for name, value in values.items())]).task
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    assert dataclasses.asdict(found) == {"kind": kind, **values, **tuples}


def test_a_setting_of_another_task_is_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    plain = compose(["task=gsm8k"])
    assert caplog.messages == []
    for overrides in (["task.num_beams=4", "task.doc_stride=8"], ["+task.num_beams=4", "++task.doc_stride=8"]):
        caplog.clear()
        run = compose(["task=gsm8k", *overrides])
        assert run == plain
        assert caplog.messages == ["task.num_beams=4, task.doc_stride=8: not used by task gsm8k"]


def test_a_setting_that_no_task_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.num_beam: there is no such setting; did you mean 'num_beams'\?$"):
        task_settings("gsm8k", num_beam=4)
    with pytest.raises(
        UserError, match=r"^task.num_beam=4: there is no such setting; did you mean 'task.num_beams'\?$"
    ):
        compose(["task.num_beam=4"])
    with pytest.raises(
        UserError, match=r"^task.kind=gms8k: not a choice \(did you mean 'gsm8k'\?\); choose from: anli, "
    ):
        task_settings("gms8k")


def test_a_sweep_over_tasks_may_share_a_setting_that_one_lacks(cli: Any) -> None:
    shared = [override for override in cli.tiny if not override.startswith("task")]
    outcome = cli(*shared, "-m", "task=gsm8k,wikitext", "task.block_size=16,24", "stages=[quantize]")
    assert (outcome.code, outcome.err) == (0, "")
    configs = [json.loads(path.read_text())["task"] for path in Path("outputs/runs").glob("*/config.json")]
    assert sorted((config["kind"], config.get("block_size", 0)) for config in configs) == [
        ("gsm8k", 0), ("wikitext", 16), ("wikitext", 24),
    ]  # fmt: skip
    assert outcome.out.count("task.block_size=16: not used by task gsm8k") == 1
    jobs = [json.loads(path.read_text())["overrides"] for path in sorted(Path("outputs/sweeps").glob("*/job-*.json"))]
    assert "task.block_size=24" in jobs[1]  # as written in the file


def test_two_tasks_of_one_kind_are_a_bug_that_is_named() -> None:
    with pytest.raises(TypeError, match=r"two tasks have the kind 'gsm8k': loftq_exp.tasks.gsm8k and "):
        type("Again", (TASKS["anli"],), {"kind": "gsm8k"})


# One module and one YAML ----------------------------------------------------------------------------------------------


def test_a_new_task_is_one_module_and_one_yaml(tmp_path: Path, tiny_llama_dir: Path) -> None:
    copy = tmp_path / "checkout"
    for name in ("loftq_exp", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "experiment"))
    (copy / "conf" / "experiment").mkdir()
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "loftq_exp" / "tasks" / "riddles.py").write_text(RIDDLES)
    (copy / "conf" / "task" / "riddles.yaml").write_text("kind: riddles\nmax_source_length: 64\n")
    rows = [json.dumps(row) for row in islice(generate("train", 0), 4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    overrides = [
        "task=riddles", "task.hints=2", "task.num_beams=3", "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4",
        "task.train_file=rows.jsonl", "task.eval_file=rows.jsonl", "task.max_target_length=8", "device=cpu", "stages=[quantize,evaluate]",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "loftq_exp", *overrides], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(copy)}, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "task.num_beams=3: not used by task riddles" in done.stdout
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["config"]["task"]["hints"] == 2
    assert "num_beams" not in metrics["config"]["task"]
    assert metrics["scores"]["accuracy"] == 1.0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"].endswith(" Hint. Hint.") for sample in samples] == [True] * 4
