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


@functools.cache
def rounding_if(rounded: bool) -> Any:
    """Return `rounding()` if `rounded`, else a function that does nothing."""
    return rounding() if rounded else compiled(lambda values, count: None)


def largest_stored(rounded: bool) -> Any:
    """Return the largest finite bfloat16 if `rounded`, else the largest float32: a numpy float32."""
    return np.float32(torch.finfo(torch.bfloat16 if rounded else torch.float32).max)


@functools.cache
def storing(rounded: bool) -> Any:
    """Return f(scale, scratch), compiled: the scale as it is stored, rounded and finite, see `Quantizer._round`."""
    largest, round_in_place = largest_stored(rounded), rounding_if(rounded)

    def stored(scale: Any, scratch: Any) -> Any:
        scratch[0] = min(max(scale, -largest), largest)
        round_in_place(scratch, 1)
        return scratch[0]

    return compiled(stored)
