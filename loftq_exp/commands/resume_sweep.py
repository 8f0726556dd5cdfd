"""Going on with a multirun that was cut short: `loftq-exp sweep resume DIR [--failed]`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from loftq_exp.commands.run import main as run
from loftq_exp.commands.sweep import PLAN, Sweep
from loftq_exp.commands.terminal import OneLineParser, exit_code
from loftq_exp.config import local_path
from loftq_exp.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if every job of the multirun is done then."""

    def work() -> int:
        options = _parser().parse_args(argv)
        sweep = _resumable(local_path(options.folder).resolve())
        _enter(sweep)
        return run(sweep.arguments, sweep.folder, options.failed)

    return exit_code(work, "nothing was begun")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="loftq-exp sweep",
        description="Runs the jobs of a multirun that are missing, as its command did, and shows the tables of all jobs. The exit "
        "code is 0 if every job is done.",
    )
    parser.add_argument("action", choices=("resume",), help="go on where it was cut short")
    parser.add_argument("folder", metavar="DIR", help=f"a folder of OUTPUT_DIR/sweeps, with its {PLAN}")
    parser.add_argument("--failed", action="store_true", help="also run the failed jobs again")
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
