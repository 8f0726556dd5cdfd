"""NormalFloat: levels at the quantiles of a normal distribution, scaled by the absmax of each block."""

from __future__ import annotations

import functools
import itertools
from statistics import NormalDist

import torch

from loftq_exp.kernels.quantize import SMALLEST_ABSMAX
from loftq_exp.loftq.quantizer import Quantizer

NORMAL_OFFSET = 0.9677083
"""Probability of the outermost normal quantile of NormalFloat, as in bitsandbytes and the paper."""


class NormalFloat(Quantizer):
    """NF2, NF3, NF4 (type `nf`) and symmetric NF2 (`nf-symmetric`): one absmax per block, nearest level.

    NF4 with float32 scales equals `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4")` bit for bit in codes,
    absmax and values. This includes ties (to the lower level) and a short last block.
    """

    kernel_family = "levels"

    def levels(self) -> torch.Tensor:
        return normal_float_levels(self.type, self.bits)

    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = groups.abs().amax(dim=1, keepdim=True)
        if groups.shape[1] < self.block_size:
            # bitsandbytes handles the short last block differently: it clamps the absmax and divides by it, while full
            # blocks are multiplied by the reciprocal. A last-bit difference could move a value across a threshold.
            absmax = self._round(absmax.clamp(min=SMALLEST_ABSMAX))
            scaled = groups / absmax.clamp(min=SMALLEST_ABSMAX)
        else:
            absmax = self._round(absmax)
            scaled = groups * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))
        return self._nearest(scaled.clamp_(-1, 1)), absmax

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._look_up(codes).mul_(scales)


@functools.cache
def normal_float_levels(type: str, bits: int) -> torch.Tensor:
    """Return the ascending levels of a NormalFloat type in [-1, 1]: float32, (2**bits,).

    `nf`: the normal quantiles of 2**(bits-1) probabilities from NORMAL_OFFSET towards 1/2, zero, and the negated
    quantiles of 2**(bits-1) - 1 such probabilities. `nf-symmetric`: midpoints of the quantiles that bound bins of equal
    probability, without zero. Both are divided by the largest level. Every NF2 level is an NF4 level.
    """
    count = 2**bits
    if type == "nf-symmetric":
        bounds = _normal_quantiles(1 - NORMAL_OFFSET, NORMAL_OFFSET, count + 1)
        levels = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
    else:
        positive = _normal_quantiles(NORMAL_OFFSET, 0.5, count // 2 + 1)[:-1]
        negative = [-quantile for quantile in _normal_quantiles(NORMAL_OFFSET, 0.5, count // 2)[:-1]]
        levels = sorted([*negative, 0.0, *positive])
    table = torch.tensor(levels, dtype=torch.float32)
    return table / table.max()


def _normal_quantiles(start: float, end: float, count: int) -> list[float]:
    """Return the standard normal quantiles (float64) of `count` evenly spaced probabilities."""
    # Probabilities are float32, as for bitsandbytes' table. In float64 some levels differ in the last bit.
    return [NormalDist().inv_cdf(p) for p in torch.linspace(start, end, count, dtype=torch.float32).tolist()]
