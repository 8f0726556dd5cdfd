"""The split of a product s B A between its factors.

Any B G and G^-1 A have the same product, so they start at the same function. They do not train alike: a step of Adam changes
each value of A and B by about the learning rate, which changes the product by B dA + dB A.
"""

from __future__ import annotations

import math

import torch

from loftq_exp.loftq.pieces import in_thread_pool


def split_factors(
    lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, how: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) with s B A equal to the product of the given ones, float32.

    Args:
        lora_A: (r, in), float32.
        lora_B: (out, r), float32.
        scaling: s, positive.
        how: `balanced`: both factors as they are, divided by sqrt(s), as published. `orthonormal`: the rows of A are
            orthonormal, and B has the singular values. Each row's sign makes its largest value positive.
    """
    if how == "balanced":
        share = math.sqrt(scaling)
        return lora_A / share, lora_B / share
    return in_thread_pool(lambda: _orthonormal(lora_A, lora_B, scaling), lora_A.device)


def _orthonormal(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    basis, triangle = torch.linalg.qr(lora_A.T.double())
    left, core = torch.linalg.qr(lora_B.double())
    inner, singular, rotation = torch.linalg.svd(core @ triangle.T)
    rows = rotation @ basis.T
    peaks = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(rows.dtype)
    columns = (left @ inner) * (singular * signs.squeeze(1))
    return (rows * signs).float(), (columns / scaling).float()
