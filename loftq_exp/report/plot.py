"""Plots: training losses, and a map of weight errors. No display is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

from loftq_exp.report.weights import Errors
from loftq_exp.whole import whole_file, write_whole

matplotlib.rcParams["svg.hashsalt"] = "loftq_exp"  # names in an SVG, which are random otherwise

MOST_MARKED = 40
"""Points of a line up to which each has a marker. A line of one point is nothing but its marker."""

Losses = Sequence[tuple[int, float]]
"""(step, loss) pairs of a run."""


def plot_losses(path: Path, losses: Mapping[str, Sequence[Losses]]) -> None:
    """Plot training loss over optimiser steps to `path`, a PNG, and beside it as SVG, with the values as CSV.

    Each label of `losses` has one line, for the runs that differ only in their seeds: their mean, and a band from the smallest
    to the largest. Only steps that all runs of a label logged are drawn. The CSV has every value.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, runs in losses.items():
        logged = [dict(pairs) for pairs in runs if pairs]
        steps = sorted(set.intersection(*map(set, logged))) if logged else []
        if not steps:
            continue
        values = [[run[step] for run in logged] for step in steps]
        marker = "o" if len(steps) <= MOST_MARKED else None
        (line,) = axes.plot(steps, list(map(mean, values)), label=label, linewidth=1.8, marker=marker, markersize=4)
        if len(logged) > 1:
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as beside, whole_file(path.with_suffix(".svg")) as drawn:
        figure.savefig(beside, format="png")
        figure.savefig(drawn, format="svg", metadata={"Date": None})  # the same bytes for the same losses
    write_whole(path.with_suffix(".csv"), _table(losses))


def _table(losses: Mapping[str, Sequence[Losses]]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", "number", "step", "loss"])
    rows.writerows([label, number, step, repr(loss)] for label, runs in losses.items() for number, run in enumerate(runs)
                   for step, loss in run)  # fmt: skip
    return text.getvalue()


def error_map(errors: Errors) -> Figure:
    """Return a heat map of the relative errors of weights, a row for each layer. A layer without a module is blank there."""
    figure = Figure(
        figsize=(2.5 + 0.7 * len(errors.modules), 2.5 + 0.22 * len(errors.layers)), dpi=100, layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(errors.kept, aspect="auto", interpolation="none", cmap="viridis")
    axes.set_xticks(range(len(errors.modules)), errors.modules, rotation=45, ha="right")
    axes.set_yticks(range(len(errors.layers)), errors.layers)
    axes.set_ylabel("layer")
    figure.colorbar(image, label="relative weight error")
    return figure
