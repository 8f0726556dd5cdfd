"""The charts of a summary's rows: which there are, of what, and what a reader must know of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loftq_exp.report.charts import Line, Point, bars, heat_map, lines, scatter
from loftq_exp.report.grid import setting_columns, setting_of
from loftq_exp.report.settings import shown
from loftq_exp.report.summary import Row, Score
from loftq_exp.report.table import method_name
from loftq_exp.report.weights import Errors, errors_of

Href = Callable[[Row], str]
_LOWER, _HIGHER = ("nll", "perplexity"), ("accuracy", "f1", "exact_match", "matthews", "pearson", "spearman", "rouge1", "rouge2",
                                          "rougeL")  # fmt: skip
_MOST_POINTS, _MOST_MAPS = 150, 8
_SPREAD = "Error bars: ± one sample standard deviation over the seeds."
_STAGES = {"quantize": "initialise", "finetune": "train", "evaluate": "evaluate"}
_BITS = ("quant.bits", "quant.allocation", "quant.bits_per_layer")


@dataclass(frozen=True)
class Drawn:
    """A chart: its title, what is to be known of it, and its SVG."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """Charts that belong together. The page shows an `open` section at once."""

    title: str
    charts: list[Drawn]
    open: bool = True


@dataclass(frozen=True)
class _Named:
    """A score, and how it is shown: times `scale`, in the form `text`, under `label`."""

    name: str
    label: str
    text: str
    scale: float

    def point(self, row: Row, x: float, href: str) -> Point:
        score = row.scores[self.name]
        return _point(x, score, f"{row.name}: {self.label}", "", href, self.scale, self.text)


def sections(rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Section]:
    """Return the sections of charts for rows of one model and task. A chart without data is left out, as is a section without charts.

    Args:
        rows: the rows, drawn in this order.
        differing: the settings that differ between the rows.
        href: where the point of a row leads.
        of: what the rows are of, for the labels of charts.
    """
    scores = [
        Section(score.label, _of_score(score, rows, differing, href, of), index < 2)
        for index, score in enumerate(_scores(rows))
    ]
    errors = _errors(rows)
    found = [
        *scores,
        Section("Training loss, weight error", [*_losses(rows, href, of), *_steps(errors, href, of)]),
        Section("Weight error by layer and module", maps := _maps(errors, of), len(maps) <= _MOST_MAPS),
        Section("Time and memory", _costs(rows, href, of)),
    ]
    return [section for section in found if section.charts]


def lower_is_better(score: str) -> bool | None:
    """Return whether a lower score of this name is better. None if that is not known. A part's score is named as the whole's."""
    names = {score, score.partition("_")[0], score.removeprefix("lead3_")}
    return True if names & set(_LOWER) else False if names & set(_HIGHER) else None


def pareto_front(points: Iterable[tuple[float, float]], lower: bool) -> list[int]:
    """Return which (memory, score) no other point beats in one and equals in the other, by rising memory."""
    front: list[int] = []
    best = math.inf
    order = sorted(enumerate(points), key=lambda item: (item[1][0], item[1][1] if lower else -item[1][1]))
    for index, (_, score) in order:
        if (value := score if lower else -score) < best:
            best = value
            front.append(index)
    return front


def _scores(rows: Sequence[Row]) -> list[_Named]:
    """Return the scores of the table's columns that some row has, in their order."""
    named: dict[str, _Named] = {}
    for column in (column for row in rows for run in row.runs for column in run.metrics["table"]):
        form, scale = column["form"], column["scale"]
        if form.endswith("%}"):
            form, scale = form.replace("%}", "f}"), scale * 100
        for name in column["scores"]:
            if any(name in row.scores for row in rows):
                label = name.replace("_", " ") + (" (%)" if scale == 100 and column["form"] != form else "")
                named.setdefault(name, _Named(name, label, form, scale))
    return list(named.values())


def _point(x: float, score: Score, title: str, unit: str, href: str, scale: float, text: str) -> Point:
    low = high = None
    title += f" {text.format(score.mean * scale)}"
    if score.std is not None:
        low, high = (score.mean - score.std) * scale, (score.mean + score.std) * scale
        title += f" ± {text.format(score.std * scale)}"
    title += f" {unit}".rstrip() + (f" (n {score.n})" if score.std is not None else "")
    return Point(x, score.mean * scale, low, high, title, href)


