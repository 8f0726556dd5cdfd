"""A model on several devices: its layers on GPUs, in CPU memory and on disk, by accelerate, for scoring."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loftq_exp import ranks
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError

Placement = dict[str, Any]
"""Arguments of `from_pretrained` that place the weights."""


def check_placement(config: RunConfig) -> None:
    """Raise UserError for a placement that this model or launch cannot have."""
    given = f"evaluate.device_map={config.evaluate.device_map}"
    if config.evaluate.device_map is None:
        return
    if ranks.count() > 1:
        raise UserError(
            f"{given}: each of {ranks.count()} processes has a device of its own; start one, or leave it out"
        )
    if config.model.kind not in ("causal", "seq2seq"):
        raise UserError(
            f"{given}: model.kind={config.model.kind} has a trained head, which is not spread; leave it out"
        )
    gpus = torch.cuda.device_count()
    for name in config.evaluate.max_memory or ():
        if name != "cpu" and int(name) >= gpus:
            raise UserError(
                f"evaluate.max_memory.{name}: there is no such GPU, of {gpus} from 0; leave it out, or name one that is there"
            )


@contextmanager
def placed(config: RunConfig, device: torch.device) -> Iterator[Placement | None]:
    """Yield the arguments that place a model for scoring; None: all of it is on `device`.

    The folder for offloaded weights is removed at the end.
    """
    settings = config.evaluate
    if settings.device_map is None or (device.type == "cpu" and settings.max_memory is None):
        yield None
        return
    config.cache_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=config.cache_path) as folder:
        # Packed layers hold their codes in buffers, which would otherwise all stay on the first device.
        found: Placement = {"device_map": settings.device_map, "offload_folder": folder, "offload_buffers": True}
        if settings.max_memory is not None:
            sizes = settings.max_memory.items()
            found["max_memory"] = {int(name) if name.isdigit() else name: size for name, size in sizes}
        yield found


def adapter_to_layers(adapted: nn.Module) -> None:
    """Move each adapter to where its layer is computed. Beside an offloaded weight PEFT leaves it without memory, to be filled."""
    for module in adapted.modules():
        hook = getattr(getattr(module, "base_layer", None), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            continue
        for name, part in module.named_children():
            if name != "base_layer":
                no_memory = any(value.is_meta for value in part.parameters())
                part.to_empty(device=device) if no_memory else part.to(device)


def input_device(model: Any) -> torch.device:
    """Return the device of a model's inputs. The weights of an offloaded model have none."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return torch.device(next(found for hook in hooks if (found := getattr(hook, "execution_device", None)) is not None))
