"""Weights like trained ones, and the kinds of packed weights that tests of kernels go through."""

from __future__ import annotations

from typing import TypeVar

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

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


Model = TypeVar("Model", bound=nn.Module)


def in_float32(model: Model) -> Model:
    """A model that was loaded without this package, whose 4-bit layers now compute in float32 on every CPU.

    On one with AVX512_BF16 they ignore the type of their inputs in evaluation and use bfloat16.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False
    return model


def weight_like(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight like a trained one: noise, a few strong directions, and outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    strong = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    noise[:, ::37] *= 4
    return 0.02 * (noise + 0.5 * strong)
