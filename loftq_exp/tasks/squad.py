"""SQuAD v1.1 (Rajpurkar et al., 2016): the span of a paragraph that answers a question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loftq_exp.config import TaskConfig
from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.config.task import SourceLength
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Column, Outputs, Request, Scored, Task, missing_column
from loftq_exp.tasks.data import Row, shown, with_line_feeds
from loftq_exp.tasks.encode import Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SquadConfig(SourceLength, TaskConfig):
    """The settings of windows over the context, and of finding an answer in them."""

    doc_stride: int = setting(
        "number of tokens by which windows over a long context overlap",
        128,
        ge=0,
        lt=LONGEST + 1,
        shapes=(ADAPTER, SCORES),
    )
    n_best_size: int = setting(
        "number of best start and end positions that are paired to find the answer",
        20,
        ge=1,
        lt=LONGEST + 1,
        shapes=(SCORES,),
    )
    max_answer_length: int = setting(
        "maximum length of an answer in tokens", 30, ge=1, lt=LONGEST + 1, shapes=(SCORES,)
    )


Offsets = list[tuple[int, int] | None]
"""For each token its [start, end) characters in the context; None for tokens outside the context."""


@dataclass(frozen=True)
class Window:
    """A question with as much of its context as fits. Windows overlap by `task.doc_stride` tokens."""

    row: int
    """Index of the window's row."""
    features: Features
    offsets: Offsets


@dataclass(frozen=True)
class Span:
    """A candidate answer: the sum of its start and end logits, and its [start, end) characters in the context."""

    logit: float
    start: int
    end: int


