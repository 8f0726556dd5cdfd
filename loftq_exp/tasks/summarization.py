"""Summarization: XSum (Narayan et al., 2018) and CNN/DailyMail (Hermann et al., 2015). `task.name` selects one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.config import TaskConfig
from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.config.task import SourceLength, TargetLength
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Column, Generation, Likelihood, Request, Scored, Task, mean_nll
from loftq_exp.tasks.data import DataSource, Row, Split, shown
from loftq_exp.tasks.encode import Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hub, and its columns of documents and summaries."""

    dataset: str
    config: str | None
    revision: str | None
    document: str
    summary: str


DATA_SETS = {
    # The default branch may hold a loading script, which `datasets` no longer runs. The Hub's conversion to Parquet has none.
    "xsum": DataSet("EdinburghNLP/xsum", None, "refs/convert/parquet", "document", "summary"),
    "cnn_dailymail": DataSet("abisee/cnn_dailymail", "3.0.0", None, "article", "highlights"),
}
LEAD_SENTENCES = 3


@dataclass(frozen=True)
class SummarizationConfig(TargetLength, SourceLength, TaskConfig):
    """The data set and the settings of generation."""

    names = tuple(DATA_SETS)

    source_prefix: str = setting(
        "text placed before each document; t5 expects 'summarize: '", "", shapes=(ADAPTER, SCORES)
    )
    num_beams: int = setting("number of beams for generation; 1 is greedy", 1, ge=1, lt=1025, shapes=(SCORES,))
    length_penalty: float = setting(
        "beam search divides a summary's log-probability by its length to this power", 1.0, shapes=(SCORES,)
    )
    no_repeat_ngram_size: int = setting(
        "n-gram size, in tokens, that may occur only once in a summary; 0: no limit", 0, ge=0, shapes=(SCORES,)
    )


class Summarization(Task):
    """Rows of a document and its summary, in the columns of the data set that `task.name` names.

    Scores: `nll`, nats per token of the gold summaries; `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (F-measures) of the
    generated summaries; and the same with the prefix `lead3_` for the Lead-3 baseline, the first three sentences of each
    document.
    """

    kind = "summarization"
    model_kind = "seq2seq"
    config: SummarizationConfig

    def __init__(self, config: SummarizationConfig) -> None:
        super().__init__(config)
        self.data = DATA_SETS[config.name or ""]
        self.columns = (self.data.document, self.data.summary)

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. Without `task.dataset`, the data set is given by `task.name`."""
        source = super().source(split)
        if source.dataset:
            return source
        data = self.data
        return dataclasses.replace(
            source,
            dataset=data.dataset,
            dataset_config=source.dataset_config or data.config,
            dataset_revision=source.dataset_revision or data.revision,
        )

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`. A summary must also hold a word, because otherwise its ROUGE is always 0."""
        from loftq_exp.metrics.words import has_words  # imported here, because it takes a second

        problem = super().flaw(row)
        if problem is None and not has_words(row[self.data.summary]):
            summary = shown(row[self.data.summary])
            problem = f"holds {summary} in column '{self.data.summary}', without a word that ROUGE could compare"
        return problem

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return the documents as encoder inputs and the summaries, with end of sequence, as labels. Both are truncated."""
        end = tokenizer.eos_token_id
        if end is None:
            raise UserError(
                f"model.path={tokenizer.name_or_path}: its tokenizer has no end-of-sequence token, without which a model "
                "cannot learn to stop; use a model whose tokenizer_config.json names an eos_token"
            )
        limit = self.config.max_target_length
        texts = [row[self.data.summary] for row in rows]
        summaries = tokenizer(text_target=texts, truncation=True, max_length=limit)["input_ids"]
        labels = [list(ids) if ids and ids[-1] == end else [*ids, end][:limit] for ids in summaries]
        documents = self._documents(rows, tokenizer)
        return [feature | {"labels": own} for feature, own in zip(documents, labels, strict=True)]

    def _documents(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        texts = [self.config.source_prefix + row[self.data.document] for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=self.config.max_source_length)["input_ids"]
        return [{"input_ids": list(own)} for own in ids]

    @property
    def lengths(self) -> dict[str, int]:
        """Documents and summaries have separate lengths."""
        return {"input_ids": self.config.max_source_length, "labels": self.config.max_target_length}

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request the likelihood of the gold summaries, and a generated summary of each document."""
        config = self.config
        search = Generation(
            f"search with {config.num_beams} beams" if config.num_beams > 1 else "greedy generation",
            self._documents(rows, tokenizer),
            max_new_tokens=config.max_target_length,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
        )
        return [Likelihood("likelihood of the gold summaries", self.encode(rows, tokenizer)), search]

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `nll`, and ROUGE of the model and of Lead-3. A sample is document, predicted, gold and its own nll."""
        from loftq_exp import metrics  # imported here, because it takes a second
        from loftq_exp.metrics.sentences import sentences

        likelihoods, written = answers
        gold = [row[self.data.summary] for row in rows]
        leads = [" ".join(sentences(row[self.data.document])[:LEAD_SENTENCES]) for row in rows]
        own = metrics.compute(("rouge",), [generated.text for generated in written], gold)
        lead = metrics.compute(("rouge",), leads, gold)
        samples = [
            {"document": row[self.data.document], "predicted": generated.text, "gold": summary, "nll": nll.mean}
            for row, generated, summary, nll in zip(rows, written, gold, likelihoods, strict=True)
        ]  # fmt: skip
        scores = {"nll": mean_nll(likelihoods)} | own | {f"lead3_{name}": value for name, value in lead.items()}
        return Scored(scores, samples)

    @property
    def table(self) -> tuple[Column, ...]:
        """NLL, ROUGE as the paper prints it, and ROUGE of Lead-3."""
        names = ("rouge1", "rouge2", "rougeL")
        return (
            Column("NLL", ("nll",), "{:.4f}"),
            Column("R1/R2/RL", names, "{:.2f}", 100),
            Column("Lead-3 R1/R2/RL", tuple(f"lead3_{name}" for name in names), "{:.2f}", 100),
        )
