"""The numbers of one run: its scores, and what else it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def scores_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one run that are finite numbers."""
    return _finite(metrics["scores"])


def measures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what else one run measured, by name: bits and errors a weight, rank, bytes, seconds, peak memory in bytes."""
    init, seconds = metrics["init"], metrics["seconds"]
    return _finite({
        "bits_per_weight": init.get("bits_per_weight"),
        "weight_error": init.get("mean_error"),
        "output_error": init.get("mean_output_error"),
        "rank": metrics["config"]["quant"]["rank"],
        "backbone_bytes": metrics["backbone_bytes"],
        "adapter_bytes": metrics["adapter_bytes"],
        "init_seconds": seconds.get("quantize"),
        "train_seconds": seconds.get("finetune"),
        **{
            f"peak_memory_{stage}_{kind}": size
            for stage, sizes in (metrics.get("peak_memory") or {}).items()
            for kind, size in (sizes or {}).items()
        },
    })  # fmt: skip


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def training_tag(name: str) -> str:
    """Return the name that loggers show for a value of the trainer's log: `train/loss`, or `validation/loss`."""
    return f"validation/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def score_tag(name: str) -> str:
    """Return the name that loggers show for a score."""
    return f"score/{name}"
