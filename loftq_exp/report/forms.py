"""A summary as text for other programs: JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from loftq_exp.report.grid import Grid, setting_of
from loftq_exp.report.settings import SEEDS, flatten, shown
from loftq_exp.report.summary import Score, Summary
from loftq_exp.report.table import markdown
from loftq_exp.report.values import scores_of

_STATISTICS = ("mean", "std", "n", "low", "high")


def as_json(summary: Summary) -> str:
    """Return a list of rows. Each has nested settings, scores.NAME.{mean,std,n,low,high}, measures and differences so, and runs."""
    rows = [
        {
            "name": row.name,
            "settings": _nested(row.settings),
            "scores": _plain(row.scores),
            "measures": _plain(row.measures),
            "differences": _plain(row.differences),
            "baseline": summary.baseline,
            "runs": [
                {
                    "run": run.metrics["label"],
                    "file": str(run.path),
                    "state": run.state,
                    "scores": scores_of(run.metrics),
                    **{name: value for name, value in flatten(run.metrics["config"]).items() if name in SEEDS},
                }
                for run in row.runs
            ],
        }
        for row in summary.rows
    ]
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def as_csv(summary: Summary) -> str:
    """Return a line a row, with all digits and in the scores' own units: name, settings that differ, runs, scores, measures.

    A score has the columns NAME, NAME.std, NAME.n, NAME.low, NAME.high, and with a baseline the same of NAME.difference. A
    measure has the columns NAME and NAME.std. What a row does not have is empty.
    """
    scores = dict.fromkeys(name for row in summary.rows for name in row.scores)
    differences = dict.fromkeys(name for row in summary.rows for name in row.differences)
    measures = dict.fromkeys(name for row in summary.rows for name in row.measures)
    headings = ["name", *summary.differing, "runs"]
    for name in scores:
        headings += _headings(name) + (_headings(f"{name}.difference") if name in differences else [])
    headings += [heading for name in measures for heading in _headings(name)[:2]]
    lines = []
    for row in summary.rows:
        cells = [row.name, *(shown(setting_of(row, name)) for name in summary.differing)]
        cells.append(str(len(row.runs)))
        for name in scores:
            cells += _cells(row.scores.get(name)) + (_cells(row.differences.get(name)) if name in differences else [])
        cells += [cell for name in measures for cell in _cells(row.measures.get(name))[:2]]
        lines.append(cells)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *lines])
    return text.getvalue()


def as_markdown(tables: Sequence[Grid]) -> str:
    """Return the tables as Markdown, each with its title if there are several, and the notes below."""
    parts = []
    for grid in tables:
        title = f"**{grid.title}**\n\n" if len(tables) > 1 else ""
        parts.append(title + markdown(grid.headings, grid.rows) + "".join(f"\n{note}\n" for note in grid.notes))
    return "\n".join(parts)


def as_latex(tables: Sequence[Grid]) -> str:
    """Return a tabular of booktabs for each table. Notes are comments."""
    lines = ["% needs \\usepackage{booktabs}"]
    for grid in tables:
        lines += [f"% {' '.join(note.split())}" for note in (grid.title, *grid.notes)]
        numeric = ["r" if all(re.match(r"[-+\[\d]", row[index]) for row in grid.rows) else "l"
                   for index in range(len(grid.headings))]  # fmt: skip
        lines += [f"\\begin{{tabular}}{{{''.join(numeric)}}}", "\\toprule", _latex_row(grid.headings), "\\midrule"]
        lines += [*map(_latex_row, grid.rows), "\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"}, "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    "<": "$<$", ">": "$>$", "±": "$\\pm$", "Δ": "$\\Delta$",
}  # fmt: skip


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, cells)) + " \\\\"


def escape_latex(text: str) -> str:
    """Return text for LaTeX. A minus before a number is one, not a hyphen."""
    escaped = "".join(_LATEX.get(mark, mark) for mark in text)
    return re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", escaped)


def _headings(name: str) -> list[str]:
    return [name, *(f"{name}.{each}" for each in _STATISTICS[1:])]


def _cells(score: Score | None) -> list[str]:
    values = [getattr(score, name) for name in _STATISTICS] if score else [None] * len(_STATISTICS)
    return ["" if value is None else repr(value) for value in values]


def _plain(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: dataclasses.asdict(score) for name, score in scores.items()}


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return dotted settings in their groups, as in a run's config.json."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, own = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[own] = value
    return nested
