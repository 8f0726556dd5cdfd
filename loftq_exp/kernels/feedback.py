"""The inner loop of GPTQ on a panel of columns, compiled by numba where it is installed, else in Python over columns."""

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
def rounding_panel(quantizer: Quantizer) -> PanelPass:
    """Return the pass over a panel for a quantizer with levels times a scale, or with a minimum and a step."""
    levels = quantizer.levels().numpy() if quantizer.type != "uniform" else np.arange(2**quantizer.bits, dtype=np.float32)
    thresholds = ((levels[:-1] + levels[1:]) / np.float32(2)).astype(np.float32)
    run, block = _panel() if numba is not None else _panel_in_python, quantizer.block_size

    def call(values: torch.Tensor, fixed: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor,
             factor: torch.Tensor, errors: torch.Tensor, first: int) -> None:  # fmt: skip
        run(values.numpy(), fixed.numpy(), codes.numpy(), scales.numpy(), factor.numpy(), errors.numpy(), first, block,
            levels, thresholds)  # fmt: skip

    return call


def _panel_in_python(values: Any, fixed: Any, all_codes: Any, scales: Any, factor: Any, errors: Any, first: int,
                     block: int, levels: Any, thresholds: Any) -> None:  # fmt: skip
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
            for k in range(j + 1, width):
                row[k] -= error * factor[first + j, first + k]


@functools.cache
def _panel() -> Any:
    return compiled(_panel_in_python)
