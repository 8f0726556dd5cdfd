"""TensorBoard: errors of the weights, losses, learning rate, scores, samples, resolved settings, hparams."""

from __future__ import annotations

import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.config.naming import shown
from loftq_exp.report.plot import error_map
from loftq_exp.report.values import score_tag, training_tag
from loftq_exp.report.weights import averaged

MOST_SAMPLES = 10
"""Number of samples that are written. A run's samples.jsonl has all of them."""


class Recorder:
    """A run's TensorBoard log. It is opened at the first write, so that a run with nothing to do adds no file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def empty(self) -> bool:
        """Whether nothing has been written for this run, by this process or an earlier one."""
        return not self._folder.exists()

    @cached_property
    def _writer(self) -> SummaryWriter:
        return SummaryWriter(str(self._folder))

    def close(self) -> None:
        """Flush and close the log."""
        if "_writer" in vars(self):
            self._writer.close()

    def config(self, config: RunConfig) -> None:
        """Write the resolved settings as text."""
        self._writer.add_text("config", "    " + json.dumps(config.to_dict(), indent=2).replace("\n", "\n    "))

    def errors(self, init: Initialised) -> None:
        """Write the relative weight errors: their histogram and mean by step, and a map of those that were kept.

        Step 0 is after quantization alone, step t after t alternating steps. The errors of a published checkpoint are unknown.
        """
        weights = [weight for weight in init.report["weights"] if weight["errors"]]
        by_layer = averaged([weights]) if weights else None
        if by_layer is None:
            return
        for step in range(max(len(weight["errors"]) for weight in weights)):
            errors = np.array([weight["errors"][step] for weight in weights if step < len(weight["errors"])])
            self._writer.add_histogram("init_error", errors, step)
            self._writer.add_scalar("init_error_mean", errors.mean(), step)
        self._writer.add_figure("init_error_by_layer", error_map(by_layer))

    def training(self, step: int, values: dict[str, float]) -> None:
        """Write what the trainer logs: loss, learning rate, gradient norm."""
        for name, value in values.items():
            self._writer.add_scalar(training_tag(name), value, step)
        self._writer.flush()

    def scores(self, config: RunConfig, init: Initialised, scores: dict[str, float], step: int) -> None:
        """Write the scores after `step` training steps with hparams, so that runs can be compared in the HPARAMS tab.

        Every run has the same hparams, because TensorBoard shows the columns of one run for all of a sweep.
        """
        quant, plan = config.quant, init.report.get("bits_plan", {})
        hparams: dict[str, Any] = {
            "model": config.model.basename, "task": config.task.label, "quant.method": quant.method, "quant.type": quant.type,
            "quant.bits": float(plan.get("code_bits", quant.bits)), "quant.rank": quant.rank, "quant.iter": quant.iter,
        }  # fmt: skip
        hparams |= shown(config) | {"quant.alpha": init.report["quant"]["scaling"] * quant.rank}
        metrics = {score_tag(name): score for name, score in scores.items()}
        self._writer.add_hparams(hparams, metrics, run_name=".", global_step=step)

    def samples(self, path: Path, step: int) -> None:
        """Write the first samples behind the scores as text: what the task records, predictions and gold answers."""
        with path.open() as file:
            some = [json.loads(line) for line in itertools.islice(file, MOST_SAMPLES)]
        blocks = (json.dumps(sample, indent=2, ensure_ascii=False).replace("\n", "\n    ") for sample in some)
        self._writer.add_text("samples", "\n\n---\n\n".join(f"    {block}" for block in blocks), step)
