"""TensorBoard: errors of every weight and step, losses, learning rate, scores, resolved settings, hparams."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig


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
        """Write the relative weight errors: step 0 after quantization alone, step t after t alternating steps."""
        weights = init.report["weights"]
        for weight in weights:
            for step, error in enumerate(weight["errors"]):
                self._writer.add_scalar(f"init_error/{weight['name']}", error, step)
        for step in range(len(weights[0]["errors"])):
            self._writer.add_scalar("init_error_mean", sum(w["errors"][step] for w in weights) / len(weights), step)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Write what the trainer logs: loss, learning rate, gradient norm."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def scores(self, config: RunConfig, init: Initialised, scores: dict[str, float]) -> None:
        """Write the scores with hparams, so that runs can be compared in the HPARAMS tab."""
        quant, train, plan = config.quant, config.train, init.report.get("bits_plan", {})
        hparams: dict[str, Any] = {
            "model": config.model.basename, "method": quant.method, "type": quant.type, "bits": plan.get("code_bits", quant.bits),
            "rank": quant.rank, "iter": quant.iter, "alpha": init.report["quant"]["scaling"] * quant.rank, "task": config.task.label,
            "learning_rate": train.learning_rate, "seed": config.seed,
        }  # fmt: skip
        self._writer.add_hparams(hparams, {f"score/{name}": score for name, score in scores.items()}, run_name=".")
