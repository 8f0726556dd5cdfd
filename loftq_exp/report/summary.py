"""Runs that differ only in their seeds as one row: mean, spread and interval of each score, and differences to a baseline."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.special import stdtrit

from loftq_exp.config.schema import SCORES
from loftq_exp.errors import UserError
from loftq_exp.report.collect import Found
from loftq_exp.report.settings import (
    SCORED,
    SEEDS,
    by_telling,
    canonical,
    declared,
    flatten,
    identity,
    model_label,
    shapes,
    shown,
    task_label,
)
from loftq_exp.report.table import method_name
from loftq_exp.report.values import measures_of, scores_of
from loftq_exp.schemes import variation

log = logging.getLogger(__name__)

_CONFIDENCE = 0.95
_Key = tuple[tuple[str, str], ...]
_OF_METHOD = {f"quant.{name}" for name in ("method", "iter", "type", "bits", "scale", "levels", "calibration", "rounding", "order",
                                           "allocation", "bits_per_layer", "block_size", "double", "path", "revision",
                                           "solver")}  # fmt: skip
"""Settings in which a baseline may differ from the row that is compared with it, rather than in any other."""


@dataclass(frozen=True)
class Score:
    """A score over the runs of one setting: mean, sample standard deviation, number, and the 95 % interval by Student's t.

    std, low and high are None for one run.
    """

    mean: float
    std: float | None
    n: int
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seeds.

    Attributes:
        name: the method, its rank and what else differs between the rows; unique among them.
        settings: all settings by dotted name that its runs have in common, without the seeds.
        scores: by name, such as "nll".
        measures: bits, errors, bytes, seconds and peak memory by name; those that a run has.
        differences: paired differences to the baseline over equal seeds, by score; empty without a baseline.
        runs: the runs, in the order of their seeds.
    """

    name: str
    settings: dict[str, Any]
    scores: dict[str, Score]
    measures: dict[str, Score]
    differences: dict[str, Score]
    runs: tuple[Found, ...]


@dataclass(frozen=True)
class Summary:
    """The rows, the dotted names of the settings that differ between them (most telling first), and the baseline.

    `baseline` is the baseline row's name, or the method's if each row has its own baseline row.
    """

    rows: tuple[Row, ...]
    differing: tuple[str, ...]
    baseline: str | None


def summarise(found: Sequence[Found], *, baseline: str | None = None, option: str = "report.baseline") -> Summary:
    """Return one row for all runs that differ in nothing but their seeds, in the order in which they were found.

    Args:
        found: the runs. One with the same settings and seeds as an earlier one counts once.
        baseline: a row's name, or a method of `quant.method`: its rows in the published form (no calibration, searched scales or
            optimal levels) if there are any. If several rows have that method, each row is compared with the
            one whose other settings are nearest. A row with several nearest ones, or of other evaluation data, has none.
        option: where the baseline was given, for messages.

    Raises:
        UserError: no row matches `baseline`.
    """
    groups: dict[_Key, list[Found]] = {}
    for run in _once(found):
        settings = {name: value for name, value in identity(run.metrics).items() if name not in SEEDS}
        groups.setdefault(_frozen(settings), []).append(run)
    repeated = [name for name in SEEDS if len({canonical(_seeds(run)[name]) for run in found}) > 1]
    members = [sorted(runs, key=lambda run: [_order(_seeds(run)[name]) for name in SEEDS]) for runs in groups.values()]
    identities = [identity(runs[0].metrics) for runs in members]
    differing = _differing(identities)
    names = _names(members, identities, differing)
    rows = tuple(_row(name, runs, repeated) for name, runs in zip(names, members, strict=True))
    if baseline is None:
        return Summary(rows, differing, None)
    return _compared(rows, differing, baseline, option)


def narrowed(summary: Summary, rows: Sequence[Row]) -> Summary:
    """Return the summary of some of its rows, in this order. Names and differences stay."""
    return replace(summary, rows=tuple(rows), differing=_differing([identity(row.runs[0].metrics) for row in rows]))


