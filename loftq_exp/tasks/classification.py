"""The shape of a task answered by a head: one label or one number for a text or a pair of texts."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.config import TaskConfig
from loftq_exp.config.task import SourceLength
from loftq_exp.tasks.base import PART, Column, Outputs, Request, Scored, Task, missing_column
from loftq_exp.tasks.data import Row, shown
from loftq_exp.tasks.encode import Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ClassificationConfig(SourceLength, TaskConfig):
    """The settings of a classification task."""


class Classification(Task):
    """Rows of one or two texts (`columns`) and a `label`.

    A subclass sets `columns`, either `labels` or `bounds`, and the `metrics` of loftq_exp.metrics. Each metric is a score of
    its own name. If `+` joins several splits or files, `NAME_PART` is the score of one of them.
    """

    model_kind = "classification"
    config: ClassificationConfig
    labels: tuple[str, ...] = ()
    """The meaning of labels 0, 1, ...; empty: regression, the label is a number between `bounds`."""
    bounds: tuple[float, float] = (0.0, 1.0)
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def num_labels(self) -> int:
        """One output per label; 1 for regression."""
        return len(self.labels) or 1

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`. The label must also be valid for the task."""
        problem = super().flaw(row)
        if problem:
            return problem
        if "label" not in row:
            return missing_column(row, "label")
        if _label(row, bool(self.labels)) is None or not self._allows(row):
            meanings = ", ".join(f"{number} ({meaning})" for number, meaning in enumerate(self.labels))
            allowed = meanings or f"a number from {self.bounds[0]:g} to {self.bounds[1]:g}"
            hidden = " (-1 stands for a hidden label)" if str(row["label"]).startswith("-1") else ""
            return f"holds {shown(row['label'])} in column 'label'{hidden} where one of these is needed: {allowed}"
        return None

    def _allows(self, row: Row) -> bool:
        low, high = (0, len(self.labels) - 1) if self.labels else self.bounds
        return low <= self._gold(row) <= high

    def _gold(self, row: Row) -> float:
        label = _label(row, bool(self.labels))
        assert label is not None  # checked by `flaw`
        return label

    @property
    def lengths(self) -> dict[str, int]:
        """The texts of a row form one sequence."""
        return {"input_ids": self.config.max_source_length}

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the texts of each row with the tokenizer's special tokens, the longer text truncated first, and its label."""
        features = self._features(rows, tokenizer)
        return [feature | {"labels": self._gold(row)} for feature, row in zip(features, rows, strict=True)]

    def _features(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        texts = [[row[column] for row in rows] for column in self.columns]
        encoded = tokenizer(*texts, truncation=True, max_length=self.config.max_source_length)
        return [{name: ids[index] for name, ids in encoded.items()} for index in range(len(rows))]

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request the head's outputs for each row."""
        return [Outputs("labels", self._features(rows, tokenizer))]

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return each of `metrics` over all rows and per part. A sample is the texts, predicted, gold and correct."""
        predicted = [int(logits.argmax()) if self.labels else float(logits[0]) for (logits,) in answers[0]]
        gold = [self._gold(row) for row in rows]
        scores = self._measured(predicted, gold)
        for part in self._parts():
            inside = [index for index, row in enumerate(rows) if row.get(PART) == part]
            own = self._measured([predicted[index] for index in inside], [gold[index] for index in inside])
            scores |= {f"{name}_{part}": value for name, value in own.items()}
        samples = [self._sample(row, *pair) for row, *pair in zip(rows, predicted, gold, strict=True)]
        return Scored(scores, samples)

    def _measured(self, predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
        from loftq_exp import metrics  # imported here, because it takes a second

        return metrics.compute(self.metrics, predicted, gold)

    def _sample(self, row: Row, predicted: float, gold: float) -> dict[str, Any]:
        sample = {column: row[column] for column in (*self.columns, PART) if column in row}
        if not self.labels:
            return sample | {"predicted": predicted, "gold": gold}
        meanings = {"predicted": self.labels[int(predicted)], "gold": self.labels[int(gold)]}
        return sample | meanings | {"correct": predicted == gold}

    def _parts(self) -> list[str]:
        """The names of the parts that are also scored separately; empty for a single part."""
        parts = self.source("eval").parts()
        return [part.name for part in parts] if len(parts) > 1 else []

    @property
    def table(self) -> tuple[Column, ...]:
        """One column with all metrics, as papers print them ("89.9/93.6"), and one with the parts if there are several."""
        whole = Column("/".join(self.metrics), self.metrics, "{:.1f}", 100)
        if not self._parts():
            return (whole,)
        title = f"{self.metrics[0]} {'/'.join(self._parts())}"
        return whole, Column(title, tuple(f"{self.metrics[0]}_{part}" for part in self._parts()), "{:.1f}", 100)


_WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")
_DECIMAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def _label(row: Row, whole: bool) -> float | None:
    """Return the row's label as a number, or as a whole number if `whole`. None if it is not one.

    A .csv file holds labels as text, and 1 as "1.0" if the column held floats.
    """
    value = row["label"]
    if isinstance(value, str):
        if not (_WHOLE if whole else _DECIMAL).fullmatch(value):
            return None
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if whole:
        return int(value) if value == value // 1 else None
    return float(value) if abs(value) <= sys.float_info.max else None
