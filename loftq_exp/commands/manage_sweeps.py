"""Multiruns that were cut short, and the best of one again with more seeds: `loftq-exp sweep resume|best`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from loftq_exp.commands.best import run_best
from loftq_exp.commands.run import main as run
from loftq_exp.commands.sweep import Sweep
from loftq_exp.commands.terminal import OneLineParser, exit_code
from loftq_exp.config import local_path
from loftq_exp.errors import UserError
from loftq_exp.report.places import PLAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if every job is done then."""

    def work() -> int:
        options = _parser().parse_args(argv)
        if options.action == "best":
            return run_best(options.overrides, options.over, options.seeds)
        sweep = _resumable(local_path(options.folder).resolve())
        _enter(sweep)
        return run(sweep.arguments, sweep.folder, options.failed)

    return exit_code(work, "nothing was begun")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="loftq-exp sweep", description="Runs the jobs of multiruns.")
    actions = parser.add_subparsers(dest="action", required=True)
    about = "run the jobs that are missing, as the sweep's command did, and show the tables of all jobs"
    resume = actions.add_parser("resume", help="go on where a multirun was cut short", description=about)
    resume.add_argument("folder", metavar="DIR", help=f"a folder of OUTPUT_DIR/sweeps, with its {PLAN}")
    resume.add_argument("--failed", action="store_true", help="also run the failed jobs again")
    about = (
        "run a multirun, choose the best of --over for each of its other settings, and run that with each of --seeds"
    )
    best = actions.add_parser("best", help="the best learning rate of each method, with seeds", description=about)
    best.add_argument("overrides", metavar="OVERRIDE", nargs="+", help="as after loftq-exp run -m, with objective=NAME")
    best.add_argument("--over", metavar="NAME", action="append", required=True,
                      help="a setting that is chosen, such as train.learning_rate; repeatable")  # fmt: skip
    best.add_argument(
        "--seeds", metavar="A,B,...", required=True, help="the seeds of the second multirun, such as 0,1,2"
    )
    return parser


def _resumable(folder: Path) -> Sweep:
    """Return the multirun in `folder`. Raises UserError if it cannot be resumed."""
    sweep = Sweep.read(folder)
    if sweep is None:
        raise UserError(f"{folder}: no sweep (there is no sound {PLAN} in it); give a folder of OUTPUT_DIR/sweeps")
    if sweep.jobs is None:
        raise UserError(
            f"{folder}: its sweeper chooses the jobs as it goes; run its command again, with the same storage"
        )
    return sweep


def _enter(sweep: Sweep) -> None:
    """Change to the working directory of the sweep's command, from which its relative paths start."""
    try:
        os.chdir(sweep.place)
    except OSError as error:
        raise UserError(f"{sweep.folder}: its command was run in {sweep.place}, which cannot be entered ({error.strerror}); "
                        "bring that folder back, or run the command again") from None  # fmt: skip
