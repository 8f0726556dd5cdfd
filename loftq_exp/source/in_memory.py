"""The layout of a model in memory, whose tensors have the names of its parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_lists, block_of, left_out
from loftq_exp.source.finite import is_finite
from loftq_exp.source.layout import (
    AUTO_CLASSES,
    HEAD_KINDS,
    Layout,
    Target,
    as_left_out,
    head_modules,
    left_dense,
    shortest_endings,
    split_targets,
)
from loftq_exp.source.selection import ALL, Selection

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kind_of(model: transformers.PreTrainedModel) -> str:
    """The kind of a model by its class. Raises UserError for a class of no kind, such as one without a head."""
    for kind, auto in AUTO_CLASSES.items():
        if type(model) in auto._model_mapping.values():
            return kind
    raise UserError(f"model: {type(model).__name__} is of no kind that can be trained; load it with "
                    f"{', '.join(auto.__name__ for auto in AUTO_CLASSES.values())}")  # fmt: skip


def layout_in_memory(model: transformers.PreTrainedModel, kind: str, selection: Selection = ALL) -> Layout:
    """The layout of `model`. Raises UserError if it has no plain, finite linear layers in blocks, or too much besides.

    Also raises it if a pattern of the `selection` matches no layer.
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    stacks, name = block_lists(model), Path(model.name_or_path or type(model).__name__)
    not_quantized = left_out(model, stacks, {}, name)
    inside = {module: block for module in linears if (block := block_of(module, stacks))}
    if not inside:
        raise UserError(f"model: {type(model).__name__} has no linear layer in a block; nothing to quantize")
    _check_values({module: linears[module].weight for module in inside})
    outside = tuple(module for module in linears if module not in inside)
    targets = tuple(
        Target(module, f"{module}.weight", (linears[module].out_features, linears[module].in_features), block)
        for module, block in inside.items()
    )
    chosen, excluded = split_targets(targets, selection)
    names = [target.module for target in chosen]
    return Layout(
        targets=chosen,
        target_modules=shortest_endings(names, modules),
        other_linears=(*outside, *(target.module for target in excluded)),
        left_dense=left_dense(model, names),
        foreign=(),
        not_quantized=(*not_quantized, *map(as_left_out, excluded)),
        excluded=tuple(target.module for target in excluded),
        head=head_modules(model, outside, set(model.state_dict())) if kind in HEAD_KINDS else (),
        ties_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
    )


def _check_values(weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError if a weight has no plain values, or shares them with another."""
    seen: dict[int, str] = {}
    for module, weight in weights.items():
        if weight.is_meta or weight.dtype not in _TYPES:
            what = "is on the meta device" if weight.is_meta else f"has values of {weight.dtype}"
            raise UserError(
                f"model: {module} {what}; load the model in float32, bfloat16 or float16, without quantization"
            )
        if (other := seen.setdefault(weight.data_ptr(), module)) != module:
            raise UserError(f"model: {module} shares its weight with {other}; quantizing one would change both")
        if not is_finite(weight.detach()):
            raise UserError(f"model: {module}.weight has NaN or infinite values; load a checkpoint without them")
