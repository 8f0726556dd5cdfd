"""8-bit integers with one scale per row."""

from __future__ import annotations

import torch

from loftq_exp.kernels.compiled import SMALLEST_ABSMAX
from loftq_exp.loftq.quantizer import Quantizer


class RowInt(Quantizer):
    """Row-wise symmetric int8 (`int`): round(127 w / absmax) = code - 128, with absmax over the last dimension.

    Equals `bitsandbytes.functional.int8_vectorwise_quant` without outlier threshold. A row of zeros, undefined there, gives
    zeros here.
    """

    @property
    def identity(self) -> dict[str, str | int]:
        return {name: value for name, value in super().identity.items() if name != "block_size"}

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def _encode_groups(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = self._round(groups.abs().amax(dim=1, keepdim=True))
        # Below SMALLEST_ABSMAX the factor would overflow, and a row of zeros would give 0 * inf.
        values = (groups * (127.0 / absmax.clamp(min=SMALLEST_ABSMAX))).round_().clamp_(-127, 127)
        return values.add_(128).to(torch.uint8), absmax

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        # Two products in bitsandbytes' order; a division by 127 would differ in the last bit.
        return codes.to(torch.float32).sub_(128).mul_(scales).mul_(1 / 127)
