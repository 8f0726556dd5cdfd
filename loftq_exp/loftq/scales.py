"""Double quantization: the scales are quantized to one byte each, with one step for every 256 of them.

A scale becomes an integer multiple of its group's step. The step keeps 16 significant bits, so each multiple is exact in
float32, and the largest multiple reproduces the step. Quantizing again therefore changes nothing, and the bytes can be
recomputed from the rounded scales at any time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SCALES_PER_STEP = 256
"""Consecutive scales that share one step."""


class QuantizedScales(NamedTuple):
    """Scales (groups, numbers) as bytes and steps; each column is quantized by itself."""

    codes: torch.Tensor
    """uint8 (groups, numbers). In a signed column, the multiple plus 128."""
    steps: torch.Tensor
    """float32 (groups / 256 rounded up, numbers)."""


def quantize_scales(scales: torch.Tensor, signed: tuple[bool, ...]) -> QuantizedScales:
    """Return the nearest multiples, with step = max |scale| / 255, or / 127 in signed columns.

    Args:
        scales: (groups, numbers), finite, float32.
        signed: for each column, whether it may hold negative values.
    """
    groups, numbers = scales.shape
    most, offset = _most(signed, scales.device), _offset(signed, scales.device)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -groups % SCALES_PER_STEP))
    largest = padded.reshape(-1, SCALES_PER_STEP, numbers).abs().amax(dim=1)
    steps = ((largest / most).contiguous().view(torch.int32) & ~0xFF).view(torch.float32)
    each = _each(steps, groups)
    multiples = torch.where(each == 0, 0.0, scales / each).round_()
    codes = torch.maximum(torch.minimum(multiples, most), -most) + offset
    return QuantizedScales(codes.clamp_(min=0).to(torch.uint8), steps)


def dequantize_scales(quantized: QuantizedScales, signed: tuple[bool, ...]) -> torch.Tensor:
    """Return the scales that bytes and steps represent: float32 (groups, numbers)."""
    codes, steps = quantized
    multiples = codes.to(torch.float32)
    if any(signed):
        multiples -= _offset(signed, codes.device)
    return multiples * _each(steps, len(codes))


def _each(steps: torch.Tensor, groups: int) -> torch.Tensor:
    return steps[:, None].expand(-1, SCALES_PER_STEP, -1).reshape(-1, steps.shape[1])[:groups]


def _most(signed: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([127.0 if sign else 255.0 for sign in signed], device=device)


def _offset(signed: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([128.0 if sign else 0.0 for sign in signed], device=device)
