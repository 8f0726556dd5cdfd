"""Names from other tools are refused with the setting, or what there is instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loftq_exp.commands.run import CLOSED, compose
from loftq_exp.errors import UserError


@pytest.mark.parametrize(("given", "advice"), [
    ("model=Qwen/Qwen2.5-0.5B", "for a hub id or folder give model.path=Qwen/Qwen2.5-0.5B"),
    ("train.lr=1e-4", "did you mean 'train.learning_rate'?"),
    ("train.packing=true", "task=instruct has task.packing"),
    ("train.seed=3", "did you mean 'seed'?"),
    ("quant.r=16", "did you mean 'quant.rank'?"),
    ("quant.modules=[q_proj]", "did you mean 'quant.target_modules'?"),
    ("logger=wandb", "did you mean 'train.report_to'? Every run logs to TensorBoard in its folder, and metrics.json has all numbers"),
])  # fmt: skip
def test_a_name_of_another_tool(given: str, advice: str) -> None:
    with pytest.raises(UserError) as refused:
        compose([given])
    assert str(refused.value).startswith(f"{given}: ")
    assert str(refused.value).endswith(advice)


def piped(*arguments: str) -> tuple[str, str, int]:
    """First line, standard error and exit code of the command whose output is read up to that line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment)  # fmt: skip
    assert child.stdout
    assert child.stderr
    line = child.stdout.readline()
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    return line, error, child.wait()


def test_a_closed_pipe_ends_a_page_without_a_traceback() -> None:
    line, error, code = piped("loftq_exp", "--cfg", "job")
    assert line == "model:\n"
    assert (error, code) in (("", 0), (f"error: {CLOSED}\n", 1))  # 0 if all was written before the pipe was closed


@pytest.mark.slow
def test_a_closed_pipe_ends_a_run_in_one_line(cli: Any) -> None:
    line, error, code = piped("loftq_exp", *cli.tiny, "train.max_steps=1", "quant.iter=1")
    assert line
    assert (error, code) == (f"error: {CLOSED}\n", 1)


def test_an_output_folder_that_cannot_be_created_is_one_line(cli: Any) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc on this system")
    message = "/proc/x cannot be created (No such file or directory); set another"
    assert cli.refused(*cli.tiny, "output_dir=/proc/x") == f"output_dir=/proc/x: {message} output_dir"


def test_a_multirun_of_one_job_says_so(cli: Any) -> None:
    outcome = cli("-m", *cli.tiny, "device=none")
    assert (
        "-m: one job, because no setting has several values; to run several give NAME=A,B, such as quant.rank=8,16\n"
        in outcome.out
    )
    assert "one job" not in cli("-m", *cli.tiny, "device=none", "quant.rank=2,4").out
