"""A multirun: the outcome of each job, a table of settings over their seeds, one of all jobs, and one plot of the losses.

Each job writes a small file to the sweep's folder, so that the table does not depend on the process that ran it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.errors import UserError
from loftq_exp.masking import masked
from loftq_exp.report.collect import Found
from loftq_exp.report.console import print_table
from loftq_exp.report.forms import as_csv, as_markdown
from loftq_exp.report.grid import grids
from loftq_exp.report.jobs import Job, all_jobs, failures, searches
from loftq_exp.report.page import write_page
from loftq_exp.report.places import job_file
from loftq_exp.report.plot import plot_losses
from loftq_exp.report.record import write_json
from loftq_exp.report.summary import Summary, summarise
from loftq_exp.report.table import LEAST, cells, columns, markdown
from loftq_exp.whole import write_whole

log = logging.getLogger(__name__)

_ELSEWHERE = "table.md and table.csv have all"


@dataclass
class Outcome:
    """What is known of a job so far: its settings and, once it is done, its metrics."""

    config: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None


@contextmanager
def record_job(folder: Path, number: int, overrides: list[str]) -> Iterator[Outcome]:
    """Record one job's outcome in `folder`, which the caller fills in: its metrics, or the error and the settings.

    A failure is logged in one line (with a traceback if it is not a UserError) and the sweep continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcome, reason = Outcome(), None
    log.info("\njob %d: %s", number, " ".join(overrides))
    try:
        yield outcome
    except UserError as error:
        reason = str(error)
    except Exception as error:
        reason = masked(f"{type(error).__name__}: {error}")
        log.error("%s", traceback.format_exc())
    record = {"number": number, "overrides": overrides, "error": reason, "metrics": outcome.metrics}
    if reason:
        log.error("job %d failed: %s", number, reason)
        record["config"] = outcome.config  # the metrics of a job that is done have it
    write_json(folder / job_file(number), record)


def report_sweep(folder: Path) -> bool:
    """Print the tables of all jobs in `folder`, and write table.md, table.csv, report.html and losses.png. Returns whether all succeeded.

    One row a setting comes first if some jobs differ only in their seeds or there is a baseline, then one row a job.

    Raises UserError if there was no job, or after all this if no row matches report.baseline.
    """
    jobs = all_jobs(folder)
    if not jobs:
        raise UserError("no job to run: a glob among the overrides matches no file of its folder in conf/")
    found = [Found(job.path, job.metrics) for job in jobs if job.metrics]
    summary, refused = _summary(found)
    settings = grids(summary) if summary.baseline or len(summary.rows) < len(found) else []
    headings, rows = _job_rows(jobs)
    for grid in settings:
        print_table(grid.title, grid.headings, grid.rows, drop=grid.drop, notes=grid.notes, elsewhere=_ELSEWHERE)
    print_table(f"{len(jobs)} jobs", headings, rows, drop=(*LEAST, "rank", "run", "state"), elsewhere=_ELSEWHERE)
    lines = [*(search.summary for search in searches(jobs)), *(job.failure for job in failures(jobs))]
    missing = [job.number for job in jobs if job.missing]
    lines += [f"job {number} ended without a result; its process was killed or not started" for number in missing]
    for line in lines:
        log.info("%s", line)
    text = [as_markdown(settings)] if settings else []
    text += [markdown(headings, rows) + "".join(f"\n{line}\n" for line in lines)]
    write_whole(folder / "table.md", "\n".join(text))
    write_whole(folder / "table.csv", as_csv(summary))
    write_page(summary, folder / "report.html", jobs)
    _plot(folder, summary)
    log.info("tables, plot and one file per job: %s", folder)
    if refused:
        raise refused
    return not failures(jobs) and not missing


def with_baseline(found: Sequence[Found]) -> Summary:
    """Return the rows with their differences to report.baseline. Raises UserError if no row matches it, or runs name several."""
    named = [(run.metrics["config"].get("report") or {}).get("baseline") for run in found]
    chosen = sorted({name for name in named if name is not None})
    if len(chosen) > 1:
        raise UserError(f"report.baseline={','.join(chosen)}: a sweep has one baseline; give one of them")
    return summarise(found, baseline=next(iter(chosen), None))


def _summary(found: Sequence[Found]) -> tuple[Summary, UserError | None]:
    """Return the rows with their differences to report.baseline; without them, and the error, if no row matches it."""
    try:
        return with_baseline(found), None
    except UserError as error:
        return summarise(found), error


def _job_rows(jobs: Sequence[Job]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the headings and rows of the table of jobs. Overrides that all jobs have are not shown."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    results = columns([job.metrics for job in jobs if job.metrics])
    rows = []
    for job in jobs:
        own = " ".join(override for override in job.overrides if override not in common)
        result = cells(job.metrics, results) if job.metrics else ["-"] * len(results)
        rows.append([str(job.number), own, *result, "failed" if job.error else "missing" if job.missing else "done"])
    return ("job", "overrides", *results, "state"), rows


def _plot(folder: Path, summary: Summary) -> None:
    """Plot the losses of the rows that have some, with bands over seeds."""
    losses = {row.name: [run.metrics["losses"] for run in row.runs] for row in summary.rows}
    if any(any(runs) for runs in losses.values()):
        plot_losses(folder / "losses.png", losses)
