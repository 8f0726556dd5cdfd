"""TensorBoard: errors of the weights, losses, learning rate, scores, samples, resolved settings, hparams."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from loftq_exp.whole import workspace_beside

START, TRAINING, SCORES = "start", "training", "scores"
"""Sections, as the ends of the names of their files: settings and errors; losses; and `scores-KEY` of each evaluation."""
_SECTIONS = rf"\.({START}|{TRAINING}|{SCORES}-\w+)$"
MOST_SAMPLES = 10
"""Number of samples that are written. A run's samples.jsonl has all of them."""


class Recorder:
    """A run's TensorBoard log, in a file for each section: what a killed process wrote of one is replaced, so nothing is
    logged twice. A run with nothing to do adds no file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def holds(self, section: str) -> bool:
        """Whether a section was written as a whole, or the log is of an older version, which has no sections."""
        files = list(self._folder.glob("*tfevents*"))
        return any(file.suffix == f".{section}" or not re.search(_SECTIONS, file.name) for file in files)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Write what the block writes as one section. It appears when the block ends, in the place of an earlier one."""
        self.close()
        with workspace_beside(self._folder) as partial:
            self._writer = SummaryWriter(str(partial))
            try:
                yield
            finally:
                self.close()
            self._remove(name)
            self._folder.mkdir(exist_ok=True)
            for file in sorted(partial.iterdir()):
                file.rename(self._folder / f"{file.name}.{name}")

    def begin_training(self, history: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Start the log of a training, with what it had logged before the checkpoint that it resumes from."""
        self._remove(TRAINING)
        self._writer = SummaryWriter(str(self._folder), filename_suffix=f".{TRAINING}")
        for step, values in history:
            self.training(step, values)

    def _remove(self, section: str) -> None:
        for file in self._folder.glob(f"*tfevents*.{section}"):
            file.unlink()

    def close(self) -> None:
        """Flush and close what is open."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

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
