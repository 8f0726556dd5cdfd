"""A search with Optuna's sweeper. It needs the extra `optuna`; the objective itself is tested in test_run.py."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands import dispatch

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")

ROOT = Path(__file__).parents[2]
STUDY = (
    "-m", "hydra/sweeper=optuna", "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=rank",
    "hydra.sweeper.n_jobs=1", "stages=[quantize,evaluate]",
)  # fmt: skip


def tiny(cli: Any) -> list[str]:
    """The overrides of a run of seconds without a rank: Optuna does not search over what is fixed."""
    return [override for override in cli.tiny if not override.startswith("quant.rank=")]


def trials() -> list[tuple[str, float | None]]:
    """State and value of each trial of the study on disk."""
    query = "select state, value from trials left join trial_values using (trial_id) order by number"
    with sqlite3.connect("study.db") as study:
        return list(study.execute(query))


def test_a_study_on_disk_goes_on_and_outlives_a_killed_trial(cli: Any) -> None:
    search = (*tiny(cli), *STUDY, "objective=nll", "quant.rank=choice(4,8)")
    assert cli(*search, "hydra.sweeper.n_trials=2").code == 0
    scores = [
        json.loads(path.read_text())["metrics"]["scores"]["nll"]
        for path in sorted(Path("outputs/sweeps").glob("*/job-*.json"))
    ]
    assert trials() == [("COMPLETE", pytest.approx(score)) for score in scores]
    with sqlite3.connect("study.db") as study:  # what a kill leaves behind
        study.execute("update trials set state = 'RUNNING' where number = 1")
        study.execute("delete from trial_values where trial_id = 2")
    assert cli(*search, "hydra.sweeper.n_trials=1").code == 0
    assert [state for state, _ in trials()] == ["COMPLETE", "RUNNING", "COMPLETE"]


def test_a_failed_job_is_a_failed_trial(cli: Any) -> None:
    search = (*tiny(cli), *STUDY, "objective=nll", "quant.rank=choice(100000,200000)", "hydra.sweeper.n_trials=1")
    outcome = cli(*search)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "error: job 0: failed with the error above; correct it, or go on after failed jobs with hydra.sweeper.max_failure_rate=1"
    )
    assert "job 0 failed: quant.rank=" in outcome.out
    assert trials() == [("FAIL", None)]


def test_a_search_without_an_objective_is_refused(cli: Any) -> None:
    outcome = cli(*tiny(cli), *STUDY, "quant.rank=choice(4,8)", "hydra.sweeper.n_trials=1")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "error: objective=null: hydra/sweeper searches for the best score; add objective=NAME, such as objective=nll"
    )
    assert not Path("outputs/runs").exists()


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_the_report_shows_its_whole_history(cli: Any) -> None:
    """Killed by the system in the course of its second trial or later."""
    search = (*tiny(cli), *STUDY, "objective=nll", "quant.rank=choice(2,4,8)", "hydra.sweeper.n_trials=6")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "loftq_exp", *search]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while len(list(Path("outputs/sweeps").glob("*/job-*.json"))) < 1:
        assert killed.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = len(list(Path("outputs/sweeps").glob("*/job-*.json")))
    assert cli(*search[:-1], "hydra.sweeper.n_trials=2").code == 0
    assert [state for state, _ in trials()].count("COMPLETE") in (
        before + 2,
        before + 1,
    )  # it may die between record and study
    outcome = cli.call(lambda: dispatch.main(["report", "outputs/sweeps"]))
    found = [
        json.loads(path.read_text())["metrics"]["scores"]["nll"]
        for path in sorted(Path("outputs/sweeps").glob("*/job-*.json"))
    ]
    assert f"best of {before + 2} trials: nll {min(found):.6g} with " in outcome.out
