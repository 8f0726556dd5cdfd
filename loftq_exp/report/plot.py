"""Plots. No display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot_losses(path: Path, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Plot training loss over optimiser steps, one line per run. `losses` maps a label to (step, loss) pairs."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, pairs in losses.items():
        if pairs:
            steps, values = zip(*pairs, strict=True)
            axes.plot(steps, values, label=label, linewidth=1.8)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
