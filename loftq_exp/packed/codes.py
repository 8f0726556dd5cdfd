"""Codes packed tight: codes of b bits take b bits each, whatever b is.

Eight codes fill b bytes. They lie in the order of the flattened row-major weight, the first in the lowest bits of the first
byte (a little-endian stream of bits); what is left of the last b bytes is zero.

Eight codes, a byte each, are one word of 64 bits here. Packing halves its gaps three times, so that fields of b bits in
each byte become fields of 2 b in two bytes, of 4 b in four, of 8 b in all eight; unpacking goes the other way.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError

CODES_PER_GROUP = 8

CHUNK_CODES = 2**18
"""Codes that are worked on at a time, in a processor's cache."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Types of as many bytes, to take the lowest of a word or to widen to one."""


def packed_bytes(values: int, bits: int) -> int:
    """Bytes that `values` codes of `bits` bits take."""
    return -(-values // CODES_PER_GROUP) * bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (any shape, uint8) of 1 to 8 bits as one row of bytes: uint8, (packed_bytes(codes.numel(), bits),).

    Raises UserError for a code that does not fit into so many bits.
    """
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise UserError(f"codes: {int(flat.max())} does not fit into {bits} bits; give codes below {2**bits}")
    packed = flat.new_empty(packed_bytes(flat.numel(), bits))
    if bits == 8:
        packed[: flat.numel()] = flat
        packed[flat.numel() :] = 0
        return packed
    for start in range(0, flat.numel(), CHUNK_CODES):
        some = flat[start : start + CHUNK_CODES]
        words = torch.nn.functional.pad(some, (0, -len(some) % CODES_PER_GROUP)).clone().view(torch.int64)
        for half in (1, 2, 4):
            low, high = _fields(bits * half, 16 * half), _fields(bits * half, 16 * half, bits * half)
            words = (words & low) | ((words >> (8 - bits) * half) & high)
        packed[start // CODES_PER_GROUP * bits :][: len(words) * bits] = _lowest_bytes(words, bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """The first `values` codes of what `pack_codes` made: uint8, (values,)."""
    if bits == 8:
        return packed[:values]
    codes = packed.new_empty(len(packed) // bits * CODES_PER_GROUP)
    for start in range(0, len(codes), CHUNK_CODES):
        words = _as_words(packed[start // CODES_PER_GROUP * bits :][: CHUNK_CODES // CODES_PER_GROUP * bits], bits)
        for half in (4, 2, 1):
            low, high = _fields(bits * half, 16 * half), _fields(bits * half, 16 * half, 8 * half)
            words = (words & low) | ((words << (8 - bits) * half) & high)
        codes[start : start + CHUNK_CODES] = words.view(torch.uint8)
    return codes[:values]


def _fields(width: int, stride: int, first: int = 0) -> int:
    """A mask of 64 bits with `width` ones at every multiple of `stride`, all of them `first` bits higher."""
    return sum((2**width - 1) << (at + first) for at in range(0, 64, stride))


def _lowest_bytes(words: torch.Tensor, count: int) -> torch.Tensor:
    if count in _WHOLE:
        return words.to(_WHOLE[count]).view(torch.uint8)
    return words.view(torch.uint8).reshape(-1, 8)[:, :count].reshape(-1)


def _as_words(some: torch.Tensor, count: int) -> torch.Tensor:
    """Words of 64 bits whose lowest `count` bytes are these, the next for each word; what lies higher is not defined."""
    if count in _WHOLE:
        return some.clone().view(_WHOLE[count]).to(torch.int64)
    return torch.nn.functional.pad(some.reshape(-1, count), (0, 8 - count)).view(torch.int64).reshape(-1)
