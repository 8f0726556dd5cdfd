"""Search for a block's scale by the squared error, in torch. `loftq_exp.kernels.search` defines it and gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loftq_exp.kernels.compiled import LANES, SMALLEST_ABSMAX
from loftq_exp.kernels.search import FACTORS


def best_absmax(
    groups: torch.Tensor,
    absmax: torch.Tensor,
    importance: torch.Tensor | None,
    thresholds: torch.Tensor,
    levels: torch.Tensor,
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the multiple of each group's absmax with the smallest error, as stored: float32, (n, 1).

    Args:
        groups: (n, size), float32.
        absmax: (n, 1).
        importance: weights of the squared errors, (n, size); None: 1 everywhere.
        thresholds: midpoints between the levels, ascending.
        levels: ascending, in [-1, 1].
        stored: rounds a scale as it is stored.
    """
    thresholds, levels = thresholds.to(groups.device), levels.to(groups.device)
    best, least = stored(absmax), torch.empty(0)
    inverse = 1.0 / best.clamp(min=SMALLEST_ABSMAX)
    relative = groups * inverse
    for number, factor in enumerate(FACTORS.tolist()):
        scale = stored(absmax * factor)
        ratio = scale * inverse
        codes = torch.searchsorted(thresholds * ratio, relative)
        error = _weighted_squares(relative - torch.gather(levels * ratio, 1, codes), importance)
        if not number:
            least = error
            continue
        better = (error < least) & (scale >= SMALLEST_ABSMAX)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def best_range(
    groups: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    importance: torch.Tensor | None,
    top: int,
    stored: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends of the range of uniform levels with the smallest error, shrunk around its middle: (n, 1) each.

    Args:
        groups: (n, size), float32.
        low: minimum of each group, (n, 1).
        high: maximum of each group, (n, 1).
        importance: weights of the squared errors, (n, size); None: 1 everywhere.
        top: largest code.
        stored: rounds the minimum (0) or the step (1) as it is stored.
    """
    unit = 1.0 / torch.maximum(-low, high).clamp(min=SMALLEST_ABSMAX)
    radius, relative = high * 0.5 - low * 0.5, groups * unit
    best, least = torch.zeros_like(low), torch.empty(0)
    for number, shrink in enumerate((1 - FACTORS).tolist()):
        less = radius * shrink
        minimum = stored(low + less, 0) + 0.0
        step = stored((((high - less) - minimum) / top).clamp_(min=0), 1) * unit
        minimum = minimum * unit
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        codes = ((relative - minimum) * inverse).round_().clamp_(0, top)
        error = _weighted_squares(relative - (codes * step + minimum), importance)
        if not number:
            least = error
            continue
        better = error < least
        best, least = torch.where(better, less, best), torch.where(better, error, least)
    return low + best, high - best


def _weighted_squares(left: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of left**2 * importance over each row, (n, 1), in the order of `loftq_exp.kernels.search`."""
    errors = left * left
    if importance is not None:
        errors = errors * importance
    errors = torch.nn.functional.pad(errors, (0, -errors.shape[1] % LANES))
    lanes = errors[:, :LANES]
    for first in range(LANES, errors.shape[1], LANES):
        lanes = lanes + errors[:, first : first + LANES]
    while lanes.shape[1] > 1:
        width = lanes.shape[1] // 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes
