"""The calibration samples: rows of a task or windows of running text as token ids, and batches of them without padding."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_exp.config import RunConfig
from loftq_exp.config.calibration import RUNNING_TEXT
from loftq_exp.errors import UserError
from loftq_exp.source.layout import skeleton
from loftq_exp.source.locate import Source
from loftq_exp.tasks import TASKS, Task, load_task, task_settings
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.encode import Features
from loftq_exp.training.load import load_tokenizer
from loftq_exp.training.positions import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""Maximum number of tokens per batch, unless one sample has more."""

IGNORED = -100
"""The label of padding."""


def calibration_task(config: RunConfig) -> Task:
    """The task whose training rows are the calibration text. No data is read.

    Raises UserError if that task is unknown, or needs another kind of model.
    """
    chosen = config.calibration
    kind = chosen.task or (RUNNING_TEXT if chosen.is_text else config.task.kind)
    if kind not in TASKS:
        raise UserError(f"calibration.task={kind}: there is no such task; choose from: {', '.join(TASKS)}")
    place = _place(config)
    if not place and kind == config.task.kind:
        settings = config.task
    elif kind == config.task.kind:
        elsewhere = {"train_file": None, "dataset_revision": None, "max_train_samples": None}
        settings = dataclasses.replace(config.task, **elsewhere | place)
    else:
        settings = task_settings(kind, **place)
    if kind == RUNNING_TEXT:
        of_length: dict[str, Any] = {"block_size": chosen.length, "max_train_samples": None}
        return load_task(dataclasses.replace(settings, **of_length))
    if getattr(settings, "packing", False):  # a sample is one row
        settings = dataclasses.replace(settings, packing=False)  # type: ignore[call-arg]
    task = load_task(settings)
    if task.model_kind != config.model.kind:
        given = f"calibration.task={kind}" if chosen.task else f"task={kind}"
        raise UserError(f"{given}: its rows are for a {task.model_kind} model, and model.kind is {config.model.kind}; choose a "
                        "task of that kind, or give running text by calibration.file=FILE.txt")  # fmt: skip
    return task


def _place(config: RunConfig) -> dict[str, Any]:
    """The task's settings that name the calibration text, if it is not the task's own."""
    chosen = config.calibration
    if chosen.file:
        return {"train_file": chosen.file}
    if chosen.dataset:
        return {"dataset": chosen.dataset, "dataset_config": chosen.dataset_config, "train_split": chosen.split}
    return {}


@contextmanager
def _named_for(config: RunConfig) -> Iterator[None]:
    """Name the settings `calibration` in errors about the text, unless it is the task's own."""
    try:
        yield
    except UserError as error:
        chosen, text = config.calibration, str(error)
        if chosen.file or chosen.dataset or chosen.task not in (None, config.task.kind):
            for theirs, ours in (("train_file", "file"), ("dataset", "dataset"), ("train_split", "split")):
                text = text.replace(f"task.{theirs}", f"calibration.{ours}")
        raise UserError(text) from error


def calibration_origin(config: RunConfig) -> dict[str, Any]:
    """What the calibration text is made of, for keys: a digest of its data, and the settings that shape its tokens."""
    task = calibration_task(config)
    shaping = {
        field.name: getattr(task.config, field.name)
        for field in dataclasses.fields(task.config)
        if "adapter" in field.metadata["shapes"]
    }
    chosen = config.calibration
    with _named_for(config):
        data = task.digest("train")
    return {"data": data, "task": shaping, "samples": chosen.samples, "length": chosen.length,
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
    length, kind = _length(source, config), config.model.kind
    draw = random.Random(config.calibration.seed)
    with _named_for(config):
        rows = task.rows("train")
        if task.kind == RUNNING_TEXT:
            windows = _windows(task, rows, tokenizer, length, kind)
            found = [windows[place] for place in _drawn(len(windows), config, draw)]
        else:
            chosen = task.encode([rows[place] for place in _drawn(len(rows), config, draw)], tokenizer)
            found = [_cut(one, length, kind) for one in chosen[: config.calibration.samples]]
    found = [one for one in found if len(one["input_ids"]) > 1]
    if not found:
        raise UserError(
            f"calibration.length={config.calibration.length}: no sample has two tokens; raise it, or give other text"
        )
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


def padded_batches(samples: Sequence[Features], tokens: int) -> list[dict[str, torch.Tensor]]:
    """Return the samples in batches of similar lengths, padded on the right: int64 (batch, length) by argument.

    A batch has at most `tokens` tokens, padding included, unless one sample has more. Padding is masked, and is `IGNORED`
    among labels.
    """
    ordered = sorted(samples, key=lambda sample: sorted((name, len(ids)) for name, ids in sample.items()))
    groups: list[list[Features]] = [[]]
    for sample in ordered:
        longest = max(len(ids) for one in [*groups[-1], sample] for ids in one.values())
        if groups[-1] and longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(sample)
    return [_padded(group) for group in groups]


def _padded(samples: Sequence[Features]) -> dict[str, torch.Tensor]:
    batch = {}
    for name in samples[0]:
        rows = [torch.tensor(sample[name]) for sample in samples]
        filler = IGNORED if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    places = torch.arange(batch["input_ids"].shape[1])
    return batch | {"attention_mask": (places < lengths[:, None]).long()}


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


def _windows(
    task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int, kind: str
) -> list[Features]:
    """The windows of a text as the model reads a text: encoders each between their special tokens."""
    before, after = ([], []) if kind == "causal" else _special(tokenizer)
    size = length - len(before) - len(after)
    if size < 1:
        raise UserError(f"calibration.length={length}: leaves no token between a text's special tokens; raise it")
    config: Any = dataclasses.replace(task.config, block_size=max(size, 2))  # type: ignore[call-arg]
    parts = [list(one["input_ids"]) for one in load_task(config).encode(rows, tokenizer)]
    if parts[0][: len(before)] == before:  # those of the whole text
        parts[0] = parts[0][len(before) :]
    if after and parts[-1][-len(after) :] == after:
        parts[-1] = parts[-1][: -len(after)]
    windows = [[*before, *part[:size], *after] for part in parts if part]
    return [{"input_ids": window} | ({"labels": window} if kind == "seq2seq" else {}) for window in windows]


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def tokens_of(samples: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """The number of tokens of all samples, labels not counted."""
    return sum(len(sample["input_ids"]) for sample in samples)
