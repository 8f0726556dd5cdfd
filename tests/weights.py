"""Weights like trained ones, and the kinds of packed weights that tests of kernels go through."""

from __future__ import annotations

import torch

from loftq_exp.schemes import BITS_OF_TYPE, BLOCKLESS_TYPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [
    (kind, bits, double, levels)
    for kind, widths in BITS_OF_TYPE.items()
    for bits in widths
    for double in ((False,) if kind in BLOCKLESS_TYPES else (False, True))
    for levels in (("nf", "optimal") if kind == "nf" else ("nf",))
    if kind != "none"
]
"""Type, bits, whether scales are quantized themselves, and levels."""


def weight_like(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight like a trained one: noise, a few strong directions, and outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    strong = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    noise[:, ::37] *= 4
    return 0.02 * (noise + 0.5 * strong)
