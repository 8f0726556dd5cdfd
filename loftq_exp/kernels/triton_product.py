# mypy: disable-error-code="no-untyped-def"
"""Multiply a few rows by a packed weight on a GPU, without writing its values. Imported only with Triton.

Values are rounded to the storage type and to the rows' type, as unpacking rounds them; sums are float32. Each program computes
whole sums, and their order depends on the shapes alone, so that the result is the same every time.

One row: 32-bit multiply-adds. More rows of 16 bits: tensor cores, where each warp of a program sums a part of the columns.
The configurations are for an H100 (132 multiprocessors, 3.3 TB/s), by reasoning: about 8 warps or more on each of them, each
thread with several independent loads, so that about 16 KiB are in flight per multiprocessor. The words of the next tile are
loaded before those of the last are decoded. Triton's pipelining is off: it would copy every level looked up to shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from loftq_exp.kernels.triton_codes import TYPES, constants, current, decode, group_size, load_units, tensors

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

MAX_ROWS = 16
"""Rows of one tile of the tensor cores. For more, unpacking once is faster."""

ROW_ALIGNMENT = 32
"""Values that are whole words and whole units for every number of bits."""

ROW_VALUES, ROW_WARPS = 1024, 4
"""One row: values of each output per tile of a program, and warps."""

TILE_OUTS, TILE_VALUES, TILE_WARPS = 16, 64, 8
"""More rows: outputs of a program, values that a warp multiplies at a time, and warps, each with its part of the columns.
With 4096 outputs there are 256 programs, 2048 warps."""


@triton.jit
def _one_row(
    words, scales, steps, table, rows, products, outs,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, DOUBLE: tl.constexpr, SIGNED: tl.constexpr,
    STORED: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr, OUTS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Write OUTS products of the row of the second grid index. ROW: the rows' type."""
    first = tl.program_id(0) * OUTS
    row = tl.program_id(1).to(tl.int64)
    LENGTH: tl.constexpr = COLUMNS // UNIT
    out = tl.arange(0, OUTS)
    unit = tl.arange(0, UNITS)
    code = tl.arange(0, UNIT)
    words += first.to(tl.int64) * LENGTH * (BITS * UNIT) // 32
    sums = tl.zeros([OUTS, UNITS], tl.float32)
    at = out[:, None] * LENGTH + unit[None, :]
    present = (first + out < outs)[:, None]
    following = load_units(words, at, present & (unit < LENGTH)[None, :], BITS, UNIT)
    for start in range(0, LENGTH, UNITS):
        found, units = following, start + unit
        valid = present & (units < LENGTH)[None, :]
        more = present & (units + UNITS < LENGTH)[None, :]
        following = load_units(words, at + start + UNITS, more, BITS, UNIT)
        codes = ((found[:, :, None] >> (code * BITS).to(tl.uint32)[None, None, :]) & (2**BITS - 1)).to(tl.int32)
        if GROUP == 0:
            groups = out[:, None] * 0 + units[None, :] * 0
        else:
            groups = (first + out)[:, None] * (COLUMNS // GROUP) + (units * UNIT // GROUP)[None, :]
        values = decode(
            codes, scales, steps, table, groups[:, :, None], valid[:, :, None], KIND, DOUBLE, SIGNED, STORED
        )
        columns = row * COLUMNS + units[:, None] * UNIT + code[None, :]
        factors = tl.load(rows + columns, mask=(units < LENGTH)[:, None], other=0).to(tl.float32)
        sums += tl.sum(values.to(ROW).to(tl.float32) * factors[None, :, :], axis=2)
    product = tl.sum(sums, axis=1)
    tl.store(products + row * outs + first + out, product.to(ROW), mask=first + out < outs)


@triton.jit
def _few_rows(
    words, scales, steps, table, rows, products, outs, count,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, DOUBLE: tl.constexpr, SIGNED: tl.constexpr,
    STORED: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr, OUTS: tl.constexpr, UNITS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write OUTS products of each of `count` rows, at most ROWS. PARTS: warps, each with UNITS units of a tile of columns."""
    first = tl.program_id(0) * OUTS
    LENGTH: tl.constexpr = COLUMNS // UNIT
    out = tl.arange(0, OUTS)
    row = tl.arange(0, ROWS)
    code = tl.arange(0, UNIT)
    of_part = tl.arange(0, PARTS)[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
    values_of_part = tl.arange(0, PARTS)[:, None] * (UNITS * UNIT) + tl.arange(0, UNITS * UNIT)[None, :]
    words += first.to(tl.int64) * LENGTH * (BITS * UNIT) // 32
    sums = tl.zeros([PARTS, OUTS, ROWS], tl.float32)
    at = out[None, :, None] * LENGTH + of_part[:, None, :]
    present = (first + out < outs)[None, :, None]
    following = load_units(words, at, present & (of_part < LENGTH)[:, None, :], BITS, UNIT)
    for start in range(0, LENGTH, PARTS * UNITS):
        found, units = following, (start + of_part)[:, None, :]
        valid = present & (units < LENGTH)
        more = present & (units + PARTS * UNITS < LENGTH)
        following = load_units(words, at + start + PARTS * UNITS, more, BITS, UNIT)
        codes = ((found[:, :, :, None] >> (code * BITS).to(tl.uint32)[None, None, None, :]) & (2**BITS - 1)).to(
            tl.int32
        )
        if GROUP == 0:
            groups = out[None, :, None] * 0 + units * 0
        else:
            groups = (first + out)[None, :, None] * (COLUMNS // GROUP) + units * UNIT // GROUP
        values = decode(
            codes, scales, steps, table, groups[:, :, :, None], valid[:, :, :, None], KIND, DOUBLE, SIGNED, STORED
        )
        columns = (start * UNIT + values_of_part)[:, :, None]
        inside = (columns < COLUMNS) & (row < count)[None, None, :]
        factors = tl.load(rows + row[None, None, :] * COLUMNS + columns, mask=inside, other=0)
        sums = tl.dot(tl.reshape(values.to(ROW), [PARTS, OUTS, UNITS * UNIT]), factors, sums)
    product = tl.sum(sums, axis=0)
    written = (first + out < outs)[:, None] & (row < count)[None, :]
    tl.store(products + row[None, :] * outs + (first + out)[:, None], product.to(ROW), mask=written)


def _row_outs(outs: int) -> int:
    """Return the outputs of a program for one row: 8, or 4 where there are few, so that there are 256 programs or more."""
    return 8 if outs >= 2048 else 4


def multiplies(quantizer: Quantizer, shape: tuple[int, int], count: int, dtype: torch.dtype) -> bool:
    """Return whether `multiply` takes so many rows of this type, and a weight of this shape."""
    group = group_size(quantizer, shape) or ROW_ALIGNMENT
    whole = shape[1] % ROW_ALIGNMENT == 0 and shape[1] % group == 0 and group % constants(quantizer)["UNIT"] == 0
    return whole and 0 < count <= MAX_ROWS and dtype in TYPES


def multiply(
    parts: Mapping[str, torch.Tensor],
    quantizer: Quantizer,
    shape: tuple[int, int],
    rows: torch.Tensor,
    products: torch.Tensor,
) -> None:
    """Write rows (n, in) times the transpose of a packed weight (out, in) to `products` (n, out), of the rows' type.

    Rows and products are contiguous, and `multiplies` takes them.
    """
    count, columns = rows.shape
    fixed = {
        **constants(quantizer),
        "GROUP": group_size(quantizer, shape),
        "ROW": TYPES[rows.dtype],
        "COLUMNS": columns,
    }
    unit = fixed["UNIT"]
    given = (*tensors(parts, quantizer), rows, products, shape[0])
    with current(rows.device):
        if count == 1 or rows.dtype == torch.float32:
            each = _row_outs(shape[0])
            grid: tuple[Any, ...] = (triton.cdiv(shape[0], each), count)
            _one_row[grid](*given, **fixed, OUTS=each, UNITS=ROW_VALUES // unit, num_warps=ROW_WARPS)
        else:
            grid = (triton.cdiv(shape[0], TILE_OUTS),)
            _few_rows[grid](*given, count, **fixed, OUTS=TILE_OUTS, UNITS=TILE_VALUES // unit, PARTS=TILE_WARPS,
                            ROWS=MAX_ROWS, num_warps=TILE_WARPS, num_stages=1)  # fmt: skip
