"""Look up codes in vector registers, 8 or 16 at a time with one or two CPU instructions, and multiply rows by the levels.

A table of at most 16 levels fits in registers, and x86 has a permute instruction that indexes a register per lane. The
compiler does not generate it from a loop, which becomes one memory access per code. This module therefore emits LLVM IR:
load the bytes of some codes, broadcast them to all lanes, shift and mask each lane's code, and look it up.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from loftq_exp.kernels.compiled import LANES, compiled, numba

if numba is not None:
    from llvmlite import binding, ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

REGISTER_WIDTHS = (2, 3, 4)
"""Bits per code for which the levels fit in registers."""

TABLE_SIZE = 16
"""Number of table entries that `looking_up` expects, for any number of bits. Entries without a code may hold anything."""


@functools.cache
def lanes() -> int:
    """Return how many codes this CPU looks up at a time: 16 with AVX-512, 8 with AVX2 and FMA.

    Return 0 if it has neither, or if numba is configured to compile for another CPU.
    """
    if numba is None or any(getattr(numba.config, name, None) for name in ("CPU_NAME", "CPU_FEATURES")):
        return 0
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") and features.get("fma") else 0


@functools.cache
def looking_up(bits: int, lanes: int) -> Any:
    """Return f(packed, table, x), compiled: write the levels of packed codes of 2, 3 or 4 bits to x (float32).

    x.size is a multiple of 16, `packed` has as many codes, and the table has TABLE_SIZE levels.
    """
    look_up_some, size = _look_up(bits, lanes), lanes * bits // 8

    def look_up(packed: Any, table: Any, x: Any) -> None:
        for i in range(packed.size // size):
            look_up_some(packed, size * i, table, x, lanes * i)

    return compiled(look_up)


@functools.cache
def dotting(bits: int, lanes: int, block: int, affine: bool) -> Any:
    """Return f(packed, scales, table, row, products), compiled: products[o] = sum_i Q[o, i] row[i].

    No value of Q is written to memory. Rows are whole blocks of a multiple of 16 values. `scales` are float32 or the bits of
    bfloat16. If `affine`, they are a minimum and a step.
    """
    dot_some = _dot(bits, lanes, block, affine)

    def dot(packed: Any, scales: Any, table: Any, row: Any, products: Any) -> None:
        blocks = row.size // block
        for o in range(products.size):
            products[o] = dot_some(packed, scales, table, row, o * blocks, blocks)

    return compiled(dot)


def _look_up(bits: int, lanes: int) -> Any:
    """Return f(packed, first byte, table, x, first value), which looks up `lanes` codes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, table, x = (_data(context, builder, signature, arguments, at) for at in (0, 2, 3))
        source, target = builder.gep(packed, [arguments[1]]), builder.gep(x, [arguments[4]])
        found = _looked_up(builder, source, _levels(builder, table, bits, lanes), bits, lanes)
        _store(builder, found, target, 4)
        return context.get_dummy_value()

    @intrinsic
    def look_up_some(typing: Any, packed: Any, first: Any, table: Any, x: Any, to: Any) -> Any:
        return types.void(packed, types.intp, table, x, types.intp), emit

    return look_up_some


def nearest(bits: int, lanes: int) -> Any:
    """Return f(x, thresholds, codes, first) for compiled functions: write the codes of `lanes` values from `first` on.

    A code is the number of thresholds below the value.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, thresholds, codes = (_data(context, builder, signature, arguments, at) for at in range(3))
        values = _load(builder, builder.gep(x, [arguments[3]]), ir.VectorType(ir.FloatType(), lanes), 4)
        below = _below(builder, values, _levels(builder, thresholds, bits, lanes), bits, lanes)
        found = builder.trunc(below, ir.VectorType(ir.IntType(8), lanes))
        target = builder.gep(codes, [arguments[3]])
        _store(builder, found, target, 1)
        return context.get_dummy_value()

    @intrinsic
    def nearest_of_some(typing: Any, x: Any, thresholds: Any, codes: Any, first: Any) -> Any:
        return types.void(x, thresholds, codes, types.intp), emit

    return nearest_of_some


def errors_of(bits: int, lanes: int, block: int) -> Any:
    """Return f(values, importance, thresholds, levels, ratios, errors, number) for compiled functions: 16 errors of a block.

    An error is the sum of (value - level)**2 * importance, where levels and thresholds are multiplied by one of the block's
    16 ratios. The order of operations is that of `loftq_exp.kernels.search`. A block is a multiple of 16 values.
    """
    vector = ir.VectorType(ir.FloatType(), lanes)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, importance, thresholds, table, ratios, errors = (
            _data(context, builder, signature, arguments, at) for at in range(6)
        )
        values, importance = (builder.gep(of, [builder.mul(arguments[6], _long(block))]) for of in (values, importance))
        ratios, errors = (builder.gep(of, [builder.mul(arguments[6], _long(LANES))]) for of in (ratios, errors))
        bounds, levels = (_levels(builder, source, bits, lanes) for source in (thresholds, table))
        sums = cgutils.alloca_once(builder, vector, LANES)
        with cgutils.for_range(builder, _long(LANES)) as loop:
            ratio = _broadcast(builder, builder.load(builder.gep(ratios, [loop.index])), lanes)
            now, scaled = ([builder.fmul(some, ratio) for some in kept] for kept in (bounds, levels))
            totals = [cgutils.alloca_once(builder, vector) for _ in range(LANES // lanes)]
            for total in totals:
                builder.store(ir.Constant(vector, [0.0] * lanes), total)
            with cgutils.for_range(builder, _long(block // LANES)) as inner:
                for part, total in enumerate(totals):
                    at = builder.add(builder.mul(inner.index, _long(LANES)), _long(part * lanes))
                    some, weights = (_load(builder, builder.gep(of, [at]), vector, 4) for of in (values, importance))
                    below = _below(builder, some, now, bits, lanes)
                    left = builder.fsub(some, _named(builder, scaled, below, lanes))
                    error = builder.fmul(builder.fmul(left, left), weights)
                    builder.store(builder.fadd(builder.load(total), error), total)
            halves = [builder.load(total) for total in totals]
            both = halves[0] if len(halves) == 1 else builder.fadd(*halves)
            builder.store(both, builder.gep(sums, [loop.index]))
        found = _all_summed(builder, [builder.load(builder.gep(sums, [_long(at)])) for at in range(LANES)], lanes)
        for at, some in enumerate(found):
            _store(builder, some, builder.gep(errors, [_long(at * lanes)]), 4)
        return context.get_dummy_value()

    @intrinsic
    def errors_of_block(
        typing: Any, values: Any, importance: Any, thresholds: Any, table: Any, ratios: Any, errors: Any, number: Any
    ) -> Any:
        return types.void(values, importance, thresholds, table, ratios, errors, types.intp), emit

    return errors_of_block


def levels_of(bits: int, lanes: int) -> Any:
    """Return f(codes, table, x, first) for compiled functions: write the levels of `lanes` byte codes from `first` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, table, x = (_data(context, builder, signature, arguments, at) for at in range(3))
        some = _load(builder, builder.gep(codes, [arguments[3]]), ir.VectorType(ir.IntType(8), lanes), 1)
        indices = builder.zext(some, ir.VectorType(ir.IntType(32), lanes))
        found = _named(builder, _levels(builder, table, bits, lanes), indices, lanes)
        target = builder.gep(x, [arguments[3]])
        _store(builder, found, target, 4)
        return context.get_dummy_value()

    @intrinsic
    def levels_of_some(typing: Any, codes: Any, table: Any, x: Any, first: Any) -> Any:
        return types.void(codes, table, x, types.intp), emit

    return levels_of_some


