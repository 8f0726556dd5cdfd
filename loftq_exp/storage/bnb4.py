"""bitsandbytes' packed form of a weight: NF4 in blocks of 64, two codes a byte, and the state that tells how to read them.

From our own codes it is a matter of moving bits. Values that are no quantizer's own are quantized by bitsandbytes.
"""

from __future__ import annotations

import math

import torch

from loftq_exp.loftq import Quantizer
from loftq_exp.storage.codes import pack_codes, unpack_codes
from loftq_exp.storage.specs import TensorSpec

BLOCK = 64
TYPE = "nf4"


def four_bit_of_codes(
    name: str, packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], quantizer: Quantizer
) -> dict[str, torch.Tensor]:
    """The same values as `quantizer` decodes, by the names that bitsandbytes gives to its parts.

    Args:
        name: of the weight, whose shape is (out, in), with a multiple of 64 values.
        packed: its codes as `pack_codes` packs them.
        scales: one number a block.
        shape: (out, in).
        quantizer: NF4 or NF2 with blocks of 64.
    """
    low_first = packed
    if not torch.equal(quantizer.levels(), _levels()):
        codes = unpack_codes(packed, quantizer.bits, math.prod(shape))
        low_first = pack_codes(_as_nf4(codes, quantizer), 4)
    high_first = (low_first << 4).bitwise_or_(low_first >> 4)
    return {name: high_first.reshape(-1, 1)} | _state(name, scales.reshape(-1), shape, quantizer.scale_dtype)


def four_bit_of_values(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values quantized to NF4 by bitsandbytes, by the names that it gives to their parts."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(values, blocksize=BLOCK, quant_type=TYPE)
    return {name: codes} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}


def values_of_four_bit(codes: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of packed codes, whose state is given by the names that bitsandbytes gives to its parts.

    Raises ValueError, KeyError, AssertionError or RuntimeError where the state does not fit, as bitsandbytes does.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    known = QuantState.from_dict(state, torch.device("cpu"))
    shape, known.shape = known.shape, torch.Size([codes.numel() * 2])  # one row, which has whole blocks
    values: torch.Tensor = dequantize_4bit(codes, known).reshape(shape)
    return values


def four_bit_specs(name: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Types and shapes of the parts of a weight of this shape and type."""
    values = math.prod(shape)
    parts = _state(name, torch.empty(-(-values // BLOCK)), shape, dtype)
    specs = {part: TensorSpec(tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    return {name: TensorSpec(torch.uint8, (-(-values // 2), 1))} | specs


def _as_nf4(codes: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """The codes that stand in NF4 for the levels that these stand for."""
    there, nf4 = torch.zeros_like(codes), _levels()
    for code, level in enumerate(quantizer.levels()):
        there.masked_fill_(codes == code, int((nf4 == level).nonzero().item()))
    return there


def _levels() -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(TYPE, device="cpu")


def _state(name: str, absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import QuantState

    state = QuantState(absmax, torch.Size(shape), _levels(), BLOCK, TYPE, dtype)
    return {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
