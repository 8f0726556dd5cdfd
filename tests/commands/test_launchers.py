"""Launchers: the same table as the plain loop, from jobs in other processes."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loftq_exp.commands import launchers
from loftq_exp.commands.run import conf_dir

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(path.stem for path in (conf_dir() / "hydra" / "launcher").glob("*.yaml"))
CHOSEN = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
}


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of the table of a sweep's jobs, without times and peak memory."""
    with (folder / "table.csv").open() as lines:
        return [
            {name: value for name, value in row.items() if "seconds" not in name and "memory" not in name}
            for row in csv.DictReader(lines)
        ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(CHOSEN))
def test_the_same_table_as_the_plain_loop(cli: Any, launcher: str) -> None:
    if not launchers.is_installed(launcher):
        pytest.skip(f"the extra of {launcher} is not installed")
    jobs = (*cli.tiny, "-m", "quant=lora,qlora", "seed=1,2")
    assert cli(*jobs, "output_dir=plain").code == 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "loftq_exp", *jobs, *CHOSEN[launcher], "output_dir=spread"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    (plain,), (spread,) = Path("plain/sweeps").iterdir(), Path("spread/sweeps").iterdir()
    assert table(spread) == table(plain)
    assert len(list(spread.glob("job-*.json"))) == 4
    assert "4 jobs" in done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_not_installed(cli: Any, monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    extra = launcher.partition("_")[0]
    said = cli.refused("-m", "seed=1,2", f"hydra/launcher={launcher}")
    assert said == f"hydra/launcher={launcher}: not installed; run: pip install 'loftq_exp[{extra}]'"
    assert not Path("outputs").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_file_opens_with_its_command_and_says_whether_it_was_run(launcher: str) -> None:
    text = (conf_dir() / "hydra" / "launcher" / f"{launcher}.yaml").read_text()
    first, *rest = text.splitlines()
    assert first.startswith(f"# python -m loftq_exp -m quant.rank=8,16 hydra/launcher={launcher}")
    assert any("Run in tests" in line or "Not run" in line for line in rest)
    assert "_target_" in yaml.safe_load(text)
