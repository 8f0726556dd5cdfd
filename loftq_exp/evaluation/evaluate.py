"""From a model to its scores: the model answers a task's requests batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from loftq_exp import ranks
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import Generated, Generation, Likelihood, Nll, Outputs, Request, Task
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.encode import IGNORED, Collator, Features, pad_token_id
from loftq_exp.tasks.harness import HarnessResult, HarnessRun
from loftq_exp.training.padding import settle_padding
from loftq_exp.training.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int, str], None]
"""Called after each batch with the number of features done, their total, and a description of the work."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on one split, and the samples behind them in the order of the rows."""

    scores: dict[str, float]
    """Scores by the task's names."""
    samples: list[dict[str, Any]]
    """What the task records for each row: predictions and gold answers."""
    tokens_generated: int
    """Generated tokens, including end-of-sequence tokens and excluding padding."""
    seconds: float
    """Wall-clock time of the whole evaluation."""
    scored_with: dict[str, Any] = field(default_factory=dict)
    """As in `Scored`."""


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    batch_size: int,
    progress: Progress | None = None,
    requests: Sequence[Request] | None = None,
) -> Evaluation:
    """Return the scores of `model`, with or without an adapter, on `rows`. It must be of the kind that `task` needs.

    `requests` are the task's requests for these rows and this tokenizer. If None, they are created here. The model's mode
    is restored, and its pad token is set by `settle_padding`. Raises ValueError if there are no rows. Raises UserError if
    the tokenizer or the settings do not fit the task, or an output of the model is NaN or infinite.

    With several ranks, all must call this. The batches are those of a single process, so that the answers are the same.
    Each rank answers a share of them and gets the whole result.
    """
    if not rows:
        raise ValueError("there are no rows to score")
    report = progress or (lambda done, total, what: None)
    started = time.perf_counter()
    settle_padding(model, tokenizer)
    requests = task.requests(rows, tokenizer) if requests is None else requests
    with _scoring(model):
        answers = [_answers(model, tokenizer, request, batch_size, report) for request in requests]
    scored = task.score(rows, requests, answers)
    tokens = sum(
        answer.tokens for given in answers for answer in given if isinstance(answer, (Generated, HarnessResult))
    )
    return Evaluation(scored.scores, scored.samples, tokens, time.perf_counter() - started, scored.scored_with)


def _answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, request: Request, batch_size: int, report: Progress
) -> list[Any]:
    """Return the model's answer for each of the request's features, in order, computed by all ranks together.

    The harness has one answer, which rank 0 computes.
    """
    if isinstance(request, HarnessRun):
        from loftq_exp.evaluation.harness import run_harness  # imported here, because its library is an extra

        asked = request
        return ranks.from_main(lambda: [run_harness(model, tokenizer, asked, batch_size, report)])
    batches = list(_batches([len(feature["input_ids"]) for feature in request.features], batch_size))
    share = list(islice(batches, ranks.rank(), None, ranks.count()))
    answers, refusal = {}, None
    try:
        answers = _share_of_answers(model, tokenizer, request, share, report)
    except UserError as error:  # raised by all ranks below, because the others wait for this one's answers
        refusal = error
    shares = ranks.gather((answers, refusal))
    for _, refusal in shares:
        if refusal is not None:
            raise refusal
    found = {index: answer for answers, _ in shares for index, answer in answers.items()}
    return [found[index] for index in range(len(request.features))]


def _share_of_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, request: Request, batches: Sequence[list[int]], report: Progress
) -> dict[int, Any]:
    """Return the model's answers for these batches of the request's features, by feature index."""
    total, found = sum(map(len, batches)), dict[int, Any]()
    for indices in batches:
        features = [request.features[index] for index in indices]
        try:
            found.update(zip(indices, _batch_answers(model, tokenizer, request, features), strict=True))
        except _NotFinite as error:
            index = min(indices[position] for position in error.positions)
            row = getattr(request.notes[index], "row", index) if request.notes else index  # a window knows its row
            raise UserError(f"evaluate: the model's output for row {row + 1} is NaN or infinite ({request.what}); no score is "
                            "kept: check the weights at model.path and the adapter, or leave out train.fp16, and use train.bf16=false") from None  # fmt: skip
        report(len(found), total, request.what)
    return found


def _batch_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, request: Request, features: Sequence[Features]
) -> Sequence[Any]:
    pad = pad_token_id(tokenizer)
    if isinstance(request, Generation):
        # A decoder continues at the end of its prompt. An encoder's positions count from the start.
        side = Collator(pad, side="right" if model.config.is_encoder_decoder else "left")
        return _generated(model, tokenizer, request, side(features))
    batch = Collator(pad)(features)
    if isinstance(request, Likelihood):
        return _likelihoods(model, batch)
    assert isinstance(request, Outputs)
    outputs = model(**_placed(model, batch))
    values = [outputs[name].float().cpu() for name in request.names]
    for value in values:
        # Of outputs per token (a span's start and end), those at padding are ignored.
        counts = (
            batch["attention_mask"].bool() if value.shape == batch["attention_mask"].shape else torch.ones(1).bool()
        )
        bad = (
            _is_not_finite(value) if value.shape[-1] > 1 else ~value.isfinite()
        )  # a single output is a regression value
        _refuse_not_finite(bad & counts)
    return list(zip(*(value.numpy() for value in values), strict=True))


