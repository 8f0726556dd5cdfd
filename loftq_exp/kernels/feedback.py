"""The inner loop of GPTQ on a panel of columns: row by row, compiled by numba, or column by column in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loftq_exp.kernels.compiled import compiled, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

PANEL = 128
"""Columns per panel. Errors are spread within it value by value, and beyond it by one matrix product."""

PanelPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], None]
"""f(values, fixed, codes, scales, factor, errors, first): round the columns from `first` on, as many as `errors` has."""


@functools.cache
def rounding_panel(quantizer: Quantizer, device: str) -> PanelPass:
    """Return the pass over a panel for a quantizer with levels times a scale, or with a minimum and a step."""
    levels = torch.arange(2.0**quantizer.bits) if quantizer.type == "uniform" else quantizer.levels()
    thresholds, block = (levels[:-1] + levels[1:]) / 2, quantizer.block_size
    if device != "cpu" or numba is None:
        on_device = levels.to(device), thresholds.to(device)
        return functools.partial(_in_torch, block=block, levels=on_device[0], thresholds=on_device[1])
    run, tables = _panel(), (levels.numpy(), thresholds.numpy())

    def call(values: torch.Tensor, fixed: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor,
             factor: torch.Tensor, errors: torch.Tensor, first: int) -> None:  # fmt: skip
        arrays = [tensor.numpy() for tensor in (values, fixed, codes, scales, factor, errors)]
        run(*arrays, first, block, *tables)

    return call


def _in_torch(
    values: torch.Tensor,
    fixed: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    first: int,
    block: int,
    levels: torch.Tensor,
    thresholds: torch.Tensor,
) -> None:
    rows, columns = values.shape
    last = first + errors.shape[1]
    starts = torch.arange(rows, device=values.device) * columns
    for j in range(first, last):
        each = scales[(starts + j) // block]
        zero, scale = (each[:, 0], each[:, 1]) if scales.shape[1] == 2 else (torch.zeros_like(each[:, 0]), each[:, 0])
        x = torch.where(scale > 0, (values[:, j] - zero) / scale, 0.0)
        nearest = torch.bucketize(x, thresholds)
        ends = torch.where(x > 0, len(levels) - 1, 0)
        code = torch.where(fixed[:, j] > 0, ends, nearest)
        error = values[:, j] - (zero + levels[code] * scale)
        codes[:, j], errors[:, j - first] = code.to(torch.uint8), error
        values[:, j + 1 : last] -= error[:, None] * factor[j, j + 1 : last]


@functools.cache
def _panel() -> Any:
    def panel(values: Any, fixed: Any, all_codes: Any, scales: Any, factor: Any, errors: Any, first: int, block: int,
              levels: Any, thresholds: Any) -> None:  # fmt: skip
        rows, columns = values.shape
        width, top = errors.shape[1], levels.size - 1
        affine = scales.shape[1] == 2
        for i in range(rows):
            row = values[i, first : first + width]
            for j in range(width):
                group = (i * columns + first + j) // block
                zero = scales[group, 0] if affine else np.float32(0)
                scale = scales[group, 1] if affine else scales[group, 0]
                x = (row[j] - zero) / scale if scale > 0 else np.float32(0)
                code = 0
                if fixed[i, first + j]:
                    code = top if x > 0 else 0
                else:
                    for k in range(top):
                        code += x > thresholds[k]
                all_codes[i, first + j] = code
                error = row[j] - (zero + levels[code] * scale)
                errors[i, j] = error
                spread = factor[first + j, first : first + width]
                for k in range(j + 1, width):
                    row[k] -= error * spread[k]

    return compiled(panel)
