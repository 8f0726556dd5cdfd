"""`loftq-exp COMMAND ...`: each command by its name, and one form of error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from loftq_exp.commands import dispatch


def call(cli: Any, *arguments: str) -> Any:
    return cli.call(lambda: dispatch.main(arguments))


def test_help_names_every_command(cli: Any) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        outcome = call(cli, *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        named = [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ")]
        assert named == ["run", "cache", "export", "report", "sweep", "rerun"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["cahce", "list"], "cahce: there is no such command; did you mean 'cache'?"),
    (["zzz"], "zzz: there is no such command; choose from: run, cache, export, report, sweep, rerun"),
    (["quant.bits=2"], "quant.bits=2: settings come after the command; give loftq-exp run quant.bits=2"),
    (["-m", "quant.bits=2,4"], "-m: settings come after the command; give loftq-exp run -m"),
    (["run", "quant.bit=2"], "quant.bit=2: there is no such setting; did you mean 'quant.bits'?"),
    (["run", "--bogus"], "unrecognized arguments: --bogus; give settings as NAME=VALUE, see --help"),
    (["cache", "lits"], "argument list|size|verify|prune|inits: invalid choice: 'lits'"),
    (["cache", "--cache-dir", "nowhere", "list"], "--cache-dir=nowhere: there is no such folder"),
    (["export", "only-one"], "the following arguments are required: OUT; see python -m loftq_exp.export --help"),
    (["report", "nowhere"], "nowhere: there is no such folder"),
])  # fmt: skip
def test_every_command_refuses_in_one_line(cli: Any, arguments: list[str], message: str) -> None:
    outcome = call(cli, *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("name", ["run", "cache", "export", "report"])
def test_the_help_of_a_command_returns_0_and_leaves_the_arguments_of_the_process_alone(cli: Any, name: str) -> None:
    before = list(sys.argv)
    outcome = call(cli, name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "usage: python -m loftq_exp" in outcome.out.replace("Usage", "usage")
    assert sys.argv == before


def test_a_run_by_its_name(cli: Any) -> None:
    direct, named = cli("--cfg", "job", "quant.bits=2"), call(cli, "run", "quant.bits=2", "--cfg", "job")
    assert named == direct
    assert "bits: 2" in named.out


def test_what_is_shown_and_refused_needs_no_torch() -> None:
    script = """
import sys
from loftq_exp.commands.dispatch import main
assert main([]) == 0 and main(["run", "--cfg", "job", "task=squad"]) == 0 and main(["run", "task.num_beam=2"]) == 1
assert main(["report", "nowhere"]) == 1
from loftq_exp.tasks import task_settings
task_settings("summarization", name="xsum", num_beams=2)
sys.exit(", ".join({"torch", "transformers", "datasets", "evaluate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == (
        "error: task.num_beam=2: there is no such setting; did you mean 'task.num_beams'?\n"
        "error: nowhere: there is no such folder; give a run, a sweep or a folder of them, such as outputs/runs\n\n"
    )
