"""bfloat16 in compiled loops: numba knows no such type, so that values are float32 or the upper halves of their bits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from loftq_exp.kernels.compiled import compiled


def flat(tensor: torch.Tensor) -> Any:
    """The tensor's values in one row for numpy, those of bfloat16 as 16 bits each."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().reshape(-1)


@functools.cache
def rounding() -> Any:
    """f(values, count), compiled: rounds the first float32 values in place to bfloat16's, ties to even."""

    def in_place(values: Any, count: int) -> None:
        bits = values.view(np.uint32)
        for i in range(count):
            even = (bits[i] >> np.uint32(16)) & np.uint32(1)
            bits[i] = (bits[i] + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)

    return compiled(in_place)


@functools.cache
def narrowing() -> Any:
    """f(values, out), compiled: writes float32 values to 16 bits each, rounded to bfloat16's, ties to even."""

    def narrow(values: Any, out: Any) -> None:
        bits = values.view(np.uint32)
        for i in range(out.size):
            even = (bits[i] >> np.uint32(16)) & np.uint32(1)
            out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))

    return compiled(narrow)


@functools.cache
def widening() -> Any:
    """f(values, room), compiled: float32 values of 16 bits each, written to the float32 `room`; gives its part."""

    def widen(values: Any, room: Any) -> Any:
        bits = room.view(np.uint32)
        for i in range(values.size):
            bits[i] = np.uint32(values[i]) << np.uint32(16)
        return room[: values.size]

    return compiled(widen)
