"""Own data: conversations, prompts with completions, or Alpaca rows, recognised by their columns (docs/own-data.md)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.config import TaskConfig
from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.config.task import TargetLength
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import PART, Column, Generation, Likelihood, Request, Scored, Task, mean_nll
from loftq_exp.tasks.chat import (
    Message,
    NotStable,
    Rendered,
    conversation,
    flaw_of,
    plain_prompt,
    render,
    render_prompt,
    said,
    shape_of,
    text_ids,
)
from loftq_exp.tasks.data import DataSource, Row, Split, shown, with_line_feeds
from loftq_exp.tasks.encode import IGNORED, Collator, Features, prompt_ids, target_ids
from loftq_exp.tasks.held_out import split_rows
from loftq_exp.tasks.packing import PackedCollator, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

USUAL_SHARE = 0.1


@dataclass(frozen=True)
class InstructConfig(TargetLength, TaskConfig):
    """The settings of own instruction data."""

    max_length: int = setting(
        "maximum length of a conversation in tokens, cut at its end; with packing, of a training sequence",
        1024,
        ge=2,
        lt=LONGEST + 1,
        shapes=(ADAPTER, SCORES),
    )
    packing: bool = setting(
        "join short conversations to sequences of task.max_length tokens, without attention between them",
        False,
        shapes=(ADAPTER,),
    )
    eval_share: float | None = setting(
        "share of the training rows that is held out and scored, in (0, 1); null: 0.1 of a task.train_file without a "
        "task.eval_file, otherwise none",
        None,
        gt=0,
        lt=1,
        shapes=(),
        locates=(ADAPTER, SCORES),
    )
    data_seed: int = setting("random seed of the held-out share", 0, ge=0, shapes=(), locates=(ADAPTER, SCORES))
    score: str = setting(
        "score besides the NLL: nll (none), exact (share of generated answers equal to the reference) or rouge",
        "nll",
        choices=("nll", "exact", "rouge"),
        shapes=(SCORES,),
    )
    reference: str | None = setting(
        "column with the text that exact and rouge compare with; null: the last message of the assistant",
        None,
        shapes=(SCORES,),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_share and self.eval_file:
            raise UserError(
                f"task.eval_share={self.eval_share:g}: task.eval_file={self.eval_file} is given too; leave one out"
            )
        if self.reference and self.score == "nll":
            raise UserError(
                f"task.reference={self.reference}: compared with nothing by task.score=nll; set task.score=exact or rouge"
            )

    @property
    def held_out(self) -> float | None:
        """The share of the training rows that is scored. None: the evaluation rows have a source of their own."""
        if self.eval_share is None and self.train_file and not self.eval_file:
            return USUAL_SHARE
        return self.eval_share


class Instruct(Task):
    """Rows of one of three shapes: `messages`; `prompt`, `completion`; `instruction`, `output` and optionally `input`.

    The loss is on the assistant's tokens of every turn. Scores: `nll`, nats per token of the assistant; and with
    `task.score`, of the generated last answers: `exact`, the share equal to the reference apart from outer white space, or
    `rouge1`, `rouge2`, `rougeL`, `rougeLsum`.
    """

    kind = "instruct"
    model_kind = "causal"
    config: InstructConfig
    columns = ()
    length_settings = ("max_length", "max_target_length")

    # The data ---------------------------------------------------------------------------------------------------------

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. Rows that are held out come from the source of the training rows."""
        own = super().source(split)
        if split != "eval" or not self.config.held_out:
            return own
        train = super().source("train")
        return dataclasses.replace(own, file=train.file, dataset_split=train.dataset_split)

    def rows(self, split: Split) -> list[Row]:
        """As `Task.rows`. The limit applies to the rows of a split after the share is held out."""
        share = self.config.held_out
        if not share or split == "validation":
            return super().rows(split)
        rows = super().rows(split)
        found = split_rows(rows, self.units(rows), share, self.config.data_seed, split)
        return found[: super().limit(split)]

    def units(self, rows: Sequence[Row]) -> list[Any]:
        """As `Task.units`: the columns of the row's shape. A column such as an id does not make two rows of one."""
        return [said(row) for row in rows]

    def limit(self, split: Split) -> int | None:
        """As `Task.limit`, but all rows are read if a share of them is held out."""
        return None if self.config.held_out else super().limit(split)

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`, for the shape that the row's columns have and the column of references."""
        problem, column = flaw_of(row), self.config.reference
        if problem is None and column and not (isinstance(row.get(column), str) and row[column].strip()):
            problem = f"holds {shown(row.get(column))} in column '{column}' (task.reference) where text is needed"
        return problem

    def with_line_feeds(self, row: Row) -> Row:
        """As `Task.with_line_feeds`, in messages too."""
        texts: Row = {name: with_line_feeds(value) for name, value in row.items() if isinstance(value, str)}
        if shape_of(row) == "messages":
            texts["messages"] = [
                {"role": message["role"], "content": with_line_feeds(message["content"])} for message in row["messages"]
            ]
        return row | texts

    # The model --------------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the conversations with labels on the assistant's tokens, packed if `task.packing`.

        Rows that keep no token of the assistant within `task.max_length` are left out; their number is logged. Raises
        UserError if no row is left.
        """
        features = [one for one in self._features("train", rows, tokenizer) if _is_trained(one)]
        return pack(features, self.config.max_length) if self.config.packing else features

    def _features(self, split: Split, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return one feature per row, cut to `max_length`, and log how many rows were cut or have no label left."""
        limit = self.config.max_length
        found, cut = [], 0
        for number, row in enumerate(rows, start=1):
            whole = self._rendered(split, number, row, tokenizer)
            labels = [token if own else IGNORED for token, own in zip(whole.ids, whole.trained, strict=True)]
            cut += len(labels) > limit
            found.append({"input_ids": whole.ids[:limit], "labels": labels[:limit]})
        empty = sum(not _is_trained(one) for one in found)
        if empty == len(found):
            raise UserError(
                f"task.max_length={limit}: no row of {self.source(split).label} keeps a token of the assistant within it; "
                "raise it, or check that the chat template renders the assistant's messages"
            )
        if cut:
            effect = f"; {empty} of them keep no token of the assistant and do not count" if empty else ""
            log.warning("task.max_length=%d: cuts %d of %d %s rows%s", limit, cut, len(found), split, effect)
        elif empty:
            log.warning("%s: %d of %d rows have no token of the assistant and do not count", self.source(split).label,
                        empty, len(found))  # fmt: skip
        return found

    def _rendered(self, split: Split, number: int, row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        if not self._has_template(row, tokenizer):
            prompt = prompt_ids(tokenizer, plain_prompt(row))
            answer = target_ids(tokenizer, conversation(row)[-1]["content"])
            return Rendered(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        try:
            return render(conversation(row), tokenizer)
        except NotStable:
            raise UserError(
                f"{self.source(split).label}: {split} row {number}: the chat template of {tokenizer.name_or_path} renders "
                "the start of this conversation in another way when more follows, so that the assistant's tokens cannot be "
                "told for certain; give rows with one answer each, or a template that marks them with {% generation %}"
            ) from None

    def _has_template(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the tokenizer has a chat template. Raises UserError if not and the row cannot do without."""
        if tokenizer.chat_template:
            return True
        if shape_of(row) == "messages":
            raise UserError(
                f"model.path={tokenizer.name_or_path}: its tokenizer has no chat template, which rows of messages need; put "
                "a chat_template.jinja into the model's folder, use an instruction-tuned model, or give prompt and completion"
            )
        return False

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """As `Task.collator`. Packed sequences have positions in place of an attention mask."""
        usual = super().collator(tokenizer)
        return PackedCollator(usual.pad_token_id, usual.lengths) if self.config.packing else usual

    @property
    def lengths(self) -> dict[str, int]:
        """A conversation is one sequence."""
        return {"input_ids": self.config.max_length, "labels": self.config.max_length}

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request the likelihood of the assistant's tokens, and with `task.score` a greedy last answer to each row."""
        prompts = [self._prompt(row, tokenizer) for row in rows]
        known = Likelihood("likelihood of the answers", self._features("eval", rows, tokenizer), prompts)
        if self.config.score == "nll":
            return [known]
        limit = self.config.max_length
        ids = [self._prompt_ids(row, tokenizer) for row in rows]
        if cut := sum(len(one) > limit for one in ids):
            log.warning("task.max_length=%d: cuts the start of %d of %d prompts", limit, cut, len(ids))
        written = Generation(
            "greedy generation",
            [{"input_ids": one[-limit:]} for one in ids],
            max_new_tokens=self.config.max_target_length,
        )
        return [known, written]

    def _prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text after which the last answer begins."""
        if self._has_template(row, tokenizer):
            return render_prompt(conversation(row)[:-1], tokenizer)
        return plain_prompt(row)

    def _prompt_ids(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        text = self._prompt(row, tokenizer)
        return text_ids(tokenizer, text) if self._has_template(row, tokenizer) else prompt_ids(tokenizer, text)

    # The scores -------------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `nll` and what `task.score` names. A sample is prompt, gold, its nll and the generated text, if any."""
        gold = [self._reference(row) for row in rows]
        parts = [{PART: row[PART]} if PART in row else {} for row in rows]
        samples: list[dict[str, Any]] = [
            part | {"prompt": prompt, "gold": text, "nll": nll.mean}
            for part, prompt, text, nll in zip(parts, requests[0].notes, gold, answers[0], strict=True)
        ]
        scores = {"nll": mean_nll(answers[0])}
        if self.config.score == "nll":
            return Scored(scores, samples)
        texts = [generated.text for generated in answers[1]]
        samples = [sample | {"generated": text} for sample, text in zip(samples, texts, strict=True)]
        if self.config.score == "rouge":
            from loftq_exp import metrics  # imported here, because it takes a second

            return Scored(scores | metrics.compute(("rouge",), texts, gold), samples)
        correct = [text.strip() == other.strip() for text, other in zip(texts, gold, strict=True)]
        samples = [sample | {"correct": right} for sample, right in zip(samples, correct, strict=True)]
        return Scored(scores | {"exact": sum(correct) / len(correct)}, samples)

    def _reference(self, row: Row) -> str:
        last: Message = conversation(row)[-1]
        return str(row[self.config.reference]) if self.config.reference else last["content"]

    @property
    def table(self) -> tuple[Column, ...]:
        """NLL, and exact match or ROUGE."""
        extra = {
            "exact": (Column("exact", ("exact",)),),
            "rouge": (Column("R1/R2/RL", ("rouge1", "rouge2", "rougeL"), "{:.2f}", 100),),
        }
        return Column("NLL", ("nll",), "{:.4f}"), *extra.get(self.config.score, ())


def _is_trained(feature: Features) -> bool:
    """Return whether a label is left that a token before it predicts."""
    return any(label != IGNORED for label in feature["labels"][1:])
