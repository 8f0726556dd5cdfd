"""MetaMathQA (Yu et al., 2023) to train on and GSM8K to score, as on PEFT's board method_comparison/MetaMathQA."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Task
from loftq_exp.tasks.data import DataSource, Row, Split, with_line_feeds
from loftq_exp.tasks.generation import Judgement, PromptConfig, PromptTask
from loftq_exp.tasks.gsm8k import GOLD_MARK, GSM8K, final_number
from loftq_exp.tasks.numbers import numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
"""The prompt of PEFT's board."""
ANSWER_MARK = "The answer is:"
"""The mark before the final answer in MetaMathQA's responses."""
TRAINING = ("query", "response")
SOURCES = {
    "train": ("meta-math/MetaMathQA", None),
    "validation": ("meta-math/MetaMathQA", None),
    "eval": ("openai/gsm8k", "main"),
}
"""Hub id and configuration of each split's rows."""


class MetaMath(PromptTask):
    """Training rows of `query` and `response`, and evaluation rows of GSM8K's `question` and `answer`.

    Scores as `PromptTask`: `nll` of GSM8K's own solutions, and `accuracy` of the final number.
    """

    kind = "metamath"
    config: PromptConfig
    columns = GSM8K.columns

    def __init__(self, config: PromptConfig) -> None:
        super().__init__(config)
        self._scored = GSM8K(config)

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. Without `task.dataset`, the two data sets of the board."""
        own = super().source(split)
        dataset, part = SOURCES[split]
        return own if own.dataset else dataclasses.replace(own, dataset=dataset, dataset_config=part)

    def rows(self, split: Split) -> list[Row]:
        """As `Task.rows`. Raises UserError for a row with the columns of the other split."""
        found = super().rows(split)
        needed = self.columns if split == "eval" else TRAINING
        for number, row in enumerate(found, start=1):
            if needed[0] not in row:
                raise UserError(
                    f"{self.source(split).label}: row {number} has no column '{needed[0]}'; the {split} rows of metamath "
                    f"have {' and '.join(needed)}"
                )
        return found

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`, for the columns of the row's split. A scored row must hold a gold number as in GSM8K."""
        return _Training(self.config).flaw(row) if TRAINING[0] in row else self._scored.flaw(row)

    def units(self, rows: Sequence[Row]) -> list[Any]:
        """As `Task.units`: MetaMathQA rewords one question several times."""
        return [row.get("original_question") or row for row in rows]

    def with_line_feeds(self, row: Row) -> Row:
        """As `Task.with_line_feeds`."""
        columns = TRAINING if TRAINING[0] in row else self.columns
        return row | {column: with_line_feeds(row[column]) for column in columns}

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the question in the board's template."""
        return TEMPLATE.format(query=row.get("query") or row["question"])

    def target(self, row: Row) -> str:
        """Return the response or solution after a blank, unchanged."""
        return " " + str(row.get("response") or row["answer"]).strip()

    def judge(self, row: Row, generated: str) -> Judgement:
        """Compare the number after the last `The answer is:` or `####`, or else the last number, with the gold number."""
        response = row.get(TRAINING[1])  # of a row that is held out of the training rows
        gold = answer_number(str(response)) if response else final_number(self._scored.target(row))
        predicted = answer_number(generated)
        return Judgement(predicted, gold, correct=predicted is not None and predicted == gold)


class _Training(MetaMath):
    """The check of a training row's columns."""

    columns = TRAINING

    def flaw(self, row: Row) -> str | None:
        return Task.flaw(self, row)


def answer_number(text: str) -> float | None:
    """Return the first number after the last mark of an answer in `text`, or its last number. None: there is none."""
    for mark in (ANSWER_MARK, GOLD_MARK):
        if mark in text:
            return next(numbers(text.rpartition(mark)[2]), None)
    return next(reversed(list(numbers(text))), None)
