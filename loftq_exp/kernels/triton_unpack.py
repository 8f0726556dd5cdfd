# mypy: disable-error-code="no-untyped-def"
"""Unpack and decode a packed weight on a GPU, in one pass over memory. Imported only with Triton.

The bytes equal those of the torch code in `loftq_exp.storage.packed`. A program writes 4096 values, so that a weight of 4096 x
4096 makes 4096 programs, and each thread writes 32 values in 16-byte stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from loftq_exp.kernels.triton_codes import constants, current, decode, group_size, load_units, tensors

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

TILE = 4096
"""Values per program: whole units and whole words for every number of bits."""

WARPS = 4


@triton.jit
def _unpack(
    words, scales, steps, table, out, values,
    BITS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, DOUBLE: tl.constexpr, SIGNED: tl.constexpr,
    STORED: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write one tile of the flattened weight. EVEN: there are only whole tiles, so that no access is masked."""
    start = tl.program_id(0).to(tl.int64) * TILE
    units = tl.arange(0, TILE // UNIT)
    inside = units[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    valid = units >= 0 if EVEN else units * UNIT < values - start
    found = load_units(words + start * BITS // 32, units, valid, BITS, UNIT)
    codes = ((found[:, None] >> (tl.arange(0, UNIT) * BITS).to(tl.uint32)[None, :]) & (2**BITS - 1)).to(tl.int32)
    covered = valid[:, None]
    if GROUP == 0:
        groups = units[:, None] * 0
    elif GROUP % UNIT == 0:
        groups = ((start + units * UNIT) // GROUP)[:, None]
    else:
        groups = (start + inside) // GROUP
        covered = start + inside < values
    decoded = decode(codes, scales, steps, table, groups, covered, KIND, DOUBLE, SIGNED, STORED)
    written = covered if EVEN else inside < values - start
    tl.store(out + start + inside, decoded.to(out.dtype.element_ty), mask=written)


def unpack(
    parts: Mapping[str, torch.Tensor], quantizer: Quantizer, shape: tuple[int, int], values: torch.Tensor
) -> None:
    """Write the values of a packed weight of this shape to `values`, (out, in): float32, bfloat16 or float16."""
    count = values.numel()
    if not count:
        return
    with current(values.device):
        _unpack[(triton.cdiv(count, TILE),)](
            *tensors(parts, quantizer), values, count, **constants(quantizer), GROUP=group_size(quantizer, shape),
            TILE=TILE, EVEN=count % TILE == 0, num_warps=WARPS,
        )  # fmt: skip
