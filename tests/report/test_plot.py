"""The plot of losses: every run is seen, also one of a single point, and its values lie beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from loftq_exp.report.plot import error_map, plot_losses
from loftq_exp.report.weights import averaged


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


def test_the_map_of_errors_has_a_row_for_each_layer_and_a_column_for_each_module() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.10.self_attn.q_proj"]
    weights = [{"name": name, "errors": [0.5, place / 10], "kept_step": 1} for place, name in enumerate(names, start=1)]
    errors = averaged([weights])
    assert errors is not None
    axes = error_map(errors).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["self_attn.q_proj", "mlp.up_proj"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "10"]
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(values, [[0.1, 0.2], [0.3, np.nan]])


def test_the_same_losses_give_the_same_svg(tmp_path: Path) -> None:
    for name in ("one", "two"):
        plot_losses(tmp_path / f"{name}.png", {"LoftQ": [[(1, 2.0), (6, 1.5)], [(1, 2.5), (6, 1.0)]]})
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
