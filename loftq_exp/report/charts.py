"""Charts as SVG for a page: drawn by matplotlib, in the page's colours, with links and without anything outside the file."""

from __future__ import annotations

import io
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

_WIDTH = 4.4
"""Inches of 72 units. So narrow that text of 10 units is readable on a phone."""
_MOST_LETTERS = 52
"""In a line of a legend."""
_TEXT = "#010203"
"""Stands for the colour of the page's text."""
SERIES = tuple(f"#0a0b{index:02x}" for index in range(8))
"""Stand for the page's colours of series, the style sheet's --series-0 to --series-7."""
_MARKERS = "osD^vPX*"
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10, "axes.labelsize": 10,
    "text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT,
    "grid.color": _TEXT, "axes.grid": True, "grid.alpha": 0.15, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5, "figure.constrained_layout.use": True,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 6), "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value with its interval, if any, at `x`: what it is of, and where it leads."""

    x: float
    y: float
    low: float | None
    high: float | None
    title: str
    href: str


@dataclass(frozen=True)
class Line:
    """A named sequence of values over steps with a band around them, and where it leads."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    href: str


@dataclass
class _Links:
    """Links and titles by the placeholders that matplotlib writes into the SVG."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, href: str, title: str) -> str:
        self.found.append((href, title))
        return f"link:{len(self.found) - 1}"


@contextmanager
def _chart(label: str, height: float, entries: Sequence[str] = ()) -> Iterator[tuple[Axes, _Links, list[str]]]:
    """Yield axes to draw on. The list has the SVG afterwards, with `label` for those who do not see it."""
    links, svg = _Links(), list[str]()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        names = [textwrap.fill(entry, _MOST_LETTERS) for entry in entries]
        figure = Figure(figsize=(_WIDTH, height + 0.185 * sum(name.count("\n") + 1.2 for name in names)))
        axes = figure.add_subplot()
        yield axes, links, svg
        if entries:
            handles = axes.get_legend_handles_labels()[0]
            figure.legend(handles, names, loc="outside lower left", ncols=1, handlelength=1.6, borderaxespad=0.2)
        if layout := figure.get_layout_engine():
            layout.execute(figure)  # once, while saving would do it at each of its passes
        figure.set_layout_engine("none")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg.append(_inlined(text.getvalue(), label, links))


def scatter(
    label: str,
    x: str,
    y: str,
    series: dict[str, Sequence[Point]],
    front: Sequence[tuple[float, float]] = (),
    joined: bool = True,
    log: bool = False,
) -> str:
    """Return a chart of points with error bars. The points of a series may be joined; `front` is drawn as steps behind them."""
    named = [*["Pareto front"] * bool(front), *series]
    with _chart(label, 2.9, named if len(named) > 1 else ()) as (axes, links, svg):
        if front:
            axes.plot(
                *zip(*front, strict=True), drawstyle="steps-post", color=_TEXT, linewidth=5, alpha=0.16, label=named[0]
            )
        for index, (name, points) in enumerate(series.items()):
            colour, marker = SERIES[index % len(SERIES)], _MARKERS[index // len(SERIES) % len(_MARKERS)]
            xs, ys = [point.x for point in points], [point.y for point in points]
            if joined:
                axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.6)
            for point in points:
                if point.low is not None and point.high is not None:
                    axes.errorbar([point.x], [point.y], [[point.y - point.low], [point.high - point.y]], color=colour,
                                  linewidth=1.2, capsize=3)  # fmt: skip
            urls = [links.add(point.href, point.title) for point in points]
            axes.scatter(xs, ys, s=30, color=colour, marker=marker, zorder=3, urls=urls, label=name)
        axes.set(xlabel=x, ylabel=y)
        if log:
            _log_axis(axes, [point.x for points in series.values() for point in points])
    return svg[0]


