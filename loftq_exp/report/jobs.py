"""The recorded jobs of sweeps: which failed and why, and how a search came to its best settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_exp.report.collect import files_in, is_metrics
from loftq_exp.report.places import JOB, PLAN, job_file
from loftq_exp.whole import read_object


@dataclass(frozen=True)
class Job:
    """The record of a job: its file, its number in the sweep, its overrides, and its metrics or the reason why it failed."""

    path: Path
    number: int
    overrides: tuple[str, ...]
    error: str | None
    metrics: dict[str, Any] | None

    @property
    def missing(self) -> bool:
        """Whether it has no record."""
        return not self.error and self.metrics is None

    @property
    def failure(self) -> str:
        """One line: the job, its overrides and its reason."""
        return f"job {self.number} failed: {' '.join(self.error.split())}" if self.error else ""

    @property
    def objective(self) -> float | None:
        """The score that the job returned to its sweeper; None if it failed or returned none."""
        name = self.metrics["config"].get("objective") if self.metrics else None
        return self.metrics["scores"].get(name) if self.metrics and name else None


@dataclass(frozen=True)
class Search:
    """The jobs of a search, in the order in which the sweeper chose them.

    Attributes:
        objective: the name of the score.
        maximised: whether a larger score is better.
        trials: the number of each job that has a score in this order, from 0, with the job.
    """

    objective: str
    maximised: bool
    trials: tuple[tuple[int, Job], ...]

    @property
    def best_so_far(self) -> list[float]:
        """The best score up to each trial."""
        best, found = max if self.maximised else min, list[float]()
        for _, job in self.trials:
            found.append(best([*found[-1:], job.objective or 0.0]))
        return found

    @property
    def best(self) -> Job:
        """The first job with the best score."""
        best = self.best_so_far[-1]
        return next(job for _, job in self.trials if job.objective == best)

    @property
    def summary(self) -> str:
        """One line: the best score and the settings that gave it."""
        best = self.best
        return (
            f"best of {len(self.trials)} trials: {self.objective} {best.objective:.6g} with {' '.join(best.overrides)}"
        )


def jobs_in(places: Iterable[Path]) -> list[Job]:
    """Return the recorded jobs of the sweeps in `places`, in order. What is no record of a job is left out."""
    jobs = []
    for path in files_in(list(places), JOB):
        found = read_object(path)
        error, metrics = found.get("error"), found.get("metrics")
        if error or is_metrics(metrics):
            overrides = tuple(map(str, found.get("overrides") or ()))
            jobs.append(Job(path, int(found.get("number") or 0), overrides, error and str(error), metrics))
    return jobs


def all_jobs(folder: Path) -> list[Job]:
    """Return the jobs of the sweep in `folder` in order, also those that its plan has and that have no record."""
    recorded = {(job.number, job.overrides): job for job in jobs_in([folder])}
    planned = [(number, tuple(job)) for number, job in enumerate(read_object(folder / PLAN).get("jobs") or ())]
    absent = [Job(folder / job_file(number), number, overrides, None, None)
              for number, overrides in planned if (number, overrides) not in recorded]  # fmt: skip
    return sorted([*recorded.values(), *absent], key=lambda job: job.number)


def failures(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs that failed."""
    return [job for job in jobs if job.error]


def searches(jobs: Sequence[Job]) -> list[Search]:
    """Return the searches among the sweeps of these jobs. Sweeps over the same settings for the same score are one search."""
    found: dict[tuple[str, bool, tuple[str, ...]], list[Job]] = {}
    for job in jobs:
        plan = read_object(job.path.parent / PLAN)
        direction = plan.get("direction")
        if direction is None:
            continue
        named = next((str(each.metrics["config"].get("objective")) for each in jobs
                      if each.metrics and each.path.parent == job.path.parent), "")  # fmt: skip
        settings = tuple(sorted(override.partition("=")[0] for override in job.overrides))
        found.setdefault((named, direction == "maximize", settings), []).append(job)
    numbered = (
        (key, [(number, job) for number, job in enumerate(of) if job.objective is not None])
        for key, of in found.items()
    )
    return [Search(name, maximised, tuple(trials)) for (name, maximised, _), trials in numbered if trials]
