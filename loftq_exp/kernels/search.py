"""Search for a block's scale by the squared error, compiled by numba. `loftq_exp.loftq.search` is the same in torch.

Each factor of FACTORS gives a smaller scale, and the one whose nearest codes have the smallest error is kept. A tie keeps
the larger factor. Both forms give the same bytes, because the order of operations is defined:

* Values, levels and thresholds are divided by the block's largest magnitude first, so that squares stay in range.
* The error of a value is ((value - level) * (value - level)) * importance.
* Value i of a block is added to lane i % 16, in the order of i. Then the upper half of the lanes is added to the lower
  half, until one is left. No product is fused with a sum.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from loftq_exp.kernels import registers
from loftq_exp.kernels.bfloat16 import largest_stored, rounding_if
from loftq_exp.kernels.compiled import LANES, SMALLEST_ABSMAX, compiled

FACTORS = np.linspace(1, 0.3, 15, dtype=np.float32)
"""Fractions of a block's absmax or range that are tried, descending."""

_FACTORS = np.append(FACTORS, np.float32(1))
"""As many as there are lanes. The last gives nothing new."""

_ONE, _ZERO, _SMALLEST = np.float32(1), np.float32(0), np.float32(SMALLEST_ABSMAX)


@functools.cache
def best_absmax(bits: int, block: int, rounded: bool) -> Any:
    """Return f(values, scales, importance, thresholds, levels, blocks), compiled: the scales with the smallest errors.

    `scales` (blocks, 1) has each block's absmax, which is replaced by the best scale as stored. `importance` has one entry
    per value, the tables have registers.TABLE_SIZE. A scale below SMALLEST_ABSMAX is kept for the factor 1 only, because
    values are not divided by it.
    """
    largest, round_in_place = largest_stored(rounded), rounding_if(rounded)
    errors_of = _levels_errors(bits, block)

    def search(values: Any, scales: Any, importance: Any, thresholds: Any, levels: Any, blocks: int) -> None:
        tried, ratios = np.empty(blocks * LANES, np.float32), np.empty(blocks * LANES, np.float32)
        errors, relative = np.empty(blocks * LANES, np.float32), np.empty(blocks * block, np.float32)
        for b in range(blocks):
            for k in range(LANES):
                tried[b * LANES + k] = min(scales[b, 0] * _FACTORS[k], largest)
        round_in_place(tried, blocks * LANES)
        for b in range(blocks):
            inverse = _ONE / max(tried[b * LANES], _SMALLEST)
            for k in range(LANES):
                ratios[b * LANES + k] = tried[b * LANES + k] * inverse
            for i in range(block):
                relative[b * block + i] = values[b * block + i] * inverse
        for b in range(blocks):
            errors_of(relative, importance, thresholds, levels, ratios, errors, b)
        for b in range(blocks):
            best, least = tried[b * LANES], errors[b * LANES]
            for k in range(1, LANES):
                scale, error = tried[b * LANES + k], errors[b * LANES + k]
                better = (error < least) & (scale >= _SMALLEST)
                best, least = scale if better else best, error if better else least
            scales[b, 0] = best

    return compiled(search)


