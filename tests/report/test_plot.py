"""The plot of training losses and the files beside it."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from loftq_exp.report.plot import Curve, curves, error_map, plot_losses


def metrics(seed: int, losses: list[tuple[int, float]], **quant: Any) -> dict[str, Any]:
    """What `curves` and the table's `run` column read of a run's metrics."""
    kept = {"method": "loftq", "type": "nf", "bits": 4, "iter": 5, "rank": 8} | quant
    init = {"bits_per_weight": 4.5, "mean_error": 0.1}
    return {"config": {"seed": seed, "quant": kept}, "losses": losses, "table": [], "seconds": {}, "init": init,
            "backbone_bytes": 0, "adapter_bytes": 0, "published": None}  # fmt: skip


def inked(path: Path) -> int:
    """Pixels of the plot's first line colour, from axes edge to axes edge; its legend is left out."""
    image = matplotlib.image.imread(path)[:, :, :3]
    blue = np.abs(image - np.array([0x1F, 0x77, 0xB4]) / 255).max(2) < 0.02
    return int(blue[:, :600].sum())


def test_a_single_loss_is_visible(tmp_path: Path) -> None:
    plot_losses(tmp_path / "losses.png", {"one": [Curve(0, [(1, 3.5)])]})
    plot_losses(tmp_path / "none.png", {"none": [Curve(0, [])], "one": [Curve(0, [(1, 3.5)])]})
    assert inked(tmp_path / "losses.png") > 20
    assert inked(tmp_path / "none.png") == 0


def test_the_numbers_are_beside_the_picture(tmp_path: Path) -> None:
    runs = {"a, b": [Curve(0, [(1, 3.5), (6, 2.25)]), Curve(1, [(1, 3.0), (6, 2.0)])], "c": [Curve(0, [(1, 1.5)])]}
    plot_losses(tmp_path / "losses.png", runs)
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["run", "seed", "step", "loss"], ["a, b", "0", "1", "3.5"], ["a, b", "0", "6", "2.25"], ["a, b", "1", "1", "3.0"],
        ["a, b", "1", "6", "2.0"], ["c", "0", "1", "1.5"],
    ]  # fmt: skip
    assert ElementTree.parse(tmp_path / "losses.svg").getroot().tag.endswith("svg")
    before = (tmp_path / "losses.svg").read_bytes()
    plot_losses(tmp_path / "losses.png", runs)
    assert (tmp_path / "losses.svg").read_bytes() == before


def test_seeds_become_a_band(tmp_path: Path) -> None:
    pairs = [(1, 4.0), (2, 2.0)]
    plot_losses(tmp_path / "one.png", {"a": [Curve(0, pairs)]})
    plot_losses(tmp_path / "two.png", {"a": [Curve(0, pairs), Curve(1, [(1, 8.0), (2, 3.0)])]})
    assert "PolyCollection" not in (tmp_path / "one.svg").read_text()
    assert "FillBetweenPolyCollection" in (tmp_path / "two.svg").read_text()


def test_runs_are_grouped_by_all_settings_but_the_seed() -> None:
    one, two = [(1, 2.0)], [(1, 3.0)]
    by_rank = {
        "seed=0 quant.rank=8": metrics(0, one), "seed=1 quant.rank=8": metrics(1, two),
        "seed=0 quant.rank=16": metrics(0, one, rank=16),
    }  # fmt: skip
    assert curves(by_rank) == {
        "quant.rank=8": [Curve(0, one), Curve(1, two)],
        "quant.rank=16": [Curve(0, one)],
    }
    by_method = {"quant=qlora": metrics(0, one, method="qlora", iter=0), "quant=loftq": metrics(0, two)}
    assert curves(by_method) == {"QLoRA NF4": [Curve(0, one)], "LoftQ NF4 iter 5": [Curve(0, two)]}


@pytest.mark.parametrize("steps", [1, 6])
def test_the_first_and_the_last_step_are_logged(cli: Any, steps: int) -> None:
    assert cli(*cli.tiny, "-m", f"train.max_steps={steps}", "train.logging_steps=4", "seed=1,2").code == 0
    (path,) = Path("outputs/sweeps").glob("*/losses.csv")
    with path.open() as file:
        logged = [(row["seed"], int(row["step"])) for row in csv.DictReader(file)]
    wanted = [1] if steps == 1 else [1, 4, 6]
    assert logged == [(seed, step) for seed in ("1", "2") for step in wanted]


def test_the_map_of_errors_has_a_row_for_each_layer_and_a_column_for_each_module() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.10.self_attn.q_proj"]
    weights = [{"name": name, "errors": [0.5, place / 10], "kept_step": 1} for place, name in enumerate(names, start=1)]
    axes = error_map(weights).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["self_attn.q_proj", "mlp.up_proj"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["model.layers.0", "model.layers.10"]
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(values, [[0.1, 0.2], [0.3, np.nan]])
