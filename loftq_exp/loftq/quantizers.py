"""The quantizers by type.

To add one, write a subclass of `Quantizer` in its own module, and list its type here and its bits in `loftq_exp.schemes`.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq.normal_float import NormalFloat, normal_float_levels, optimal_levels
from loftq_exp.loftq.quantizer import QUANTIZER_VERSION, Quantized, Quantizer
from loftq_exp.loftq.row_int import RowInt
from loftq_exp.loftq.uniform import Uniform, UniformClipped, UniformSigma
from loftq_exp.schemes import BITS_OF_TYPE, BLOCKLESS_TYPES, SCALES, SEARCHED_TYPES, TYPES_OF_LEVELS

__all__ = ["QUANTIZER_VERSION", "Quantized", "Quantizer", "make_quantizer", "normal_float_levels", "optimal_levels"]

_CLASS_OF_TYPE: dict[str, type[Quantizer]] = {
    "nf": NormalFloat,
    "nf-symmetric": NormalFloat,
    "uniform": Uniform,
    "uniform-clipped": UniformClipped,
    "uniform-sigma": UniformSigma,
    "int": RowInt,
}


def make_quantizer(
    type: str,
    bits: int,
    block_size: int = 64,
    scale_dtype: torch.dtype = torch.float32,
    double: bool = False,
    levels: str = "nf",
    scale: str = "absmax",
) -> Quantizer:
    """Return the quantizer of this type.

    Args:
        type: nf, nf-symmetric, uniform (paper's equation 1), uniform-clipped, uniform-sigma or int.
        bits: bits per value; the allowed ones depend on the type, see `loftq_exp.schemes.BITS_OF_TYPE`.
        block_size: consecutive values (row-major) that share scales; uniform-clipped and int ignore it.
        scale_dtype: type in which scales and decoded values are stored: float32, bfloat16 or float16.
        double: whether the block scales are quantized to 8 bits themselves.
        levels: for type nf, its own levels (nf) or those with the smallest squared error among NF4's (optimal).
        scale: a block's scale covers its range (absmax), or has the smallest squared error (search).

    Raises:
        UserError: for an unknown type, or a value of another argument that it does not support.
    """
    if type not in _CLASS_OF_TYPE:
        raise UserError(f"quantizer type {type!r}: unknown; choose one of {', '.join(_CLASS_OF_TYPE)}")
    if bits not in BITS_OF_TYPE[type]:
        widths = ", ".join(map(str, BITS_OF_TYPE[type]))
        raise UserError(f"bits={bits}: quantizer type {type} has {widths} bits; choose one of them or another type")
    if block_size < 1:
        raise UserError(f"block_size={block_size}: not a number of values; choose a positive one (64 is usual)")
    if scale_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"scale_dtype={scale_dtype}: not a type for scales; choose float32, bfloat16 or float16")
    if double and type in BLOCKLESS_TYPES:
        raise UserError(
            f"double=True: quantizer type {type} has no blocks whose scales could be quantized; leave double out"
        )
    if levels not in TYPES_OF_LEVELS:
        raise UserError(f"levels={levels}: unknown; choose one of {', '.join(TYPES_OF_LEVELS)}")
    if type not in TYPES_OF_LEVELS[levels]:
        raise UserError(f"levels={levels}: quantizer type {type} has its own levels; leave levels out, or use type nf")
    if scale not in SCALES:
        raise UserError(f"scale={scale}: unknown; choose one of {', '.join(SCALES)}")
    if scale == "search" and type not in SEARCHED_TYPES:
        raise UserError(f"scale=search: quantizer type {type} has no range per block to search; "
                        f"leave scale out, or use type {', '.join(SEARCHED_TYPES)}")  # fmt: skip
    return _CLASS_OF_TYPE[type](type, bits, block_size, scale_dtype, double, levels, scale)
