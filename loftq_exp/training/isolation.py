"""Packed rows must not see each other. Whether a model keeps them apart is tried on the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loftq_exp.errors import UserError
from loftq_exp.tasks.encode import Collator, Features

_TOKENS = 8
"""Tokens of each of the two rows that are tried."""
_ROUNDING = 4
"""Differences that are rounding: so many units in the last place of the largest logit."""


def check_isolation(model: nn.Module, train: Sequence[Features], collator: Collator) -> None:
    """Raise UserError if the model's logits of a packed row change with the row before it. Does nothing without packing."""
    sequence = next((one for one in train if one.get("position_ids", []).count(0) > 1), None)
    if sequence is None:
        return
    first = list(sequence["input_ids"][:_TOKENS])
    second = sequence["position_ids"].index(0, 1)
    last = list(sequence["input_ids"][second : second + _TOKENS])
    others = [first[-1]] * len(first)
    one, other = (_logits(model, collator([_packed(before, last)]))[0, len(first) :] for before in (first, others))
    # Not exactly equal: kernels that group tokens, as of experts, may round in another order.
    if (one - other).abs().max() > _ROUNDING * torch.finfo(one.dtype).eps * one.abs().max():
        raise UserError(
            f"task.packing=true: {_name(model)} lets a packed row see the row before it; use task.packing=false"
        )


def _packed(first: list[int], second: list[int]) -> Features:
    ids = first + second
    return {"input_ids": ids, "labels": ids, "position_ids": [*range(len(first)), *range(len(second))]}


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found: torch.Tensor = model(**inputs).logits
            return found
    except TypeError:
        raise UserError(
            f"task.packing=true: {_name(model)} takes no position_ids, by which packed rows are kept apart; use "
            "task.packing=false"
        ) from None
    finally:
        model.train(training)


def _name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__
