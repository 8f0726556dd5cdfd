"""bfloat16 in compiled loops. numba lacks the type, so values are float32 or, as uint16, the upper half of its bits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from loftq_exp.kernels.compiled import compiled


def flat(tensor: torch.Tensor) -> Any:
    """Return the tensor's values as a flat numpy array; bfloat16 values as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().reshape(-1)


@functools.cache
def rounding() -> Any:
    """Return f(values, count), compiled: round the first `count` float32 values to bfloat16 in place, ties to even."""

    def in_place(values: Any, count: int) -> None:
        bits = values.view(np.uint32)
        for i in range(count):
            even = (bits[i] >> np.uint32(16)) & np.uint32(1)
            bits[i] = (bits[i] + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)

    return compiled(in_place)


@functools.cache
def narrowing() -> Any:
    """Return f(values, out), compiled: round float32 values to bfloat16, ties to even, and write them as uint16."""

    def narrow(values: Any, out: Any) -> None:
        bits = values.view(np.uint32)
        for i in range(out.size):
            even = (bits[i] >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))

    return compiled(narrow)


@functools.cache
def widening() -> Any:
    """Return f(values, buffer), compiled: convert uint16 bfloat16 values to float32 in `buffer`; return the part used."""

    def widen(values: Any, buffer: Any) -> Any:
        bits = buffer.view(np.uint32)
        for i in range(values.size):
            bits[i] = np.uint32(values[i]) << np.uint32(16)
        return buffer[: values.size]

    return compiled(widen)