def score(values: Sequence[float]) -> Score:
    """Return the mean of at least one value, and of two or more their sample standard deviation and interval of the mean."""
    mean, n = statistics.mean(map(float, values)), len(values)  # exact and rounded once: equal values have their mean
    if n == 1:
        return Score(mean, None, 1, None, None)
    std = statistics.stdev(map(float, values))
    half = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2)) * std / math.sqrt(n)
    return Score(mean, std, n, mean - half, mean + half)


def _once(found: Sequence[Found]) -> list[Found]:
    """Return the runs without those whose settings and seeds an earlier one has. A warning names one with other scores."""
    kept: dict[_Key, Found] = {}
    for run in found:
        first = kept.setdefault(key := _frozen(identity(run.metrics)), run)
        if first is run or not scores_of(run.metrics):
            continue
        if not scores_of(first.metrics):
            kept[key] = run
        elif scores_of(first.metrics) != scores_of(run.metrics):
            log.warning(
                "%s: other scores than %s, which has the same settings and seeds and counts", run.path, first.path
            )
    return list(kept.values())


def _frozen(settings: Mapping[str, Any]) -> _Key:
    return tuple(sorted((name, canonical(value)) for name, value in settings.items()))


def _seeds(run: Found) -> dict[str, Any]:
    """Return the seeds of a run. That of the calibration is None if the run was not calibrated."""
    return {name: identity(run.metrics).get(name) for name in SEEDS}


def _order(seed: Any) -> tuple[bool, float, str]:
    number = isinstance(seed, (int, float))
    return (not number, seed if number else 0, str(seed))


