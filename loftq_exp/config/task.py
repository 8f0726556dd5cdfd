"""What the settings of all tasks have in common. A task declares its own in its module of loftq_exp.tasks.

A task's settings are a frozen dataclass: `TaskConfig` and, before it in the list of bases, `SourceLength` and `TargetLength`
where the task uses their fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class TaskConfig:
    """What the model is fine-tuned and scored on: what every task has."""

    names: ClassVar[tuple[str, ...]] = ()
    """The choices of `name` where the task is a family of data sets."""

    kind: str = setting("which task of loftq_exp.tasks reads the data and scores", shapes=(ADAPTER, SCORES))
    name: str | None = setting(
        "which data set of the task, where it is a family (glue, summarization)", None, shapes=(ADAPTER, SCORES)
    )
    dataset: str | None = setting(
        "data set on the hub; none: the task's own, or local files", None, shapes=(), locates=(ADAPTER, SCORES)
    )
    dataset_config: str | None = setting(
        "configuration of the hub data set", None, shapes=(), locates=(ADAPTER, SCORES)
    )
    dataset_revision: str | None = setting(
        "branch, tag or commit of the hub data set; none: the default branch",
        None,
        shapes=(),
        locates=(ADAPTER, SCORES),
    )
    train_split: str = setting(
        "split of the hub data set to train on; + joins several", "train", shapes=(), locates=(ADAPTER,)
    )
    eval_split: str = setting(
        "split of the hub data set to score on; + joins several, each also scored alone",
        "test",
        shapes=(),
        locates=(SCORES,),
    )
    train_file: str | None = setting(
        "local .json, .jsonl or .csv file to train on instead of the hub; + joins several",
        None,
        shapes=(),
        locates=(ADAPTER,),
    )
    eval_file: str | None = setting(
        "local file to score on instead of the hub; + joins several", None, shapes=(), locates=(SCORES,)
    )
    max_train_samples: int | None = setting(
        "train on the first so many rows of each split or file (wikitext: blocks in all); none: all",
        None,
        ge=1,
        shapes=(ADAPTER,),
    )
    max_eval_samples: int | None = setting(
        "score the first so many rows of each split or file (wikitext: blocks in all); none: all",
        None,
        ge=1,
        shapes=(SCORES,),
    )
    pad_to_max_length: bool = setting(
        "pad each training batch to the lengths that the task allows instead of its longest row",
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

    @classmethod
    def variants(cls) -> Mapping[str, type[TaskConfig]]:
        """The settings of each task by `task.kind`."""
        # By name, because config lies below the tasks: their modules plug their settings in here.
        tasks = importlib.import_module("loftq_exp.tasks").TASKS
        return {kind: task.settings() for kind, task in tasks.items()}

    @property
    def label(self) -> str:
        """The task in a word: its kind and, where it is a family, the name."""
        return f"{self.kind}-{self.name}" if self.name else self.kind


@dataclass(frozen=True)
class SourceLength:
    """For a task whose rows are cut to a length."""

    max_source_length: int = setting(
        "tokens of the prompt, of the texts to classify or of a window at most", 128, ge=1, shapes=(ADAPTER, SCORES)
    )


@dataclass(frozen=True)
class TargetLength:
    """For a task whose model writes."""

    max_target_length: int = setting(
        "tokens of the target at most, end of sequence included; also the tokens generated",
        256,
        ge=1,
        shapes=(ADAPTER, SCORES),
    )
