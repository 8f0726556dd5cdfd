"""The inner loop of GPTQ on a panel of columns: ROWS rows at a time, compiled by numba, or all rows in torch.

Both give the same codes: the same float32 operations in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.kernels.bfloat16 import rounding_if
from loftq_exp.kernels.compiled import CPU_TYPES, compiled, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

PANEL = 128
"""Columns per panel. Errors are spread within it value by value, and beyond it by one matrix product."""

ROWS = 64
"""Rows that the compiled pass rounds together. The compiler vectorises loops over them; it does not with 16 or 32."""

PanelPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, slice], None]
"""f(values, image, anchors, codes, scales, root, panel): round these columns, see `FeedbackRounding`.

On entry the panel's `image` has the errors of earlier columns times the root, on return those of its own columns too."""


@functools.cache
def rounding_panel(quantizer: Quantizer, device: str) -> PanelPass:
    """Return the pass over a panel for a quantizer with levels times a scale, or with a minimum and a step."""
    levels = torch.arange(2.0**quantizer.bits) if quantizer.type == "uniform" else quantizer.levels()
    thresholds, block = (levels[:-1] + levels[1:]) / 2, quantizer.block_size
    stored = quantizer.scale_dtype
    if device != "cpu" or numba is None or stored not in CPU_TYPES:
        on_device = levels.to(device), thresholds.to(device)
        return functools.partial(_in_torch, block=block, levels=on_device[0], thresholds=on_device[1], stored=stored)
    run, tables = _panel(stored == torch.bfloat16), (levels.numpy(), thresholds.numpy())

    def call(values: torch.Tensor, image: torch.Tensor, anchors: torch.Tensor, codes: torch.Tensor,
             scales: torch.Tensor, root: torch.Tensor, panel: slice) -> None:  # fmt: skip
        arrays = [tensor.numpy() for tensor in (values, image, anchors, codes, scales, root)]
        run(*arrays, panel.start, panel.stop - panel.start, block, *tables)

    return call


def _in_torch(
    values: torch.Tensor,
    image: torch.Tensor,
    anchors: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    root: torch.Tensor,
    panel: slice,
    block: int,
    levels: torch.Tensor,
    thresholds: torch.Tensor,
    stored: torch.dtype,
) -> None:
    rows, columns = values.shape
    starts = torch.arange(rows, device=values.device) * columns
    inverse, affine = 1 / root.diagonal(), scales.shape[1] == 2
    for j in range(panel.start, panel.stop):
        group = (starts + j) // block
        zero = scales[group, 0] if affine else torch.zeros_like(values[:, j])
        scale = scales[group, -1]
        at = values[:, j] + image[:, j] * inverse[j]
        x = torch.where(scale > 0, at - zero, 0.0) / torch.where(scale > 0, scale, 1.0)
        code = torch.where(
            anchors[group] == starts + j, torch.where(x > 0, len(levels) - 1, 0), torch.bucketize(x, thresholds)
        )
        error = values[:, j] - (zero + levels[code] * scale).to(stored).to(torch.float32)
        codes[:, j], values[:, j] = code.to(torch.uint8), error
        image[:, j : panel.stop] += error[:, None] * root[j, j : panel.stop]


