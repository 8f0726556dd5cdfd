"""The layout of a model in memory, whose tensors have the names of its parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_lists, left_out
from loftq_exp.source.experts import expert_targets
from loftq_exp.source.finite import is_finite
from loftq_exp.source.layout import AUTO_CLASSES, Layout, head_of, in_order, layout_of, linear_target, linear_targets
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
    stacks, name = block_lists(model), Path(model.name_or_path or type(model).__name__)
    not_quantized = left_out(model, stacks, {}, name)
    targets = linear_targets(
        model, stacks, lambda module, block, linear: linear_target(module, f"{module}.weight", block, linear)
    )
    experts = expert_targets(model, stacks, {}, name)
    if not targets and not experts:
        raise UserError(f"model: {type(model).__name__} has no linear layer in a block; nothing to quantize")
    _check_values({target.parameter: model.get_parameter(target.parameter) for target in targets + experts})
    head = head_of(model, targets, kind, set(model.state_dict()))
    return layout_of(model, in_order(targets + experts), selection, not_quantized, head)


def _check_values(weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError if a weight has no plain values, or shares them with another."""
    seen: dict[int, str] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.is_meta or weight.dtype not in _TYPES:
            what = "is on the meta device" if weight.is_meta else f"has values of {weight.dtype}"
            raise UserError(
                f"model: {module} {what}; load the model in float32, bfloat16 or float16, without quantization"
            )
        if (other := seen.setdefault(weight.data_ptr(), module)) != module:
            raise UserError(f"model: {module} shares its weight with {other}; quantizing one would change both")
        if not is_finite(weight.detach()):
            raise UserError(f"model: {name} has NaN or infinite values; load a checkpoint without them")
