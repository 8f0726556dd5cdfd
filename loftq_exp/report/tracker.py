"""What every experiment tracker is given of a run: its settings, losses, scores, errors of the weights, and report.

A tracker is a subclass with a few methods for its own library, in a module of its own. Its names are those of TensorBoard.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.report.record import write_json
from loftq_exp.report.values import score_tag, training_tag
from loftq_exp.whole import read_object

log = logging.getLogger(__name__)

PROJECT = "loftq_exp"
"""The project or experiment that the runs belong to."""
COLUMNS = ("weight", "bits", "rank", "step", "error")
"""Of the table of the weights' relative errors. Step 0 is after quantization alone."""
_COSTS = ("seconds", "compile_seconds", "peak_memory", "provenance")


class Tracker(ABC):
    """A run in an experiment tracker. It is opened at the first write, so that a run with nothing to do adds none.

    A file named after the tracker in the run's folder, the marker, has the run's `id` there and what was logged: of the training
    the last step by name, of the rest a digest. A resumed run therefore logs nothing twice. An error of the library ends the
    tracking with a warning, and not the run.
    """

    name: ClassVar[str]

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._marker = folder / f"{self.name}.json"
        self._known = read_object(self._marker)  # no other process changes it: the run holds the folder's lock
        self._opened = self._broken = False
        self._training: str | None = None

    # Its own library --------------------------------------------------------------------------------------------------

    @abstractmethod
    def open(self, known: str | None) -> str:
        """Open the run with the settings, or the one with the id `known`, and return its id."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table."""

    @abstractmethod
    def artifact(self, files: Sequence[Path]) -> None:
        """Write the files of the report as artifact."""

    @abstractmethod
    def end(self, failed: bool) -> None:
        """Close the run."""

    # A run ------------------------------------------------------------------------------------------------------------

    def begin_training(self, key: str) -> None:
        """Start to log the training with this `key`, or go on with it."""
        if self._known and self._known.get("training") != key:
            self._write(self._known | {"training": key, "steps": {}})
        self._training = key

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Write what the trainer logs: loss, learning rate, gradient norm, and the values of the validation.

        Values up to the last step that was logged are left out: a training that resumes from a checkpoint repeats them.
        """
        steps = self._known.get("steps", {})
        new = {name: value for name, value in values.items() if step > steps.get(name, -1)}
        if new:
            self._guarded(lambda: self.scalars(step, {training_tag(name): value for name, value in new.items()}))
            self._mark(steps=steps | dict.fromkeys(new, step))

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """Write the scores after `step` training steps."""
        self._once("scores", [dict(scores), step],
                   lambda: self.scalars(step, {score_tag(name): value for name, value in scores.items()}))  # fmt: skip

    def report(self, metrics: Mapping[str, Any], init: Initialised, step: int) -> None:
        """Write the errors of the weights, metrics.json, the report of the initialisation and the samples.

        Losses and scores that were not logged yet are written too, such as when the tracker was added later.
        """
        for at, values in _logged(metrics):
            self.training(at, values)
        if metrics["scores"]:
            self.scores(metrics["scores"], step)
        weights = [weight for weight in init.report["weights"] if weight["errors"]]
        self._once("errors", [[weight["name"], weight["errors"]] for weight in weights], lambda: self._errors(weights))
        files = (self.folder / "metrics.json", init.folder / "init_report.json", self.folder / "samples.jsonl")
        self._once("logged", {name: value for name, value in metrics.items() if name not in _COSTS},
                   lambda: self.artifact([file for file in files if file.is_file()]))  # fmt: skip

    def close(self, failed: bool) -> None:
        """Close the run if it was opened."""
        if self._opened:
            self._guarded(lambda: self.end(failed))

    def _errors(self, weights: Sequence[Mapping[str, Any]]) -> None:
        for step in range(max((len(weight["errors"]) for weight in weights), default=0)):
            errors = [weight["errors"][step] for weight in weights if step < len(weight["errors"])]
            self.scalars(step, {"init_error_mean": sum(errors) / len(errors)})
        rows = [[weight["name"], weight["bits"], weight["rank"], step, error]
                for weight in weights for step, error in enumerate(weight["errors"])]  # fmt: skip
        if rows:
            self.table("init_error", COLUMNS, rows)

    def _once(self, name: str, content: Any, work: Callable[[], None]) -> None:
        """Do the work unless it was done with this content, and mark it as done."""
        digest = digest_of([content])
        if self._known.get(name) != digest:
            self._guarded(work)
            self._mark(**{name: digest})

    def _mark(self, **done: Any) -> None:
        if not self._broken:
            self._write(self._known | done)

    def _write(self, known: dict[str, Any]) -> None:
        self._known = known
        write_json(self._marker, known)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            if not self._opened:
                known = self._known.get("id")
                found = self.open(str(known) if known else None)
                if found != known:  # a new run there, in which nothing was logged
                    self._write({"id": found, "training": self._training})
                self._opened = True
            work()
        except Exception as error:
            self._broken = True
            reason = " ".join(str(error).split())
            log.warning(
                "train.report_to: %s failed (%s: %.200s); the run goes on without it",
                self.name,
                type(error).__name__,
                reason,
            )


def _logged(metrics: Mapping[str, Any]) -> list[tuple[int, dict[str, float]]]:
    losses = [(step, {"loss": loss}) for step, loss in metrics["losses"]]
    validated = (metrics.get("validation") or {}).get("values", [])
    return losses + [(step, {f"eval_{name}": value for name, value in values.items()}) for step, values in validated]
