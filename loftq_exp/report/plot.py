"""Plots: training losses, with the numbers beside them, and a map of weight errors. No display is needed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loftq_exp.report.table import cells
from loftq_exp.whole import whole_file, write_whole

matplotlib.rcParams["svg.hashsalt"] = "loftq_exp"  # the same bytes for the same losses

FEW_POINTS = 30
"""A line of at most this many losses has a marker at each, so that a single loss is visible."""


class Curve(NamedTuple):
    """The logged losses of one run: (optimiser step, loss) pairs, and the run's seed."""

    seed: int
    losses: Sequence[tuple[int, float]]


def plot_losses(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Plot training loss over optimiser steps to `path`, a PNG, and beside it as SVG and CSV.

    `curves` maps a label to the runs that differ only in the seed. Several of them become one line, their mean, in a band from
    their smallest to their largest loss. The CSV has each run's own losses.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for position, (label, runs) in enumerate(curves.items()):
        _draw(axes, f"C{position % 10}", label, [run for run in runs if run.losses])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    for place, metadata in ((path, {}), (path.with_suffix(".svg"), {"Date": None})):
        with whole_file(place) as beside:
            figure.savefig(beside, format=place.suffix[1:], metadata=metadata)
    write_whole(path.with_suffix(".csv"), _table(curves))


def curves(runs: Mapping[str, dict[str, Any]]) -> dict[str, list[Curve]]:
    """Return the loss curves of runs, grouped by all settings but the seed. `runs` maps a run's overrides to its metrics.

    A group's label is its method as in the results table if that differs between the groups, else its overrides.
    """

    def without_seed(overrides: str) -> str:
        return " ".join(word for word in overrides.split(" ") if not word.startswith("seed="))

    groups: dict[str, list[str]] = {}
    for name, metrics in runs.items():
        rest = {key: value for key, value in metrics["config"].items() if key != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(name)
    methods = [cells(runs[names[0]], ["run"])[0] for names in groups.values()]
    unique = len(set(methods)) == len(methods)
    return {
        method if unique else without_seed(names[0]): [
            Curve(runs[name]["config"]["seed"], runs[name]["losses"]) for name in names
        ]
        for method, names in zip(methods, groups.values(), strict=True)
    }


def _draw(axes: Axes, color: str, label: str, runs: Sequence[Curve]) -> None:
    """Draw one line: a run's losses, or the mean over seeds at the steps that all of them logged, and their range."""
    if not runs:
        return
    by_step = [dict(run.losses) for run in runs]
    steps = [step for step in by_step[0] if all(step in losses for losses in by_step)]
    losses = np.array([[losses[step] for step in steps] for losses in by_step])
    marker = "o" if len(steps) <= FEW_POINTS else ""
    shown = label if len(runs) == 1 else f"{label} (mean and range of {len(runs)} seeds)"
    axes.plot(steps, losses.mean(0), label=shown, color=color, linewidth=1.8, marker=marker, markersize=4)
    if len(runs) > 1:
        axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)


def _table(curves: Mapping[str, Sequence[Curve]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "seed", "step", "loss"])
    writer.writerows([label, run.seed, *pair] for label, runs in curves.items() for run in runs for pair in run.losses)
    return out.getvalue()


def error_map(weights: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a heat map of relative weight errors: a row for each layer, a column for each module in it.

    `weights` are entries of init_report.json. The error is that of the step that was kept. A place without a weight is blank.
    """
    errors = {_place(weight["name"]): weight["errors"][weight["kept_step"]] for weight in weights}
    layers, modules = (list(dict.fromkeys(place[axis] for place in errors)) for axis in (0, 1))
    values = np.array([[errors.get((layer, module), np.nan) for module in modules] for layer in layers])
    size = (2.5 + 0.7 * len(modules), 2.5 + 0.22 * len(layers))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, label="relative weight error")
    return figure


def _place(name: str) -> tuple[str, str]:
    """Return the layer and the module in it: "model.layers.0" and "self_attn.q_proj" of "model.layers.0.self_attn.q_proj"."""
    found = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else ("", name)
