"""The shape of a generation task for a decoder: a prompt, a target, and a judgement of the generated text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.config import TaskConfig
from loftq_exp.config.task import SourceLength, TargetLength
from loftq_exp.tasks.base import Column, Generation, Likelihood, Request, Scored, Task, mean_nll
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.encode import Features, encode, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptConfig(TargetLength, SourceLength, TaskConfig):
    """The settings of a generation task."""


@dataclass(frozen=True)
class Judgement:
    """A model's answer and the gold answer. `predicted` is None if the generated text holds no answer."""

    predicted: float | str | None
    gold: float | str | None
    correct: bool


class PromptTask(Task):
    """A task for a causal model. A subclass defines its columns and the prompt, target and judgement of a row.

    Scores: `nll`, nats per token of the gold targets, truncated as in training; `accuracy`, the share of rows whose greedy
    continuation, at most `max_target_length` tokens, is judged correct.
    """

    model_kind = "causal"
    config: PromptConfig

    @abstractmethod
    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text that the model is given. It may use the tokenizer's chat template."""

    @abstractmethod
    def target(self, row: Row) -> str:
        """Return the expected continuation, without the end-of-sequence token."""

    @abstractmethod
    def judge(self, row: Row, generated: str) -> Judgement:
        """Compare the continuation `generated` (without the prompt) with the row's gold answer."""

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Features]:
        """Return prompt and target of each row, with the loss on the target only."""
        return [encode(self, row, tokenizer, self.config) for row in rows]

    @property
    def lengths(self) -> dict[str, int]:
        """Prompt and target form one sequence."""
        both = self.config.max_source_length + self.config.max_target_length
        return {"input_ids": both, "labels": both}

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """Request the likelihood of the gold targets, and greedy continuations of the prompts."""
        texts = [self.prompt(row, tokenizer) for row in rows]
        prompts = [{"input_ids": encode_prompt(self, row, tokenizer, self.config)} for row in rows]
        return [
            Likelihood("likelihood of the gold solutions", self.encode(rows, tokenizer)),
            Generation("greedy generation", prompts, texts, max_new_tokens=self.config.max_target_length),
        ]

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `nll` and `accuracy`. A sample is prompt, target, generated, predicted, gold, correct and its own nll."""
        likelihoods, texts = answers
        samples = []
        for row, prompt, nll, generated in zip(rows, requests[1].notes, likelihoods, texts, strict=True):
            sample = {"prompt": prompt, "target": self.target(row), "generated": generated.text}
            judgement = asdict(self.judge(row, generated.text))
            samples.append({**sample, **judgement, "nll": nll.mean})
        accuracy = sum(sample["correct"] for sample in samples) / len(samples)
        return Scored({"nll": mean_nll(likelihoods), "accuracy": accuracy}, samples)

    @property
    def table(self) -> tuple[Column, ...]:
        """NLL and accuracy."""
        return Column("NLL", ("nll",), "{:.4f}"), Column("accuracy", ("accuracy",))