def _likelihoods(model: Any, batch: dict[str, torch.Tensor]) -> list[Nll]:
    """Return the likelihood of the labels of each feature in a right-padded batch of shape (features, length)."""
    labels = batch["labels"].to(input_device(model))
    if model.config.is_encoder_decoder:
        logits = model(**_placed(model, batch), use_cache=False).logits  # it shifts the labels into its inputs
    else:
        del batch["labels"]
        labels[:, 0] = IGNORED  # the first token has no context to be predicted from
        targets = (labels != IGNORED).any(dim=0).nonzero()
        if not len(targets):
            return [Nll(0.0, 0)] * len(labels)
        first = int(targets[0])  # the first target token of the batch
        # Logits are by far the largest tensor. Position first - 1 predicts token `first`; earlier ones are not needed.
        kept = torch.arange(first - 1, labels.shape[1], device=labels.device)  # indices: see `_generated`
        logits = model(**_placed(model, batch), use_cache=False, logits_to_keep=kept).logits[:, :-1]
        labels = labels[:, first:]
    likelihoods: list[Nll] = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        # Row by row, to avoid a float32 copy of the whole batch. Ignored labels add 0.
        nll = torch.nn.functional.cross_entropy(row_logits.float(), row_labels, ignore_index=IGNORED, reduction="none")
        likelihoods.append(Nll(float(nll.double().sum()), int((row_labels != IGNORED).sum())))
    _refuse_not_finite(torch.tensor([[not math.isfinite(nll.total)] for nll in likelihoods]))
    return likelihoods


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, request: Generation, batch: dict[str, torch.Tensor]
) -> list[Generated]:
    """Return the text that `model` generates for each feature of a batch, without the prompt."""
    inputs = _placed(model, batch)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=request.num_beams,
        max_new_tokens=request.max_new_tokens,
        length_penalty=request.length_penalty,
        no_repeat_ngram_size=request.no_repeat_ngram_size,
        early_stopping=request.num_beams > 1,  # stop at num_beams finished texts, as in bart's settings
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
        use_cache=True,
    )
    settings.decoder_start_token_id = _decoder_start(model)
    if not model.config.is_encoder_decoder:
        # The last position's logits only. An index gives a contiguous copy of the states. Of the slice that generate() would
        # take, torch's product copies the frozen head's weight once for each row of the batch: seconds and gigabytes.
        inputs["logits_to_keep"] = torch.tensor([-1], device=inputs["input_ids"].device)
    with _without_defaults(model):
        sequences = model.generate(
            **inputs, generation_config=settings, logits_processor=[_RefuseNotFinite(request.num_beams)]
        )
    given = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = []
    for ids in sequences[:, given:].tolist():
        own = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids
        # No clean-up: it removes spaces before punctuation, and would change the model's text before it is scored.
        text = str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        texts.append(Generated(text, len(own)))
    return texts


class _NotFinite(Exception):
    """NaN or infinite outputs for the features at `positions` of a batch."""

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__(positions)
        self.positions = positions


def _is_not_finite(values: torch.Tensor) -> torch.Tensor:
    """Return where `values` are NaN or +inf. -inf is valid: a model or a generation rule masks tokens with it."""
    return values.isnan() | (values == math.inf)


def _refuse_not_finite(found: torch.Tensor) -> None:
    """Raise _NotFinite for the features where `found`, of shape (features, ...), holds a true value."""
    if bool(found.any()):
        raise _NotFinite(found.flatten(1).any(dim=1).nonzero().flatten().tolist())


class _RefuseNotFinite(LogitsProcessor):
    """Raises _NotFinite before a token is chosen from NaN scores."""

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the `scores`, of shape (features * beams, tokens), unchanged."""
        _refuse_not_finite(_is_not_finite(scores).reshape(-1, self.num_beams * scores.shape[-1]))
        return scores


def _decoder_start(model: Any) -> int | None:
    """Return the first token of an encoder-decoder's answer, from either config of the checkpoint. None for a decoder."""
    if not model.config.is_encoder_decoder:
        return None
    found = [getattr(holder, "decoder_start_token_id", None) for holder in (model.config, model.generation_config)]
    return next((token for token in found if token is not None), None)


def _placed(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = input_device(model)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, to reduce padding. The longest come first, so that lack of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def _scoring(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients, and restore each module's mode afterwards.

    `inference_mode` is not used, because a module may keep tensors of a forward pass (bitsandbytes repacks its 4-bit weights
    on some CPUs). They would be inference tensors, which a later training step cannot use.
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
    """Hide the checkpoint's own generation settings.

    `generate` takes from them whatever a given GenerationConfig leaves unset. A checkpoint's repetition penalty or
    suppressed tokens would then change the meaning of the task's settings. An adapter and its backbone each hold them.
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
