"""The interface of a task: rows of data, training features, requests to a model, and scores of its answers.

Tasks differ in shape (a target to generate, a label, a span, running text). A shape is a subclass of `Task` with three
methods: `encode` (rows to training features), `requests` (what a model is asked in evaluation) and `score` (answers to
numbers). Fine-tuning and evaluation use only these. A task never calls a model; it returns one of three kinds of request.
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
"""The key that names the split or file of a row, if several are joined."""


@dataclass(frozen=True)
class Request:
    """A request to a model for one answer per feature. The answers have the order of `features`."""

    what: str
    """A short description for the progress display."""
    features: list[Features]
    notes: list[Any] = field(default_factory=list)
    """One entry per feature with what `Task.score` needs beyond the row. Not passed to the model."""


@dataclass(frozen=True)
class Likelihood(Request):
    """Request the negative log-likelihood of each feature's `labels`. Answers: `Nll`."""


@dataclass(frozen=True)
class Generation(Request):
    """Request the text generated for each feature's `input_ids`, without sampling. Answers: `Generated`."""

    max_new_tokens: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Outputs(Request):
    """Request the model outputs with the given names, such as `logits`. Answers: a tuple of float32 arrays, one per name."""

    names: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class Nll:
    """The negative log-likelihood of one feature's labels: the sum in nats over `tokens` tokens, which may be 0."""

    total: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per token; None if there are no tokens."""
        return self.total / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Generated:
    """Generated text without special tokens, and its number of tokens including end of sequence."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Scored:
    """The scores of a split by name, and the samples behind them: predictions and gold answers."""

    scores: dict[str, float]
    samples: list[dict[str, Any]]
    scored_with: dict[str, Any] = field(default_factory=dict)
    """Versions and hashes by which a score can be traced, of a task that another library scores."""


@dataclass(frozen=True)
class Column:
    """A column of the results table: one score, or several in one cell, as in "90.4/90.5"."""

    title: str
    scores: tuple[str, ...]
    form: str = "{:.1%}"
    """Format of a score, for `str.format`."""
    scale: float = 1.0
    """Factor applied before formatting; 100 for scores that are published in points."""


TASKS: dict[str, type[Task]] = {}
"""The task class of each `task.kind`. A class is registered when its module is imported."""


class Task(ABC):
    """One task: its data, its training features and its scores.

    A class with a `kind` is the task of that `task.kind`. A class without one is a shape that several tasks share. The
    dataclass that annotates `config` declares the settings of the task.
    """

    kind: ClassVar[str]
    config: TaskConfig
    model_kind: ClassVar[str]
    """The `model.kind` that the task needs."""
    columns: tuple[str, ...]
    """The columns that must hold text in every row."""

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
        """Return the dataclass of the task's settings."""
        found: type[TaskConfig] = typing.get_type_hints(cls)["config"]
        return found

    # The data ---------------------------------------------------------------------------------------------------------

    def rows(self, split: Split) -> list[Row]:
        """Return the training or evaluation rows in order, at most `limit` per split or file.

        If `+` joins several splits or files, each row has the name of its own under `PART`. Raises UserError, one line, for
        data that cannot be read or used.
        """
        parts = self.source(split).parts()
        rows = []
        for part in parts:
            found = [self.with_line_feeds(row) for row in read_rows(part, self.flaw, self.limit(split))]
            rows += found if len(parts) == 1 else [row | {PART: part.name} for row in found]
        return rows

    def digest(self, split: Split) -> str:
        """Return a digest of the data behind `rows(split)` before the limit is applied, for provenance."""
        return "+".join(data_digest(part) for part in self.source(split).parts())

    def source(self, split: Split) -> DataSource:
        """Return the source of the rows of `split`."""
        return DataSource.of(self.config, split)

    def limit(self, split: Split) -> int | None:
        """Return the maximum number of rows per part of `split`. None: all."""
        return {"train": self.config.max_train_samples, "validation": None, "eval": self.config.max_eval_samples}[split]

    def units(self, rows: Sequence[Row]) -> list[Any]:
        """Return for each row the unit that it belongs to. Rows of equal units are held out together."""
        if self.columns:
            return [{name: row.get(name) for name in self.columns} for row in rows]
        return [{name: row[name] for name in row if name != PART} for row in rows]

    def flaw(self, row: Row) -> str | None:
        """Return why `row` is unusable, as the continuation of "line 7 ...". None for a valid row."""
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
        """Return a valid row with the line ends of its texts converted to LF."""
        return row | {column: with_line_feeds(row[column]) for column in self.columns}

    # The model --------------------------------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int | None:
        """Number of classification head outputs; 1 means regression, None that the task needs no such head."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the training features with labels, not necessarily one per row. May raise UserError."""

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the collator for the features of `encode`. It applies `task.pad_to_max_length`."""
        return Collator(pad_token_id(tokenizer), self.lengths if self.config.pad_to_max_length else {})

    @property
    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """The maximum length of a feature's `input_ids` and, if it differs, of its `labels`."""

    @property
    def length_settings(self) -> tuple[str, ...]:
        """The names of the settings that limit input and output length, for error messages."""
        return tuple(name for name in ("max_source_length", "max_target_length") if hasattr(self.config, name))

    @abstractmethod
    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Return the requests whose answers score a model on `rows`. May raise UserError."""

    @abstractmethod
    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return the scores of a model's `answers`: one list per request, one answer per feature."""

    @property
    @abstractmethod
    def table(self) -> tuple[Column, ...]:
        """The columns of the results table with the task's scores."""


def missing_column(row: Row, column: str) -> str:
    """Return the flaw of a row without `column`."""
    found = ", ".join(map(str, row)).encode(errors="backslashreplace").decode()
    return f"has no column '{column}' (found: {found or 'none'})"


def _lone_surrogate(text: str) -> str | None:
    """Return the first lone surrogate in `text`, as JSON escapes allow, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def mean_nll(answers: Sequence[Nll]) -> float:
    """Return nats per token over all answers, so that longer answers weigh more.

    Raises UserError if no answer has a token that can be scored.
    """
    tokens = sum(answer.tokens for answer in answers)
    if not tokens:
        raise UserError("task.max_target_length: no target has a token that can be scored; raise it or give other rows")
    return sum(answer.total for answer in answers) / tokens
