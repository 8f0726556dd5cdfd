"""Unpack, decode and multiply in one pass over memory, compiled by numba.

`unpacking(quantizer, dtype)` returns a function that writes a packed weight's values. The bytes equal those of the torch
code in `loftq_exp.storage.packed`: the same float32 operations in the same order. `multiplying(quantizer)` returns a
function that multiplies a few rows by the weight without writing its values. In generation, writing them would dominate.

Codes of 2, 3 and 4 bits are looked up in vector registers if the CPU can, see `loftq_exp.kernels.registers`. Otherwise
codes of 2, 4 and 8 bits are extracted from 32-bit words. Codes of 3 bits cross words; a table indexed by 12 bits gives
four levels per load.

Without numba, or for a quantizer or type without a kernel, both return None, and the torch code is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.kernels import registers
from loftq_exp.kernels.bfloat16 import flat, narrowing, rounding
from loftq_exp.kernels.compiled import CHUNK_VALUES, CPU_TYPES, compiled, compiled_with, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

UnpackPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(packed, scales, values): whole blocks; scales float32 (blocks, numbers); values (output) flat, of the kernel's type."""

ProductPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(packed, scales, rows, products): scales of any float type, rows (n, in) float32, products (output) (n, out) float32."""

PACKED_WIDTHS = (2, 3, 4, 8)
"""Bits per packed code that have a kernel."""


@functools.cache
def unpacking(quantizer: Quantizer, dtype: torch.dtype) -> UnpackPass | None:
    """Return the compiled pass from packed codes of `quantizer` to `dtype` on the CPU; None if there is none."""
    if not _has_kernel(quantizer) or dtype not in CPU_TYPES or quantizer.scale_dtype not in CPU_TYPES:
        return None
    bits, table = quantizer.bits, _table(quantizer)
    affine, stored_rounded = quantizer.kernel_family == "uniform", quantizer.scale_dtype == torch.bfloat16
    run = _unpack_kernel(bits, quantizer.block_size, affine, stored_rounded, dtype == torch.bfloat16)

    def call(packed: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        run(packed.numpy(), scales.numpy(), table, flat(values), len(scales))

    return call


@functools.cache
def multiplying(quantizer: Quantizer) -> ProductPass | None:
    """Return the compiled product of a few rows with a packed weight on the CPU; None if there is none.

    Rows must be whole blocks. Sums are in float32, of values that are not rounded to the storage type.
    """
    if not _has_kernel(quantizer):
        return None
    table, affine = _table(quantizer), quantizer.kernel_family == "uniform"
    run = _product_kernel(quantizer.bits, quantizer.block_size, affine)
    single = None
    if _in_registers(quantizer.bits):
        single = registers.dotting(quantizer.bits, registers.lanes(), quantizer.block_size, affine)

    def call(packed: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, products: torch.Tensor) -> None:
        if single and len(rows) == 1:
            held = scales.view(torch.uint16) if scales.dtype == torch.bfloat16 else scales.to(torch.float32)
            single(packed.numpy(), held.view(-1).numpy(), table, rows.view(-1).numpy(), products.view(-1).numpy())
        else:
            run(packed.numpy(), scales.to(torch.float32).numpy(), table, rows.numpy(), products.numpy())

    return call


def _has_kernel(quantizer: Quantizer) -> bool:
    kind = quantizer.kernel_family is not None and quantizer.bits in PACKED_WIDTHS
    return numba is not None and kind and quantizer.block_size % 32 == 0


def _in_registers(bits: int) -> bool:
    return bits in registers.REGISTER_WIDTHS and registers.lanes() > 0


def _table(quantizer: Quantizer) -> np.ndarray:
    """Return the unscaled value of each code. Without registers, 3-bit codes get a table of four values per 12 bits."""
    bits = quantizer.bits
    levels = quantizer.kernel_family == "levels"
    of_code = (quantizer.levels() if levels else torch.arange(2**bits, dtype=torch.float32)).numpy()
    if _in_registers(bits):
        return registers.padded(of_code)
    if bits != 3:
        return of_code
    return np.ascontiguousarray(of_code[(np.arange(4096)[:, None] >> np.arange(0, 12, 3)) & 7])


@functools.cache
def _unpack_kernel(bits: int, block: int, affine: bool, stored_rounded: bool, rounded: bool) -> Any:
    """Return the pass over whole blocks. Everything but the arrays is a compile-time constant, so loops are unrolled.

    `stored_rounded`: values are stored in bfloat16; `rounded`: the output is bfloat16.
    """
    look_up, write = _looking_up(bits), _writing(stored_rounded, rounded)
    most = max(CHUNK_VALUES // block, 1)

    def run(packed: Any, scales: Any, table: Any, values: Any, blocks: int) -> None:
        x = np.empty(most * block, np.float32)
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
            write(x, values[first * block : stop * block])

    return compiled(run)


@functools.cache
def _looking_up(bits: int) -> Any:
    """Return f(packed, table, x): write the unscaled values of packed codes to x."""
    if _in_registers(bits):
        return registers.looking_up(bits, registers.lanes())
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
    per_word, mask = 32 // bits, np.uint32(2**bits - 1)

    def look_up(packed: Any, table: Any, x: Any) -> None:
        words = packed.view(np.uint32)
        for i in range(words.size):
            word = words[i]
            for j in range(per_word):
                x[per_word * i + j] = table[(word >> np.uint32(bits * j)) & mask]

    return compiled(look_up)


@functools.cache
def _product_kernel(bits: int, block: int, affine: bool) -> Any:
    """Return the product y[n, o] = sum_i Q[o, i] x[n, i], computed one row of Q at a time in the L1 cache."""
    look_up = _looking_up(bits)

    def run(packed: Any, scales: Any, table: Any, rows: Any, products: Any) -> None:
        columns = rows.shape[1]
        blocks, size, last = columns // block, columns * bits // 8, scales.shape[1] - 1
        x = np.empty(columns, np.float32)
        for o in range(products.shape[1]):
            look_up(packed[o * size : (o + 1) * size], table, x)
            for b in range(blocks):
                part, scale = x[b * block : (b + 1) * block], scales[o * blocks + b, last]
                for i in range(block):
                    part[i] = part[i] * scale
                if affine:
                    minimum = scales[o * blocks + b, 0]
                    for i in range(block):
                        part[i] = part[i] + minimum
            for n in range(rows.shape[0]):
                row, total = rows[n], np.float32(0)
                for i in range(columns):
                    total += x[i] * row[i]
                products[n, o] = total

    # Sums may be reordered, so that the compiler vectorises them. The order is the same every time.
    return compiled_with(run, {"nnan", "reassoc", "contract"})


@functools.cache
def _writing(stored_rounded: bool, rounded: bool) -> Any:
    """Return f(x, values): write float32 values, rounded to the output type or to the storage type."""
    if rounded:
        return narrowing()
    round_in_place = rounding()

    def whole(x: Any, values: Any) -> None:
        if stored_rounded:
            round_in_place(x, values.size)
        for i in range(values.size):
            values[i] = x[i]

    return compiled(whole)
