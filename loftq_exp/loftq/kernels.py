"""The quantizers' inner loop as one pass over memory: numba's compiled form of `Quantizer.requantize`.

`fused(quantizer)` gives a function that quantizes blocks of W - P and writes codes, scales and W - Q while the block is in
the nearest cache, where torch's operations would go over memory some thirty times. It gives the same bytes as torch does:
the same float32 operations in the same order, and nothing that regroups a sum. It runs on one thread, and lets go of
Python's lock, so that others may run beside it.

Without numba, or for a quantizer or type that has no kernel, `fused` gives None and torch's form is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizers import Quantizer

try:
    import numba
except ImportError:  # said once, by fused
    numba = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Kernel = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(weight, product, unit, codes, scales, residual), as `Quantizer.requantize` has them, flat and of whole blocks. An empty
product is zero."""

LANES = 16
"""Values compared side by side in the search for a block's extremes."""

SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less than this, so that a block of zeros stays finite."""


@functools.cache
def fused(quantizer: Quantizer) -> Kernel | None:
    """The compiled pass of `quantizer` for tensors on the CPU; None where there is none."""
    family, block = quantizer.kernel_family, quantizer.block_size
    if (
        family is None
        or quantizer.double
        or block % (2 * LANES)
        or quantizer.scale_dtype not in (torch.float32, torch.bfloat16)
    ):
        return None
    if numba is None:
        _say_once()
        return None
    rounded = quantizer.scale_dtype == torch.bfloat16
    if family == "levels":
        tables = quantizer.thresholds().numpy(), quantizer.levels().numpy()
        return _caller(_levels_kernel(2**quantizer.bits - 1, block, rounded), tables, block)
    return _caller(_uniform_kernel(2**quantizer.bits - 1, block, rounded), (), block)


@functools.cache
def _say_once() -> None:
    log.warning("numba is not there: quantizing takes several times as long, with the same result; pip install numba")


def _caller(compiled: Any, tables: tuple[np.ndarray, ...], block: int) -> Kernel:
    def call(
        weight: torch.Tensor,
        product: torch.Tensor,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        arrays = [tensor.numpy() for tensor in (weight, product, codes, scales, residual)]
        compiled(*arrays, np.float32(unit), *tables, weight.numel() // block)

    return call


def _compiled(function: Any) -> Any:
    # No NaN comes in, which lets the compiler take maxima lane by lane. Nothing else of fastmath: it would change bytes.
    return numba.njit(function, nogil=True, error_model="numpy", fastmath={"nnan"})


@functools.cache
def _rounding(rounded: bool) -> Any:
    """In-place rounding of a float32 array to bfloat16's values, ties to even; or none."""
    if not rounded:
        return _compiled(lambda values: None)

    def to_bfloat16(values: Any) -> None:
        bits = values.view(np.uint32)
        for i in range(bits.size):
            bits[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) & np.uint32(
                0xFFFF0000
            )

    return _compiled(to_bfloat16)


@functools.cache
def _storing(rounded: bool) -> Any:
    """A scale as it is stored, see `Quantizer._round`: rounded, and no infinity."""
    largest = np.float32(torch.finfo(torch.bfloat16 if rounded else torch.float32).max)
    round_in_place = _rounding(rounded)

    def stored(scale: Any, scratch: Any) -> Any:
        scratch[0] = min(max(scale, -largest), largest)
        round_in_place(scratch[:1])
        return scratch[0]

    return _compiled(stored)


@functools.cache
def _levels_kernel(top: int, block: int, rounded: bool) -> Any:
    """NormalFloat's pass, see `NormalFloat._encode_groups`: absmax of the block, nearest level.

    `top` and `block` are constants to the compiler, which unrolls the loops over them; and it vectorizes only what is
    indexed from 0, so that each block is a slice.
    """
    round_in_place, stored, subtract = _rounding(rounded), _storing(rounded), _subtracting(block)
    smallest, one = np.float32(SMALLEST_ABSMAX), np.float32(1)

    def run(weights: Any, products: Any, all_codes: Any, scales: Any, residuals: Any, unit: Any,
            thresholds: Any, levels: Any, blocks: int) -> None:  # fmt: skip
        x, values = np.empty(block, np.float32), np.empty(block, np.float32)
        for b in range(blocks):
            weight, codes = weights[b * block : (b + 1) * block], all_codes[b * block : (b + 1) * block]
            residual = residuals[b * block : (b + 1) * block]
            subtract(weight, products, b, x)
            for lane in range(LANES):
                values[lane] = abs(x[lane])
            for i in range(1, block // LANES):
                for lane in range(LANES):
                    values[lane] = max(values[lane], abs(x[i * LANES + lane]))
            absmax = values[0]
            for lane in range(1, LANES):
                absmax = max(absmax, values[lane])
            absmax = stored(absmax, values)
            scales[b, 0] = absmax
            inverse = one / max(absmax, smallest)
            for i in range(block):
                x[i] = min(max(x[i] * inverse, -one), one)
            for i in range(block):
                code = np.uint8(0)
                for k in range(top):
                    code += np.uint8(x[i] > thresholds[k])
                codes[i] = code
            for i in range(block):
                values[i] = levels[codes[i]] * absmax
            round_in_place(values)
            for i in range(block):
                residual[i] = (weight[i] - values[i]) * unit

    return _compiled(run)


@functools.cache
def _uniform_kernel(top: int, block: int, rounded: bool) -> Any:
    """The paper's uniform quantizer, see `Uniform._encode_groups`: minimum and step of the block, nearest level."""
    round_in_place, stored, subtract = _rounding(rounded), _storing(rounded), _subtracting(block)
    zero, last, infinite = np.float32(0), np.float32(top), np.float32(np.inf)

    def run(weights: Any, products: Any, all_codes: Any, scales: Any, residuals: Any, unit: Any,
            blocks: int) -> None:  # fmt: skip
        x, values = np.empty(block, np.float32), np.empty(block, np.float32)
        for b in range(blocks):
            weight, codes = weights[b * block : (b + 1) * block], all_codes[b * block : (b + 1) * block]
            residual = residuals[b * block : (b + 1) * block]
            subtract(weight, products, b, x)
            for lane in range(LANES):
                smallest, largest = x[lane], x[lane]
                for i in range(1, block // LANES):
                    smallest = min(smallest, x[i * LANES + lane])
                    largest = max(largest, x[i * LANES + lane])
                values[lane], values[LANES + lane] = smallest, largest
            low, high = values[0], values[LANES]
            for lane in range(1, LANES):
                low = min(low, values[lane])
                high = max(high, values[LANES + lane])
            minimum = stored(low, values) + zero
            step = stored(max((high - minimum) / last, zero), values)
            scales[b, 0], scales[b, 1] = minimum, step
            divisor = step if step > zero else infinite
            for i in range(block):
                level = min(max(np.rint((x[i] - minimum) / divisor), zero), last)
                codes[i] = np.uint8(level)
                values[i] = level * step + minimum
            round_in_place(values)
            for i in range(block):
                residual[i] = (weight[i] - values[i]) * unit

    return _compiled(run)


@functools.cache
def _subtracting(block: int) -> Any:
    """Writes W - P of block `b` to x."""

    def subtract(weight: Any, products: Any, b: int, x: Any) -> None:
        if products.size:
            product = products[b * block : (b + 1) * block]
            for i in range(block):
                x[i] = weight[i] - product[i]
        else:
            for i in range(block):
                x[i] = weight[i]

    return _compiled(subtract)