def _dot(bits: int, lanes: int, block: int, affine: bool) -> Any:
    """Return f(packed, scales, table, row, first block, blocks): the dot product of these decoded blocks and the row."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, scales, table, row = (_data(context, builder, signature, arguments, at) for at in range(4))
        first, blocks = arguments[4:]
        vector = ir.VectorType(ir.FloatType(), lanes)
        nothing = ir.Constant(vector, [0.0] * lanes)
        levels, total = _levels(builder, table, bits, lanes), cgutils.alloca_once_value(builder, nothing)
        with cgutils.for_range(builder, blocks) as loop:
            here = builder.add(first, loop.index)
            codes = builder.gep(packed, [builder.mul(here, _long(block * bits // 8))])
            values = builder.gep(row, [builder.mul(loop.index, _long(block))])
            product = plain = nothing
            for group in range(block // lanes):
                some = _load(builder, builder.gep(values, [_long(group * lanes)]), vector, 4)
                source = builder.gep(codes, [_long(group * lanes * bits // 8)])
                product = _multiplied(builder, _looked_up(builder, source, levels, bits, lanes), some, product)
                plain = builder.fadd(plain, some)
            now = builder.load(total)
            if affine:
                minimum = _scale(builder, scales, builder.mul(here, _long(2)), lanes)
                step = _scale(builder, scales, builder.add(builder.mul(here, _long(2)), _long(1)), lanes)
                now = _multiplied(builder, plain, minimum, now)
            else:
                step = _scale(builder, scales, here, lanes)
            builder.store(_multiplied(builder, product, step, now), total)
        return _summed(builder, builder.load(total), lanes)

    @intrinsic
    def dot_some(typing: Any, packed: Any, scales: Any, table: Any, row: Any, first: Any, blocks: Any) -> Any:
        return types.float32(packed, scales, table, row, types.intp, types.intp), emit

    return dot_some


def _data(context: Any, builder: Any, signature: Any, arguments: Any, at: int) -> Any:
    """Return a pointer to the values of an array argument."""
    return context.make_array(signature.args[at])(context, builder, arguments[at]).data


def _levels(builder: Any, table: Any, bits: int, lanes: int) -> list[Any]:
    """Load the levels into registers."""
    kind = ir.VectorType(ir.FloatType(), lanes)
    return [_load(builder, builder.gep(table, [_long(at)]), kind, 4) for at in range(0, 2**bits, lanes)]


def _below(builder: Any, values: Any, bounds: list[Any], bits: int, lanes: int) -> Any:
    """Return how many of the 2**bits - 1 ascending bounds are below each lane's value, by bisection."""
    below = _constant([0] * lanes)
    for half in (2**bit for bit in reversed(range(bits))):
        bound = _named(builder, bounds, builder.add(below, _constant([half - 1] * lanes)), lanes)
        above = builder.fcmp_ordered(">", values, bound)
        below = builder.add(below, builder.select(above, _constant([half] * lanes), _constant([0] * lanes)))
    return below


def _looked_up(builder: Any, source: Any, levels: list[Any], bits: int, lanes: int) -> Any:
    """Return the levels of the packed codes that begin at `source`, one per lane."""
    words, shifts = _words(builder, source, bits, lanes)
    indices = builder.and_(builder.lshr(words, _constant(shifts)), _constant([2**bits - 1] * lanes))
    return _named(builder, levels, indices, lanes)


def _named(builder: Any, levels: list[Any], indices: Any, lanes: int) -> Any:
    """Return the level at each lane's index. The 8 or 16 levels are in one or two registers."""
    found = [_permuted(builder, some, indices, lanes) for some in levels]
    if len(found) == 1:
        return found[0]
    upper = builder.icmp_unsigned(">=", indices, _constant([lanes] * lanes))
    return builder.select(upper, found[1], found[0])


def _scale(builder: Any, scales: Any, at: Any, lanes: int) -> Any:
    """Broadcast one scale, float32 or bfloat16 bits, to every lane."""
    value = builder.load(builder.gep(scales, [at]))
    if value.type != ir.FloatType():
        word = builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16))
        value = builder.bitcast(word, ir.FloatType())
    return _broadcast(builder, value, lanes)