def _of_score(score: _Named, rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Drawn]:
    scored = [row for row in rows if score.name in row.scores]
    axes = (
        ("bits", "bits a weight", "bits_per_weight", 1.0, _BITS),
        ("rank", "rank", "rank", 1.0, ("quant.rank",)),
        ("backbone bytes", "backbone (MB)", "backbone_bytes", 1e-6, (*_BITS, "save_format")),
    )
    drawn = []
    for title, label, measure, unit, along in axes:
        known = [(row, row.measures[measure].mean * unit) for row in scored if measure in row.measures]
        series = _series(score, known, differing, along, href)
        if len({x for _, x in known}) > 1:
            svg = scatter(f"{score.label} against {title}: {of}", label, score.label, series, log=True)
            drawn.append(Drawn(f"{score.label} against {title}", _spread(scored), svg))
    return drawn + _pareto(score, scored, differing, href, of)


def _pareto(score: _Named, rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Drawn]:
    known = [(row, memory) for row in rows if (memory := _memory(row)) is not None]
    if len({memory for _, memory in known}) < 2:
        return []
    lower = lower_is_better(score.name)
    what = "Memory: the quantized weights at their bits, and the adapter as stored."
    front: list[tuple[float, float]] = []
    if lower is None:
        what += " No front is drawn, because it is not known whether a higher or a lower score is better."
    else:
        points = [(memory, row.scores[score.name].mean) for row, memory in known]
        places = pareto_front(points, lower)
        front = [(points[place][0], points[place][1] * score.scale) for place in places]
        what += f" {'Lower' if lower else 'Higher'} is better. Front: {', '.join(known[place][0].name for place in places)}."
    series = _series(score, known, differing, (*_BITS, "quant.rank", "save_format"), href)
    svg = scatter(f"{score.label} against memory, with the Pareto front: {of}", "weights and adapter (MB)", score.label, series,
                  front, joined=False)  # fmt: skip
    return [Drawn(f"{score.label} against memory", f"{what} {_spread(rows)}".strip(), svg)]


def _memory(row: Row) -> float | None:
    """Return the MB of the weights in the blocks at their bits, and of the adapter. The files may hold dequantized weights."""
    values = row.runs[0].metrics["init"].get("linear_values")
    if not values or not {"bits_per_weight", "adapter_bytes"} <= set(row.measures):
        return None
    return (values * row.measures["bits_per_weight"].mean / 8 + row.measures["adapter_bytes"].mean) / 1e6


def _series(
    score: _Named, known: Sequence[tuple[Row, float]], differing: Sequence[str], along: Sequence[str], href: Href
) -> dict[str, Sequence[Point]]:
    """Return the points in series of rows that differ in nothing but the settings `along` the axis, by rising x."""
    rows = [row for row, _ in known]
    names = [name for name in setting_columns(rows, differing)[0] if name not in along]
    ranks = {row.measures["rank"].mean for row in rows if "rank" in row.measures}
    series: dict[str, list[Point]] = {}
    for row, x in sorted(known, key=lambda item: item[1]):
        parts = [_method(row, with_bits="quant.bits" not in along)]
        if len(ranks) > 1 and "quant.rank" not in along:
            parts[0] += f" r{row.measures['rank'].mean:g}"
        parts += [f"{name.rpartition('.')[2]}={shown(setting_of(row, name))}" for name in names]
        series.setdefault(" ".join(parts), []).append(score.point(row, x, href(row)))
    order = {href(row): index for index, row in enumerate(rows)}
    return {name: points for name, points in sorted(series.items(), key=lambda item: min(order[point.href] for point in item[1]))}


def _method(row: Row, with_bits: bool) -> str:
    config = row.runs[0].metrics["config"]
    if with_bits:
        return method_name(config)
    without = {**config["quant"], "bits": "", "allocation": None, "bits_per_layer": None}
    return method_name({"quant": without}).replace("- ", " ").rstrip("-")


def _spread(rows: Sequence[Row]) -> str:
    return _SPREAD if any(len(row.runs) > 1 for row in rows) else ""


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
    drawn = [_line(_together(same), range(errors.steps.shape[1]), errors.steps, href(same[0])) for same, errors in found]
    caption = "Mean relative error of the weights, ‖W − Q − BA‖ / ‖W‖. Step 0: after quantization alone."
    caption += " Bands: ± one sample standard deviation over the seeds." * any(len(errors.steps) > 1 for _, errors in found)
    svg = lines(f"Weight error by step: {of}", "alternating step", "mean relative error", drawn)
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
    return [Drawn("Training loss", caption, lines(f"Training loss: {of}", "optimiser step", "training loss", drawn, log=True))]


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
            _point(place, row.measures[measure], f"{row.name}: {name}", unit, href(row), scale, "{:.4g}")
            for place, row in enumerate(known)
            if measure in row.measures
        ]
        for name, measure in measures.items()
    }
    if not known:
        return []
    svg = bars(label, unit, [row.name for row in known], {name: points for name, points in groups.items() if points})
    return [Drawn(label.partition(":")[0], f"{caption} {_spread(known)}".strip(), svg)]
