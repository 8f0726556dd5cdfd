from __future__ import annotations

import dataclasses
from typing import Any

from loftq_exp.report.table import cells, columns
from loftq_exp.tasks import load_task, task_settings


def metrics(scores: dict[str, float], published: dict[str, float] | None = None, **task: Any) -> dict[str, Any]:
    """As much of metrics.json as the table reads."""
    return {
        "config": {"quant": {"method": "qlora", "type": "nf", "bits": 4, "rank": 8, "iter": 0}},
        "table": [dataclasses.asdict(column) for column in load_task(task_settings(**task)).table],
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


GSM8K = metrics({"nll": 1.25, "accuracy": 0.345}, {"accuracy": 35.0}, kind="gsm8k")
MRPC = metrics({"accuracy": 0.899, "f1": 0.9}, {"accuracy": 89.9, "f1": 93.6}, kind="glue", name="mrpc")


def test_each_task_has_its_own_columns() -> None:
    assert shown(GSM8K)["NLL"] == "1.2500"
    assert shown(GSM8K)["accuracy"] == "34.5% (published 35.0%)"
    assert shown(MRPC)["accuracy/f1"] == "89.9/90.0 (published 89.9/93.6)"
    assert "NLL" not in shown(MRPC)


def test_published_scores_stand_beside_the_measured_ones_of_their_name() -> None:
    """Also where they belong to the column of the parts, and where only some are known."""
    parts = metrics({"accuracy": 0.9, "accuracy_matched": 0.85, "accuracy_mismatched": 0.95},
                    {"accuracy_matched": 90.4, "accuracy_mismatched": 90.5}, kind="glue", name="mnli",
                    dataset="nyu-mll/glue", eval_split="validation")  # fmt: skip
    row = shown(parts)
    assert row["accuracy"] == "90.0"
    assert row["accuracy matched/mismatched"] == "85.0/95.0 (published 90.4/90.5)"
    rouge = shown(
        metrics({"rouge1": 0.4, "rouge2": 0.2, "rougeL": 0.3}, {"rouge2": 20.2}, kind="summarization", name="xsum")
    )
    assert rouge["R1/R2/RL"] == "40.00/20.00/30.00 (published -/20.20/-)"
    assert (
        shown(metrics({"perplexity": 7.5}, {"perplexity": 5.24}, kind="wikitext"))["perplexity"]
        == "7.50 (published 5.24)"
    )


def test_a_sweep_over_tasks_has_the_columns_of_all() -> None:
    row = shown(MRPC, GSM8K)
    assert list(row) == ["run", "bits", "rank", "weight error", "accuracy/f1", "NLL", "accuracy", "init s", "train s",
                         "backbone MB", "adapter MB"]  # fmt: skip
    assert row["NLL"] == row["accuracy"] == "-"
    assert row["backbone MB"] == "2"


def test_a_run_that_was_not_scored() -> None:
    assert shown(metrics({}, {"accuracy": 35.0}, kind="gsm8k"))["accuracy"] == "- (published 35.0%)"
    assert shown(metrics({}, kind="squad"))["EM/F1"] == "-"


def test_no_run_at_all() -> None:
    assert columns([]) == ("run", "bits", "rank", "weight error", "init s", "train s", "backbone MB", "adapter MB")


def test_the_share_that_is_quantized_is_shown_where_it_is_not_all() -> None:
    whole, partial, lora, old = (
        GSM8K | {"init": GSM8K["init"] | counts}
        for counts in ({"linear_values": 800, "quantized_values": 800}, {"linear_values": 800, "quantized_values": 604},
                       {"linear_values": 800, "quantized_values": 0}, {})
    )  # fmt: skip
    assert "quantized" not in shown(whole, lora, old)
    assert shown(partial, whole)["quantized"] == "75.50%"
    assert shown(whole, partial)["quantized"] == "100.00%"
    assert shown(lora, partial)["quantized"] == shown(old, partial)["quantized"] == "-"
    assert list(shown(partial))[:4] == ["run", "bits", "quantized", "rank"]
