"""Codes packed tight: codes of b bits take b bits each, whatever b is.

Eight codes fill b bytes. They lie in the order of the flattened row-major weight, the first in the lowest bits of the first
byte (a little-endian stream of bits); what is left of the last b bytes is zero.
"""

from __future__ import annotations

import torch

from loftq_exp.errors import UserError

CODES_PER_GROUP = 8


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
        padding = -flat.numel() % CODES_PER_GROUP
        return torch.nn.functional.pad(flat, (0, padding)).contiguous()
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % CODES_PER_GROUP)).reshape(-1, CODES_PER_GROUP)
    words = torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for position in range(CODES_PER_GROUP):
        words |= groups[:, position].to(torch.int64) << (bits * position)
    return torch.stack([(words >> (8 * byte)) & 255 for byte in range(bits)], dim=1).to(torch.uint8).reshape(-1)


def unpack_codes(packed: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """The first `values` codes of what `pack_codes` made: uint8, (values,)."""
    if bits == 8:
        return packed[:values]
    groups = packed.reshape(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= groups[:, byte].to(torch.int64) << (8 * byte)
    mask = 2**bits - 1
    codes = torch.stack([(words >> (bits * position)) & mask for position in range(CODES_PER_GROUP)], dim=1)
    return codes.to(torch.uint8).reshape(-1)[:values]
