"""Metrics of runs as far as the reports read them, without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loftq_exp.report.collect import Found

COLUMNS = {
    "accuracy": {"title": "accuracy", "scores": ["accuracy"], "form": "{:.1%}", "scale": 1.0},
    "nll": {"title": "NLL", "scores": ["nll"], "form": "{:.4f}", "scale": 1.0},
}


def metrics(scores: dict[str, Any] | None = None, *, seed: int = 11, **settings: Any) -> dict[str, Any]:
    """Metrics of a run. `settings` are those of `quant`, or of another group by `group__name`."""
    quant = {"method": "qlora", "type": "nf", "bits": 4, "rank": 8, "iter": 0, "calibration": "none"}
    config: dict[str, Any] = {
        "quant": quant,
        "task": {"kind": "gsm8k"},
        "model": {"path": "org/tiny"},
        "train": {},
        "seed": seed,
    }
    for name, value in settings.items():
        group, _, own = name.rpartition("__")
        config.setdefault(group or "quant", {})[own] = value
    return {
        "label": f"tiny-{quant['rank']}rank-{quant['method']}",
        "config": config,
        "table": [COLUMNS[name] for name in COLUMNS if name in (scores or {"accuracy": None})],
        "scores": scores or {},
        "seconds": {"quantize": 2.0},
        "published": None,
        "init": {"bits_per_weight": quant["bits"] + 0.25, "mean_error": 0.1},
        "backbone_bytes": 2_000_000,
        "adapter_bytes": 100_000,
        "losses": [],
    }


def found(scores: dict[str, Any] | None = None, **settings: Any) -> Found:
    """A run that was found in no file."""
    return Found(Path("metrics.json"), metrics(scores, **settings))


def write(path: Path, value: Any) -> None:
    """Write JSON, with NaN as Python has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
