"""What a task is: rows of data, a prompt and a target for each, and a judgement of what a model wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from loftq_exp.config import TaskConfig
from loftq_exp.tasks.data import DataSource, Row, Split, data_digest, read_rows


@dataclass(frozen=True)
class Judgement:
    """A model's answer beside the gold one. `predicted` is None where the model's text holds no answer."""

    predicted: float | None
    gold: float | None
    correct: bool


class Task(ABC):
    """One task. A subclass names its columns and says how a row becomes a prompt, a target and a judgement."""

    model_kind: ClassVar[str] = "causal"
    """The `model.kind` that the task needs."""
    columns: ClassVar[tuple[str, ...]]
    """The columns that every row must fill with text."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def rows(self, split: Split) -> list[Row]:
        """The rows to train on or to score, `task.max_train_samples` or `task.max_eval_samples` at most, in file order.

        Raises UserError, one line, for data that cannot be read or used.
        """
        return read_rows(self.source(split), self.flaw)[: self.limit(split)]

    def digest(self, split: Split) -> str:
        """What identifies the data behind `rows(split)`, before the limit is applied; for provenance."""
        return data_digest(self.source(split))

    def source(self, split: Split) -> DataSource:
        """Where the rows of `split` come from."""
        return DataSource.of(self.config, split)

    def limit(self, split: Split) -> int | None:
        """The most rows of `split` to use; None: all."""
        return self.config.max_train_samples if split == "train" else self.config.max_eval_samples

    def flaw(self, row: Row) -> str | None:
        """What makes `row` unusable, in words that go on from "line 7 ..."; None for a sound row."""
        for column in self.columns:
            if column not in row:
                return f"has no column '{column}' (found: {', '.join(map(str, row)) or 'none'})"
            value = row[column]
            if value is None:
                return f"holds nothing in column '{column}'"
            if not isinstance(value, str):
                return f"holds {value!r} in column '{column}' where text is needed"
            if not value.strip():
                return f"holds an empty text in column '{column}'"
        return None

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """The text that the model is given."""

    @abstractmethod
    def target(self, row: Row) -> str:
        """The text that the model should go on with, without the end-of-sequence token."""

    @abstractmethod
    def judge(self, row: Row, generated: str) -> Judgement:
        """The model's own continuation `generated` (without the prompt) against the row's gold answer."""
