"""A table of runs and sweeps: `python -m loftq_exp.report DIR ... [--format json|csv|markdown] [--output FILE]`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from loftq_exp.commands.terminal import OneLineParser, exit_code
from loftq_exp.config import local_path
from loftq_exp.errors import UserError
from loftq_exp.report.collect import Found, collect
from loftq_exp.report.table import cells, columns, markdown, print_table

FORMATS = ("table", "json", "csv", "markdown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. An error is one line on standard error and exit code 1."""

    def work() -> int:
        options = _parser().parse_args(argv)
        logging.basicConfig(
            level=logging.INFO, format="%(message)s"
        )  # on standard error, because the report may be piped
        if options.output and options.format == "table":
            raise UserError(
                f"--output={options.output}: --format=table is for the terminal only; add --format json, csv or markdown"
            )
        runs = collect(folder for place in options.places for folder in _folders(place))
        if not runs:
            raise UserError(f"{' '.join(options.places)}: there is no run with a metrics.json, and no sweep, in it")
        _write(runs, options)
        return 0

    return exit_code(work, "nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m loftq_exp.report", description="Shows one row per run in these folders and their subfolders."
    )
    parser.add_argument("places", metavar="DIR", nargs="+", help="a run, a sweep or a folder of them; globs work too")
    parser.add_argument("--format", choices=FORMATS, default="table",
                        help="json: a list of rows with all settings and scores. Other formats: the columns of the table")  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE", help="output file for json, csv or markdown (default: standard output)"
    )
    return parser


def _folders(place: str) -> list[Path]:
    """Return the folder of this name, or those that match the glob. Raises UserError if there is none."""
    path = local_path(place)
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if any(mark in place for mark in "*?[") else []
    found = [path] if path.is_dir() else sorted(match for match in matches if match.is_dir())
    if not found:
        raise UserError(
            f"{place}: there is no such folder; give a run, a sweep or a folder of them, such as outputs/runs"
        )
    return found


def _write(runs: Sequence[Found], options: argparse.Namespace) -> None:
    headings = columns([run.metrics for run in runs])
    rows = [cells(run.metrics, headings) for run in runs]
    if options.format == "table":
        print_table(f"{len(runs)} runs", headings, rows)
        return
    if options.format == "json":
        text = _as_json(runs)
    else:
        text = _as_csv(headings, rows) if options.format == "csv" else markdown(headings, rows)
    if not options.output:
        sys.stdout.write(text)
        return
    try:
        local_path(options.output).write_text(text)
    except OSError as error:
        raise UserError(f"--output={options.output}: cannot be written ({error.strerror})") from None


def _as_json(runs: Sequence[Found]) -> str:
    rows = [
        {
            "run": run.metrics["label"],
            "file": str(run.path),
            "settings": run.metrics["config"],
            "scores": run.metrics["scores"],
        }
        for run in runs
    ]
    return json.dumps(rows, indent=1) + "\n"


def _as_csv(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *rows])
    return text.getvalue()
