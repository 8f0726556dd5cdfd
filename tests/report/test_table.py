from __future__ import annotations

import dataclasses
from typing import Any

from loftq_exp.config import TaskConfig
from loftq_exp.report.table import cells, columns
from loftq_exp.tasks import load_task


def metrics(scores: dict[str, float], published: float | None = None, **task: Any) -> dict[str, Any]:
    """As much of metrics.json as the table reads."""
    return {
        "config": {"quant": {"method": "qlora", "type": "nf", "bits": 4, "rank": 8, "iter": 0}},
        "table": [dataclasses.asdict(column) for column in load_task(TaskConfig(**task)).table],
        "scores": scores,
        "seconds": {},
        "published": published,
        "init": {"bits_per_weight": 4.25, "mean_error": 0.1},
        "backbone_bytes": 2_000_000,
        "adapter_bytes": 100_000,
    }


def shown(run: dict[str, Any], *others: dict[str, Any]) -> dict[str, str]:
    headings = columns([run, *others])
    return dict(zip(headings, cells(run, headings), strict=True))


GSM8K = metrics({"nll": 1.25, "accuracy": 0.345}, 35.0, kind="gsm8k")
MRPC = metrics({"accuracy": 0.899, "f1": 0.936}, 89.9, kind="glue", name="mrpc")


def test_each_task_has_its_own_columns() -> None:
    assert shown(GSM8K)["NLL"] == "1.2500"
    assert shown(GSM8K)["accuracy"] == "34.5% (published 35%)"
    assert shown(MRPC)["accuracy/f1"] == "89.9/93.6 (published 89.9)"
    assert "NLL" not in shown(MRPC)


def test_a_sweep_over_tasks_has_the_columns_of_all() -> None:
    row = shown(MRPC, GSM8K)
    assert list(row) == ["run", "bits", "rank", "weight error", "accuracy/f1", "NLL", "accuracy", "init s", "train s",
                         "backbone MB", "adapter MB"]  # fmt: skip
    assert row["NLL"] == row["accuracy"] == "-"
    assert row["backbone MB"] == "2"


def test_a_run_that_was_not_scored() -> None:
    assert shown(metrics({}, 35.0, kind="gsm8k"))["accuracy"] == "- (published 35%)"
    assert shown(metrics({}, kind="squad"))["EM/F1"] == "-"


def test_no_run_at_all() -> None:
    assert columns([]) == ("run", "bits", "rank", "weight error", "init s", "train s", "backbone MB", "adapter MB")
