"""Unpacking and what follows it in one pass over memory, in numba's compiled form.

`unpacking(quantizer, dtype)` gives a function that writes a packed weight's values, with the same bytes as torch's form in
`loftq_exp.storage.packed`: the same float32 operations in the same order. `multiplying(quantizer)` gives one that multiplies
a few rows by the weight and never writes its values: in generation, writing them would take longer than all else.

Codes of 2, 3 and 4 bits are looked up in vector registers where the processor can, see `loftq_exp.kernels.registers`. Else
codes of 2, 4 and 8 bits are taken from words of 32 bits, and of 3-bit codes, which cross words, a table has what 12 bits stand
for, so that one load brings four levels.

Without numba, or for a quantizer or type that has no kernel, both give None and torch's form is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.kernels import registers
from loftq_exp.kernels.bfloat16 import flat, narrowing, rounding
from loftq_exp.kernels.compiled import CHUNK_VALUES, CPU_TYPES, compiled, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

UnpackPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(packed, scales, values): whole blocks; scales float32 (blocks, numbers); values flat, of the kernel's type, written."""

ProductPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(packed, scales, rows, products): scales of any float type, rows (n, in) float32, products (n, out) float32, written."""

PACKED_WIDTHS = (2, 3, 4, 8)
"""Bits a packed code that there are kernels for."""


@functools.cache
def unpacking(quantizer: Quantizer, dtype: torch.dtype) -> UnpackPass | None:
    """The compiled pass for packed codes of `quantizer` on the CPU into `dtype`; None where there is none."""
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
    """The compiled product of a few rows with a packed weight on the CPU; None where there is none. Rows must be whole blocks.

    Sums are in float32, of values that are not rounded to the type that they would be stored in.
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
    """What a code stands for before scaling; of 3 bits, for every content of 12 bits what its four codes stand for."""
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
    """The pass over whole blocks; all but the arrays is constant to the compiler, which unrolls the loops.

    `stored_rounded`: values are stored in bfloat16; `rounded`: they are wanted in bfloat16.
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
    """Writes what packed codes stand for to x."""
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
    """y[n, o] = sum_i Q[o, i] x[n, i], a row of Q at a time in the nearest cache."""
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

    # The sums may be taken in any order, which is what lets them be vectors; it is the same order each time.
    return numba.njit(run, nogil=True, error_model="numpy", fastmath={"nnan", "reassoc", "contract"})


@functools.cache
def _writing(stored_rounded: bool, rounded: bool) -> Any:
    """Writes float32 values, rounded to bfloat16's 16 bits or as they would be stored."""
    if rounded:
        return narrowing()
    round_in_place = rounding()

    def whole(x: Any, values: Any) -> None:
        if stored_rounded:
            round_in_place(x, values.size)
        for i in range(values.size):
            values[i] = x[i]

    return compiled(whole)