@functools.cache
def best_range(top: int, block: int, rounded: bool) -> Any:
    """Return f(values, scales, importance, blocks), compiled: the ranges with the smallest errors.

    `scales` (blocks, 2) has each block's minimum and maximum, which are replaced by the ends of the best range around the
    same middle. `importance` has one entry per value, and codes go to `top`.
    """
    largest, round_in_place = largest_stored(rounded), rounding_if(rounded)
    sum_lanes, sum_up = _lane_sums(block), _halving()
    shrinks, half, last = _ONE - _FACTORS, np.float32(0.5), np.float32(top)

    def search(values: Any, scales: Any, importance: Any, blocks: int) -> None:
        relative, errors = np.empty(block, np.float32), np.empty(block, np.float32)
        sums = np.empty(LANES**2, np.float32)
        minima, steps = np.empty(blocks * LANES, np.float32), np.empty(blocks * LANES, np.float32)
        for b in range(blocks):
            low, high = scales[b, 0], scales[b, 1]
            radius = high * half - low * half
            for k in range(LANES):
                minima[b * LANES + k] = min(max(low + shrinks[k] * radius, -largest), largest)
        round_in_place(minima, blocks * LANES)
        for b in range(blocks):
            low, high = scales[b, 0], scales[b, 1]
            radius = high * half - low * half
            for k in range(LANES):
                step = ((high - shrinks[k] * radius) - (minima[b * LANES + k] + _ZERO)) / last
                steps[b * LANES + k] = min(max(step, _ZERO), largest)
        round_in_place(steps, blocks * LANES)
        for b in range(blocks):
            low, high = scales[b, 0], scales[b, 1]
            unit, radius = _ONE / max(max(-low, high), _SMALLEST), high * half - low * half
            for i in range(block):
                relative[i] = values[b * block + i] * unit
            for k in range(LANES):
                minimum, step = (minima[b * LANES + k] + _ZERO) * unit, steps[b * LANES + k] * unit
                inverse = _ONE / step if step > _ZERO else _ZERO
                for i in range(block):
                    code = min(max(np.rint((relative[i] - minimum) * inverse), _ZERO), last)
                    left = relative[i] - (code * step + minimum)
                    errors[i] = left * left * importance[b * block + i]
                sum_lanes(errors, sums, k * LANES)
            sum_up(sums)
            best, least = _ZERO, sums[0]
            for k in range(1, LANES):
                less, error = shrinks[k] * radius, sums[k * LANES]
                best, least = less if error < least else best, error if error < least else least
            scales[b, 0], scales[b, 1] = low + best, high - best

    return compiled(search)


@functools.cache
def repeating() -> Any:
    """Return f(columns, start, out), compiled: write the entries of consecutive values of a matrix from value `start` on.

    `columns` has one entry per column of the matrix. Values are row-major.
    """

    def repeat(columns: Any, start: int, out: Any) -> None:
        column, done = start % columns.size, 0
        while done < out.size:
            length = min(columns.size - column, out.size - done)
            for i in range(length):
                out[done + i] = columns[column + i]
            column, done = 0, done + length

    return compiled(repeat)


@functools.cache
def _levels_errors(bits: int, block: int) -> Any:
    """Return f(values, importance, thresholds, levels, ratios, errors, number): write the errors of a block.

    There are LANES errors, one for each ratio by which levels and thresholds are multiplied.
    """
    lanes, top = registers.lanes(), 2**bits - 1
    if bits in registers.REGISTER_WIDTHS and lanes:
        of_block = registers.errors_of(bits, lanes, block)
        return compiled(
            lambda values, importance, thresholds, levels, ratios, errors, number: of_block(
                values, importance, thresholds, levels, ratios, errors, number
            )
        )

    sum_lanes, sum_up = _lane_sums(block), _halving()

    def errors_of(
        values: Any, importance: Any, thresholds: Any, levels: Any, ratios: Any, errors: Any, number: int
    ) -> None:
        squares, sums, first = np.empty(block, np.float32), np.empty(LANES**2, np.float32), number * block
        for at in range(LANES):
            ratio = ratios[number * LANES + at]
            for i in range(block):
                value, level = values[first + i], levels[0] * ratio
                for k in range(top):
                    level = levels[k + 1] * ratio if value > thresholds[k] * ratio else level
                squares[i] = (value - level) * (value - level) * importance[first + i]
            sum_lanes(squares, sums, at * LANES)
        sum_up(sums)
        for at in range(LANES):
            errors[number * LANES + at] = sums[at * LANES]

    return compiled(errors_of)


@functools.cache
def _lane_sums(block: int) -> Any:
    """Return f(errors, sums, first): write the sum of each lane of a block's errors from `first` on."""
    groups = block // LANES

    def sum_lanes(errors: Any, sums: Any, first: int) -> None:
        for lane in range(LANES):
            total = errors[lane]
            for group in range(1, groups):
                total += errors[group * LANES + lane]
            sums[first + lane] = total

    return compiled(sum_lanes)


@functools.cache
def _halving() -> Any:
    """Return f(sums): add up LANES times the sums of LANES lanes, by halves. Each total replaces its first sum."""

    def sum_up(sums: Any) -> None:
        width = LANES // 2
        while width:
            for k in range(LANES):
                for lane in range(k * LANES, k * LANES + width):
                    sums[lane] += sums[lane + width]
            width //= 2

    return compiled(sum_up)
