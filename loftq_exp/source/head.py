"""The head of a classification or question-answering model. It is trained, so it is stored with the adapter.

If the checkpoint has a trained head, the adapter starts from it. A pre-trained encoder has none: its head is then
initialised as transformers would do it, but from the run's seed. The same run thus always starts from the same values.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.dequantized import open_values
from loftq_exp.source.layout import HEAD_KINDS, Layout, find_layout, skeleton, stored_name
from loftq_exp.source.tensors import CheckpointTensors

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the initialised checkpoint's key. Increment it when the values of a head change."""
PREFIX = "base_model.model."
"""The prefix that PEFT adds to the names of the model."""


def head_tensors(
    folder: Path, tensors: CheckpointTensors, layout: Layout, config: RunConfig
) -> dict[str, torch.Tensor]:
    """Every parameter of `layout.head` in float32, by its name in an adapter file; empty for a language model.

    Values come from `tensors`, the checkpoint in `folder`. A parameter that it lacks is drawn from `config.seed`. Raises
    UserError if a stored head does not have the shape that config.json expects.
    """
    if not layout.head:
        return {}
    model = skeleton(folder, config.model.kind, config.model.trust_remote_code)
    values = draw_head(model, layout.head, config.seed)
    drawn = []
    for name, value in values.items():
        stored = stored_name(name, model.base_model_prefix, tensors.names)
        if stored is None:
            drawn.append(name)
            continue
        if tensors.shape(stored) != tuple(value.shape):
            raise UserError(f"model.path={config.model.path}: {stored} has shape {tensors.shape(stored)}, config.json expects "
                            f"{tuple(value.shape)}; correct num_labels (id2label) in config.json")  # fmt: skip
        values[name] = tensors.read(stored).float()
    if drawn:
        log.info("quantize: new head, drawn from seed %d: %s", config.seed, ", ".join(drawn))
    return {PREFIX + name: value for name, value in values.items()}


def draws_head(folder: Path, config: RunConfig) -> bool:
    """Whether `head_tensors` would draw a parameter for the checkpoint in `folder`.

    True if it cannot be read; opening its tensors raises the error later.
    """
    kind, trusted = config.model.kind, config.model.trust_remote_code
    if kind not in HEAD_KINDS:
        return False
    try:
        with open_values(folder) as tensors:
            head, model = find_layout(folder, kind, tensors.shapes(), trusted).head, skeleton(folder, kind, trusted)
            names = [f"{name}.{part}" for name in head for part, _ in model.get_submodule(name).named_parameters()]
            return any(stored_name(name, model.base_model_prefix, tensors.names) is None for name in names)
    except UserError:
        return True


def draw_head(model: transformers.PreTrainedModel, modules: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """New float32 values for every parameter of `modules` of a model on the meta device, by its name in the model.

    The model class itself initialises them: usually normal(0, initializer_range) with zero biases. The seed and the
    module's name determine the random stream. The modules are moved to the CPU.
    """
    values: dict[str, torch.Tensor] = {}
    for name in modules:
        module = model.get_submodule(name).to_empty(device="cpu").float()
        stream = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(stream, "little") >> 1)
            module.apply(model._init_weights)
        values |= {f"{name}.{part}": value.detach() for part, value in module.named_parameters()}
    return values
