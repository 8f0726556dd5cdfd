"""metrics.json: the settings, results and provenance of one run in one file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.tasks.base import Column
from loftq_exp.whole import write_whole

FORMAT = 2
"""Version of the records in a run's folder: config.json, finetune.json, evaluate.json, metrics.json. Version 0.1 wrote none."""

_COSTS = ("seconds", "compile_seconds", "peak_memory")


def assemble(
    config: RunConfig,
    init: Initialised,
    finetuned: dict[str, Any] | None,
    evaluated: dict[str, Any] | None,
    table: Sequence[Column],
) -> dict[str, Any]:
    """Return the run's metrics from the records of its stages. A stage that was skipped keeps its earlier times and memory.

    `table` holds the task's columns. It is stored, so that a sweep's table can be built from the metrics alone.
    """
    totals = init.report["totals"]
    quantized = totals | {"provenance": init.report.get("provenance")}
    stages = {"quantize": quantized, "finetune": finetuned, "evaluate": evaluated}
    return {
        "format": FORMAT,
        "label": config.label,
        "config": config.to_dict(),
        "scores": evaluated["scores"] if evaluated else {},
        "table": [dataclasses.asdict(column) for column in table],
        "scored_adapter": evaluated["adapter"] if evaluated else None,
        **({"scored_with": evaluated["scored_with"]} if evaluated and "scored_with" in evaluated else {}),
        "published": config.published,
        "init": {name: value for name, value in totals.items() if name not in _COSTS},
        "bits_plan": init.report.get("bits_plan"),
        **{cost: {name: record.get(cost) for name, record in stages.items() if record} for cost in _COSTS},
        "backbone_bytes": init.backbone_bytes,
        "adapter_bytes": init.adapter_bytes,
        "finetune": {name: finetuned.get(name) for name in ("steps", "rows", "ranks", "backbone", "dtype")}
        if finetuned
        else None,
        "validation": finetuned.get("validation") if finetuned else None,
        "losses": finetuned["losses"] if finetuned else [],
        "data": {**(finetuned["data"] if finetuned else {}), **(evaluated["data"] if evaluated else {})},
        "model": init.report["model"],
        **_made_by(stages),
    }


def _made_by(stages: dict[str, Any]) -> dict[str, Any]:
    """Return what made the results: the provenance of each stage when it ran, and that of the last one.

    Records of older versions have none. Theirs stays unknown, because a later run did not make them.
    """
    made = {name: record.get("provenance") for name, record in stages.items() if record}
    return {"provenance": list(made.values())[-1] or {}, "made_by": made}


def as_json(value: Any) -> str:
    """Return the text of a record. Raises ValueError for NaN and infinities, which JSON does not allow."""
    return json.dumps(value, indent=1, default=str, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a record atomically. Raises ValueError for NaN and infinities."""
    write_whole(path, as_json(value))