def lines(label: str, x: str, y: str, drawn: Sequence[Line], log: bool = False) -> str:
    """Return a chart of lines with bands and markers."""
    with _chart(label, 2.9, [line.name for line in drawn] if len(drawn) > 1 else ()) as (axes, links, svg):
        for index, line in enumerate(drawn):
            colour, marker = SERIES[index % len(SERIES)], _MARKERS[index // len(SERIES) % len(_MARKERS)]
            few = len(line.x) <= 30
            axes.plot(line.x, line.y, color=colour, marker=marker if few or index >= len(SERIES) else None, markersize=4, linewidth=1.4,
                      markevery=max(1, len(line.x) // 12), label=line.name, url=links.add(line.href, line.name))  # fmt: skip
            if list(line.low) != list(line.high):
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        values = [value for line in drawn for value in line.y]
        if log and _wide(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return svg[0]


def bars(label: str, x: str, names: Sequence[str], groups: dict[str, Sequence[Point]]) -> str:
    """Return a chart of horizontal bars from top to bottom, each below its name. A group has one colour.

    The `x` of a point is its place in `names`, and its `y` the length.
    """
    names = [textwrap.fill(name, _MOST_LETTERS) for name in names]
    text = 0.17 * max(name.count("\n") + 1 for name in names)  # inches
    slot = 0.08 + text + 0.15 * len(groups)
    with _chart(label, 0.55 + slot * len(names), list(groups) if len(groups) > 1 else ()) as (axes, links, svg):
        thick = 0.15 / slot
        for index, (name, points) in enumerate(groups.items()):
            places = [point.x + thick * (index + 0.5) for point in points]
            drawn = axes.barh(places, [point.y for point in points], thick * 0.85, color=SERIES[index], label=name)
            for bar, point, place in zip(drawn, points, places, strict=True):
                bar.set_url(links.add(point.href, point.title))
                if point.low is not None and point.high is not None:
                    axes.errorbar([point.y], [place], xerr=[[point.y - point.low], [point.high - point.y]], color=_TEXT,
                                  linewidth=1, capsize=2)  # fmt: skip
        for place, name in enumerate(names):
            written = axes.text(
                0.005, place - 0.02, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9.5
            )
            written.set_in_layout(False)
        axes.set(xlabel=x, ylim=(len(names) - text / slot, -text / slot), yticks=[])
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
    return svg[0]


def heat_map(
    label: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], limits: tuple[float, float]
) -> str:
    """Return a chart of `values` (row, column) between `limits`. NaN is left empty."""
    height = 0.5 + min(3.2, max(1.0, 0.11 * len(rows))) + 0.045 * max(map(len, columns))
    with _chart(label, height) as (axes, _, svg):
        norm = LogNorm(*limits) if _wide(limits) else Normalize(*limits)
        image = axes.imshow(values, aspect="auto", interpolation="none", cmap="viridis", norm=norm)
        axes.grid(False)
        every = max(1, len(rows) // 12)
        axes.set_yticks(range(0, len(rows), every), rows[::every])
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_ylabel("layer")
        bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        if _wide(limits):
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter("{x:g}")
            bar.ax.yaxis.set_minor_locator(NullLocator())
    return svg[0]


def _wide(values: Sequence[float]) -> bool:
    """Return whether values are shown on a logarithmic scale: they are above 0 and span more than a factor of 4."""
    return 0 < 4 * min(values) < max(values)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the x axis logarithmic to base 2 with ticks at the values."""
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > 1.12 * ticks[-1]:  # labels do not overlap
            ticks.append(value)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter("{x:.4g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _inlined(svg: str, label: str, links: _Links) -> str:
    """Return the SVG as part of an HTML page: without declarations, with the page's colours, and with real links."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(
                ("}metadata", "}style")
            ):  # a style would hold for the whole page, which has it itself
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "g":
            element.attrib.pop("id", None)  # another chart has the same; that of a definition is made from `label`
        element.attrib = {name.rpartition("}")[2]: _coloured(value) for name, value in element.attrib.items()}
        if element.tag == "a":
            _link(element, links)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "group", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def _link(element: ET.Element, links: _Links) -> None:
    href, title = links.found[int(element.attrib["href"].removeprefix("link:"))]
    element.attrib = {"href": href, "aria-label": title}
    shown = ET.Element("title")
    shown.text = title
    element.insert(0, shown)


def _coloured(value: str) -> str:
    value = value.replace(_TEXT, "currentColor")
    for index, colour in enumerate(SERIES):
        value = value.replace(colour, f"var(--series-{index})")
    return value
