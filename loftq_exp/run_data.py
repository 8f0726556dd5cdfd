"""The task and the rows of a run: read and checked before any other work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from loftq_exp import ranks
from loftq_exp.artifact.origin import rows_digest
from loftq_exp.calibration.samples import calibration_origin
from loftq_exp.config import RunConfig
from loftq_exp.config.train import LOSS
from loftq_exp.errors import UserError
from loftq_exp.report.scored import lower_is_better
from loftq_exp.tasks import load_task, pairs_that_fit
from loftq_exp.tasks.base import Task
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.held_out import USUAL_VALIDATION, hold_out, without_parts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The task and the rows that the run's stages need. Rows of other stages are not read."""

    task: Task
    train: list[Row]
    validation: list[Row]
    eval: list[Row]

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the rows that a training sees, by their names in its record."""
        validated = {"validation": f"rows:{rows_digest(self.validation)}"} if self.validation else {}
        return {"train": self.task.digest("train"), **validated}


def read_data(config: RunConfig) -> RunData:
    """Read the rows of `config.stages`. Raises UserError if the task does not fit the settings, or its rows each other."""
    task = load_scored(config)
    _check_metric(config, task)
    stages = set(config.stages)
    if stages & {"finetune", "evaluate"} and task.model_kind != config.model.kind:
        raise UserError(f"task={config.task.kind}: needs a {task.model_kind} model, model.kind is {config.model.kind}; "
                        f"these fit: {pairs_that_fit()}; choose another model or task, or for an encoder another model.kind")  # fmt: skip
    if "quantize" in stages and config.quant.needs_text:
        calibration_origin(config)  # refuses a text that is not there before a model is downloaded or converted
    train = task.rows("train") if "finetune" in stages else []
    scored = task.rows("eval") if "evaluate" in stages else []
    train, validation = _validation_rows(config, task, train) if train and config.train.validates else (train, [])
    _check_not_scored(config, validation, scored)
    return RunData(task, train, validation, scored)


def log_data(config: RunConfig, data: RunData) -> None:
    """Log the validation rows. Warn about published scores without a column in the table: a wrong name or another split."""
    shown = [name for column in data.task.table for name in column.scores]
    for name in config.published or ():
        if name not in shown:
            log.warning("published.%s: not shown, this run's scores are %s", name, ", ".join(shown))
    if data.validation and ranks.is_main():
        source = data.task.source("validation")
        where = source.label if source.is_given else "held out of the training rows"
        log.info("validation: %d rows, %s; %d rows to train on", len(data.validation), where, len(data.train))


def _validation_rows(config: RunConfig, task: Task, train: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to validate on, of a source of their own or held out of the training rows."""
    if task.source("validation").is_given:
        return train, task.rows("validation")
    size, seed = config.task.validation_size or USUAL_VALIDATION, config.task.validation_seed
    return hold_out(train, task.units(train), size, seed)


def _check_not_scored(config: RunConfig, validation: Sequence[Row], scored: Sequence[Row]) -> None:
    """Raise UserError if rows are both validated on and scored: a score of the best step would be biased."""
    common = without_parts(validation) & without_parts(scored)
    given = next((f"task.{name}={value}" for name in ("validation_file", "validation_split")
                  if (value := getattr(config.task, name))), None)  # fmt: skip
    if common and given:
        raise UserError(f"{given}: {len(common)} of its rows are scored too, by which the scores would be chosen; give rows of "
                        "their own, or leave it out to hold out training rows")  # fmt: skip
    if common:
        log.warning(
            "task.validation_size: %d of the training rows that are held out are also scored; mend the data",
            len(common),
        )


def load_scored(config: RunConfig) -> Task:
    """Return the task. Raises UserError if it has no score that is named `objective`."""
    task = load_task(config.task)
    names = [name for column in task.table for name in column.scores]
    if config.objective and config.objective not in names:
        raise UserError(
            f"objective={config.objective}: {config.task.label} has no such score; choose from: {', '.join(names)}"
        )
    return task


def _check_metric(config: RunConfig, task: Task) -> None:
    """Raise UserError if train.metric_for_best_model is no score of the task, or one without a known better direction."""
    metric = config.train.metric_for_best_model
    names = [name for column in task.table for name in column.scores if lower_is_better(name) is not None]
    if metric not in (LOSS, *names):
        raise UserError(f"train.metric_for_best_model={metric}: not known; choose from: {', '.join((LOSS, *names))}")
