"""The calibration samples: rows of a task or windows of running text as token ids, and batches of them without padding."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from loftq_exp.config import RunConfig
from loftq_exp.config.calibration import RUNNING_TEXT
from loftq_exp.errors import UserError
from loftq_exp.source.layout import skeleton
from loftq_exp.source.locate import Source
from loftq_exp.tasks import TASKS, Task, load_task, task_settings
from loftq_exp.tasks.encode import Features
from loftq_exp.training.load import load_tokenizer
from loftq_exp.training.positions import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Maximum number of tokens per batch, unless one sample has more."""


def calibration_task(config: RunConfig) -> Task:
    """The task whose training rows are the calibration text. No data is read.

    Raises UserError if that task is unknown, or needs another kind of model.
    """
    chosen = config.calibration
    kind = chosen.task or (RUNNING_TEXT if chosen.is_text else config.task.kind)
    if kind not in TASKS:
        raise UserError(f"calibration.task={kind}: there is no such task; choose from: {', '.join(TASKS)}")
    if not chosen.file and not chosen.dataset and chosen.task in (None, config.task.kind):
        task = load_task(config.task)
    else:
        place = {"train_file": chosen.file} if chosen.file else {"train_file": None}
        if chosen.dataset:
            place |= {"dataset": chosen.dataset, "dataset_config": chosen.dataset_config, "train_split": chosen.split}
        if kind == config.task.kind:
            task = load_task(dataclasses.replace(config.task, **place))
        else:
            extra: dict[str, Any] = {"block_size": chosen.length} if kind == RUNNING_TEXT else {}
            task = load_task(task_settings(kind, **{k: v for k, v in place.items() if v is not None}, **extra))
    if kind == RUNNING_TEXT:
        return load_task(dataclasses.replace(task.config, block_size=chosen.length, max_train_samples=None))  # type: ignore[call-arg]
    if task.model_kind != config.model.kind:
        given = f"calibration.task={kind}" if chosen.task else f"task={kind}"
        raise UserError(f"{given}: its rows are for a {task.model_kind} model, and model.kind is {config.model.kind}; choose a "
                        "task of that kind, or give running text by calibration.file=FILE.txt")  # fmt: skip
    return task


def calibration_origin(config: RunConfig) -> dict[str, Any]:
    """What the calibration text is made of, for keys: a digest of its data, and the settings that shape its tokens."""
    task = calibration_task(config)
    shaping = {
        field.name: getattr(task.config, field.name)
        for field in dataclasses.fields(task.config)
        if "adapter" in field.metadata["shapes"]
    }
    chosen = config.calibration
    return {"data": task.digest("train"), "task": shaping, "samples": chosen.samples, "length": chosen.length,
            "seed": chosen.seed}  # fmt: skip


def calibration_samples(source: Source, config: RunConfig) -> list[Features]:
    """Return the samples as the model's arguments (lists of ids), each of at most calibration.length tokens.

    Samples are drawn without replacement by calibration.seed, all of them if there are fewer. A row that is longer than
    calibration.length, or than the model's positions, is cut. Running text is cut into windows of that length; a shorter
    text is one window.

    Raises UserError for text that cannot be read, or has fewer than two tokens.
    """
    task = calibration_task(config)
    tokenizer = load_tokenizer(source, config)
    length = _length(source, config)
    draw = random.Random(config.calibration.seed)
    rows = task.rows("train")
    if task.kind == RUNNING_TEXT:
        windows = task.encode(rows, tokenizer)
        chosen = [windows[place] for place in _drawn(len(windows), config, draw)]
        found = [_window(one["input_ids"], length, config.model.kind, tokenizer) for one in chosen]
    else:
        chosen = task.encode([rows[place] for place in _drawn(len(rows), config, draw)], tokenizer)
        found = [_cut(one, length, config.model.kind) for one in chosen[: config.calibration.samples]]
    found = [one for one in found if len(one["input_ids"]) > 1]
    if not found:
        raise UserError("calibration.length: no sample has two tokens; raise it, or give other text")
    return found


def batches_of(samples: Sequence[Features]) -> list[dict[str, torch.Tensor]]:
    """Return the samples in batches of equal lengths, without padding: int64 (batch, length) by argument."""

    def lengths(sample: Features) -> tuple[tuple[str, int], ...]:
        return tuple((name, len(ids)) for name, ids in sorted(sample.items()))

    batches = []
    for shape, group in groupby(sorted(samples, key=lengths), key=lengths):
        alike = list(group)
        size = max(BATCH_TOKENS // max(length for _, length in shape), 1)
        for first in range(0, len(alike), size):
            some = alike[first : first + size]
            batch = {name: torch.tensor([sample[name] for sample in some]) for name in some[0]}
            batches.append(batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
    return batches


def _drawn(count: int, config: RunConfig, draw: random.Random) -> list[int]:
    return sorted(draw.sample(range(count), min(config.calibration.samples, count)))


def _length(source: Source, config: RunConfig) -> int:
    """The maximum length of a sample: calibration.length, or what the model's positions allow."""
    positions = positions_of(skeleton(source.folder, config.model.kind, config.model.trust_remote_code))
    limits = [limit for limit in (positions.inputs, positions.labels, positions.rotary) if limit is not None]
    length = min([config.calibration.length, *limits])
    if length < config.calibration.length:
        log.info("calibrate: samples of at most %d tokens, the model's positions, for calibration.length=%d", length,
                 config.calibration.length)  # fmt: skip
    return length


def _cut(features: Features, length: int, kind: str) -> Features:
    """The arguments that the model's blocks depend on, cut to `length`. Labels make an encoder-decoder's decoder run."""
    names = [
        name for name, ids in features.items() if isinstance(ids, list) and (name != "labels" or kind == "seq2seq")
    ]
    return {name: features[name][:length] for name in names}


def _window(ids: Sequence[int], length: int, kind: str, tokenizer: PreTrainedTokenizerBase) -> Features:
    """A window of running text as the model reads a text: encoders between their special tokens."""
    if kind == "causal":
        return {"input_ids": list(ids[:length])}
    before, after = _special(tokenizer)
    window = [*before, *ids[: max(length - len(before) - len(after), 1)], *after][:length]
    return {"input_ids": window} | ({"labels": window} if kind == "seq2seq" else {})


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def tokens_of(samples: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """The number of tokens of all samples, labels not counted."""
    return sum(len(sample["input_ids"]) for sample in samples)
