"""WikiText (Merity et al., 2017) or any other running text: perplexity over blocks of fixed length."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.config import TaskConfig
from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Column, Likelihood, Request, Scored, Task, mean_nll
from loftq_exp.tasks.data import DataSource, Row, Split, read_rows
from loftq_exp.tasks.encode import IGNORED, Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LARGEST_NLL = 700.0
"""Cap in nats per token. The perplexity is at most e^700, since a diverged model would overflow a float."""
_TITLE = re.compile(r"= [^=].*[^=] =")
"""An article's title as WikiText has it. Those of its sections have more than one =."""


@dataclass(frozen=True)
class WikiTextConfig(TaskConfig):
    """The settings of running text."""

    block_size: int = setting(
        "number of tokens per block of text", 1024, ge=2, lt=LONGEST + 1, shapes=(ADAPTER, SCORES)
    )
    start_token: bool = setting(
        "put the tokenizer's beginning-of-sequence token first in each block, and not only in the text; Gemma's perplexity is "
        "more than twice as high without it",
        False,
        shapes=(ADAPTER, SCORES),
    )


class WikiText(Task):
    """Rows with one line of `text` each, which may be empty. A local .txt file is read line by line.

    The lines are joined, tokenized as one text, and split into blocks of `task.block_size` tokens. An incomplete last block
    is dropped unless it is the only one. Scores: `nll`, nats per token, and `perplexity`, its exponential, at most e^700. A
    block's first token has no context and is not scored.
    """

    kind = "wikitext"
    model_kind = "causal"
    config: WikiTextConfig
    length_settings = ("block_size",)
    columns = ("text",)

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. Plain text files are supported too."""
        return dataclasses.replace(super().source(split), text_column="text")

    def rows(self, split: Split) -> list[Row]:
        """Return all lines, because `limit` counts blocks here."""
        parts = self.source(split).parts()
        return [self.with_line_feeds(row) for part in parts for row in read_rows(part, self.flaw)]

    def units(self, rows: Sequence[Row]) -> list[Any]:
        """As `Task.units`: an article, below a line such as `= Title =`; in a text without such lines, a paragraph."""
        lines = [row["text"].strip() for row in rows]
        titles = [bool(_TITLE.fullmatch(line)) for line in lines]
        starts = titles if sum(titles) > 1 else [not line for line in lines]
        numbers = list(itertools.accumulate(starts))
        texts: dict[int, list[str]] = {}
        for number, line in zip(numbers, lines, strict=True):
            texts.setdefault(number, []).append(line)
        return ["\n".join(texts[number]).strip() for number in numbers]

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`, except that a line may be empty."""
        text = row.get("text")
        return None if isinstance(text, str) and not text.strip() else super().flaw(row)

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the blocks of the training text."""
        return self._blocks("train", rows, tokenizer)

    @property
    def lengths(self) -> dict[str, int]:
        """All blocks have the same length."""
        return {"input_ids": self.config.block_size, "labels": self.config.block_size}

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request the likelihood of the blocks of the evaluation text."""
        return [Likelihood("likelihood of the text", self._blocks("eval", rows, tokenizer))]

    def _blocks(self, split: Split, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the first `limit` blocks. Raises UserError for a text of fewer than two tokens, which cannot be scored."""
        # The Hub data set has empty blank lines and keeps other line ends. Blank lines of a local file may hold spaces.
        lines = [row["text"].rstrip("\n") if row["text"].strip() else "" for row in rows]
        first = self._start(tokenizer)
        # not verbose: no warning about the length
        ids = list(tokenizer("\n".join(lines), add_special_tokens=not first, verbose=False)["input_ids"])
        size = self.config.block_size - len(first)
        whole = len(ids) // size * size or len(ids)
        if whole + len(first) < 2:
            raise UserError(f"{self.source(split).label}: the text has {whole} tokens; give one with two or more")
        starts = range(0, whole, size)[: self.limit(split)]
        return [_block([*first, *ids[start : min(start + size, whole)]]) for start in starts]

    def _start(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token before each block, if any. Raises UserError if the tokenizer has none and one is asked for."""
        if not self.config.start_token:
            return []
        if tokenizer.bos_token_id is None:
            raise UserError("task.start_token=true: the tokenizer has no beginning-of-sequence token; leave it out")
        return [tokenizer.bos_token_id]

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `nll` and `perplexity`. A sample is a block's number, its tokens and its own nll."""
        nll = mean_nll(answers[0])
        samples = [
            {"block": number, "tokens": answer.tokens, "nll": answer.mean} for number, answer in enumerate(answers[0])
        ]
        perplexity = math.exp(min(nll, LARGEST_NLL))
        return Scored({"nll": nll, "perplexity": perplexity}, samples)

    @property
    def table(self) -> tuple[Column, ...]:
        """NLL and perplexity."""
        return Column("NLL", ("nll",), "{:.4f}"), Column("perplexity", ("perplexity",), "{:.2f}")


def _block(ids: list[int]) -> Features:
    return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
