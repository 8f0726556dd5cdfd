"""From a model to its scores: the log-likelihood of the gold targets, and what the model writes by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from loftq_exp.config import TaskConfig
from loftq_exp.tasks.base import Task
from loftq_exp.tasks.data import Row
from loftq_exp.training.encode import IGNORED, Collator, encode, encode_prompt, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int, str], None]
"""Told after each batch: rows done, rows in all, and what is being done."""
Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on one split, and the samples that made them, in the order of the rows."""

    scores: dict[str, float]
    """`nll`: mean negative log-likelihood of a gold target token, in nats. `accuracy`: share of rows answered right."""
    samples: list[dict[str, Any]]
    """A row each: prompt, target, generated, predicted, gold, correct, and nll (nats a token of its own target)."""
    tokens_generated: int
    """End-of-sequence tokens included, padding not."""
    seconds: float
    """Wall-clock time of the whole evaluation."""


@dataclass(frozen=True)
class _Likelihood:
    """The negative log-likelihood of one row's target: its sum in nats over `tokens` tokens."""

    total: float
    tokens: int


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    config: TaskConfig,
    batch_size: int,
    progress: Progress | None = None,
) -> Evaluation:
    """The scores of `model`, a causal language model with or without an adapter, on `rows`.

    `nll` averages over all target tokens of the split, so that a long solution weighs more than a short one; targets
    are cut as in training. `accuracy` judges greedy continuations, at most `max_target_length` tokens, of the prompts
    that training saw. The model comes back in the mode it was in. Raises ValueError if there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to score")
    report = progress or (lambda done, total, what: None)
    started = time.perf_counter()
    with _scoring(model):
        encoded = [encode(task, row, tokenizer, config) for row in rows]
        likelihoods = _likelihoods(model, encoded, tokenizer, batch_size, report)
        prompts = [encode_prompt(task, row, tokenizer, config) for row in rows]
        continuations = _continuations(model, prompts, tokenizer, config, batch_size, report)

    samples = []
    for row, likelihood, ids in zip(rows, likelihoods, continuations, strict=True):
        # No clean-up: it closes blanks before punctuation, and the text judged is to be the model's own.
        generated = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        sample = {"prompt": task.prompt(row), "target": task.target(row), "generated": generated}
        samples.append({**sample, **asdict(task.judge(row, generated)), "nll": likelihood.total / likelihood.tokens})
    scores = {
        "nll": sum(item.total for item in likelihoods) / sum(item.tokens for item in likelihoods),
        "accuracy": sum(sample["correct"] for sample in samples) / len(samples),
    }
    return Evaluation(scores, samples, sum(map(len, continuations)), time.perf_counter() - started)


def _likelihoods(
    model: Any, encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, batch_size: int, report: Progress
) -> list[_Likelihood]:
    """The likelihood of each row's labels, in the order of `encoded`."""
    collate = Collator(pad_token_id(tokenizer))
    found: dict[int, _Likelihood] = {}
    for indices in _batches([len(row["input_ids"]) for row in encoded], batch_size):
        batch = collate([encoded[index] for index in indices])
        found.update(zip(indices, _batch_likelihoods(model, batch), strict=True))
        report(len(found), len(encoded), "likelihood of the gold solutions")
    return [found[index] for index in range(len(encoded))]


def _batch_likelihoods(model: Any, batch: dict[str, torch.Tensor]) -> list[_Likelihood]:
    """The likelihood of each row of a right-padded batch of shape (rows, length)."""
    labels = batch.pop("labels").to(model.device)
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])  # the first target token of the batch
    # Logits are the largest tensor by far, and those before the first target token are not needed: position first - 1
    # predicts token first.
    inputs = {name: ids.to(model.device) for name, ids in batch.items()}
    logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] - first + 1).logits
    likelihoods = []
    for row_logits, row_labels in zip(logits[:, :-1], labels[:, first:], strict=True):
        # Row by row, so that no float32 copy of the whole batch is made; ignored labels cost 0.
        nll = torch.nn.functional.cross_entropy(row_logits.float(), row_labels, ignore_index=IGNORED, reduction="none")
        likelihoods.append(_Likelihood(float(nll.double().sum()), int((row_labels != IGNORED).sum())))
    return likelihoods


def _continuations(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    batch_size: int,
    report: Progress,
) -> list[list[int]]:
    """The ids that `model` greedily adds to each prompt, the end-of-sequence token included, in the prompts' order."""
    collate = Collator(pad_token_id(tokenizer), side="left")
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=config.max_target_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=collate.pad_token_id,
        use_cache=True,
    )
    found: dict[int, list[int]] = {}
    with _without_defaults(model):
        for indices in _batches([len(prompt) for prompt in prompts], batch_size):
            batch = collate([{"input_ids": prompts[index]} for index in indices])
            inputs = {name: ids.to(model.device) for name, ids in batch.items()}
            sequences = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
            for index, ids in zip(indices, sequences.tolist(), strict=True):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                found[index] = ids[:end]
            report(len(found), len(prompts), "greedy generation")
    return [found[index] for index in range(len(prompts))]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, which saves padding; the longest first, to show at once if memory lacks."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def _scoring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in.

    Not `inference_mode`: what a module keeps from a forward pass (bitsandbytes repacks its 4-bit weights on some
    processors) would be an inference tensor, on which no later training step can work.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_defaults(model: torch.nn.Module) -> Iterator[None]:
    """Hides the checkpoint's own generation settings.

    `generate` fills whatever a given GenerationConfig leaves open from them, so that a checkpoint's repetition penalty
    or suppressed tokens would change what greedy decoding means. An adapter and its backbone each hold them.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    settings = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, setting in zip(owners, settings, strict=True):
            module.generation_config = setting
