"""Hundreds of jobs of one multirun in one process: memory, handles, threads and folders do not grow with their number."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from conftest import Command
from omegaconf import DictConfig

JOBS, SETTLED, GROWTH = 200, 10, 1.05

PROGRAM = """
import gc, json, os, sys, tempfile, threading
from loftq_exp.commands import run
outcome, out = run._outcome, open(sys.argv[1], "w")
def counted(*args):
    found = outcome(*args)
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    state = {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(os.listdir("/proc/self/fd")),
             "threads": threading.active_count(), "tasks": len(os.listdir("/proc/self/task")),
             "folders": len(os.listdir(tempfile.gettempdir())), "done": found is not None}
    out.write(json.dumps(state) + "\\n")
    out.flush()
    return found
run._outcome = counted
sys.exit(run.main(sys.argv[2:]))
"""


def test_a_job_leaves_no_settings_in_memory(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra keeps the result of each job of a multirun, which holds two composed trees."""
    alive = list[int]()

    def counted(*_: object) -> None:
        gc.collect()
        # Not isinstance, which follows a weak proxy to an object that may be gone.
        alive.append(sum(issubclass(type(each), DictConfig) for each in gc.get_objects()))

    monkeypatch.setattr("loftq_exp.commands.run._outcome", counted)
    cli(*cli.tiny, "-m", "seed=range(6)")
    assert len(alive) == 6
    assert alive[-1] == alive[1]


@pytest.mark.slow
def test_many_jobs_in_one_process(cli: Command, tmp_path: Path) -> None:
    """Every job has rows of other lengths, for each of which oneDNN compiles and keeps primitives."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = (*cli.tiny, "stages=[quantize,finetune]", "train.max_steps=1", "-m", f"task.data_seed=range({JOBS})")  # fmt: skip
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "states"), *command], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    states = [json.loads(line) for line in (tmp_path / "states").read_text().splitlines()]
    assert len(states) == JOBS
    assert all(state["done"] for state in states)
    first, last = states[SETTLED], states[-1]
    before = median(state["rss"] for state in states[SETTLED : SETTLED + 5])
    most = max(state["rss"] for state in states[SETTLED:])
    assert most <= GROWTH * before, f"{before / 1e6:.0f} MB after {SETTLED} jobs, at most {most / 1e6:.0f} MB in {JOBS}"
    assert {name: last[name] for name in ("files", "threads", "tasks", "folders")} == {
        name: first[name] for name in ("files", "threads", "tasks", "folders")
    }
