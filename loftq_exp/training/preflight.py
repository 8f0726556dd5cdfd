"""Checks of a run's rows and settings against its model, before the quantize stage, which may take hours.

The rows of later stages are encoded with the source's tokenizer and checked against the model without its weights. The
encoded rows are kept for those stages.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.config.train import LOSS
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError
from loftq_exp.foreign import explained
from loftq_exp.source.layout import skeleton
from loftq_exp.source.locate import Source
from loftq_exp.tasks.base import Generation, Request, Task
from loftq_exp.tasks.data import Row, Split
from loftq_exp.tasks.encode import Features
from loftq_exp.training.divergence import FiniteTrainer
from loftq_exp.training.finetune import training_arguments
from loftq_exp.training.load import load_tokenizer
from loftq_exp.training.padding import settle_padding
from loftq_exp.training.positions import positions_of
from loftq_exp.training.sharding import check_sharding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The encoded rows of a run. A stage that is not run has none."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Features]
    requests: list[Request]
    validation: list[Features] = field(default_factory=list)
    validation_requests: list[Request] = field(default_factory=list)


def prepare(
    source: Source | Initialised,
    task: Task,
    train: Sequence[Row],
    scored: Sequence[Row],
    config: RunConfig,
    validation: Sequence[Row] = (),
) -> Prepared:
    """Encode the training, validation and evaluation rows, and check that the model in `source` can read them.

    Raises UserError, one line that names the setting or the row, for: a sequence longer than the model's positions, in
    training or generation; a token without an embedding; a text without tokens; a tokenizer that lacks what the task needs.
    """
    model = skeleton(source.folder, config.model.kind, config.model.trust_remote_code)
    if train and config.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.gradient_checkpointing=true: {type(model).__name__} cannot recompute its activations; leave it out"
        )
    _check_attention(model, config)
    tokenizer = load_tokenizer(source, config)
    checks = _Checks(task, tokenizer, model)
    with explained(
        f"model.path={config.model.path}: its tokenizer cannot encode the rows", "check its tokenizer files"
    ):
        encoded = task.encode(train, tokenizer) if train else []
        requests = task.requests(scored, tokenizer) if scored else []
        validated = task.encode(validation, tokenizer) if validation else []
    pads = task.lengths if task.config.pad_to_max_length else {}
    checks.check("train", encoded, len(train), pads)
    place: Split = "validation" if task.source("validation").is_given else "train"
    checks.check(place, validated, len(validation), pads)
    for request in requests:
        checks.check("eval", request.features, len(scored), {}, request)
    compared = task.requests(validation, tokenizer) if validation and config.train.metric_for_best_model != LOSS else []
    for request in compared:
        checks.check(place, request.features, len(validation), {}, request)
    checks.warn_beyond_rotary()
    settle_padding(model, tokenizer)
    return Prepared(tokenizer, encoded, requests, validated, compared)


def _check_attention(model: PreTrainedModel, config: RunConfig) -> None:
    """Raise UserError if the model or the device lacks the attention implementation. None is fetched from the Hub."""
    name = config.model.attn_implementation
    if name is None:
        return
    given = f"model.attn_implementation={name}"
    if name.startswith("fl") and compute_device(config.device).type == "cpu":
        raise UserError(f"{given}: needs a GPU; use eager or sdpa, or leave it out")
    with _refused(given, "use another, or leave it out"):
        model.get_correct_attn_implementation(name, is_init_check=True)


def check_optimiser(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Take one step with the run's optimiser and schedule on a tiny layer.

    Raises UserError for an optimiser that transformers does not know, whose package is missing, or that needs further
    arguments or another device. Also raises it for a schedule that does not fit its settings, and for any argument that
    transformers rejects.
    """
    check_sharding(config)
    name = config.train.optim
    known = [optimiser.value for optimiser in OptimizerNames]
    if name not in known:
        near = get_close_matches(name, known) or ["adamw_torch", "adafactor", "sgd"]
        raise UserError(f"train.optim={name}: transformers has no such optimiser; choose one of its OptimizerNames, such as {', '.join(near)}")  # fmt: skip
    layer = nn.Linear(64, 64).to(device)  # 8-bit optimisers keep smaller weights in 32 bits
    with tempfile.TemporaryDirectory() as folder:  # a trainer creates its folder immediately
        arguments = training_arguments(config, Path(folder), device, dtype)
        trainer = FiniteTrainer(model=layer, args=arguments, eval_dataset=[] if config.train.validates else None)
        with _refused(f"train.optim={name}", "install what it needs, or use train.optim=adamw_torch"):
            optimiser = trainer.create_optimizer()
            layer(torch.ones(1, 64, device=device)).sum().backward()
            optimiser.step()
        settings = f"train.lr_scheduler_type={config.train.lr_scheduler_type}, train.learning_rate={config.train.learning_rate:g}"
        with _refused(settings, "use another of the two"):
            trainer.create_scheduler(num_training_steps=2)


