"""The table of a summary: one row a setting, with the columns that follow from what differs between the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_exp.report.collect import Found
from loftq_exp.report.settings import SCORED, SEEDS, canonical, identity, model_label, shown, task_label
from loftq_exp.report.summary import Row, Score, Summary
from loftq_exp.report.table import (
    AFTER,
    LEAST,
    METHODS,
    OUTPUT,
    QUANTIZED,
    cells,
    columns,
    megabytes,
    method_name,
    quantized_share,
)
from loftq_exp.report.table import shown as in_form

_NAMED = {f"quant.{name}" for name in ("method", "type", "bits", "rank", "iter", "scale", "levels", "calibration", "rounding",
                                       "order", "allocation", "bits_per_layer")}  # fmt: skip
"""Settings that the columns run and rank show."""
_GROUPED = ("model.", "task.", "quant.")
"""Settings that often differ along with the model, task or method. They are shown only where these do not tell rows apart."""
LABELS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"model": model_label, "task": task_label}
"""Names that stand for several settings."""


@dataclass(frozen=True)
class Grid:
    """A table: its title, headings and cells, the headings that a narrow terminal drops first, and what is to be known."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    drop: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[Row], str]
    drops: bool = False


def grids(summary: Summary, group_by: Sequence[str] = ()) -> list[Grid]:
    """Return a table for each group of rows: those with equal values of `group_by`, by default of model and task."""
    names = list(group_by) or [name for name in LABELS if len({_value(row, name) for row in summary.rows}) > 1]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in summary.rows:
        groups.setdefault(tuple(_value(row, name) for name in names), []).append(row)
    return [_grid(_title(names, values, rows), rows, names, summary) for values, rows in groups.items()]


