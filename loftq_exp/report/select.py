"""Which rows of a summary are shown, and in which order: filters such as quant.rank>8, and a name to sort by."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_exp.errors import UserError
from loftq_exp.report.collect import Found
from loftq_exp.report.grid import LABELS, setting_of
from loftq_exp.report.settings import SCORED, SEEDS, canonical, declared, flatten, identity, shown
from loftq_exp.report.summary import Row
from loftq_exp.report.values import measures_of, scores_of

_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A filter as it was given: `name` is a setting, a score or a measure, found by `full_name`."""

    text: str
    name: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Return the filter NAME=VALUE, or with !=, <, >, <= or >=. Raises UserError for any other text."""
        found = re.fullmatch(r"\s*([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
        if not found:
            raise UserError(
                f"--filter={text}: not readable; give NAME=VALUE, or NAME with !=, <, >, <= or >= and a value"
            )
        condition = cls(text, *found.groups())
        if condition.sign not in ("=", "!=") and _number(condition.value) is None:
            raise UserError(
                f"--filter={text}: {condition.sign} needs a number; give {condition.name}{condition.sign}NUMBER"
            )
        return condition

    def holds(self, value: Any) -> bool:
        """Return whether it holds for a value: as a number if both are, else as it is typed. None is null."""
        ours, theirs = _number(shown(value)), _number(self.value)
        if ours is not None and theirs is not None:
            return _TESTS[self.sign](ours, theirs)
        return self.sign in ("=", "!=") and _TESTS[self.sign](shown(value), self.value)


def full_name(option: str, name: str, runs: Sequence[Found], *, numbers: bool = True) -> str:
    """Return the full name that `name` stands for: of a setting, "model" or "task", or with `numbers` a score or measure.

    The last part of a dotted name is enough if no other has it. Raises UserError, which names `option`, if there is none or
    there are several.
    """
    settings = {*(each for run in runs for each in (*declared(run.metrics), *flatten(run.metrics["config"])))}
    others = [*LABELS, SCORED, *({each for run in runs for each in _values(run)} if numbers else ())]
    if name in settings or name in others:
        return name
    short = sorted(each for each in settings if each.rpartition(".")[2] == name)
    if len(short) > 1:
        raise UserError(f"--{option}={name}: several settings have this name; choose from: {', '.join(short)}")
    if not short:
        known = sorted({*settings, *others, *(each.rpartition(".")[2] for each in settings)})
        near = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"give a setting, such as quant.rank, or {', '.join(sorted(others))}"
        )
        raise UserError(f"--{option}={name}: there is no such name; {hint}")
    return short[0]


def of_run(name: str, runs: Sequence[Found]) -> bool:
    """Return whether a filter on this name chooses runs instead of rows: it is a seed, or a setting that makes no other run."""
    makes_rows = any(name in identity(run.metrics) for run in runs) and name not in SEEDS
    return not makes_rows and any(name in flatten(run.metrics["config"]) for run in runs)


def check_rows(option: str, name: str, rows: Sequence[Row]) -> None:
    """Raise UserError, which names `option`, if the runs of a row differ in this setting."""
    for row in rows:
        if len({canonical(run_value(run, name)) for run in row.runs}) > 1:
            raise UserError(
                f"--{option}={name}: the runs of {row.name} differ in it; give a setting that differs between rows"
            )


def run_value(run: Found, name: str) -> Any:
    """Return the setting of a run, also one that its record lacks."""
    return {SCORED: "fine-tuned", **identity(run.metrics), **flatten(run.metrics["config"])}.get(name)


def row_value(row: Row, name: str) -> Any:
    """Return the setting of a row, or the mean of a score or measure; None if it has none."""
    own = setting_of(row, name)
    return next((values[name].mean for values in (row.scores, row.measures) if own is None and name in values), own)


def in_order(rows: Sequence[Row], name: str, *, descending: bool = False) -> list[Row]:
    """Return the rows sorted by a setting, score or measure: numbers, then texts. Rows without a value are last."""

    def key(row: Row) -> tuple[bool, float, str]:
        number = _number(shown(row_value(row, name)))
        return (number is None, number or 0.0, shown(row_value(row, name)))

    known = [row for row in rows if row_value(row, name) is not None]
    return sorted(known, key=key, reverse=descending) + [row for row in rows if row_value(row, name) is None]


def _values(run: Found) -> Mapping[str, float]:
    return {**scores_of(run.metrics), **measures_of(run.metrics)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
