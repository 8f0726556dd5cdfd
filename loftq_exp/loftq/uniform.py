"""Uniform quantizers: evenly spaced levels over a block's range, in the three published variants."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from loftq_exp.loftq.quantizer import Quantizer
from loftq_exp.loftq.search import best_range


class Uniform(Quantizer):
    """Uniform quantization of the paper's equation 1 (`uniform`, the default of the three published variants).

    For each block X, with F(X) = (X - min X) / (max X - min X):  codes = round((2**bits - 1) F(X)).
    Scales hold the minimum and the step, (max X - min X) / (2**bits - 1). A constant block has step 0 and decodes to its
    minimum.
    """

    numbers = 2
    signed = (True, False)
    kernel_family: ClassVar[str | None] = "uniform"

    def _encode_groups(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self._range(groups)
        top = 2**self.bits - 1
        if self.scale == "search":
            low, high = best_range(groups, low, high, importance, top, self._round_alone)
        minimum = self._round(low) + 0.0  # aminmax may return either zero: make it the positive one
        # From the rounded minimum, so that the highest level still reaches the maximum.
        step = self._round(((high - minimum) / top).clamp_(min=0), 1)
        codes = ((groups - minimum) / torch.where(step == 0, torch.inf, step)).round_().clamp_(0, top)
        return codes.to(torch.uint8), torch.cat([minimum, step], dim=1)

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        minimum, step = scales[:, :1], scales[:, 1:]
        return codes.to(torch.float32).mul_(step).add_(minimum)

    def _range(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = groups.aminmax(dim=1, keepdim=True)
        return low, high


class UniformClipped(Uniform):
    """Uniform quantization of the official GLUE code (`uniform-clipped`): the whole weight, clipped to mean +- 2 sigma.

    Like `Uniform` with the whole weight as one block, over the range after clipping. The standard deviation is unbiased.
    The official code adds 1e-8 to the range to avoid a division by zero; here the range is unchanged.
    """

    kernel_family = None

    @property
    def identity(self) -> dict[str, str | int]:
        return {name: value for name, value in super().identity.items() if name != "block_size"}

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

    def _range(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super()._range(groups)
        mean, deviation = _mean_and_deviation(groups)
        return torch.maximum(low, mean - 2 * deviation), torch.minimum(high, mean + 2 * deviation)


class UniformSigma(Quantizer):
    """Uniform levels of early official code and PEFT (`uniform-sigma`): levels linspace(-1, 1, 2**bits) times a scale.

    The scale of a block is mean + 2.5 unbiased standard deviations of its signed values. A negative scale only reverses the
    levels. Values beyond the scale take the outermost level.
    """

    signed = (True,)

    def levels(self) -> torch.Tensor:
        return torch.linspace(-1, 1, 2**self.bits)

    def _encode_groups(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = _mean_and_deviation(groups)
        scale = self._round(mean + 2.5 * deviation)
        scaled = torch.where(scale == 0, 0.0, groups / scale)
        return self._nearest(scaled.clamp_(-1, 1)), scale

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._look_up(codes).mul_(scales)


def _mean_and_deviation(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased standard deviation of each row, (n, 1) each. For a single value the deviation is 0."""
    # Divide by the row's absmax, because squares of very large or small float32 values leave the range.
    absmax = groups.abs().amax(dim=1, keepdim=True)
    relative = groups / torch.where(absmax == 0, 1.0, absmax)
    deviation, mean = torch.std_mean(relative, dim=1, keepdim=True, correction=min(1, groups.shape[1] - 1))
    return mean * absmax, deviation * absmax
