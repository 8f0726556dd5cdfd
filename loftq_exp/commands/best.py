"""The best of a multirun again: for each method the value of a setting with the best score, then several seeds of it.

This is how a table compares methods that need other learning rates. The score that chooses should be of rows that the final
scores are not of, because the best of several noisy scores is too good.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from loftq_exp.commands.run import main as run
from loftq_exp.commands.sweep import SWEEP_FOLDER, Sweep
from loftq_exp.commands.write_report import main as report
from loftq_exp.errors import UserError
from loftq_exp.report.jobs import Job, all_jobs
from loftq_exp.report.scored import lower_is_better

log = logging.getLogger(__name__)

_Group = tuple[str, ...]
"""The overrides of a job without those that are chosen, and without seed and baseline."""


def run_best(overrides: Sequence[str], over: Sequence[str], seeds: str) -> int:
    """Run the multirun, then the best of `over` for each of its other settings with `seeds`, and show the table of these.

    Returns 0 if every job of the second part is done. A job of the first part may fail.

    Raises UserError if no objective is set, an `over` does not vary, or a group has no scored job.
    """
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if "objective" not in given:
        raise UserError("objective=null: the best score is chosen; add objective=NAME, such as objective=nll")
    for name in over:
        if name not in given:
            raise UserError(
                f"--over={name}: not among the overrides; add {name}=A,B,... with the values to choose from"
            )
    folder = _multirun(overrides)
    chosen = best_jobs(all_jobs(folder), over, maximised=_maximised(folder, given["objective"]))
    how = [override for override in overrides if override.startswith(("hydra/launcher=", "hydra.launcher."))]
    common = set.intersection(*map(set, chosen)) if len(chosen) > 1 else set()
    folders = []
    for group, job in chosen.items():
        values = [override for override in job.overrides if _name(override) in over]
        log.info("\nbest of %s: %s with %s %.6g", " ".join(each for each in group if each not in common) or "all",
                 " ".join(values), given["objective"], job.objective)  # fmt: skip
        folders.append(_multirun([*how, *group, *values, f"seed={seeds}"]))
    baseline = ["--baseline", given["report.baseline"].strip("'\"")] if "report.baseline" in given else []
    code = report([*map(str, folders), *baseline])
    return code if all(map(_complete, folders)) else 1


def best_jobs(jobs: Sequence[Job], over: Sequence[str], *, maximised: bool) -> Mapping[_Group, Job]:
    """Return the job with the best mean objective for each group of jobs with equal settings beside `over` and the seed.

    Jobs that differ only in their seed count by their mean; the first of them is returned.

    Raises UserError if no job of a group has a score.
    """
    scores: dict[_Group, dict[tuple[str, ...], list[Job]]] = {}
    for job in jobs:
        values = tuple(override for override in job.overrides if _name(override) in over)
        group = tuple(each for each in job.overrides if _name(each) not in (*over, "seed", "report.baseline"))
        scores.setdefault(group, {}).setdefault(values, []).append(job)
    best = {}
    for group, of_values in scores.items():
        # A value with a failed job does not compete: its mean would be over other seeds.
        scored = {values: [job.objective for job in same] for values, same in of_values.items()}
        means = {values: sum(known) / len(known) for values, found in scored.items()
                 if len(known := [value for value in found if value is not None]) == len(found)}  # fmt: skip
        if not means:
            raise UserError(
                f"{' '.join(group)}: no job has a score; correct the errors above and run the command again"
            )
        values = (max if maximised else min)(means, key=lambda each: means[each])
        best[group] = of_values[values][0]
    return best


def _multirun(overrides: Sequence[str]) -> Path:
    """Run a multirun and return its folder, also if jobs failed. Exits if it was refused or interrupted, which it has said."""
    code = run(["-m", *overrides])
    place = os.environ.get(SWEEP_FOLDER)
    if code not in (0, 1) or not place or not Path(place).exists():
        raise SystemExit(code)
    return Path(place)


def _maximised(folder: Path, objective: str) -> bool:
    """Return whether a larger objective is better: as the search says, or as the score's name does."""
    sweep = Sweep.read(folder)
    if sweep and sweep.direction:
        return sweep.direction == "maximize"
    lower = lower_is_better(objective)
    if lower is None:
        raise UserError(
            f"objective={objective}: it is not known whether a higher or a lower one is better; choose another"
        )
    return not lower


def _complete(folder: Path) -> bool:
    sweep = Sweep.read(folder)
    return sweep is not None and sweep.complete


def _name(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
