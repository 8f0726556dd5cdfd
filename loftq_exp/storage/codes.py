"""Codes packed tight: codes of b bits take b bits each, whatever b is.

Eight codes fill b bytes. They lie in the order of the flattened row-major weight, the first in the lowest bits of the first
byte (a little-endian stream of bits); what is left of the last b bytes is zero.

Packing codes of at most 4 bits makes one code of twice the bits of each pair, which are packed in turn; unpacking goes the
other way. Eight wider codes, a byte each, are one word of 64 bits, whose gaps are halved three times.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError

CODES_PER_GROUP = 8

CHUNK_CODES = 2**18
"""Codes that are worked on at a time, in a processor's cache."""


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
    if bits == 8:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % CODES_PER_GROUP)).contiguous()
    packed = flat.new_empty(packed_bytes(flat.numel(), bits))
    for start in range(0, flat.numel(), CHUNK_CODES):
        some = flat[start : start + CHUNK_CODES]
        some = torch.nn.functional.pad(some, (0, -len(some) % CODES_PER_GROUP)).clone()
        size = len(some) // CODES_PER_GROUP * bits
        packed[start // CODES_PER_GROUP * bits :][:size] = _packed(some, bits)[:size]
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """The first `values` codes of what `pack_codes` made: uint8, (values,)."""
    if bits == 8:
        return packed[:values]
    codes = packed.new_empty(len(packed) // bits * CODES_PER_GROUP)
    for start in range(0, len(codes), CHUNK_CODES):
        some = packed[start // CODES_PER_GROUP * bits :][: CHUNK_CODES // CODES_PER_GROUP * bits]
        found = codes[start : start + CHUNK_CODES]
        found.copy_(_unpacked(some, bits)[: len(found)])
    return codes[:values]


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bytes of codes whose number is even, and bytes of zeros after them where they are no whole groups."""
    if bits == 8:
        return codes
    if bits <= 4:
        pairs = codes.view(torch.int16)
        return _packed((pairs | (pairs >> (8 - bits))).to(torch.uint8), 2 * bits)
    words = torch.nn.functional.pad(codes, (0, -len(codes) % CODES_PER_GROUP)).view(torch.int64)
    for half in (1, 2, 4):
        low, high = _fields(bits * half, 16 * half), _fields(bits * half, 16 * half, bits * half)
        words = (words & low) | ((words >> (8 - bits) * half) & high)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in these bytes, and zeros after them where the bytes are no whole groups."""
    if bits == 8:
        return packed
    if bits <= 4:
        pairs = _unpacked(packed, 2 * bits).to(torch.int16)
        both = (2**bits - 1) * 0x0101
        return ((pairs | (pairs << (8 - bits))) & both).view(torch.uint8)
    whole = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).reshape(-1, bits)
    words = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64).reshape(-1)
    for half in (4, 2, 1):
        low, high = _fields(bits * half, 16 * half), _fields(bits * half, 16 * half, 8 * half)
        words = (words & low) | ((words << (8 - bits) * half) & high)
    return words.view(torch.uint8)


def _fields(width: int, stride: int, first: int = 0) -> int:
    """A mask of 64 bits with `width` ones at every multiple of `stride`, all of them `first` bits higher."""
    return sum((2**width - 1) << (at + first) for at in range(0, 64, stride))
