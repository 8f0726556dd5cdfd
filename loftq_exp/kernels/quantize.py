"""The quantizers' inner loops as one pass over memory: `Quantizer.requantize`, `leave` and `restore` compiled by numba.

`quantizing(quantizer)` returns functions that quantize blocks of W - P, compute W - Q - P, and write Q's values. A block
stays in the L1 cache; torch's operations would pass over memory about thirty times. The bytes equal torch's: the same
float32 operations in the same order, and no regrouped sums. Each function runs on one thread and releases the GIL.

Without numba, or for a quantizer or type without a kernel, `quantizing` returns None, and the torch code is used.

The loops are written so that the compiler vectorises them: simple loops over the values of a few blocks, one task each,
indexed from 0, in arrays of 32-bit numbers. A loop over bytes takes three times as long.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loftq_exp.kernels import registers, search
from loftq_exp.kernels.bfloat16 import flat, narrowing, rounding_if, storing, widening
from loftq_exp.kernels.compiled import CHUNK_VALUES, CPU_TYPES, LANES, SMALLEST_ABSMAX, compiled, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

log = logging.getLogger(__name__)

BlockPass = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(weight, product, unit, codes, scales, out), with the arguments of the methods of `Quantizer`. It processes whole blocks.
An empty product is zero. `out` must not overlap the other arguments."""


class QuantizerPasses(NamedTuple):
    """The compiled passes of one quantizer. Weights, residuals and restored values are float32 or bfloat16."""

    requantize: Callable[
        [torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
    ]
    """f(weight, product, unit, codes, scales, residual, importance): as `BlockPass`, with the importance of each column of the
    weight, float32, or nothing if the scales are not searched."""
    leave: BlockPass
    restore: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    """f(codes, scales, out)."""


@functools.cache
def quantizing(quantizer: Quantizer) -> QuantizerPasses | None:
    """Return the compiled passes of `quantizer` for tensors on the CPU; None if it has none."""
    family, block = quantizer.kernel_family, quantizer.block_size
    if family is None or quantizer.double or block % (2 * LANES) or quantizer.scale_dtype not in CPU_TYPES:
        return None
    if numba is None:
        _warn_once()
        return None
    top, rounded = 2**quantizer.bits - 1, quantizer.scale_dtype == torch.bfloat16
    if family == "levels":
        encode = _levels_encoder(quantizer.bits, block, rounded, quantizer.scale == "search")
        decode = _levels_decoder(quantizer.bits, block, rounded)
        tables = registers.padded(quantizer.thresholds().numpy()), registers.padded(quantizer.levels().numpy())
    else:
        encode = _uniform_encoder(top, block, rounded, quantizer.scale == "search")
        decode = _uniform_decoder(block, rounded)
        tables = np.empty(0, np.float32), np.empty(0, np.float32)
    return QuantizerPasses(
        _requantizer(lambda *narrow: _requantize(encode, decode, block, *narrow), tables, block),
        _leaver(lambda narrow: _leave(decode, block, narrow), tables[1], block),
        _restorer(lambda narrow: _restore(decode, block, narrow), tables[1], block),
    )


@functools.cache
def _warn_once() -> None:
    log.warning("numba is not installed: quantizing is several times slower, with the same result; pip install numba")


def _requantizer(compiled_for: Callable[[bool, bool], Any], tables: tuple[np.ndarray, ...], block: int) -> Any:
    """Return the pass that calls `compiled_for(whether the weight, whether the residual is bfloat16)`."""

    def call(
        weight: torch.Tensor,
        product: torch.Tensor,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
        importance: torch.Tensor,
    ) -> None:
        # numpy, because each torch operation releases the GIL and has to wait for it again.
        arrays = [flat(tensor) for tensor in (weight, product, importance, codes, residual)]
        run = compiled_for(weight.dtype == torch.bfloat16, residual.dtype == torch.bfloat16)
        run(*arrays[:4], scales.numpy(), arrays[4], np.float32(unit), *tables, weight.numel() // block)

    return call


def _leaver(compiled_for: Callable[[bool], Any], levels: np.ndarray, block: int) -> BlockPass:
    def call(
        weight: torch.Tensor,
        product: torch.Tensor,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        arrays = [flat(tensor) for tensor in (weight, product, codes, out)]
        run = compiled_for(weight.dtype == torch.bfloat16)
        run(*arrays[:3], scales.numpy(), arrays[3], np.float32(unit), levels, weight.numel() // block)

    return call


def _restorer(
    compiled_for: Callable[[bool], Any], levels: np.ndarray, block: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def call(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        run = compiled_for(out.dtype == torch.bfloat16)
        run(flat(codes), scales.numpy(), flat(out), levels, codes.numel() // block)

    return call


@functools.cache
def _requantize(encode: Any, decode: Any, block: int, narrow_weight: bool, narrow_residual: bool) -> Any:
    """Return `Quantizer.requantize` over chunks of blocks. Narrow arrays are bfloat16, all others float32."""
    most, widened, written = max(CHUNK_VALUES // block, 1), _widened(narrow_weight), _written(narrow_residual)
    repeat = search.repeating()

    def requantize(weights: Any, products: Any, importances: Any, all_codes: Any, all_scales: Any, residuals: Any,
                   unit: Any, thresholds: Any, levels: Any, blocks: int) -> None:  # fmt: skip
        x, buffer = np.empty(most * block, np.float32), np.empty(most * block, np.float32)
        importance = np.empty(most * block if importances.size else 0, np.float32)
        for first in range(0, blocks, most):
            some = min(most, blocks - first)
            start, end = first * block, (first + some) * block
            weight, codes, scales = (
                widened(weights[start:end], buffer),
                all_codes[start:end],
                all_scales[first : first + some],
            )
            if products.size:
                product = products[start:end]
                for i in range(end - start):
                    x[i] = weight[i] - product[i]
            else:
                for i in range(end - start):
                    x[i] = weight[i]
            if importances.size:
                repeat(importances, start, importance)
            encode(x, codes, scales, thresholds, levels, importance, some)
            decode(codes, scales, levels, x, some)
            for i in range(end - start):
                x[i] = (weight[i] - x[i]) * unit
            written(x, residuals[start:end])

    return compiled(requantize)


@functools.cache
def _leave(decode: Any, block: int, narrow_weight: bool) -> Any:
    """Return `Quantizer.leave` over chunks of blocks. A narrow weight is bfloat16, all other arrays float32."""
    most, widened = max(CHUNK_VALUES // block, 1), _widened(narrow_weight)

    def leave(weights: Any, products: Any, all_codes: Any, all_scales: Any, outs: Any, unit: Any,
              levels: Any, blocks: int) -> None:  # fmt: skip
        x, buffer = np.empty(most * block, np.float32), np.empty(most * block, np.float32)
        for first in range(0, blocks, most):
            some = min(most, blocks - first)
            start, end = first * block, (first + some) * block
            weight, out = widened(weights[start:end], buffer), outs[start:end]
            decode(all_codes[start:end], all_scales[first : first + some], levels, x, some)
            if products.size:
                product = products[start:end]
                for i in range(end - start):
                    out[i] = ((weight[i] - x[i]) - product[i]) * unit
            else:
                for i in range(end - start):
                    out[i] = (weight[i] - x[i]) * unit

    return compiled(leave)


@functools.cache
def _restore(decode: Any, block: int, narrow: bool) -> Any:
    """Return `Quantizer.restore` over chunks of blocks, to bfloat16 if `narrow`, else to float32."""
    most, written = max(CHUNK_VALUES // block, 1), _written(narrow)

    def restore(all_codes: Any, all_scales: Any, outs: Any, levels: Any, blocks: int) -> None:
        x = np.empty(most * block, np.float32)
        for first in range(0, blocks, most):
            some = min(most, blocks - first)
            start, end = first * block, (first + some) * block
            decode(all_codes[start:end], all_scales[first : first + some], levels, x, some)
            written(x, outs[start:end])

    return compiled(restore)


@functools.cache
def _widened(narrow: bool) -> Any:
    """Return f(values, buffer): the values in float32, converted in `buffer` if they are narrow."""
    return widening() if narrow else compiled(lambda values, buffer: values)


@functools.cache
def _written(narrow: bool) -> Any:
    """Return f(values, out): fill `out` with float32 values, rounded if `out` is narrow."""

    def whole(values: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = values[i]

    return narrowing() if narrow else compiled(whole)


@functools.cache
def _levels_encoder(bits: int, block: int, rounded: bool, searched: bool) -> Any:
    """Return NormalFloat's encoder, see `NormalFloat._encode_groups`: absmax or searched scale of each block, nearest level.

    `block` is a compile-time constant, so loops over it are unrolled. Values are not clamped to [-1, 1] as in the torch
    code. All thresholds lie inside that range, so the codes are the same.
    """
    nearest, groups = _nearest(bits), block // LANES
    smallest, one = np.float32(SMALLEST_ABSMAX), np.float32(1)
    choose = search.best_absmax(bits, block, rounded) if searched else _stored_absmax(rounded)

    def encode(x: Any, codes: Any, scales: Any, thresholds: Any, levels: Any, importance: Any, blocks: int) -> None:
        lanes = np.empty(LANES, np.float32)
        for b in range(blocks):
            values = x[b * block : (b + 1) * block]
            for lane in range(LANES):
                largest = abs(values[lane])
                for group in range(1, groups):
                    largest = max(largest, abs(values[group * LANES + lane]))
                lanes[lane] = largest
            absmax = lanes[0]
            for lane in range(1, LANES):
                absmax = max(absmax, lanes[lane])
            scales[b, 0] = absmax
        choose(x, scales, importance, thresholds, levels, blocks)
        for b in range(blocks):
            values, inverse = x[b * block : (b + 1) * block], one / max(scales[b, 0], smallest)
            for i in range(block):
                values[i] *= inverse
        nearest(x, thresholds, codes, blocks * block)

    return compiled(encode)


@functools.cache
def _stored_absmax(rounded: bool) -> Any:
    """Return f(values, scales, importance, thresholds, levels, blocks): round each block's absmax as it is stored."""
    stored = storing(rounded)

    def choose(values: Any, scales: Any, importance: Any, thresholds: Any, levels: Any, blocks: int) -> None:
        scratch = np.empty(1, np.float32)
        for b in range(blocks):
            scales[b, 0] = stored(scales[b, 0], scratch)

    return compiled(choose)


@functools.cache
def _nearest(bits: int) -> Any:
    """Return f(x, thresholds, codes, count): write the code of the nearest level, the number of thresholds below a value."""
    top, lanes = 2**bits - 1, registers.lanes()
    if bits in registers.REGISTER_WIDTHS and lanes:
        nearest_of_some = registers.nearest(bits, lanes)

        def in_registers(x: Any, thresholds: Any, codes: Any, count: int) -> None:
            for i in range(count // lanes):
                nearest_of_some(x, thresholds, codes, lanes * i)

        return compiled(in_registers)

    def counted(x: Any, thresholds: Any, codes: Any, count: int) -> None:
        indices = np.empty(count, np.uint32)
        for i in range(count):
            index = np.uint32(0)
            for k in range(top):  # a compile-time constant, so the loop is unrolled
                index += np.uint32(x[i] > thresholds[k])
            indices[i] = index
        for i in range(count):
            codes[i] = np.uint8(indices[i])

    return compiled(counted)


@functools.cache
def _levels_of(bits: int) -> Any:
    """Return f(codes, levels, x, count): write the levels of the first `count` codes to x."""
    lanes = registers.lanes()
    if bits in registers.REGISTER_WIDTHS and lanes:
        levels_of_some = registers.levels_of(bits, lanes)

        def in_registers(codes: Any, levels: Any, x: Any, count: int) -> None:
            for i in range(count // lanes):
                levels_of_some(codes, levels, x, lanes * i)

        return compiled(in_registers)

    def from_memory(codes: Any, levels: Any, x: Any, count: int) -> None:
        for i in range(count):
            x[i] = levels[codes[i]]

    return compiled(from_memory)


@functools.cache
def _levels_decoder(bits: int, block: int, rounded: bool) -> Any:
    """Return NormalFloat's decoder of stored values: level times absmax."""
    round_in_place, levels_of = rounding_if(rounded), _levels_of(bits)

    def decode(codes: Any, scales: Any, levels: Any, x: Any, blocks: int) -> None:
        levels_of(codes, levels, x, blocks * block)
        for b in range(blocks):
            values, absmax = x[b * block : (b + 1) * block], scales[b, 0]
            for i in range(block):
                values[i] *= absmax
        round_in_place(x, blocks * block)

    return compiled(decode)


@functools.cache
def _uniform_encoder(top: int, block: int, rounded: bool, searched: bool) -> Any:
    """Return the encoder of the paper's uniform quantizer, see `Uniform._encode_groups`: minimum and step, nearest level."""
    choose = search.best_range(top, block, rounded) if searched else compiled(lambda *_: None)
    stored, groups = storing(rounded), block // LANES
    zero, last, infinite = np.float32(0), np.float32(top), np.float32(np.inf)

    def encode(x: Any, codes: Any, scales: Any, thresholds: Any, levels: Any, importance: Any, blocks: int) -> None:
        lows, highs = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for b in range(blocks):
            values = x[b * block : (b + 1) * block]
            for lane in range(LANES):
                smallest, largest = values[lane], values[lane]
                for group in range(1, groups):
                    smallest = min(smallest, values[group * LANES + lane])
                    largest = max(largest, values[group * LANES + lane])
                lows[lane], highs[lane] = smallest, largest
            low, high = lows[0], highs[0]
            for lane in range(1, LANES):
                low, high = min(low, lows[lane]), max(high, highs[lane])
            scales[b, 0], scales[b, 1] = low, high
        choose(x, scales, importance, blocks)
        for b in range(blocks):
            values, low, high = x[b * block : (b + 1) * block], scales[b, 0], scales[b, 1]
            minimum = stored(low, lows) + zero
            step = stored(max((high - minimum) / last, zero), lows)
            scales[b, 0], scales[b, 1] = minimum, step
            divisor = step if step > zero else infinite
            for i in range(block):
                values[i] = min(max(np.rint((values[i] - minimum) / divisor), zero), last)
        for i in range(blocks * block):
            codes[i] = np.uint8(x[i])

    return compiled(encode)


@functools.cache
def _uniform_decoder(block: int, rounded: bool) -> Any:
    """Return the uniform decoder of stored values: minimum + code times step."""
    round_in_place = rounding_if(rounded)

    def decode(codes: Any, scales: Any, levels: Any, x: Any, blocks: int) -> None:
        for i in range(blocks * block):
            x[i] = np.float32(codes[i])
        for b in range(blocks):
            values, minimum, step = x[b * block : (b + 1) * block], scales[b, 0], scales[b, 1]
            for i in range(block):
                values[i] = values[i] * step + minimum
        round_in_place(x, blocks * block)

    return compiled(decode)
