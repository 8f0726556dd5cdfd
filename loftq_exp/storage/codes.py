"""Bit-packed codes: a code of b bits takes b bits, for any b.

Eight codes fill b bytes. They have the order of the flattened row-major weight. The first code is in the lowest bits of the
first byte (a little-endian bit stream). Unused bits of the last b bytes are zero.

To pack codes of at most 4 bits, each pair becomes one code of twice the bits, recursively; unpacking reverses this. Eight
wider codes, a byte each, form a 64-bit word, from which three steps remove the gaps.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError

CODES_PER_GROUP = 8

CHUNK_CODES = 2**18
"""Codes processed at a time on a CPU, to fit its cache. A GPU packs all at once."""


def packed_bytes(values: int, bits: int) -> int:
    """Return the size in bytes of `values` codes of `bits` bits."""
    return -(-values // CODES_PER_GROUP) * bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (any shape, uint8) of 1 to 8 bits into bytes: uint8, (packed_bytes(codes.numel(), bits),).

    Raise UserError if a code does not fit into `bits` bits.
    """
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise UserError(f"codes: {int(flat.max())} does not fit into {bits} bits; give codes below {2**bits}")
    if bits == 8:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % CODES_PER_GROUP)).contiguous()
    packed = flat.new_empty(packed_bytes(flat.numel(), bits))
    chunk = CHUNK_CODES if flat.device.type == "cpu" else flat.numel()
    for start in range(0, flat.numel(), max(chunk, 1)):
        some = flat[start : start + chunk]
        some = torch.nn.functional.pad(some, (0, -len(some) % CODES_PER_GROUP)).clone()
        size = len(some) // CODES_PER_GROUP * bits
        packed[start // CODES_PER_GROUP * bits :][:size] = _packed(some, bits)[:size]
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """Unpack the first `values` codes from the bytes of `pack_codes`: uint8, (values,)."""
    if bits == 8:
        return packed[:values]
    codes = packed.new_empty(len(packed) // bits * CODES_PER_GROUP)
    for start in range(0, len(codes), CHUNK_CODES):
        some = packed[start // CODES_PER_GROUP * bits :][: CHUNK_CODES // CODES_PER_GROUP * bits]
        found = codes[start : start + CHUNK_CODES]
        found.copy_(_unpacked(some, bits)[: len(found)])
    return codes[:values]


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of an even number of codes, followed by zero bytes if the codes are not whole groups."""
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
    """Return the codes in these bytes, followed by zeros if the bytes are not whole groups."""
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
    """Return a 64-bit mask with `width` ones at every multiple of `stride`, shifted left by `first` bits."""
    return sum((2**width - 1) << (at + first) for at in range(0, 64, stride))
