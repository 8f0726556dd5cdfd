"""The quantizers' inner loops as one pass over memory: numba's compiled form of `Quantizer.requantize`, `leave` and `restore`.

`quantizing(quantizer)` gives functions that quantize blocks of W - P, that tell what Q and P leave of W, and that write Q's values,
while the blocks are in the nearest cache, where torch's operations would go over memory some thirty times. They give the same bytes as torch does:
the same float32 operations in the same order, and nothing that regroups a sum. They run on one thread, and let go of
Python's lock, so that others may run beside them.

Without numba, or for a quantizer or type that has no kernel, `quantizing` gives None and torch's form is used.

How they are written follows from what the compiler makes vector instructions of: plain loops over a few blocks' values, one
subject each, indexed from 0 in arrays of 32-bit numbers. A loop that counts in bytes takes three times as long.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loftq_exp.kernels import registers
from loftq_exp.kernels.bfloat16 import flat, narrowing, rounding, widening
from loftq_exp.kernels.compiled import CHUNK_VALUES, CPU_TYPES, compiled, numba

if TYPE_CHECKING:
    from loftq_exp.loftq.quantizer import Quantizer

log = logging.getLogger(__name__)

BlockPass = Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""f(weight, product, unit, codes, scales, out), as the methods of `Quantizer` have them; whole blocks of them are worked on.
An empty product is zero. `out` must not overlap the others."""


class QuantizerPasses(NamedTuple):
    """The compiled passes of one quantizer. A weight, its residual and values restored are float32 or bfloat16."""

    requantize: BlockPass
    leave: BlockPass
    restore: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    """f(codes, scales, out)."""


LANES = 16
"""Values compared side by side in the search for a block's extremes."""

SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less than this, so that a block of zeros stays finite."""


@functools.cache
def quantizing(quantizer: Quantizer) -> QuantizerPasses | None:
    """The compiled passes of `quantizer` for tensors on the CPU; None where there are none."""
    family, block = quantizer.kernel_family, quantizer.block_size
    if family is None or quantizer.double or block % (2 * LANES) or quantizer.scale_dtype not in CPU_TYPES:
        return None
    if numba is None:
        _say_once()
        return None
    top, rounded = 2**quantizer.bits - 1, quantizer.scale_dtype == torch.bfloat16
    if family == "levels":
        encode = _levels_encoder(quantizer.bits, block, rounded)
        decode = _levels_decoder(quantizer.bits, block, rounded)
        tables = registers.padded(quantizer.thresholds().numpy()), registers.padded(quantizer.levels().numpy())
    else:
        encode = _uniform_encoder(top, block, rounded)
        decode = _uniform_decoder(block, rounded)
        tables = np.empty(0, np.float32), np.empty(0, np.float32)
    return QuantizerPasses(
        _caller(lambda *narrow: _requantize(encode, decode, block, *narrow), tables, block),
        _caller(lambda narrow, _: _leave(decode, block, narrow), tables, block),
        _restorer(lambda narrow: _restore(decode, block, narrow), tables[1], block),
    )


@functools.cache
def _say_once() -> None:
    log.warning("numba is not there: quantizing takes several times as long, with the same result; pip install numba")


def _caller(compiled_for: Callable[[bool, bool], Any], tables: tuple[np.ndarray, ...], block: int) -> BlockPass:
    """The pass of what is compiled for a weight and a result that are narrow or not."""

    def call(
        weight: torch.Tensor,
        product: torch.Tensor,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        # In numpy, because each operation of torch lets go of Python's lock and has to wait for it.
        arrays = [flat(tensor) for tensor in (weight, product, codes, out)]
        run = compiled_for(weight.dtype == torch.bfloat16, out.dtype == torch.bfloat16)
        run(*arrays[:3], scales.numpy(), arrays[3], np.float32(unit), *tables, weight.numel() // block)

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
    """`Quantizer.requantize` over chunks of blocks. What is narrow is bfloat16, all else float32."""
    most, widened, written = max(CHUNK_VALUES // block, 1), _widened(narrow_weight), _written(narrow_residual)

    def requantize(weights: Any, products: Any, all_codes: Any, all_scales: Any, residuals: Any, unit: Any,
                   thresholds: Any, levels: Any, blocks: int) -> None:  # fmt: skip
        x, room = np.empty(most * block, np.float32), np.empty(most * block, np.float32)
        for first in range(0, blocks, most):
            some = min(most, blocks - first)
            start, end = first * block, (first + some) * block
            weight, codes, scales = (
                widened(weights[start:end], room),
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
            encode(x, codes, scales, thresholds, some)
            decode(codes, scales, levels, x, some)
            for i in range(end - start):
                x[i] = (weight[i] - x[i]) * unit
            written(x, residuals[start:end])

    return compiled(requantize)


@functools.cache
def _leave(decode: Any, block: int, narrow_weight: bool) -> Any:
    """`Quantizer.leave` over chunks of blocks, in float32 but for a narrow weight, which is bfloat16."""
    most, widened = max(CHUNK_VALUES // block, 1), _widened(narrow_weight)

    def leave(weights: Any, products: Any, all_codes: Any, all_scales: Any, outs: Any, unit: Any,
              thresholds: Any, levels: Any, blocks: int) -> None:  # fmt: skip
        x, room = np.empty(most * block, np.float32), np.empty(most * block, np.float32)
        for first in range(0, blocks, most):
            some = min(most, blocks - first)
            start, end = first * block, (first + some) * block
            weight, out = widened(weights[start:end], room), outs[start:end]
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
    """`Quantizer.restore` over chunks of blocks, to float32 or to bfloat16."""
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
    """f(values, room): the values in float32, written to `room` where they are narrow."""
    return widening() if narrow else compiled(lambda values, room: values)


@functools.cache
def _written(narrow: bool) -> Any:
    """f(values, out): writes float32 values to all of `out`, rounded where that is narrow."""

    def whole(values: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = values[i]

    return narrowing() if narrow else compiled(whole)


@functools.cache
def _rounding(rounded: bool) -> Any:
    """In-place rounding of a float32 array's first `count` values to bfloat16's; or none."""
    return rounding() if rounded else compiled(lambda values, count: None)


@functools.cache
def _storing(rounded: bool) -> Any:
    """A scale as it is stored, see `Quantizer._round`: rounded, and no infinity."""
    largest = np.float32(torch.finfo(torch.bfloat16 if rounded else torch.float32).max)
    round_in_place = _rounding(rounded)

    def stored(scale: Any, scratch: Any) -> Any:
        scratch[0] = min(max(scale, -largest), largest)
        round_in_place(scratch, 1)
        return scratch[0]

    return compiled(stored)


@functools.cache
def _levels_encoder(bits: int, block: int, rounded: bool) -> Any:
    """NormalFloat's codes and scales, see `NormalFloat._encode_groups`: absmax of the block, nearest level.

    `block` is constant to the compiler, which unrolls the loops over it. Values are not clamped to [-1, 1]
    as torch's form has it: all thresholds lie within, so that no code changes.
    """
    stored, nearest, groups = _storing(rounded), _nearest(bits), block // LANES
    smallest, one = np.float32(SMALLEST_ABSMAX), np.float32(1)

    def encode(x: Any, codes: Any, scales: Any, thresholds: Any, blocks: int) -> None:
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
            absmax = stored(absmax, lanes)
            scales[b, 0] = absmax
            inverse = one / max(absmax, smallest)
            for i in range(block):
                values[i] *= inverse
        nearest(x, thresholds, codes, blocks * block)

    return compiled(encode)


@functools.cache
def _nearest(bits: int) -> Any:
    """Writes how many thresholds are below each of x's first `count` values: the code of the nearest level."""
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
            for k in range(top):  # a constant to the compiler, which unrolls it
                index += np.uint32(x[i] > thresholds[k])
            indices[i] = index
        for i in range(count):
            codes[i] = np.uint8(indices[i])

    return compiled(counted)


@functools.cache
def _levels_of(bits: int) -> Any:
    """Writes the levels of the first `count` codes to x."""
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
    """What codes and absmaxes stand for once stored: level times absmax."""
    round_in_place, levels_of = _rounding(rounded), _levels_of(bits)

    def decode(codes: Any, scales: Any, levels: Any, x: Any, blocks: int) -> None:
        levels_of(codes, levels, x, blocks * block)
        for b in range(blocks):
            values, absmax = x[b * block : (b + 1) * block], scales[b, 0]
            for i in range(block):
                values[i] *= absmax
        round_in_place(x, blocks * block)

    return compiled(decode)


@functools.cache
def _uniform_encoder(top: int, block: int, rounded: bool) -> Any:
    """The paper's uniform quantizer, see `Uniform._encode_groups`: minimum and step of the block, nearest level."""
    stored, groups = _storing(rounded), block // LANES
    zero, last, infinite = np.float32(0), np.float32(top), np.float32(np.inf)

    def encode(x: Any, codes: Any, scales: Any, thresholds: Any, blocks: int) -> None:
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
    """What codes, minima and steps stand for once stored: minimum + code times step."""
    round_in_place = _rounding(rounded)

    def decode(codes: Any, scales: Any, levels: Any, x: Any, blocks: int) -> None:
        for i in range(blocks * block):
            x[i] = np.float32(codes[i])
        for b in range(blocks):
            values, minimum, step = x[b * block : (b + 1) * block], scales[b, 0], scales[b, 1]
            for i in range(block):
                values[i] = values[i] * step + minimum
        round_in_place(x, blocks * block)

    return compiled(decode)
