"""NormalFloat: levels at the quantiles of a normal distribution, scaled by the absmax of each block."""

from __future__ import annotations

import functools
import itertools
from statistics import NormalDist

import torch

from loftq_exp.kernels.compiled import SMALLEST_ABSMAX
from loftq_exp.loftq.quantizer import Quantizer
from loftq_exp.loftq.search import best_absmax

NORMAL_OFFSET = 0.9677083
"""Probability of the outermost normal quantile of NormalFloat, as in bitsandbytes and the paper."""

OPTIMAL_INDICES = {2: (0, 4, 11, 15), 3: (0, 2, 4, 6, 9, 11, 13, 15), 4: tuple(range(16))}
"""The optimal levels by number of bits, as indices of the NF4 table.

NF2 and NF3 minimise no error, and NF3 is no part of NF4. Lloyd-Max levels have the smallest squared error on normal values,
but bitsandbytes' NF4 does not have them. Of all subsets of NF4 with both ends, the one for 2 bits has the smallest error on
normal blocks of 64 with searched scales: 0.335, where Lloyd-Max has 0.334. The one for 3 bits has 0.178, and the best of all
3003 has 0.177.
"""


class NormalFloat(Quantizer):
    """NF2, NF3, NF4 (type `nf`) and symmetric NF2 (`nf-symmetric`): one absmax per block, nearest level.

    NF4 with float32 scales equals `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4")` bit for bit in codes,
    absmax and values. This includes ties (to the lower level) and a short last block.
    """

    kernel_family = "levels"

    def levels(self) -> torch.Tensor:
        return optimal_levels(self.bits) if self.table == "optimal" else normal_float_levels(self.type, self.bits)

    def _encode_groups(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = groups.abs().amax(dim=1, keepdim=True)
        if self.scale == "search":
            absmax = best_absmax(groups, absmax, importance, self.thresholds(), self.levels(), self._round_alone)
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


def optimal_levels(bits: int) -> torch.Tensor:
    """Return the levels of `OPTIMAL_INDICES`: float32, (2**bits,), with the bits of the NF4 table."""
    return normal_float_levels("nf", 4)[list(OPTIMAL_INDICES[bits])]


def _normal_quantiles(start: float, end: float, count: int) -> list[float]:
    """Return the standard normal quantiles (float64) of `count` evenly spaced probabilities."""
    # Probabilities are float32, as for bitsandbytes' table. In float64 some levels differ in the last bit.
    return [NormalDist().inv_cdf(p) for p in torch.linspace(start, end, count, dtype=torch.float32).tolist()]
