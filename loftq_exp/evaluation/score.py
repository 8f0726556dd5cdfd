"""The evaluate stage: load the run's adapter, score it and save the samples behind the scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_exp import manifest, ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.origin import file_digest
from loftq_exp.config import RunConfig
from loftq_exp.costs import StageWatch
from loftq_exp.device import compute_device, compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.evaluation.evaluate import evaluate
from loftq_exp.progress import progress
from loftq_exp.tasks.base import Task
from loftq_exp.training.load import load_model
from loftq_exp.training.placement import placed

if TYPE_CHECKING:
    from loftq_exp.training.preflight import Prepared


def score(
    init: Initialised,
    adapter: Path | None,
    rows: Sequence[dict[str, Any]],
    prepared: Prepared,
    task: Task,
    config: RunConfig,
    samples: Path,
) -> dict[str, Any]:
    """Score `rows`, encoded in `prepared`, with the fine-tuned `adapter` or, if it is None, with the initial factors.

    Writes one line of JSON per row to `samples`: what the task records, predictions and gold answers. Raises UserError and
    writes nothing if an output of the model or a score is not finite.

    With several ranks, each answers a share of the batches and all return the same. Seconds and memory are the rank's own.
    """
    watch = StageWatch()
    device = compute_device(config.device)
    dtype = compute_dtype(device, config.train.bf16, config.train.fp16)
    batch_size = config.train.per_device_eval_batch_size
    with placed(config, device) as placement, progress("evaluate") as advance:
        model = load_model(init, adapter, config, device, dtype, task.num_labels, placement=placement)
        result = evaluate(model, prepared.tokenizer, task, rows, batch_size, advance, prepared.requests)
    _check_finite(result.scores)
    lines = [_line(number, sample) for number, sample in enumerate(result.samples, start=1)]
    return {
        "scores": result.scores,
        "rows": len(rows),
        "samples": ranks.from_main(lambda: _keep(lines, samples)),
        "tokens_generated": result.tokens_generated,
        **({"scored_with": result.scored_with} if result.scored_with else {}),
        **watch.costs(),
    }


def _keep(lines: Sequence[str], samples: Path) -> str:
    """Write the samples and return the file's digest."""
    manifest.write_listed(samples, "".join(lines))
    return file_digest(samples)


def _line(number: int, sample: dict[str, Any]) -> str:
    try:
        return json.dumps(sample, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(
            f"evaluate: the sample of row {number} holds NaN or an infinite value; no score is kept: check the row"
        ) from None


def _check_finite(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise UserError(f"evaluate: the score {name} is {value}; no score is kept: check the rows of task.eval_file, and the "
                            "weights at model.path")  # fmt: skip