class Squad(Task):
    """Rows of `id`, `context`, `question` and `answers` (`text` and `answer_start`, two lists that are not empty).

    The model is trained on the first answer. `exact_match` and `f1` use the best of all answers, as in the paper. A .csv
    file holds `answers` as JSON. The loss in transformers also counts padding as possible answer positions. A window's loss
    therefore depends on the longest window of its batch unless `task.pad_to_max_length` is set. Predictions do not.
    """

    kind = "squad"
    model_kind = "question-answering"
    config: SquadConfig
    columns = ("id", "context", "question")

    def units(self, rows: Sequence[Row]) -> list[Any]:
        """As `Task.units`: the questions on one context."""
        return [row["context"] for row in rows]

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`. There must also be an answer, and it must be at its stated position in the context."""
        problem = super().flaw(row)
        if problem:
            return problem
        if "answers" not in row:
            return missing_column(row, "answers")
        answers = _answers(row)
        if answers is None:
            return "holds no object with the lists 'text' and 'answer_start', of one length, in column 'answers'"
        if not answers:
            return "holds no answer in column 'answers', and SQuAD v1.1 asks nothing without one"
        for text, start in answers:
            if start < 0 or _plain(row["context"][start : start + len(text)]) != _plain(text):
                return f"holds the answer {shown(text)}, which does not stand at character {start} of its context"
        return None

    def with_line_feeds(self, row: Row) -> Row:
        """As `Task.with_line_feeds`. If that shortens the context, answer positions are shifted accordingly."""
        changed = super().with_line_feeds(row)
        if changed["context"] == row["context"]:
            return changed
        answers = _answers(row) or []
        starts = [len(with_line_feeds(row["context"][:start])) for _, start in answers]
        return changed | {"answers": {"text": [with_line_feeds(text) for text, _ in answers], "answer_start": starts}}

    @property
    def lengths(self) -> dict[str, int]:
        """Question and context form one sequence, a window."""
        return {"input_ids": self.config.max_source_length}

    # Windows ----------------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return every window with the first and last token of the answer. Both are 0 if the window lacks the answer."""
        features = []
        for window in self._windows(rows, tokenizer):
            text, start = (_answers(rows[window.row]) or [])[0]
            first, last = token_span(window.offsets, start, start + len(text)) or (0, 0)
            features.append(window.features | {"start_positions": first, "end_positions": last})
        return features

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request a start logit and an end logit for each token of each window."""
        windows = self._windows(rows, tokenizer)
        features = [window.features for window in windows]
        return [Outputs("answers", features, windows, names=("start_logits", "end_logits"))]

    def _windows(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Window]:
        if not tokenizer.is_fast:
            raise UserError(
                f"model.path={tokenizer.name_or_path}: its tokenizer cannot map tokens to characters; "
                "use a model with a tokenizer.json (a fast tokenizer)"
            )
        encoded = tokenizer(
            self._questions(rows, tokenizer),
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.config.max_source_length,
            stride=self.config.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        places = encoded.pop("offset_mapping")
        owners = encoded.pop("overflow_to_sample_mapping")
        windows = []
        for index, owner in enumerate(owners):
            parts = encoded.sequence_ids(index)
            offsets = [tuple(place) if part == 1 else None for place, part in zip(places[index], parts, strict=True)]
            windows.append(Window(owner, {name: ids[index] for name, ids in encoded.items()}, offsets))
        return windows

    def _questions(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the questions, truncated so that each window holds more context than the stride.

        Raises UserError if the settings leave no tokens for a question.
        """
        config = self.config
        available = config.max_source_length - tokenizer.num_special_tokens_to_add(pair=True) - config.doc_stride - 1
        if available < 1:
            raise UserError(
                f"task.doc_stride={config.doc_stride}: with task.max_source_length={config.max_source_length} this leaves no "
                "tokens for the question; lower task.doc_stride or raise task.max_source_length"
            )
        questions = [row["question"].lstrip() for row in rows]  # some questions have leading spaces
        places = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [
            question if len(own) <= available else question[: own[available - 1][1]]
            for question, own in zip(questions, places, strict=True)
        ]

    # Answers ----------------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `exact_match` and `f1`. A sample is id, question, predicted, gold, its scores and `n_best` (three texts)."""
        from loftq_exp import metrics  # imported here, because it takes a second
        from loftq_exp.metrics.squad import best_exact_match, best_f1

        candidates: list[list[Span]] = [[] for _ in rows]
        for window, (start, end) in zip(requests[0].notes, answers[0], strict=True):
            config = self.config
            candidates[window.row] += spans(start, end, window.offsets, config.n_best_size, config.max_answer_length)
        samples = []
        for row, found in zip(rows, candidates, strict=True):
            best = sorted(found, key=lambda span: -span.logit)
            texts = list(dict.fromkeys(row["context"][span.start : span.end].strip() for span in best))
            gold = [text for text, _ in _answers(row) or []]
            predicted = texts[0] if texts else ""
            own = {"exact_match": best_exact_match(predicted, gold), "f1": best_f1(predicted, gold)}
            sample = {"id": row["id"], "question": row["question"], "predicted": predicted, "gold": gold}
            samples.append({**sample, **own, "n_best": texts[:3]})
        scores = metrics.compute(("squad",), [s["predicted"] for s in samples], [s["gold"] for s in samples])
        return Scored(scores, samples)

    @property
    def table(self) -> tuple[Column, ...]:
        """EM and F1, as the paper prints them."""
        return (Column("EM/F1", ("exact_match", "f1"), "{:.1f}", 100),)


def token_span(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token that overlap characters [start, end) of the context.

    None if the window does not hold the whole answer.
    """
    inside = [index for index, place in enumerate(offsets) if place and place[0] < end and place[1] > start]
    if not inside:
        return None
    places = [place for place in offsets if place]
    if places[0][0] > start or places[-1][1] < end:
        return None
    return inside[0], inside[-1]


def spans(
    start_logits: np.ndarray, end_logits: np.ndarray, offsets: Offsets, n_best: int, max_tokens: int
) -> list[Span]:
    """Return the answers formed by the `n_best` likeliest starts and ends of one window, likeliest first.

    Both logits have shape (length,); only the first `len(offsets)` are used. A pair is dropped if its end is before its
    start or outside the context, or if it is longer than `max_tokens` tokens.
    """
    context = np.array([index for index, place in enumerate(offsets) if place is not None])
    starts = context[np.argsort(-start_logits[context], kind="stable")[:n_best]]
    ends = context[np.argsort(-end_logits[context], kind="stable")[:n_best]]
    pairs = [(first, last) for first in starts for last in ends if first <= last < first + max_tokens]
    found = [
        Span(float(start_logits[first]) + float(end_logits[last]), offsets[first][0], offsets[last][1])
        for first, last in pairs
    ]
    return sorted(found, key=lambda span: -span.logit)[:n_best]


def _answers(row: Row) -> list[tuple[str, int]] | None:
    """Return the row's answers, each with its start character. None if they have another form."""
    answers = row["answers"]
    if isinstance(answers, str):
        try:
            answers = json.loads(answers)
        except (ValueError, RecursionError):
            return None
    if not isinstance(answers, dict):
        return None
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    if not all(isinstance(text, str) and text.strip() for text in texts) or not all(type(s) is int for s in starts):
        return None
    return list(zip(texts, starts, strict=True))


def _plain(text: str) -> str:
    """Normalise case and whitespace, in which some paragraphs differ from their answers."""
    return " ".join(text.lower().split())
