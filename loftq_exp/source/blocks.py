"""The blocks of a model and the weights in them that cannot be quantized: they are counted, or the model is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loftq_exp.errors import UserError

MOST_LEFT_OUT = 0.1
"""The largest share of linear weight values that may stay unquantized. Beyond it a run's figures do not describe the model."""

SMALLEST_SIDE = 8
"""A linear layer with fewer inputs or outputs is a gate and stays dense. Factors of rank 1 alone would have more than an
eighth of its values, and quantizing it saves nothing."""


def is_gate(shape: Iterable[int]) -> bool:
    """Whether a linear layer with a weight of that shape stays dense, see `SMALLEST_SIDE`."""
    return min(shape) < SMALLEST_SIDE


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer: `nn.Linear`, or GPT-2's `Conv1D`, whose weight is (in, out). None for another module."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def is_expert_weight(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a parameter of the module holds a matrix per expert that transformers and PEFT orient alike.

    Both read the module's `is_transposed`, which says whether a matrix is (in, out).
    """
    return hasattr(module, "is_transposed") and parameter.ndim == 3 and not is_gate(parameter.shape[1:])


@dataclass(frozen=True)
class LeftOut:
    """A matrix in a block that is not quantized: its name in the model, its tensor in the checkpoint, its shape.

    A matrix that loading slices from a larger tensor has no tensor of its own; `tensor` is then its name.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """The number of values in the matrix."""
        return math.prod(self.shape)


def block_lists(model: nn.Module) -> list[str]:
    """Names of the outermost module lists, which hold the blocks. A model may have one each for encoder and decoder."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]


def block_of(module: str, stacks: Iterable[str]) -> str | None:
    """The name of the block in `stacks` that contains the module; None if no block does."""
    stack = next((stack for stack in stacks if module.startswith(stack + ".")), None)
    return None if stack is None else f"{stack}.{module.removeprefix(stack + '.').split('.')[0]}"


def left_out(model: nn.Module, stacks: Iterable[str], tensors: Mapping[str, str], folder: Path) -> tuple[LeftOut, ...]:
    """The matrices in blocks that belong to no linear layer, expert or embedding, such as a router or a convolution.

    `tensors` maps each parameter to its name in the checkpoint. Raises UserError if an essential part of the model would
    not be quantized or trained: experts of an unknown form, state-space and RWKV layers, or any share beyond `MOST_LEFT_OUT`.
    """
    stacks = list(stacks)
    found: list[LeftOut] = []
    linear = 0
    for owner, module in model.named_modules():
        if block_of(owner, stacks) is None:
            continue
        if recurrent := _recurrent(module):
            raise UserError(f"model.path={folder}: {type(model).__name__} has {recurrent} layers ({owner}), whose code reads or "
                            "rescales weights past an adapter; choose a model of attention and linear layers alone")  # fmt: skip
        for part, parameter in module.named_parameters(recurse=False):
            linear_map = linear_shape(module) is not None and parameter.ndim == 2
            vector = sum(size > 1 for size in parameter.shape) < 2 and not linear_map
            if vector or _is_table(module) or _is_experts_bias(module, part):
                continue
            plain = linear_map and not is_gate(parameter.shape)
            if plain or is_expert_weight(module, parameter):
                linear += parameter.numel()
            else:
                name = f"{owner}.{part}"
                found.append(LeftOut(name, tensors.get(name, name), tuple(parameter.shape)))
    _refuse_parts(model, found, linear, folder)
    return tuple(found)


def _recurrent(module: nn.Module) -> str | None:
    """The kind of recurrent layer, recognised by parameters that only such layers have; None for any other module."""
    if hasattr(module, "A_log") and hasattr(module, "D"):
        return "state-space"
    return "RWKV" if hasattr(module, "time_decay") else None


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "Norm" in type(module).__name__


def _is_experts_bias(module: nn.Module, part: str) -> bool:
    """Whether it is the biases of all experts, (experts, out)."""
    return hasattr(module, "is_transposed") and part.endswith("bias")


def _refuse_parts(model: nn.Module, found: list[LeftOut], linear: int, folder: Path) -> None:
    values = sum(weight.values for weight in found)
    share = values / max(1, values + linear)
    experts = [weight.name for weight in found if _is_expert(model, weight.name)]
    if not experts and share <= MOST_LEFT_OUT:
        return
    name = (experts or [max(found, key=lambda weight: weight.values).name])[0]
    holder = type(model.get_submodule(name.rpartition(".")[0])).__name__
    what = "experts" if experts else "weights"
    raise UserError(f"model.path={folder}: {type(model).__name__} keeps its {what} in {name} ({holder}, no nn.Linear), so that "
                    f"{share:.1%} of the values of linear weights would be left out; choose another model")  # fmt: skip


def _is_expert(model: nn.Module, name: str) -> bool:
    """Whether it is a weight of a mixture's experts rather than of its router."""
    owner = name.rpartition(".")[0]
    if name.endswith("bias") or linear_shape(model.get_submodule(owner)):
        return False
    words = f"{owner} {type(model.get_submodule(owner)).__name__}".lower()
    return "expert" in words and not any(word in words for word in ("router", "gating"))
