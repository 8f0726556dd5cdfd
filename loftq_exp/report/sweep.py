"""A multirun: the outcome of each job, one table of all jobs and one plot of the losses.

Each job writes a small file to the sweep's folder, so that the table does not depend on the process that ran it.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_exp.errors import UserError
from loftq_exp.report.plot import curves, plot_losses
from loftq_exp.report.record import write_json
from loftq_exp.report.table import cells, columns, markdown, print_table
from loftq_exp.whole import write_whole

if TYPE_CHECKING:
    from loftq_exp.pipeline import RunResult

log = logging.getLogger(__name__)


@contextmanager
def record_job(folder: Path, number: int, overrides: list[str]) -> Iterator[Callable[[RunResult], None]]:
    """Record one job's outcome in `folder`: the metrics of the result passed to the yielded function, or the error.

    A failure is logged in one line (with a traceback if it is not a UserError) and the sweep continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {"number": number, "overrides": overrides, "error": None, "metrics": None}
    log.info("\njob %d: %s", number, " ".join(overrides))

    def finished(result: RunResult) -> None:
        outcome["metrics"] = result.metrics

    try:
        yield finished
    except UserError as error:
        outcome["error"] = str(error)
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
        log.error("%s", traceback.format_exc())
    if outcome["error"]:
        log.error("job %d failed: %s", number, outcome["error"])
    write_json(folder / f"job-{number:04d}.json", outcome)


def report_sweep(folder: Path) -> bool:
    """Print the table of all jobs in `folder`, and write table.md and the plot of the losses. Returns whether every job succeeded.

    Raises UserError if there was no job.
    """
    jobs = [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
    if not jobs:
        raise UserError("no job to run: a glob among the overrides matches no file of its folder in conf/")
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    headings = columns([job["metrics"] for job in jobs if job["metrics"]])
    rows = []
    runs = {}
    for job in jobs:
        own = " ".join(override for override in job["overrides"] if override not in common)
        result = cells(job["metrics"], headings) if job["metrics"] else ["-"] * len(headings)
        rows.append([str(job["number"]), own, *result, "failed" if job["error"] else "done"])
        if job["metrics"]:
            runs[own] = job["metrics"]
    failures = [f"job {job['number']} failed: {job['error']}" for job in jobs if job["error"]]
    headings = ("job", "overrides", *headings, "state")
    print_table(f"{len(jobs)} jobs", headings, rows)
    for failure in failures:
        log.info("%s", failure)
    write_whole(folder / "table.md", markdown(headings, rows) + "".join(f"\n{failure}\n" for failure in failures))
    if any(metrics["losses"] for metrics in runs.values()):
        plot_losses(folder / "losses.png", curves(runs))
    log.info("table, plot and one file per job: %s", folder)
    return not failures
