"""The columns of the table of settings."""

from __future__ import annotations

from typing import Any

from recorded import found

from loftq_exp.report.grid import Grid, grids, runs_grid
from loftq_exp.report.summary import summarise

ROUGE = {"title": "R1/R2", "scores": ["rouge1", "rouge2"], "form": "{:.2f}", "scale": 100}


def column(grid: Grid, heading: str) -> list[str]:
    return [row[grid.headings.index(heading)] for row in grid.rows]


def test_single_runs_have_the_columns_of_single_runs() -> None:
    (grid,) = grids(summarise([found({"accuracy": 0.5}), found({"accuracy": 0.25}, rank=16)]))
    assert grid.title == "2 runs"
    assert grid.headings == (
        "run", "bits", "rank", "weight error", "accuracy", "init s", "train s", "backbone MB", "adapter MB"
    )  # fmt: skip
    assert column(grid, "accuracy") == ["50.0%", "25.0%"]
    assert grid.notes == ()
    assert runs_grid(summarise([found({})])) == []


def test_scores_that_share_a_column_of_single_runs_have_their_own() -> None:
    runs = [found({"rouge1": 0.4 + seed / 100, "rouge2": 0.2}, seed=seed) for seed in (0, 1)]
    for run in runs:
        run.metrics.update(table=[ROUGE], published={"rouge2": 20.25})
    (grid,) = grids(summarise(runs))
    assert column(grid, "R1") == ["40.50 ± 0.71"]
    assert column(grid, "R2 95 %") == ["[20.00, 20.00]"]
    assert column(grid, "R2 published") == ["20.25"]
    assert "R1 published" not in grid.headings


def test_a_score_of_fewer_runs_says_so() -> None:
    scores: list[dict[str, Any]] = [{"accuracy": 0.5}, {"accuracy": 0.7}, {}]
    runs = [found(each, seed=seed) for seed, each in enumerate(scores)]
    runs += [found({"accuracy": 0.9 + seed / 100}, seed=seed, method="loftq", iter=1) for seed in (1, 2)]
    (grid,) = grids(summarise(runs, baseline="qlora"))
    assert column(grid, "n") == ["3", "2"]
    assert column(grid, "accuracy") == ["60.0% ± 14.1% (n 2)", "91.5% ± 0.7%"]
    assert column(grid, "Δ accuracy") == ["-", "+21.0% (n 1)"]
    assert column(grid, "accuracy 95 %") == ["[-67.1%, 187.1%]", "[85.1%, 97.9%]"]
    (below,) = runs_grid(summarise(runs))
    assert below.headings[:2] == ("run", "seed")
    assert [row[:2] for row in below.rows] == [["QLoRA NF4 r8", str(seed)] for seed in range(3)] + [
        ["LoftQ NF4 iter 1 r8", str(seed)] for seed in (1, 2)
    ]


def test_each_group_has_the_columns_that_differ_in_it() -> None:
    runs = [found({"accuracy": 0.5}, task__max_train_samples=count, train__learning_rate=1e-3) for count in (10, 20)]
    runs += [found({"nll": 1.0}, task__kind="wikitext", train__learning_rate=rate) for rate in (1e-4, 1e-3)]
    one, other = grids(summarise(runs))
    assert (one.title, other.title) == ("gsm8k: 2 runs", "wikitext: 2 runs")
    assert column(one, "max_train_samples") == ["10", "20"]
    assert column(other, "learning_rate") == ["0.0001", "0.001"]
    assert "learning_rate" not in one.headings
    assert "NLL" not in one.headings


def test_settings_that_tell_no_rows_apart_are_dropped_first() -> None:
    runs = [found({"nll": 1.0}, train__learning_rate=rate, train__weight_decay=100 * rate) for rate in (1e-4, 1e-3)]
    (grid,) = grids(summarise(runs))
    assert grid.headings[3:5] == ("learning_rate", "weight_decay")
    assert "weight_decay" in grid.drop
    assert "learning_rate" not in grid.drop