@functools.cache
def _panel(rounded: bool) -> Any:
    gather, scale, choose, spread = _gather(), _scaled(), _choose(rounded), _spread()

    def panel(values: Any, image: Any, anchors: Any, codes: Any, scales: Any, root: Any, first: int, width: int,
              block: int, levels: Any, thresholds: Any) -> None:  # fmt: skip
        x, sums = np.zeros((width, ROWS), np.float32), np.zeros((width, ROWS), np.float32)
        zeros, steps = np.zeros((width, ROWS), np.float32), np.zeros((width, ROWS), np.float32)
        pinned, found = np.zeros((width, ROWS), np.int32), np.empty((width, ROWS), np.int32)
        relative, stored = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
        for start in range(0, len(values), ROWS):
            some = min(ROWS, len(values) - start)
            for i in range(some):
                row = start + i
                for j in range(width):
                    x[j, i], sums[j, i] = values[row, first + j], image[row, first + j]
                gather(anchors, scales, row * values.shape[1] + first, block, i, zeros, steps, pinned)
            for j in range(width):
                factor = root[first + j, first : first + width]
                scale(x[j], sums[j], np.float32(1) / factor[j], zeros[j], steps[j], relative)
                choose(relative, pinned[j], levels, thresholds, zeros[j], steps[j], found[j], stored)
                errors = x[j]
                for i in range(ROWS):
                    errors[i] -= stored[i]
                spread(errors, factor, sums, j)
            for i in range(some):
                row = start + i
                for j in range(width):
                    values[row, first + j], image[row, first + j] = x[j, i], sums[j, i]
                    codes[row, first + j] = np.uint8(found[j, i])

    return compiled(panel)


@functools.cache
def _gather() -> Any:
    """Return f(anchors, scales, place, block, i, zeros, steps, pinned): write what row i's values have from their blocks.

    `place` is that of the row's first value in the panel among all values. `pinned` is 1 for the largest value of a block.
    """

    def gather(anchors: Any, scales: Any, place: int, block: int, i: int, zeros: Any, steps: Any, pinned: Any) -> None:
        affine, group, left = scales.shape[1] == 2, place // block, block - place % block
        for j in range(len(zeros)):
            zeros[j, i] = scales[group, 0] if affine else np.float32(0)
            steps[j, i] = scales[group, 1] if affine else scales[group, 0]
            pinned[j, i] = anchors[group] == place + j
            left -= 1
            if not left:
                group, left = group + 1, block

    return compiled(gather)


@functools.cache
def _scaled() -> Any:
    """Return f(x, sums, inverse, zeros, steps, out): write a column's compensated values as multiples of their scales."""

    def scale(x: Any, sums: Any, inverse: Any, zeros: Any, steps: Any, out: Any) -> None:
        for i in range(ROWS):
            positive = steps[i] > 0
            above = x[i] + sums[i] * inverse - zeros[i] if positive else np.float32(0)
            out[i] = above / (steps[i] if positive else np.float32(1))

    return compiled(scale)


@functools.cache
def _choose(rounded: bool) -> Any:
    """Return f(relative, pinned, levels, thresholds, zeros, steps, codes, stored): a column's codes and stored values."""
    round_in_place = rounding_if(rounded)

    def choose(relative: Any, pinned: Any, levels: Any, thresholds: Any, zeros: Any, steps: Any, codes: Any,
               stored: Any) -> None:  # fmt: skip
        top, lowest, highest = np.int32(thresholds.size), levels[0], levels[-1]
        for i in range(ROWS):
            codes[i], stored[i] = 0, lowest
        for k in range(top):
            threshold, level, code = thresholds[k], levels[k + 1], np.int32(k + 1)
            for i in range(ROWS):
                above = relative[i] > threshold
                codes[i] = code if above else codes[i]
                stored[i] = level if above else stored[i]
        for i in range(ROWS):
            above = relative[i] > 0
            end, level = (top, highest) if above else (np.int32(0), lowest)
            codes[i] = end if pinned[i] else codes[i]
            stored[i] = level if pinned[i] else stored[i]
        for i in range(ROWS):
            stored[i] = zeros[i] + stored[i] * steps[i]
        round_in_place(stored, ROWS)

    return compiled(choose)


@functools.cache
def _spread() -> Any:
    """Return f(errors, factor, sums, first): add a column's errors times the factors to the sums from `first` on."""

    def spread(errors: Any, factor: Any, sums: Any, first: int) -> None:
        for k in range(first, len(factor)):
            some, share = sums[k], factor[k]
            for i in range(ROWS):
                some[i] += errors[i] * share

    return compiled(spread)
