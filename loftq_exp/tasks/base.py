"""What a task is: rows of data, what a model is trained on and asked of them, and the scores of its answers.

Tasks differ in shape (a target to generate, a label, a span, running text), and a shape is a subclass of `Task` that says
three things: `encode` (rows to training features), `requests` (what a model is asked when it is scored) and `score` (answers
to numbers). Fine-tuning and evaluation know only these. No task touches a model: it asks through one of three requests.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from loftq_exp.config import TaskConfig
from loftq_exp.errors import UserError
from loftq_exp.tasks.data import DataSource, Row, Split, data_digest, read_rows, shown, with_line_feeds
from loftq_exp.tasks.encode import Collator, Features, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = "part"
"""The key under which a row of several joined splits or files carries the name of its own."""


@dataclass(frozen=True)
class Request:
    """Something asked of a model, once for each of `features`; the answers come back in their order."""

    what: str
    """What is being done, in a few words for the progress display."""
    features: list[Features]
    notes: list[Any] = field(default_factory=list)
    """What `Task.score` needs to know of each feature, where it is more than the row; the model does not see it."""


@dataclass(frozen=True)
class Likelihood(Request):
    """The negative log-likelihood of each feature's `labels`. Answers: `Nll`."""


@dataclass(frozen=True)
class Generation(Request):
    """The text that the model writes for each feature's `input_ids`, without sampling. Answers: `Generated`."""

    max_new_tokens: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Outputs(Request):
    """The model's outputs of the given names, such as `logits`. Answers: a tuple of float32 arrays, one for each name."""

    names: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class Nll:
    """The negative log-likelihood of one feature's labels: its sum in nats over `tokens` tokens, of which there may be none."""

    total: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats a token; None where there is none."""
        return self.total / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Generated:
    """What a model wrote, special tokens left out, and how many tokens that took, the end of sequence included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Scored:
    """The scores of a split by name, and the samples that made them: predictions beside gold."""

    scores: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Column:
    """A column of the results table: one score, or a few that are read together, as in "90.4/90.5"."""

    title: str
    scores: tuple[str, ...]
    form: str = "{:.1%}"
    """How a score is written, as `str.format` takes it."""
    scale: float = 1.0
    """What a score is multiplied by before it is written; 100 for scores that are published in points."""


TASKS: dict[str, type[Task]] = {}
"""The task of each `task.kind`. A class enters itself when its module is imported."""


class Task(ABC):
    """One task: its data, and how a model learns it and is scored on it.

    A class with a `kind` is the task of that `task.kind`; one without is a shape that tasks have in common. The dataclass
    that annotates `config` declares the settings of the task.
    """

    kind: ClassVar[str]
    config: TaskConfig
    model_kind: ClassVar[str]
    """The `model.kind` that the task needs."""
    columns: tuple[str, ...]
    """The columns that every row must fill with text."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    def __init_subclass__(cls) -> None:
        if "kind" not in vars(cls):
            return
        other = TASKS.setdefault(cls.kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two tasks have the kind {cls.kind!r}: {other.__module__} and {cls.__module__}")

    @classmethod
    def settings(cls) -> type[TaskConfig]:
        """The dataclass of the task's settings."""
        found: type[TaskConfig] = typing.get_type_hints(cls)["config"]
        return found

    # The data ---------------------------------------------------------------------------------------------------------

    def rows(self, split: Split) -> list[Row]:
        """The rows to train on or to score, in order: of each part, those that `limit` allows.

        Where `+` joins several splits or files, each row carries the name of its own under `PART`. Raises UserError, one
        line, for data that cannot be read or used.
        """
        parts = self.source(split).parts()
        rows = []
        for part in parts:
            found = [self.with_line_feeds(row) for row in read_rows(part, self.flaw, self.limit(split))]
            rows += found if len(parts) == 1 else [row | {PART: part.name} for row in found]
        return rows

    def digest(self, split: Split) -> str:
        """What identifies the data behind `rows(split)`, before the limit is applied; for provenance."""
        return "+".join(data_digest(part) for part in self.source(split).parts())

    def source(self, split: Split) -> DataSource:
        """Where the rows of `split` come from."""
        return DataSource.of(self.config, split)

    def limit(self, split: Split) -> int | None:
        """The most rows of each part of `split` to use; None: all."""
        return self.config.max_train_samples if split == "train" else self.config.max_eval_samples

    def flaw(self, row: Row) -> str | None:
        """What makes `row` unusable, in words that go on from "line 7 ..."; None for a sound row."""
        for column in self.columns:
            if column not in row:
                return missing_column(row, column)
            value = row[column]
            if value is None:
                return f"holds nothing in column '{column}'"
            if not isinstance(value, str):
                return f"holds {shown(value)} in column '{column}' where text is needed"
            if not value.strip():
                return f"holds an empty text in column '{column}'"
            if (half := _lone_surrogate(value)) is not None:
                return f"holds {half!r}, half of a character, in column '{column}', which no tokenizer reads"
        return None

    def with_line_feeds(self, row: Row) -> Row:
        """A sound row with the line ends of its texts as LF."""
        return row | {column: with_line_feeds(row[column]) for column in self.columns}

    # The model --------------------------------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int | None:
        """Outputs of the classification head that the task needs: 1 is regression; None: the task needs no such head."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """What a model is trained on: features with labels, not necessarily one for each row. May raise UserError."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """What makes batches of `encode`'s features; heeds `task.pad_to_max_length`."""
        return Collator(pad_token_id(tokenizer), self.lengths if self.config.pad_to_max_length else {})

    @property
    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """The length of a feature at most, for `input_ids` and, where they have another one, for `labels`."""

    @property
    def length_settings(self) -> tuple[str, ...]:
        """The settings of the task that limit what a model reads and writes, as an error names them."""
        return tuple(name for name in ("max_source_length", "max_target_length") if hasattr(self.config, name))

    @abstractmethod
    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """What a model is asked in order to score it on `rows`. May raise UserError."""

    @abstractmethod
    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """The scores of a model that gave `answers`: a list for each of `requests`, an answer for each of its features."""

    @property
    @abstractmethod
    def table(self) -> tuple[Column, ...]:
        """The columns of the results table that show the task's scores."""


def missing_column(row: Row, column: str) -> str:
    """The flaw of a row without `column`."""
    found = ", ".join(map(str, row)).encode(errors="backslashreplace").decode()
    return f"has no column '{column}' (found: {found or 'none'})"


def _lone_surrogate(text: str) -> str | None:
    """The first half of a character that stands in `text` without the other half, as JSON's escapes allow; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def mean_nll(answers: Sequence[Nll]) -> float:
    """Nats a token over all answers, so that a long one weighs more than a short one.

    Raises UserError where no token of any could be scored.
    """
    tokens = sum(answer.tokens for answer in answers)
    if not tokens:
        raise UserError("task.max_target_length: no target has a token that can be scored; raise it or give other rows")
    return sum(answer.total for answer in answers) / tokens
