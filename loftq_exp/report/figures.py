"""The charts of a summary's rows: which there are, of what, and what a reader must know of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loftq_exp.report.charts import Line, bars, heat_map, lines
from loftq_exp.report.scored import Drawn, Href, charts_of, point_of, scores_shown, spread_of
from loftq_exp.report.summary import Row
from loftq_exp.report.weights import Errors, errors_of

_MOST_POINTS, _MOST_MAPS = 150, 8
_STAGES = {"quantize": "initialise", "finetune": "train", "evaluate": "evaluate"}


@dataclass(frozen=True)
class Section:
    """Charts that belong together. The page shows an `open` section at once."""

    title: str
    charts: list[Drawn]
    open: bool = True


def sections(rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Section]:
    """Return the sections of charts for rows of one model and task. A chart without data is left out, as is a section without charts.

    Args:
        rows: the rows, drawn in this order.
        differing: the settings that differ between the rows.
        href: where the point of a row leads.
        of: what the rows are of, for the labels of charts.
    """
    scores = [
        Section(score.title, charts_of(score, rows, differing, href, of), index < 2)
        for index, score in enumerate(scores_shown(rows))
    ]
    errors = _errors(rows)
    found = [
        *scores,
        Section("Training loss, weight error", [*_losses(rows, href, of), *_steps(errors, href, of)]),
        Section("Weight error by layer and module", maps := _maps(errors, of), len(maps) <= _MOST_MAPS),
        Section("Time and memory", _costs(rows, href, of)),
    ]
    return [section for section in found if section.charts]


def _errors(rows: Sequence[Row]) -> list[tuple[list[Row], Errors]]:
    """Return the weight errors, and the rows that have these, such as those of one initialisation."""
    found: dict[bytes, tuple[list[Row], Errors]] = {}
    for row in rows:
        if (errors := errors_of(row)) is not None:
            found.setdefault(errors.kept.tobytes() + errors.steps.tobytes(), ([], errors))[0].append(row)
    return list(found.values())


def _steps(found: Sequence[tuple[list[Row], Errors]], href: Href, of: str) -> list[Drawn]:
    if not found:
        return []
    drawn = [
        _line(_together(same), range(errors.steps.shape[1]), errors.steps, href(same[0])) for same, errors in found
    ]
    caption = "Mean relative error of the weights, ‖W − Q − BA‖ / ‖W‖. Step 0: after quantization alone."
    caption += " Bands: ± one sample standard deviation over the seeds." * any(
        len(errors.steps) > 1 for _, errors in found
    )
    svg = lines(f"Weight error by step: {of}", "alternating step", "mean relative error", drawn, log=True)
    return [Drawn("Weight error by step", caption, svg)]


def _maps(found: Sequence[tuple[list[Row], Errors]], of: str) -> list[Drawn]:
    """Return a heat map of each row's errors, all in the same colours."""
    every = [float(error) for _, errors in found for error in errors.kept[~np.isnan(errors.kept)]]
    charts = []
    for same, errors in found:
        own = errors.kept[~np.isnan(errors.kept)]
        layer, module = np.unravel_index(np.nanargmax(errors.kept), errors.kept.shape)
        worst = f"{own.max():.4f} in layer {errors.layers[layer]}, {errors.modules[module]}"
        caption = f"Relative error of the kept factors: mean {own.mean():.4f}, least {own.min():.4f}, largest {worst}."
        label = f"Weight error by layer and module: {_together(same)}, {of}"
        svg = heat_map(label, errors.kept, errors.layers, errors.modules, (min(every), max(every)))
        charts.append(Drawn(_together(same), caption, svg))
    return charts


def _together(rows: Sequence[Row]) -> str:
    others = len(rows) - 1
    return rows[0].name + (f" and {others} more with equal errors" if others else "")


def _line(name: str, steps: Sequence[int], values: np.ndarray, href: str) -> Line:
    """Return the mean of `values` (run, step) with a band of one standard deviation."""
    mean = values.mean(0)
    std = values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    return Line(name, list(steps), mean.tolist(), (mean - std).tolist(), (mean + std).tolist(), href)


def _losses(rows: Sequence[Row], href: Href, of: str) -> list[Drawn]:
    drawn, thinned, banded = [], 1, False
    for row in rows:
        curves = [dict(map(tuple, losses)) for run in row.runs if (losses := run.metrics.get("losses"))]
        steps = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
        if not steps:
            continue
        every = math.ceil(len(steps) / _MOST_POINTS)
        kept = sorted({*steps[::every], steps[-1]})
        drawn.append(_line(row.name, kept, np.array([[curve[step] for step in kept] for curve in curves]), href(row)))
        thinned, banded = max(thinned, every), banded or len(curves) > 1
    if not drawn:
        return []
    caption = "Cross-entropy in nats." + " Mean over the seeds with bands of ± one sample standard deviation." * banded
    caption += f" One of up to {thinned} logged steps is drawn." * (thinned > 1)
    return [
        Drawn(
            "Training loss", caption, lines(f"Training loss: {of}", "optimiser step", "training loss", drawn, log=True)
        )
    ]


def _costs(rows: Sequence[Row], href: Href, of: str) -> list[Drawn]:
    drawn = []
    for title, measure in (("Initialisation time", "init_seconds"), ("Training time", "train_seconds")):
        drawn += _bars(f"{title}: {of}", rows, {title: measure}, 1.0, "seconds", href, "")
    caption = "The process's peak at the end of each stage, which includes what it ran before."
    for kind, title in (("resident_bytes", "Peak resident memory"), ("cuda_bytes", "Peak CUDA memory")):
        stages = {name: f"peak_memory_{stage}_{kind}" for stage, name in _STAGES.items()}
        drawn += _bars(f"{title}: {of}", rows, stages, 1e-6, "MB", href, caption)
    return drawn


def _bars(
    label: str, rows: Sequence[Row], measures: Mapping[str, str], scale: float, unit: str, href: Href, caption: str
) -> list[Drawn]:
    """Return a chart of the `measures`, by the name of their bars, of the rows that have one. Empty if no row has."""
    known = [row for row in rows if set(measures.values()) & set(row.measures)]
    groups = {
        name: [
            point_of(place, row.measures[measure], f"{row.name}: {name}", unit, href(row), scale, "{:.4g}")
            for place, row in enumerate(known)
            if measure in row.measures
        ]
        for name, measure in measures.items()
    }
    if not known:
        return []
    svg = bars(label, unit, [row.name for row in known], {name: points for name, points in groups.items() if points})
    return [Drawn(label.partition(":")[0], f"{caption} {spread_of(known)}".strip(), svg)]
