"""Unpacking and dequantizing in one pass over memory: numba's compiled form of unpack, decode and round.

`fused(quantizer, dtype)` gives a function that writes a packed weight's values. It gives the same bytes as torch's form in
`loftq_exp.packed.weight`: the same float32 operations in the same order. A table holds what a byte's (or, of 3-bit codes,
12 bits') worth of codes stand for, so that one load brings two to four levels.

Without numba, or for a quantizer or type that has no kernel, `fused` gives None and torch's form is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.loftq.kernels import _compiled as compiled
from loftq_exp.loftq.kernels import numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizers import Quantizer

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(packed, scales, values): whole blocks; scales float32 (blocks, numbers); values flat, of the kernel's type, written."""

_TABLE_BITS = {2: 8, 3: 12, 4: 8, 8: 8}
"""How many bits of packed codes are looked up at once."""

CHUNK_VALUES = 1024
"""About as many values go through one loop after the other, in the nearest cache."""


@functools.cache
def fused(quantizer: Quantizer, dtype: torch.dtype) -> Kernel | None:
    """The compiled pass for packed codes of `quantizer` on the CPU into `dtype`; None where there is none."""
    family, bits, block = quantizer.kernel_family, quantizer.bits, quantizer.block_size
    types = (torch.float32, torch.bfloat16)
    if numba is None or family is None or bits not in _TABLE_BITS or block % 32:
        return None
    if dtype not in types or quantizer.scale_dtype not in types:
        return None
    of_code = quantizer.levels() if family == "levels" else torch.arange(2**bits, dtype=torch.float32)
    table = _table(of_code.numpy(), bits)
    run = _kernel(bits, block, family == "uniform", quantizer.scale_dtype == torch.bfloat16, dtype == torch.bfloat16)
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32

    def call(packed: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        written = values.view(integers).numpy()
        run(packed.numpy(), scales.numpy(), table, written.view(f"u{written.itemsize}"), len(scales))

    return call


def _table(of_code: np.ndarray, bits: int) -> np.ndarray:
    """For every content of the bits that are looked up at once, what its codes stand for: float32, (contents, codes)."""
    contents = np.arange(2 ** _TABLE_BITS[bits])
    shifts = np.arange(0, _TABLE_BITS[bits], bits)
    return np.ascontiguousarray(of_code[(contents[:, None] >> shifts) & (2**bits - 1)])


@functools.cache
def _kernel(bits: int, block: int, affine: bool, stored_rounded: bool, rounded: bool) -> Any:
    """The pass over whole blocks; all but the arrays is constant to the compiler, which unrolls the loops.

    `stored_rounded`: values are stored in bfloat16; `rounded`: they are wanted in bfloat16.
    """
    look_up, write = _looking_up(bits), _writing(stored_rounded, rounded)
    most = max(CHUNK_VALUES // block, 1)

    def run(packed: Any, scales: Any, table: Any, values: Any, blocks: int) -> None:
        x = np.empty(most * block, np.float32)
        held = x.view(np.uint32)
        last = scales.shape[1] - 1
        for first in range(0, blocks, most):
            stop = min(first + most, blocks)
            look_up(packed[first * block * bits // 8 : stop * block * bits // 8], table, x)
            for b in range(stop - first):
                part, scale = x[b * block : (b + 1) * block], scales[first + b, last]
                if affine:
                    minimum = scales[first + b, 0]
                    for i in range(block):
                        part[i] = part[i] * scale
                    for i in range(block):
                        part[i] = part[i] + minimum
                else:
                    for i in range(block):
                        part[i] = part[i] * scale
            write(held, values[first * block : stop * block])

    return compiled(run)


@functools.cache
def _looking_up(bits: int) -> Any:
    """Writes what packed codes stand for to x."""
    if bits == 3:

        def look_up_three(packed: Any, table: Any, x: Any) -> None:
            for i in range(packed.size // 3):
                word = (
                    np.uint32(packed[3 * i])
                    | (np.uint32(packed[3 * i + 1]) << np.uint32(8))
                    | (np.uint32(packed[3 * i + 2]) << np.uint32(16))
                )
                low, high = word & np.uint32(4095), word >> np.uint32(12)
                for j in range(4):
                    x[8 * i + j] = table[low, j]
                for j in range(4):
                    x[8 * i + 4 + j] = table[high, j]

        return compiled(look_up_three)
    per_byte = 8 // bits

    def look_up(packed: Any, table: Any, x: Any) -> None:
        for i in range(packed.size):
            for j in range(per_byte):
                x[per_byte * i + j] = table[packed[i], j]

    return compiled(look_up)


@functools.cache
def _writing(stored_rounded: bool, rounded: bool) -> Any:
    """Writes float32 values, given as their bits, rounded to bfloat16's (ties to even) or as they are."""
    if rounded:

        def upper_halves(held: Any, values: Any) -> None:
            for i in range(values.size):
                even = (held[i] >> np.uint32(16)) & np.uint32(1)
                values[i] = np.uint16((held[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))

        return compiled(upper_halves)

    def whole(held: Any, values: Any) -> None:
        for i in range(values.size):
            if stored_rounded:
                even = (held[i] >> np.uint32(16)) & np.uint32(1)
                values[i] = (held[i] + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
            else:
                values[i] = held[i]

    return compiled(whole)
