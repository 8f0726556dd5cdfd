"""A table of runs and sweeps: `loftq-exp report DIR ...`, also `python -m loftq_exp.report DIR ...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loftq_exp.commands.terminal import OneLineParser, exit_code, say
from loftq_exp.config import local_path
from loftq_exp.errors import UserError
from loftq_exp.report.collect import Found, collect
from loftq_exp.report.console import print_table
from loftq_exp.report.forms import as_csv, as_json, as_latex, as_markdown
from loftq_exp.report.grid import grids, runs_grid
from loftq_exp.report.jobs import Job, failures, jobs_in, searches
from loftq_exp.report.page import write_page
from loftq_exp.report.select import Condition, check_rows, full_name, in_order, of_run, row_value, run_value
from loftq_exp.report.summary import Summary, narrowed, summarise

log = logging.getLogger(__name__)

FORMATS = ("table", "json", "csv", "markdown", "latex", "html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. An error is one line on standard error and exit code 1."""

    def work() -> int:
        options = _parser().parse_args(_joined(list(sys.argv[1:] if argv is None else argv)))
        logging.basicConfig(
            level=logging.INFO, format="%(message)s"
        )  # on standard error, because the report may be piped
        if options.output and options.format == "table":
            raise UserError(f"--output={options.output}: --format=table is for the terminal only; "
                            f"add --format {', '.join(FORMATS[1:-1])} or {FORMATS[-1]}")  # fmt: skip
        places = [place for name in options.places for place in _places(name)]
        runs, jobs = collect(places), jobs_in(places)
        for job in failures(jobs):
            log.warning("%s: %s (%s)", job.path.parent, job.failure, " ".join(job.overrides))
        if not runs:
            reason = (
                "every job failed, as said above"
                if jobs
                else "there is no run with a metrics.json, and no sweep, in it"
            )
            raise UserError(f"{' '.join(options.places)}: {reason}")
        group_by = [full_name("group-by", name, runs, numbers=False) for name in options.group_by]
        summary = _chosen(runs, options)
        for name in group_by:
            check_rows("group-by", name, summary.rows)
        _write(summary, group_by, jobs, options)
        return 0

    return exit_code(work, "nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m loftq_exp.report",
        description="Shows one row for the runs in these folders that differ only in their seeds: mean, sample standard "
        "deviation, number and 95 % interval.",
    )
    parser.add_argument("places", metavar="DIR", nargs="+", help="a run, a sweep or a folder of them; globs work too")
    parser.add_argument("--format", choices=FORMATS, default="table",
                        help="json: a list of rows with all settings and scores; csv: all digits; markdown, latex: the table; html: a page with plots")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="output file (default: standard output; report.html for html)")
    parser.add_argument("--group-by", metavar="NAME", action="append", default=[],
                        help="a table for each value of a setting (default: of model and task); repeatable")  # fmt: skip
    parser.add_argument("--filter", metavar="NAME=VALUE", action="append", default=[],
                        help="show only rows where a setting, score or measure has this value; also !=, <, >; repeatable")  # fmt: skip
    parser.add_argument(
        "--sort",
        metavar="NAME",
        help="sort by a setting, score or measure; -NAME: descending (default: by what differs)",
    )
    parser.add_argument("--baseline", metavar="NAME",
                        help="a method, such as qlora, or a row's name: show differences to it over equal seeds")  # fmt: skip
    return parser


def _joined(arguments: list[str]) -> list[str]:
    """Return the arguments with `--sort -NAME` as one, because argparse takes -NAME for an option."""
    for index, argument in enumerate(arguments[:-1]):
        if argument == "--sort":
            return [*arguments[:index], f"--sort={arguments[index + 1]}", *_joined(arguments[index + 2 :])]
    return arguments


def _places(place: str) -> list[Path]:
    """Return the folder or file of this name, or those that match the glob. Raises UserError if there is none."""
    path = local_path(place)
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if any(mark in place for mark in "*?[") else []
    found = [path] if path.exists() else sorted(matches)
    if not found:
        raise UserError(
            f"{place}: there is no such folder; give a run, a sweep or a folder of them, such as outputs/runs"
        )
    return found


def _chosen(runs: Sequence[Found], options: argparse.Namespace) -> Summary:
    """Return the rows that the filters leave, in the chosen order. Differences are to a baseline that may be filtered out."""
    conditions = [(each, full_name("filter", each.name, runs)) for each in map(Condition.parse, options.filter)]
    of_runs = [(each, name) for each, name in conditions if of_run(name, runs)]
    left = [run for run in runs if all(each.holds(run_value(run, name)) for each, name in of_runs)]
    summary = summarise(left, baseline=options.baseline if left else None, option="--baseline")
    of_rows = [(each, name) for each, name in conditions if not of_run(name, runs)]
    rows = [row for row in summary.rows if all(each.holds(row_value(row, name)) for each, name in of_rows)]
    if not rows:
        raise UserError(
            f"--filter={conditions[-1][0].text}: no row is left of {len(summarise(runs).rows)}; loosen a filter"
        )
    for name in reversed(summary.differing):  # the order of files says nothing
        rows = in_order(rows, name)
    if options.sort:
        name = full_name("sort", options.sort.removeprefix("-"), runs)
        check_rows("sort", name, rows)
        rows = in_order(rows, name, descending=options.sort.startswith("-"))
    return narrowed(summary, rows)


def _write(summary: Summary, group_by: Sequence[str], jobs: Sequence[Job], options: argparse.Namespace) -> None:
    tables = grids(summary, group_by)
    if options.format == "table":
        for grid in tables:
            print_table(grid.title, grid.headings, grid.rows, drop=grid.drop, notes=grid.notes,
                        elsewhere="--format csv, json or markdown has all")  # fmt: skip
        for grid in runs_grid(summary):
            print_table(
                grid.title, grid.headings, grid.rows, drop=grid.drop, elsewhere="each run's metrics.json has all"
            )
        for search in searches(jobs):
            say(search.summary)
        return
    if options.format == "html":
        output = options.output or "report.html"
        with _written(output):
            write_page(summary, local_path(output), jobs)
        log.info("%s", local_path(output))
        return
    if options.format in ("json", "csv"):
        text = (as_json if options.format == "json" else as_csv)(summary)
    else:
        text = (as_markdown if options.format == "markdown" else as_latex)([*tables])
    if not options.output:
        sys.stdout.write(text)
        return
    with _written(options.output):
        local_path(options.output).write_text(text, encoding="utf-8")


@contextmanager
def _written(output: str) -> Iterator[None]:
    """Raise UserError, which names the file, if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror})") from None
