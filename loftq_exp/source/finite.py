"""Detect NaN and Inf in weights before they are used."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loftq_exp.errors import UserError
from loftq_exp.source.tensors import CheckpointTensors

_CHUNK = 1 << 22
"""Values checked at a time. It bounds memory use for tensors of any size."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of the tensor are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    flat = tensor.reshape(-1)
    # aminmax propagates NaN, so checking the minimum and maximum checks every value.
    return all(bool(torch.stack(torch.aminmax(chunk)).isfinite().all()) for chunk in flat.split(_CHUNK))


def check_finite(tensors: CheckpointTensors, names: Iterable[str]) -> None:
    """Raise UserError for the first of these tensors that holds NaN or Inf."""
    for name in names:
        tensor = tensors.read(name)
        if not is_finite(tensor):
            lost = sum(int((~chunk.isfinite()).sum()) for chunk in tensor.reshape(-1).split(_CHUNK))
            raise UserError(f"model.path: tensor {name}: {lost} of {tensor.numel()} values are NaN or infinite; download the "
                            "checkpoint again, or give another")  # fmt: skip
