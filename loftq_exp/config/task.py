"""The settings that all tasks share. Settings of a single task are declared in its module of loftq_exp.tasks.

A task's settings are a frozen dataclass derived from `TaskConfig`. `SourceLength` and `TargetLength` are listed before it as
bases if the task uses their fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class TaskConfig:
    """The data that the model is fine-tuned and scored on: the settings of every task."""

    names: ClassVar[tuple[str, ...]] = ()
    """The choices of `name` if the task is a family of data sets."""

    kind: str = setting(
        "task that reads the data and computes the scores, such as gsm8k or glue", shapes=(ADAPTER, SCORES)
    )
    module: str | None = setting(
        "dotted name of a Python module that defines the task; null: a task of this or of an installed package",
        None,
        shapes=(),
    )
    name: str | None = setting(
        "data set of a task that has several: glue (such as mnli) or summarization (such as xsum)",
        None,
        shapes=(ADAPTER, SCORES),
    )
    dataset: str | None = setting(
        "Hub id of the data set; null: the task's own data set, or local files",
        None,
        shapes=(),
        locates=(ADAPTER, SCORES),
    )
    dataset_config: str | None = setting(
        "configuration (subset) of the Hub data set", None, shapes=(), locates=(ADAPTER, SCORES)
    )
    dataset_revision: str | None = setting(
        "branch, tag or commit of the Hub data set; null: the default branch",
        None,
        shapes=(),
        locates=(ADAPTER, SCORES),
    )
    train_split: str = setting(
        "training split of the Hub data set; + joins several", "train", shapes=(), locates=(ADAPTER,)
    )
    eval_split: str = setting(
        "evaluation split of the Hub data set; + joins several, which are scored together and separately",
        "test",
        shapes=(),
        locates=(SCORES,),
    )
    train_file: str | None = setting(
        "local .json, .jsonl, .csv or .parquet training file (wikitext: also .txt) in place of the Hub data set; + joins several",
        None,
        shapes=(),
        locates=(ADAPTER,),
    )
    eval_file: str | None = setting(
        "local evaluation file in place of the Hub data set; + joins several", None, shapes=(), locates=(SCORES,)
    )
    validation_split: str | None = setting(
        "split of the Hub data set to validate on during training; null: none",
        None,
        shapes=(),
        locates=(ADAPTER,),
    )
    validation_file: str | None = setting(
        "local file to validate on during training; null: task.validation_split, or else rows that are held out of the "
        "training rows",
        None,
        shapes=(),
        locates=(ADAPTER,),
    )
    validation_size: float | None = setting(
        "distinct training rows that are held out for validation and not trained on: a share below 1, or a number; null: 0.1 "
        "if there is neither task.validation_file nor task.validation_split",
        None,
        gt=0,
        shapes=(),
        locates=(ADAPTER,),
    )
    validation_seed: int = setting(
        "random seed of the rows that are held out for validation", 0, ge=0, shapes=(), locates=(ADAPTER,), before=0
    )
    max_train_samples: int | None = setting(
        "maximum number of training rows per split or file (wikitext: blocks in total), taken from the start; null: all",
        None,
        ge=1,
        lt=2**63,
        shapes=(ADAPTER,),
    )
    max_eval_samples: int | None = setting(
        "maximum number of evaluation rows per split or file (wikitext: blocks in total), taken from the start; null: all",
        None,
        ge=1,
        lt=2**63,
        shapes=(SCORES,),
    )
    pad_to_max_length: bool = setting(
        "pad each training batch to the task's maximum lengths instead of to its longest row",
        False,
        shapes=(ADAPTER,),
    )

    def __post_init__(self) -> None:
        if not self.names and self.name is not None:
            raise UserError(f"task.name={self.name}: task {self.kind} is one data set and has no names; leave it out")
        if self.names and self.name not in self.names:
            shown = "null" if self.name is None else self.name
            raise UserError(
                f"task.name={shown}: not a data set of task {self.kind}; choose from: {', '.join(self.names)}"
            )

        self._check_validation()

    def _check_validation(self) -> None:
        own = {
            f"task.{name}": getattr(self, name) for name in ("validation_file", "validation_split", "validation_size")
        }
        given = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                 for name, value in own.items() if value is not None]  # fmt: skip
        if len(given) > 1:
            raise UserError(f"{given[0]}: {given[1]} is given too; leave one out")
        if (self.validation_size or 0) > 1 and self.validation_size != int(self.validation_size or 0):
            raise UserError(
                f"task.validation_size={self.validation_size:g}: neither a share nor a number of rows; give a value below 1 or a "
                "whole number"
            )

    @classmethod
    def prepare(cls, values: Mapping[str, Any]) -> None:
        """Import the module that `values` names, so that its task is among `variants`. Raises UserError if it cannot."""
        if isinstance(values.get("module"), str):
            importlib.import_module("loftq_exp.tasks.outside").import_named(values["module"])

    @classmethod
    def variants(cls) -> Mapping[str, type[TaskConfig]]:
        """Return the settings dataclass of each task by `task.kind`."""
        # Imported by name, because config may not import the tasks, whose modules register their settings.
        tasks = importlib.import_module("loftq_exp.tasks").TASKS
        return {kind: task.settings() for kind, task in tasks.items()}

    @property
    def label(self) -> str:
        """The task's kind, followed by the name if the task is a family of data sets."""
        return f"{self.kind}-{self.name}" if self.name else self.kind


@dataclass(frozen=True)
class SourceLength:
    """Settings of a task whose inputs are truncated to a maximum length."""

    max_source_length: int = setting(
        "maximum input length in tokens: of a prompt, a document, the texts to classify, or a SQuAD window",
        128,
        ge=1,
        lt=LONGEST + 1,
        shapes=(ADAPTER, SCORES),
    )


@dataclass(frozen=True)
class TargetLength:
    """Settings of a task whose model generates text."""

    max_target_length: int = setting(
        "maximum target length in tokens, end-of-sequence token included; also the maximum number of generated tokens",
        256,
        ge=1,
        lt=LONGEST + 1,
        shapes=(ADAPTER, SCORES),
    )
