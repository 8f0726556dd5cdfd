"""The evaluate stage: loads the adapter that the run has, scores it and keeps the samples that made the scores."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.device import compute_device, compute_dtype, peak_memory
from loftq_exp.evaluation.evaluate import evaluate
from loftq_exp.progress import progress
from loftq_exp.tasks.base import Task
from loftq_exp.training.load import load_model, load_tokenizer


def score(
    init: Initialised,
    adapter: Path | None,
    rows: Sequence[dict[str, Any]],
    task: Task,
    config: RunConfig,
    samples: Path,
) -> dict[str, Any]:
    """Scores `rows` with the fine-tuned `adapter`, or with the initial factors where it is None.

    Writes one line of JSON a row to `samples`: what the task keeps of each, predictions beside gold.
    """
    began = time.perf_counter()
    device = compute_device(config.device)
    dtype = compute_dtype(device, config.train.bf16)
    model = load_model(init, adapter, config, device, dtype, task.num_labels)
    tokenizer = load_tokenizer(init, config)
    with progress("evaluate") as advance:
        result = evaluate(model, tokenizer, task, rows, config.train.per_device_eval_batch_size, advance)
    beside = samples.with_name(f".{samples.name}.tmp")
    beside.write_text("".join(json.dumps(sample) + "\n" for sample in result.samples))
    beside.replace(samples)
    return {
        "scores": result.scores,
        "rows": len(rows),
        "tokens_generated": result.tokens_generated,
        "seconds": time.perf_counter() - began,
        "peak_memory": peak_memory(),
    }
