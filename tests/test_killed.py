"""Runs that are killed, runs beside each other and files that are damaged: nothing is lost, torn, done twice or left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loftq_exp

HERE = Path(__file__).parent


def tried(script: str, *arguments: str) -> dict[str, Any]:
    """What a harness prints. It is a process of its own, because it forks, which pytest's threads would not survive."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(loftq_exp.__file__).parents[1]), str(HERE)])}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the cases are forks")
def test_a_killed_run_loses_nothing() -> None:
    found = tried("killing.py", "--cases=10", "--seed=1", "--workers=1", "--processes=3", "--damaged=10")
    assert found["killed"]["failures"] == []
    assert found["killed"]["kills"] >= 8
    assert found["together"]["failures"] == []
    assert found["damaged"]["failures"] == []


@pytest.mark.slow
def test_300_damaged_files_change_no_result() -> None:
    found = tried("corruption.py", "--cases=300", f"--seed={os.environ.get('SEED', '0')}")
    assert found["failures"] == []
    assert found["cases"] == 300


@pytest.mark.slow
def test_300_killed_runs_lose_nothing() -> None:
    found = tried("killing.py", "--cases=300", f"--seed={os.environ.get('SEED', '0')}", "--workers=2")["killed"]
    assert found["failures"] == []
    assert found["kills"] >= 300


@pytest.mark.slow
def test_eight_processes_share_one_store() -> None:
    found = tried("together.py", "--processes=8", "--rounds=2")
    assert found["failures"] == []
    assert found["cases"] == 48