@contextmanager
def _refused(setting: str, remedy: str) -> Iterator[None]:
    """Convert errors that libraries raise for the value of `setting` to UserError."""
    try:
        yield
    except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{setting}: cannot be used here ({' '.join(str(error).split()):.200}); {remedy}") from None


def _embeddings(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model has embeddings for; None if unknown."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    except (AttributeError, NotImplementedError):
        return None


class _Checks:
    """The checks of one model: `check` a split's features, then `warn_beyond_rotary` once."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.embeddings, self.positions = _embeddings(model), positions_of(model)
        self.token_types = next((module.num_embeddings for name, module in model.named_modules()
                                 if name.endswith("token_type_embeddings") and isinstance(module, nn.Embedding)), None)  # fmt: skip
        self.encodes = bool(model.config.is_encoder_decoder)
        # An encoder-decoder classifies at its last end token. Every row of a batch must have the same number of them.
        self.end = model.config.eos_token_id if self.encodes and task.model_kind == "classification" else None
        self.ends: int | None = None
        self.longest = 0

    def check(
        self,
        split: Split,
        features: Sequence[Features],
        rows: int,
        pads: Mapping[str, int],
        request: Request | None = None,
    ) -> None:
        """Raise UserError for the first feature that the model cannot read, or cannot generate an answer for."""
        source, place = self.task.source(split), "row" if len(features) == rows else "example"
        origin = source.label if source.file or source.dataset else f"task={self.task.kind}"
        for number, feature in enumerate(features, start=1):
            label = f"{origin}: {place} {number}"
            if not feature["input_ids"]:
                raise UserError(f"{label} has no tokens: the tokenizer of {self.tokenizer.name_or_path} makes none of its text; "
                                "mend the row, or use a model with another tokenizer")  # fmt: skip
            self._check_ids(label, feature)
            self._check_ends(label, feature)
            for what, length, positions in self._lengths(feature, pads, request):
                if positions is not None and length > positions:
                    raise UserError(f"{self._settings()}: {what} takes {length} positions ({label}), and the model has "
                                    f"{positions}; lower what these settings allow in all to {positions}")  # fmt: skip

    def _check_ids(self, label: str, feature: Features) -> None:
        for name, known in (
            ("input_ids", self.embeddings),
            ("labels", self.embeddings),
            ("token_type_ids", self.token_types),
        ):
            ids = feature.get(name)
            highest = max(ids, default=0) if isinstance(ids, list) else 0
            if known is not None and highest >= known:
                what = (
                    "token type"
                    if name == "token_type_ids"
                    else f"token {self.tokenizer.convert_ids_to_tokens(highest)!r}"
                )
                raise UserError(f"{label} holds the {what} with id {highest}, and the model has embeddings for {known} (0 to "
                                f"{known - 1}); use the tokenizer that the model was trained with")  # fmt: skip

    def _check_ends(self, label: str, feature: Features) -> None:
        if self.end is None:
            return
        found = feature["input_ids"].count(self.end)
        self.ends = found if self.ends is None else self.ends
        if not found or found != self.ends:
            token = self.tokenizer.convert_ids_to_tokens(self.end)
            raise UserError(f"{label} holds the end token {token!r} {found} times, and the model classifies at the last one of as many "
                            f"in every row ({self.ends or 'at least 1'}); take it out of the row's text, or use a tokenizer that "
                            "ends a text with it")  # fmt: skip

    def _lengths(
        self, feature: Features, pads: Mapping[str, int], request: Request | None
    ) -> Iterator[tuple[str, int, int | None]]:
        """Yield for each sequence of a feature: what is done with it, its positions, and the model's positions."""
        read = max(len(feature["input_ids"]), pads.get("input_ids", 0))
        written = request.max_new_tokens if isinstance(request, Generation) else 0
        labels = feature.get("labels")
        if self.encodes:
            yield "reading", read, self.positions.inputs
            targets = max(len(labels), pads.get("labels", 0)) if isinstance(labels, list) else written
            yield "writing", targets, self.positions.labels
        else:
            total = read + max(0, written - 1)  # the last generated token is not read again
            self.longest = max(self.longest, total)
            yield "generating" if written else "reading", total, self.positions.inputs

    def _settings(self) -> str:
        config = self.task.config
        return ", ".join(f"task.{name}={getattr(config, name)}" for name in self.task.length_settings)

    def warn_beyond_rotary(self) -> None:
        """Log a warning if sequences are longer than those that a rotary model was trained on; scores may be worse."""
        trained = self.positions.rotary
        if trained is not None and self.longest > trained:
            log.warning("%s: sequences of up to %d tokens, and the model was trained on %d positions; expect worse scores",
                        self._settings(), self.longest, trained)  # fmt: skip
