"""The loggers of a run that `train.report_to` names, behind one interface."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.report.tensorboard import SCORES, START, Recorder
from loftq_exp.report.tracker import Tracker

_TRACKERS = {"wandb": "WandbTracker", "mlflow": "MlflowTracker", "trackio": "TrackioTracker"}
"""The class of each tracker, in the module of its name. The name is also that of its package and of the extra."""


def check_loggers(config: RunConfig) -> None:
    """Raise UserError if a logger's package is not installed."""
    for name in config.train.report_to:
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(f"train.report_to=[{name}]: not installed; run: pip install 'loftq_exp[{name}]'")


class Loggers:
    """All loggers of the run in `folder`. Only rank 0 may write."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._board = Recorder(folder / "tensorboard") if "tensorboard" in config.train.report_to else None
        self._trackers: list[Tracker] = [
            _tracker(name)(config, folder) for name in config.train.report_to if name in _TRACKERS
        ]

    def started(self, init: Initialised) -> None:
        """Write the settings and the errors of the weights, at the start of a run that has no log yet."""
        if self._board and not self._board.holds(START):
            with self._board.section(START):
                self._board.config(self._config)
                self._board.errors(init)

    def begin_training(self, key: str, history: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Start the log of the training with this `key`, with what it had logged before the checkpoint that it resumes from."""
        if self._board:
            self._board.begin_training(history)
        for tracker in self._trackers:
            tracker.begin_training(key)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Write what the trainer logs."""
        for logger in (self._board, *self._trackers):
            if logger:
                logger.training(step, values)

    def scores(self, key: str, init: Initialised, scores: dict[str, float], samples: Path, step: int) -> None:
        """Write the scores with this `key` after `step` training steps, and the first samples behind them."""
        if self._board:
            with self._board.section(f"{SCORES}-{key[:16]}"):
                self._board.scores(self._config, init, scores, step)
                self._board.samples(samples, step)
        for tracker in self._trackers:
            tracker.scores(scores, step)

    def report(self, metrics: dict[str, Any], init: Initialised, step: int) -> None:
        """Write the report of the finished run."""
        for tracker in self._trackers:
            tracker.report(metrics, init, step)

    def close(self, failed: bool) -> None:
        """Flush and close all logs."""
        if self._board:
            self._board.close()
        for tracker in self._trackers:
            tracker.close(failed)


def _tracker(name: str) -> type[Tracker]:
    found: type[Tracker] = getattr(importlib.import_module(f"loftq_exp.report.{name}_tracker"), _TRACKERS[name])
    return found