def _broadcast(builder: Any, value: Any, lanes: int) -> Any:
    """Return a float32 in every lane."""
    vector = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.IntType(32)(0))
    return builder.shuffle_vector(vector, vector, _constant([0] * lanes))


def _summed(builder: Any, vector: Any, lanes: int) -> Any:
    """Return the sum of the lanes, by adding halves."""
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, _constant(list(range(at, at + lanes)))) for at in (0, lanes)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.IntType(32)(0))


def _all_summed(builder: Any, vectors: list[Any], lanes: int) -> list[Any]:
    """Return the sums of the lanes of each vector, `lanes` per vector, by adding halves as `_summed` does.

    Two vectors share each addition: one fills the lower half of the lanes, the other the upper half.
    """
    width = lanes
    while width > 1:
        width //= 2
        # What remains of a sum lies in `2 * width` consecutive lanes.
        places = [first + lane for first in range(0, 2 * lanes, 2 * width) for lane in range(width)]
        vectors = [
            builder.fadd(
                *(builder.shuffle_vector(one, other, _constant([p + half for p in places])) for half in (0, width))
            )
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors


def _words(builder: Any, source: Any, bits: int, lanes: int) -> tuple[Any, list[int]]:
    """Return a 32-bit word per lane that contains its code, and the shift of each lane. Read only the codes' own bytes."""
    own = [bits * lane for lane in range(lanes)]
    if bits * lanes == 64:
        return _spread(builder, [_word(builder, source, 0, 32), _word(builder, source, 4, 32)], lanes), own[:8] * 2
    if bits * lanes == 48:  # the second half is bytes 3 to 5: a word at 3 would read past the end
        halves = [_word(builder, source, 0, 32), _word(builder, source, 2, 32)]
        return _spread(builder, halves, lanes), own[:8] + [shift + 8 for shift in own[:8]]
    if bits * lanes == 24:
        low, high = _word(builder, source, 0, 16), _word(builder, source, 2, 8)
        return _spread(builder, [builder.or_(low, builder.shl(high, ir.IntType(32)(16)))], lanes), own
    return _spread(builder, [_word(builder, source, 0, bits * lanes)], lanes), own


def _word(builder: Any, source: Any, byte: int, bits: int) -> Any:
    """Load `bits` bits at `byte` as a 32-bit word."""
    value = _load(builder, builder.gep(source, [_long(byte)]), ir.IntType(bits), 1)
    return value if bits == 32 else builder.zext(value, ir.IntType(32))


def _spread(builder: Any, words: list[Any], lanes: int) -> Any:
    """Distribute the words over the lanes, in equal shares."""
    kind = ir.VectorType(ir.IntType(32), 2)
    pair = ir.Constant(kind, ir.Undefined)
    for position, word in enumerate(words):
        pair = builder.insert_element(pair, word, ir.IntType(32)(position))
    return builder.shuffle_vector(pair, pair, _constant([lane * len(words) // lanes for lane in range(lanes)]))


def _permuted(builder: Any, levels: Any, indices: Any, lanes: int) -> Any:
    """Return levels[index] in each lane. Only the low bits of an index are used."""
    name = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}[lanes]
    return _called(builder, name, [levels, indices])


def _multiplied(builder: Any, one: Any, other: Any, total: Any) -> Any:
    """Return one * other + total, rounded once."""
    return _called(builder, f"llvm.fma.v{total.type.count}f32", [one, other, total])


def _called(builder: Any, name: str, arguments: list[Any]) -> Any:
    """Call an LLVM intrinsic whose result has the type of its first argument."""
    kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def _load(builder: Any, pointer: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = align
    return value


def _store(builder: Any, value: Any, pointer: Any, align: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def _long(value: int) -> Any:
    return ir.IntType(64)(value)


def _constant(values: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), values)


def padded(levels: np.ndarray) -> np.ndarray:
    """Pad the levels to TABLE_SIZE entries."""
    return np.pad(levels, (0, TABLE_SIZE - levels.size))
