"""The charts of one score over the rows of a summary: against bits, rank and bytes, and its Pareto front over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loftq_exp.report.charts import Point, scatter
from loftq_exp.report.grid import setting_columns, setting_of
from loftq_exp.report.settings import shown
from loftq_exp.report.summary import Row, Score
from loftq_exp.report.table import method_name

Href = Callable[[Row], str]
"""Where the point of a row leads."""
_LOWER = ("nll", "perplexity")
_HIGHER = ("accuracy", "f1", "exact_match", "matthews", "pearson", "spearman", "rouge1", "rouge2", "rougeL")
_BITS = ("quant.bits", "quant.allocation", "quant.bits_per_layer")


@dataclass(frozen=True)
class Drawn:
    """A chart: its title, what is to be known of it, and its SVG."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Shown:
    """A score, and how it is shown: under its title, in its unit, times `scale`, in the form `text`."""

    name: str
    title: str
    unit: str
    text: str
    scale: float

    @property
    def label(self) -> str:
        """The name of an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def point(self, row: Row, x: float, href: str) -> Point:
        score = row.scores[self.name]
        return point_of(x, score, f"{row.name}: {self.title}", self.unit, href, self.scale, self.text)


def scores_shown(rows: Sequence[Row]) -> list[Shown]:
    """Return the scores of the table's columns that some row has, in their order."""
    named: dict[str, Shown] = {}
    for column in (column for row in rows for run in row.runs for column in run.metrics["table"]):
        form, scale, names = column["form"], column["scale"], column["scores"]
        percent = form.endswith("%}")
        if percent:
            form, scale = form.replace("%}", "f}"), scale * 100
        for name in names:
            if any(name in row.scores for row in rows):
                title = column["title"] if len(names) == 1 else name.replace("_", " ")
                named.setdefault(name, Shown(name, title, "%" * percent, form, scale))
    return list(named.values())


def charts_of(score: Shown, rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Drawn]:
    """Return the charts of a score. One is left out if the rows do not differ along its axis."""
    scored = [row for row in rows if score.name in row.scores]
    axes = (
        ("bits", "bits a weight", "bits_per_weight", 1.0, _BITS),
        ("rank", "rank", "rank", 1.0, ("quant.rank",)),
        ("backbone bytes", "backbone as stored (MB)", "backbone_bytes", 1e-6, (*_BITS, "save_format")),
    )
    drawn = []
    for title, label, measure, unit, along in axes:
        known = [(row, row.measures[measure].mean * unit) for row in scored if measure in row.measures]
        series = _series(score, known, differing, along, href)
        if len({x for _, x in known}) > 1:
            log = measure != "backbone_bytes"
            svg = scatter(f"{score.title} against {title}: {of}", label, score.label, series, log=log)
            drawn.append(Drawn(f"{score.title} against {title}", spread_of(scored), svg))
    return drawn + _pareto(score, scored, differing, href, of)


def _pareto(score: Shown, rows: Sequence[Row], differing: Sequence[str], href: Href, of: str) -> list[Drawn]:
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
    svg = scatter(f"{score.title} against memory, with the Pareto front: {of}", "weights and adapter (MB)", score.label, series,
                  front, joined=False)  # fmt: skip
    return [Drawn(f"{score.title} against memory", f"{what} {spread_of(rows)}".strip(), svg)]


def _memory(row: Row) -> float | None:
    """Return the MB of the weights in the blocks at their bits, and of the adapter. The files may hold dequantized weights."""
    values = row.runs[0].metrics["init"].get("linear_values")
    if not values or not {"bits_per_weight", "adapter_bytes"} <= set(row.measures):
        return None
    return (values * row.measures["bits_per_weight"].mean / 8 + row.measures["adapter_bytes"].mean) / 1e6


def _series(
    score: Shown, known: Sequence[tuple[Row, float]], differing: Sequence[str], along: Sequence[str], href: Href
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
    return dict(sorted(series.items(), key=lambda item: min(order[point.href] for point in item[1])))


def _method(row: Row, with_bits: bool) -> str:
    config = row.runs[0].metrics["config"]
    if with_bits:
        return method_name(config)
    without = {**config["quant"], "bits": "", "allocation": None, "bits_per_layer": None}
    return method_name({"quant": without}).replace("- ", " ").rstrip("-")


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


def point_of(x: float, score: Score, title: str, unit: str, href: str, scale: float, text: str) -> Point:
    """Return the mean of a score, times `scale`, with an interval of one standard deviation. Its title has both as `text`."""
    low = high = None
    title += f" {text.format(score.mean * scale)}"
    if score.std is not None:
        low, high = (score.mean - score.std) * scale, (score.mean + score.std) * scale
        title += f" ± {text.format(score.std * scale)}"
    title += f" {unit}".rstrip() + (f" (n {score.n})" if score.std is not None else "")
    return Point(x, score.mean * scale, low, high, title, href)


def spread_of(rows: Sequence[Row]) -> str:
    """Return what the error bars of these rows are; nothing if they have none."""
    return (
        "Error bars: ± one sample standard deviation over the seeds." if any(len(row.runs) > 1 for row in rows) else ""
    )
