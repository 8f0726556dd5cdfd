"""The plot of losses: every run is seen, also one of a single point, and its values lie beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from loftq_exp.report.plot import plot_losses


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float], str | None]]:
    """The lines that are drawn: steps, values and marker."""
    lines = []
    plot = Axes.plot

    def record(self: Axes, steps: list[int], values: list[float], **options: object) -> object:
        lines.append((list(steps), list(values), options.get("marker")))
        return plot(self, steps, values, **options)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


def test_one_logged_loss_is_a_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch)
    plot_losses(tmp_path / "losses.png", {"LoftQ": [[(6, 1.5)]], "untrained": [[]]})
    assert lines == [([6], [1.5], "o")]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "losses.svg").read_text()


def test_seeds_are_a_mean_and_a_band_and_all_values_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, bands = drawn(monkeypatch), []
    fill = Axes.fill_between

    def record(self: Axes, steps: list[int], low: list[float], high: list[float], **options: object) -> object:
        bands.append((list(steps), list(low), list(high)))
        return fill(self, steps, low, high, **options)

    monkeypatch.setattr(Axes, "fill_between", record)
    runs = [[(1, 2.0), (2, 1.0)], [(1, 4.0), (2, 2.0), (3, 1.0)]]
    plot_losses(tmp_path / "losses.png", {"a, b": runs})
    assert lines == [([1, 2], [3.0, 1.5], "o")]
    assert bands == [([1, 2], [2.0, 1.0], [4.0, 2.0])]
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], int(row["number"]), int(row["step"]), float(row["loss"])) for row in rows] == [
        ("a, b", number, step, loss) for number, run in enumerate(runs) for step, loss in run
    ]


def test_a_long_line_has_no_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch)
    plot_losses(tmp_path / "losses.png", {"long": [[(step, 1.0) for step in range(1, 101)]]})
    assert lines[0][2] is None
