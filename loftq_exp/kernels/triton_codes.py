# mypy: disable-error-code="no-untyped-def"
"""Triton code shared by the kernels for packed weights: load codes, load scales, decode. Imported only with Triton.

Codes are read in units, each within one 32-bit word or two. A unit of codes of 2, 4 or 8 bits is one word. Eight codes of 3
bits have 24 bits, which are shifted out of one word or two; loading a word again hits the L1 cache.

Decoding does the float32 operations of `Quantizer.decode_stored` in the same order, and rounds to the storage type, so that
the bytes are the same. A multiplication and an addition must not be fused: launch with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

UNIT_CODES = {2: 16, 3: 8, 4: 8, 5: 4, 6: 4, 7: 4, 8: 4}
"""Codes per unit, by bits per code."""

LEVELS, AFFINE, ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""A code's value: level * scale; code * step + minimum; (code - 128) * scale / 127."""

SCALES_PER_STEP = tl.constexpr(256)
"""As in `loftq_exp.loftq.scales`, which is above this room."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's types of values."""


@triton.jit
def load_units(words, units, valid, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Return the units of these indices: uint32, the first code lowest. Bits above the last code are undefined."""
    if BITS * UNIT == 32:
        found = tl.load(words + units, mask=valid, other=0).to(tl.uint32, bitcast=True)
    else:
        first = units * (BITS * UNIT)
        shift = (first & 31).to(tl.uint32)
        low = tl.load(words + (first >> 5), mask=valid, other=0).to(tl.uint32, bitcast=True)
        crosses = valid & (shift > 32 - BITS * UNIT)
        high = tl.load(words + (first >> 5) + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True)
        found = (low >> shift) | ((high << (31 - shift)) << 1)  # in two steps: a shift by 32 is undefined
    return found


@triton.jit
def load_number(
    scales,
    steps,
    groups,
    valid,
    NUMBER: tl.constexpr,
    NUMBERS: tl.constexpr,
    DOUBLE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Return one of the numbers of each of these groups: float32."""
    found = tl.load(scales + groups * NUMBERS + NUMBER, mask=valid, other=0).to(tl.float32)
    if DOUBLE:
        step = tl.load(steps + groups // SCALES_PER_STEP * NUMBERS + NUMBER, mask=valid, other=0)
        if SIGNED:
            found = found - 128.0
        found = found * step
    return found


@triton.jit
def decode(
    codes, scales, steps, table, groups, valid,
    KIND: tl.constexpr, DOUBLE: tl.constexpr, SIGNED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Return the values of `codes`, whose scales are those of `groups`, rounded to the storage type: float32."""
    if KIND == AFFINE:
        # The minimum is column 0, the step column 1, which is never negative.
        minimum = load_number(scales, steps, groups, valid, 0, 2, DOUBLE, True)
        step = load_number(scales, steps, groups, valid, 1, 2, DOUBLE, False)
        values = codes.to(tl.float32) * step + minimum
    else:
        scale = load_number(scales, steps, groups, valid, 0, 1, DOUBLE, SIGNED)
        if KIND == LEVELS:
            values = tl.load(table + codes) * scale
        else:
            values = (codes.to(tl.float32) - 128.0) * scale * (1 / 127)
    return values.to(STORED).to(tl.float32)


@functools.cache
def constants(quantizer: Quantizer) -> dict[str, Any]:
    """Return the compile-time constants of a quantizer's codes and values, by the kernels' names."""
    kind = ROWS if quantizer.type == "int" else AFFINE if quantizer.numbers == 2 else LEVELS
    return {
        "BITS": quantizer.bits,
        "UNIT": UNIT_CODES[quantizer.bits],
        "KIND": kind.value,
        "DOUBLE": quantizer.double,
        "SIGNED": quantizer.signed[0],
        "STORED": TYPES[quantizer.scale_dtype],
        "enable_fp_fusion": False,
    }


@functools.cache
def table(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    """Return the levels by code, float32 on `device`; one unused number for a quantizer without levels."""
    has_levels = constants(quantizer)["KIND"] == LEVELS.value
    return (quantizer.levels() if has_levels else torch.zeros(1)).to(device)


@functools.cache
def group_size(quantizer: Quantizer, shape: tuple[int, int]) -> int:
    """Return the number of consecutive values that share scales; 0 if all do."""
    groups = quantizer.scales_shape(shape)[0]
    return 0 if groups == 1 else math.prod(shape) // groups


def words(qweight: torch.Tensor) -> torch.Tensor:
    """Return packed codes as 32-bit words: a view, or a zero-padded copy if the bytes are not whole words."""
    if qweight.numel() % 4:
        qweight = torch.nn.functional.pad(qweight, (0, -qweight.numel() % 4))
    elif qweight.data_ptr() % 4:
        qweight = qweight.clone()
    return qweight.view(torch.int32)


def tensors(parts: Mapping[str, torch.Tensor], quantizer: Quantizer) -> tuple[torch.Tensor, ...]:
    """Return the kernels' first four arguments: words, scales, steps and table."""
    scales = parts["scales"]
    levels = table(quantizer, scales.device)
    return words(parts["qweight"]), scales, parts.get("scale_steps", levels), levels


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels are launched on `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