def setting_columns(
    rows: Sequence[Row], differing: Iterable[str], without: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return which of the `differing` settings are columns beside method and rank, and which of these tell no rows apart.

    "model" and "task" stand for theirs. A setting of the model, task or method is left out if it tells no rows apart.
    """

    def differs(name: str) -> bool:
        return len({_value(row, name) for row in rows}) > 1

    def told_apart(names: Sequence[str]) -> int:
        return len({(_method(row), _rank(row), *(_value(row, name) for name in names)) for row in rows})

    chosen = [name for name in LABELS if name not in without and differs(name)]
    rest = [name for name in differing if name not in (*_NAMED, *without) and differs(name)]
    chosen += [name for name in rest if not name.startswith(_GROUPED)]
    for name in rest:
        if name.startswith(_GROUPED) and told_apart([*chosen, name]) > told_apart(chosen):
            chosen.append(name)
    needed: list[str] = []
    for name in chosen:
        needed += [name] * (told_apart([*needed, name]) > told_apart(needed))
    return chosen, [name for name in chosen if name not in needed]


def runs_grid(summary: Summary) -> list[Grid]:
    """Return the table of the single runs. Empty if each row is one run."""
    found = [(row, run) for row in summary.rows for run in row.runs]
    if len(found) == len(summary.rows):
        return []
    seeds = [name for name in SEEDS if len({canonical(_seed(run, name)) for _, run in found}) > 1]
    own = columns([run.metrics for _, run in found])
    states = ["state"] if any(run.state != "done" for _, run in found) else []
    rows = [[row.name, *(shown(_seed(run, name)) for name in seeds), *cells(run.metrics, own)[1:], *[run.state] * len(states)]
            for row, run in found]  # fmt: skip
    return [Grid(f"{len(found)} single runs", ("run", *seeds, *own[1:], *states), rows, ("rank", *LEAST), ())]


def _seed(run: Found, name: str) -> Any:
    return identity(run.metrics).get(name)


def _title(names: Sequence[str], values: Sequence[str], rows: Sequence[Row]) -> str:
    runs = sum(len(row.runs) for row in rows)
    counted = (
        f"{len(rows)} row{'s'[: len(rows) != 1]} of {runs} runs"
        if runs > len(rows)
        else f"{runs} run{'s'[: runs != 1]}"
    )
    group = ", ".join(value if name in LABELS else f"{name}={value}" for name, value in zip(names, values, strict=True))
    return f"{group}: {counted}" if group else counted


def setting_of(row: Row, name: str) -> Any:
    """Return a setting of a row, also one that its records lack, or its "model" or "task". None if it has no such setting."""
    settings = {SCORED: "fine-tuned", **identity(row.runs[0].metrics), **row.settings}
    return LABELS[name](settings) if name in LABELS else settings.get(name)


def _value(row: Row, name: str) -> str:
    return shown(setting_of(row, name))


def _method(row: Row) -> str:
    return method_name(row.runs[0].metrics["config"])


def _rank(row: Row) -> str:
    return str(row.runs[0].metrics["config"]["quant"]["rank"])


def _grid(title: str, rows: Sequence[Row], without: Sequence[str], summary: Summary) -> Grid:
    repeated = any(len(row.runs) > 1 for row in rows)
    settings, spare = setting_columns(rows, summary.differing, without)
    short = [name.rpartition(".")[2] for name in settings]
    headings = {name: own if short.count(own) == 1 and own != "rank" else name
                for name, own in zip(settings, short, strict=True)}  # fmt: skip
    parts = [_Column("run", _method), _measure("bits", "bits_per_weight", "{:.2f}")]
    shares = [quantized_share(row.runs[0].metrics) for row in rows]
    if any(share is not None and share < 1 for share in shares):
        parts.append(_Column(QUANTIZED, lambda row: in_form(quantized_share(row.runs[0].metrics), "{:.2%}")))
    parts.append(_Column("rank", _rank))
    parts += [_Column(headings[name], _of_setting(name)) for name in settings]
    parts.append(_measure("weight error", "weight_error", "{:.4f}"))
    if any("output_error" in row.measures for row in rows):
        parts.append(_measure(OUTPUT, "output_error", "{:.4f}"))
    if repeated:
        parts.append(_Column("n", lambda row: str(len(row.runs))))
    parts += _score_columns(rows, repeated)
    parts += [
        _measure(AFTER[0], "init_seconds", "{:.1f}"),
        _measure(AFTER[1], "train_seconds", "{:.0f}"),
        _measure(AFTER[2], "backbone_bytes", "{:.0f}", megabytes),
        _measure(AFTER[3], "adapter_bytes", "{:.1f}", megabytes),
    ]
    drop = (*LEAST, *(headings[name] for name in spare[::-1]), *(part.heading for part in parts[::-1] if part.drops))
    table = [[part.cell(row) for part in parts] for row in rows]
    return Grid(title, tuple(part.heading for part in parts), table, drop, _notes(rows, summary))


def _of_setting(name: str) -> Callable[[Row], str]:
    return lambda row: _value(row, name)


def _measure(
    heading: str, name: str, form: str, unit: Callable[[float | None], float | None] = lambda value: value
) -> _Column:
    return _Column(heading, lambda row: in_form(unit(row.measures[name].mean if name in row.measures else None), form))


def _score_columns(rows: Sequence[Row], repeated: bool) -> list[_Column]:
    """Return the columns of each score: mean and spread, interval, difference to the baseline, and published number."""
    parts: list[_Column] = []
    for heading in dict.fromkeys(heading for row in rows for heading in _forms(row)):
        first = not parts
        parts.append(_Column(heading, _cell(heading, _mean, "scores", repeated), drops=not first))
        if repeated:
            parts.append(_Column(f"{heading} 95 %", _cell(heading, _interval, "scores", repeated), drops=True))
        if any(_found(row, heading, "differences") for row in rows):
            parts.append(_Column(f"Δ {heading}", _cell(heading, _difference, "differences", repeated), drops=not first))
        if any(_published(row, heading) != "-" for row in rows):
            parts.append(_Column(f"{heading} published", _of_published(heading), drops=True))
    return parts


@dataclass(frozen=True)
class _Form:
    """How the score `name` is shown: times `scale`, in the form `text`."""

    name: str
    text: str
    scale: float

    def __call__(self, value: float | None) -> str:
        return in_form(value, self.text, self.scale)

    def signed(self, value: float) -> str:
        return self(value) if self(value).startswith("-") else f"+{self(value)}"


def _forms(row: Row) -> dict[str, _Form]:
    """Return the scores of a row's task by heading. A column of several scores has a part of its title for each."""
    forms: dict[str, _Form] = {}
    for run in row.runs:
        for column in run.metrics["table"]:
            names, parts = column["scores"], column["title"].split("/")
            titles = [column["title"]] if len(names) == 1 else parts if len(parts) == len(names) else names
            forms |= {
                title: _Form(name, column["form"], column["scale"]) for title, name in zip(titles, names, strict=True)
            }
    return forms


def _found(row: Row, heading: str, values: str) -> Score | None:
    form = _forms(row).get(heading)
    scores: Mapping[str, Score] = getattr(row, values)
    return scores.get(form.name) if form else None


def _cell(heading: str, show: Callable[[_Form, Score], str], values: str, repeated: bool) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        score = _found(row, heading, values)
        if score is None:
            return "-"
        fewer = f" (n {score.n})" if repeated and show is not _interval and score.n != len(row.runs) else ""
        return show(_forms(row)[heading], score) + fewer

    return cell


def _mean(form: _Form, score: Score) -> str:
    return form(score.mean) + (f" ± {form(score.std)}" if score.std is not None else "")


def _interval(form: _Form, score: Score) -> str:
    return "-" if score.low is None or score.high is None else f"[{form(score.low)}, {form(score.high)}]"


def _difference(form: _Form, score: Score) -> str:
    interval = (
        "" if score.low is None or score.high is None else f" [{form.signed(score.low)}, {form.signed(score.high)}]"
    )
    return form.signed(score.mean) + interval


def _published(row: Row, heading: str) -> str:
    form, published = _forms(row).get(heading), row.runs[0].metrics["published"] or {}
    if form is None or form.name not in published:
        return "-"
    percent = 100 if form.text.endswith("%}") else 1  # published numbers are in the units of the table
    return form.text.format(published[form.name] / percent)


def _of_published(heading: str) -> Callable[[Row], str]:
    return lambda row: _published(row, heading)


def _notes(rows: Sequence[Row], summary: Summary) -> tuple[str, ...]:
    notes = []
    if any(len(row.runs) > 1 for row in rows):
        notes.append("mean ± sample standard deviation over n seeds; 95 %: interval of the mean by Student's t")
    if summary.baseline is not None:
        reference = f"the nearest {summary.baseline} row" if summary.baseline in METHODS else summary.baseline
        notes.append(f"Δ: paired difference to {reference} over equal seeds, with its 95 % interval")
    states = Counter(run.state for row in rows for run in row.runs)
    if waiting := states["unfinished"]:
        notes.append(f"{waiting} of the runs {'is' if waiting == 1 else 'are'} not finished")
    if states["failed"]:
        notes.append(f"{states['failed']} of the runs failed")
    return tuple(notes)
