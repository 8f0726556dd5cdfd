"""The experts of a mixture: parameters of the shape (experts, ., .), with one matrix per expert.

Files may hold such a parameter as it is, or as one tensor for each expert and projection, which transformers merges on
loading. In both cases an expert's matrix is read and written alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_of, is_expert_weight
from loftq_exp.source.target import Piece, Target


def expert_parameters(model: nn.Module, stacks: Iterable[str]) -> dict[str, tuple[nn.Module, str]]:
    """The module and block of each parameter in blocks that holds a matrix per expert, by the parameter's name."""
    stacks = list(stacks)
    return {
        f"{owner}.{name}": (module, block)
        for owner, module in model.named_modules()
        if (block := block_of(owner, stacks))
        for name, parameter in module.named_parameters(recurse=False)
        if is_expert_weight(module, parameter)
    }


def expert_targets(
    model: transformers.PreTrainedModel, stacks: Iterable[str], stored: Mapping[str, str], folder: Path
) -> tuple[Target, ...]:
    """One target for each expert's matrix (out, in). `stored` maps the files' tensors to the model's parameters.

    An empty `stored` stands for the parameters themselves. Raises UserError if the files hold the experts in a form in which
    one cannot be read alone.
    """
    holding: dict[str, list[str]] = {}
    for tensor, parameter in stored.items():
        holding.setdefault(parameter, []).append(tensor)
    found: list[Target] = []
    for name, (module, block) in expert_parameters(model, stacks).items():
        shape = tuple(model.get_parameter(name).shape)
        transposed = bool(module.is_transposed)
        size = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        pieces = _pieces(model, name, holding.get(name, []) if stored else [name], shape[0], size, transposed)
        if pieces is None:
            raise UserError(f"model.path={folder}: {type(model).__name__} keeps its experts in {name}, which the files hold in a "
                            "form that cannot be read expert by expert; save the model again with save_pretrained")  # fmt: skip
        found += [
            Target(f"{name}.{expert}", name, size, block, own, expert, shape[0]) for expert, own in enumerate(pieces)
        ]
    return tuple(found)


def read_experts(targets: Sequence[Target], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A parameter (experts, ., .) in the model's orientation, from the targets of all its experts in order."""
    matrices = [target.read(read) for target in targets]
    return torch.stack([
        matrix.T if target.pieces[0].transposed else matrix for target, matrix in zip(targets, matrices, strict=True)
    ])  # fmt: skip


def _pieces(
    model: transformers.PreTrainedModel,
    name: str,
    tensors: list[str],
    experts: int,
    size: tuple[int, int],
    transposed: bool,
) -> list[tuple[Piece, ...]] | None:
    """Where the rows of each expert's matrix are stored; None if unknown."""
    if len(tensors) == 1:
        return [(Piece(tensors[0], size[0], expert, transposed),) for expert in range(experts)]
    sources = _merged_from(model, name)
    if transposed or not sources or size[0] % len(sources) or len(tensors) != experts * len(sources):
        return None
    places = {
        (source, int(found[1])): tensor for tensor in tensors for source in sources if (found := source.search(tensor))
    }
    if places.keys() != {(source, expert) for source in sources for expert in range(experts)}:
        return None
    rows = size[0] // len(sources)
    return [tuple(Piece(places[source, expert], rows) for source in sources) for expert in range(experts)]


def _merged_from(model: transformers.PreTrainedModel, name: str) -> list[re.Pattern[str]]:
    """The names of the tensors whose rows transformers stacks to an expert's matrix, each with the expert's number.

    Empty if it does anything else with them.
    """
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter) or not name.endswith(converter.target_patterns[0]):
            continue
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        patterns = [pattern.split("*") for pattern in converter.source_patterns]
        stacked = [(MergeModulelist, 0), (Concatenate, 1)][: 1 if len(patterns) == 1 else 2]
        if len(converter.target_patterns) == 1 and operations == stacked and all(len(parts) == 2 for parts in patterns):
            return [re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}$") for before, after in patterns]
    return []