def _differing(identities: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the settings of which the rows have several values. Those of other tasks, or of no calibration, do not count."""

    def values(name: str) -> set[str | None]:
        optional = name.startswith(("task.", "calibration."))
        return {canonical(of[name]) if name in of else None for of in identities if name in of or not optional}

    names = by_telling(name for settings in identities for name in settings if name not in SEEDS)
    return tuple(name for name in names if len(values(name)) > 1)


def _names(
    members: Sequence[Sequence[Found]], identities: Sequence[Mapping[str, Any]], differing: Iterable[str]
) -> list[str]:
    """Return the rows' names: the method, its rank, of model and task what differs, and then what tells equal names apart."""
    names = [method_name(runs[0].metrics["config"]) for runs in members]
    names = [f"{name} r{runs[0].metrics['config']['quant']['rank']}" for name, runs in zip(names, members, strict=True)]
    for label in (model_label, task_label):
        labels = [label(of) for of in identities]
        if len(set(labels)) > 1:
            names = [f"{name} {own}" for name, own in zip(names, labels, strict=True)]
    for setting in differing:
        values: dict[str, set[str]] = {}
        for name, of in zip(names, identities, strict=True):
            values.setdefault(name, set()).add(_worded(setting, of))
        names = [name + (_worded(setting, of) if len(values[name]) > 1 else "")
                 for name, of in zip(names, identities, strict=True)]  # fmt: skip
    return names


def _worded(name: str, settings: Mapping[str, Any]) -> str:
    if name == SCORED:
        return " not fine-tuned" if name in settings else ""
    return f" {name.rpartition('.')[2]}={shown(settings[name])}" if name in settings else ""


def _row(name: str, runs: Sequence[Found], seeds: Sequence[str]) -> Row:
    settings = [flatten(run.metrics["config"]) for run in runs]
    common = {
        key: value
        for key, value in settings[0].items()
        if key not in seeds and all(key in of and canonical(of[key]) == canonical(value) for of in settings)
    }
    return Row(
        name,
        common,
        _over(scores_of(run.metrics) for run in runs),
        _over(measures_of(run.metrics) for run in runs),
        {},
        tuple(runs),
    )


def _over(values: Iterable[Mapping[str, float]]) -> dict[str, Score]:
    """Return each score over the runs that have it."""
    found: dict[str, list[float]] = {}
    for of_run in values:
        for name, value in of_run.items():
            found.setdefault(name, []).append(value)
    return {name: score(of_score) for name, of_score in found.items()}


def _compared(rows: Sequence[Row], differing: tuple[str, ...], baseline: str, option: str) -> Summary:
    """Return the summary with each row's differences to its baseline row."""
    candidates = [row for row in rows if row.name == baseline] or _published_first(rows, baseline)
    if not candidates:
        methods = dict.fromkeys(str(row.settings.get("quant.method")) for row in rows)
        allowed = ", ".join([*methods, *(row.name for row in rows)]) or "nothing, because there is no run"
        raise UserError(f"{option}={baseline}: no row matches; choose from: {allowed}")
    if len(candidates) == len(rows) > 1:
        log.warning("%s=%s: every row is one, so none is compared; name one row: %s", option, baseline,
                    ", ".join(row.name for row in rows))  # fmt: skip
    names, settings = (
        {row.name for row in candidates},
        {row.name: dict(_frozen(identity(row.runs[0].metrics))) for row in rows},
    )
    compared = []
    for row in rows:
        nearest = [] if row.name in names else _nearest(row, candidates, settings)
        if len(nearest) > 1:
            log.warning("%s: %s is equally near to %s; name one of these rows", option, row.name,
                        " and ".join(each.name for each in nearest))  # fmt: skip
        compared.append(replace(row, differences=_differences(row, nearest[0])) if len(nearest) == 1 else row)
    return Summary(tuple(compared), differing, candidates[0].name if len(candidates) == 1 else baseline)


def _published_first(rows: Sequence[Row], method: str) -> list[Row]:
    """Return the rows of a method: those in its published form if there are any, so that variations are compared with it."""
    found = [row for row in rows if row.settings.get("quant.method") == method]
    return [row for row in found if not variation(row.runs[0].metrics["config"]["quant"])] or found


def _nearest(row: Row, candidates: Sequence[Row], settings: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Return the candidates with the same evaluation data that differ least from `row`."""
    own, fields = settings[row.name], declared(row.runs[0].metrics)
    scoring = [name for name in own if name.startswith("task.") and name in fields and shapes(fields[name], SCORES)]
    distances: dict[tuple[int, ...], list[Row]] = {}
    for candidate in candidates:
        differ = {name for name, _ in own.items() ^ settings[candidate.name].items()} - {*SEEDS}
        if differ.isdisjoint(scoring):
            distances.setdefault((len(differ - _OF_METHOD), len(differ & _OF_METHOD)), []).append(candidate)
    return distances[min(distances)] if distances else []


def _differences(row: Row, reference: Row) -> dict[str, Score]:
    """Return the paired differences of each score that both have, over the seeds that both have."""
    shared = [name for name in SEEDS if all(_seeds(run)[name] is not None for run in (*row.runs, *reference.runs))]
    differences = {}
    for name in row.scores.keys() & reference.scores.keys():
        ours, theirs = _by_seeds(row, name, shared), _by_seeds(reference, name, shared)
        if pairs := [ours[seeds] - theirs[seeds] for seeds in ours if seeds in theirs]:
            differences[name] = score(pairs)
    return {name: differences[name] for name in row.scores if name in differences}


def _by_seeds(row: Row, name: str, shared: Sequence[str]) -> dict[tuple[str, ...], float]:
    """Return a score by the seeds that both rows have. Runs that differ in another seed are averaged first."""
    found: dict[tuple[str, ...], list[float]] = {}
    for run in row.runs:
        scores, seeds = scores_of(run.metrics), _seeds(run)
        if name in scores:
            found.setdefault(tuple(canonical(seeds[each]) for each in shared), []).append(scores[name])
    return {seeds: statistics.mean(values) for seeds, values in found.items()}
