"""What a quantizer is: a weight becomes small integer codes and a few numbers per group of values, and comes back.

Every quantizer here works on groups of values and keeps one row of `scales` a group. A group is a block of
`block_size` consecutive values of the flattened row-major weight (`nf`, `nf-symmetric`, `uniform`, `uniform-sigma`),
the whole weight (`uniform-clipped`) or a row (`int`). Blocks run across rows, as in bitsandbytes, and where
`block_size` does not divide the number of values the last block is short.

Scales are rounded to `scale_dtype`, the type they will be stored in, *before* codes are chosen and values decoded.
A backbone of type `nf` with 4 or 2 bits and blocks of 64, decoded and stored in that type (bfloat16 or float32),
therefore comes back value for value when bitsandbytes quantizes it again to NF4 on load.

Arithmetic is float32 whatever comes in, on whatever device the weight is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from loftq_exp.kernels.compiled import CPU_TYPES
from loftq_exp.kernels.quantize import QuantizerPasses, quantizing
from loftq_exp.loftq.scales import SCALES_PER_STEP, dequantize_scales, quantize_scales

QUANTIZER_VERSION = 1
"""Part of every cache key: raise it when a quantizer's results change."""


class Quantized(NamedTuple):
    """A quantized weight; with the quantizer that made it, enough to decode it."""

    codes: torch.Tensor
    """uint8, the weight's shape: one code a value, unpacked."""
    scales: torch.Tensor
    """float32, (groups, numbers a group): absmax or scale alone, or minimum and step."""


@dataclass(frozen=True)
class Quantizer(ABC):
    """Turns a weight into codes and scales and back; `make_quantizer` makes one.

    A subclass says how large a group is and how a matrix of groups, one a row, is encoded and decoded.
    """

    type: str
    """Name in `loftq_exp.schemes.BITS_OF_TYPE`."""
    bits: int
    """Bits a code; codes are below 2**bits."""
    block_size: int = 64
    """Consecutive values that share scales, for the types that work on blocks."""
    scale_dtype: torch.dtype = torch.float32
    """Type that scales, and the decoded backbone, are stored in."""
    double: bool = False
    """Whether the scales are quantized themselves, see `loftq_exp.loftq.scales`, instead of stored in `scale_dtype`."""

    def encode(self, weight: torch.Tensor) -> Quantized:
        """Codes and scales of a finite weight of any shape, floating type and device."""
        size = self._group_size(weight.shape)
        parts = [self._encode_groups(groups) for groups in _split(weight.detach().to(torch.float32), size)]
        codes = torch.cat([codes.reshape(-1) for codes, _ in parts])
        return Quantized(codes.reshape(weight.shape), torch.cat([scales for _, scales in parts]))

    def decode(self, quantized: Quantized) -> torch.Tensor:
        """The values that codes and scales stand for: float32, the weight's shape."""
        codes, scales = quantized
        groups = _split(codes, self._group_size(codes.shape))
        rows = torch.split(scales, [len(group) for group in groups])
        values = [self._decode_groups(group, row).reshape(-1) for group, row in zip(groups, rows, strict=True)]
        return torch.cat(values).reshape(codes.shape)

    def decode_stored(self, quantized: Quantized) -> torch.Tensor:
        """What `decode` gives once it was stored in `scale_dtype` and read again: float32, the weight's shape."""
        return self.decode(quantized).to(self.scale_dtype).to(torch.float32)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Groups of a weight of this shape, and the numbers that `Quantized.scales` has for each."""
        return -(-math.prod(shape) // self._group_size(shape)), self.numbers

    def aligned_rows(self, shape: tuple[int, ...]) -> int:
        """The fewest rows of a matrix of this shape that are whole groups; all of them where no fewer are.

        Groups whose scales are quantized together count as one.
        """
        size = self._group_size(shape) * (SCALES_PER_STEP if self.double else 1)
        return min(size // math.gcd(size, shape[1]), shape[0])

    def groups_of(self, shape: tuple[int, ...], rows: slice) -> slice:
        """Which rows of `Quantized.scales` belong to these rows of the weight, a multiple of `aligned_rows` or its end."""
        size = self._group_size(shape)
        return slice(rows.start * shape[1] // size, -(-rows.stop * shape[1] // size))

    def requantize(
        self,
        weight: torch.Tensor,
        product: torch.Tensor | None,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        """Q = encode(W - P), and what it leaves of the weight: (W - decode_stored(Q)) * unit.

        Args:
            weight: W, float32 or bfloat16, contiguous: whole blocks, or all of a weight.
            product: P, of the same shape, or None for zero.
            unit: a power of two.
            codes: written: uint8, W's shape.
            scales: written: the rows of these blocks.
            residual: written: float32 or bfloat16, W's shape.
        """
        whole, kernels = self._fused_part(weight)
        if kernels:
            kernels.requantize(weight, weight[:0] if product is None else product, unit, codes, scales, residual)
        if whole < weight.numel():
            rest, less = self._rest(whole, weight, product)
            quantized = self.encode(rest if less is None else rest - less)
            codes.view(-1)[whole:] = quantized.codes.view(-1)
            scales[len(scales) - len(quantized.scales) :] = quantized.scales
            left = rest - self.decode_stored(quantized)
            residual.view(-1)[whole:] = left.mul_(unit).view(-1)

    def leave(
        self,
        weight: torch.Tensor,
        product: torch.Tensor | None,
        unit: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """What Q and P leave of the weight: (W - decode_stored(Q) - P) * unit.

        Args:
            weight: W, float32 or bfloat16, contiguous: whole blocks, or all of a weight.
            product: P, of the same shape, or None for zero.
            unit: a power of two.
            codes: of Q, uint8, W's shape.
            scales: of Q, the rows of these blocks.
            out: written: float32, W's shape.
        """
        whole, kernels = self._fused_part(weight)
        if kernels:
            kernels.leave(weight, weight[:0] if product is None else product, unit, codes, scales, out)
        if whole < weight.numel():
            rest, less = self._rest(whole, weight, product)
            rest_codes = codes.view(-1)[whole:].view(rest.shape)
            stored = self.decode_stored(Quantized(rest_codes, scales[whole // self.block_size if whole else 0 :]))
            left = rest - stored if less is None else rest - stored - less
            out.view(-1)[whole:] = left.mul_(unit).view(-1)

    def restore(self, quantized: Quantized, out: torch.Tensor) -> None:
        """Writes what `decode_stored` gives.

        Args:
            quantized: codes and scales, contiguous: whole blocks, or all of a weight.
            out: written: of the codes' shape, in `scale_dtype` or a wider type, contiguous.
        """
        codes, scales = quantized
        whole, kernels = self._fused_part(codes) if out.dtype in CPU_TYPES else (0, None)
        if kernels:
            kernels.restore(codes, scales, out)
        if whole < codes.numel():
            rest = codes.view(-1)[whole:] if whole else codes
            stored = self.decode_stored(Quantized(rest, scales[whole // self.block_size :]))
            out.view(-1)[whole:] = stored.view(-1)

    def _fused_part(self, values: torch.Tensor) -> tuple[int, QuantizerPasses | None]:
        """How many leading values the compiled passes take, whole blocks, and these passes."""
        whole = values.numel() - values.numel() % self.block_size
        kernels = quantizing(self) if values.device.type == "cpu" and whole else None
        return (whole if kernels else 0), kernels

    @staticmethod
    def _rest(
        done: int, weight: torch.Tensor, product: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the compiled passes leave to torch: the short last block, or all."""
        rest = (weight.view(-1)[done:] if done else weight).to(torch.float32)
        return rest, None if product is None else product.view(-1)[done:].view(rest.shape)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight's stored quantized values, decode_stored(encode(weight)): float32, the weight's shape."""
        return self.decode_stored(self.encode(weight))

    numbers: ClassVar[int] = 1
    """Numbers a group in `Quantized.scales`."""
    signed: ClassVar[tuple[bool, ...]] = (False,)
    """Which of these numbers may be negative."""
    kernel_family: ClassVar[str | None] = None
    """Which of `loftq_exp.kernels.quantize` do this quantizer's arithmetic: `levels`, `uniform`, or none."""

    def levels(self) -> torch.Tensor:
        """The ascending levels in [-1, 1] of a quantizer that has a table of them: float32, (2**bits,)."""
        raise NotImplementedError(f"{self.type} has no table of levels")

    def thresholds(self) -> torch.Tensor:
        """Where the next level becomes the nearest, the middle of two: float32, (2**bits - 1,)."""
        levels = self.levels()
        return (levels[:-1] + levels[1:]) / 2

    def _nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Index (uint8) of the nearest level; a value halfway between two takes the lower, as in bitsandbytes."""
        return torch.bucketize(scaled, self.thresholds().to(scaled.device), out_int32=True).to(torch.uint8)

    def _look_up(self, codes: torch.Tensor) -> torch.Tensor:
        indices = codes.reshape(-1).to(torch.int32)
        return self.levels().to(codes.device).index_select(0, indices).reshape(codes.shape)

    @property
    def identity(self) -> dict[str, str | int]:
        """All that shapes the result, for cache keys."""
        return {
            "type": self.type,
            "bits": self.bits,
            "block_size": self.block_size,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "version": QUANTIZER_VERSION,
            **({"double": True} if self.double else {}),
        }

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return self.block_size

    def _round(self, scales: torch.Tensor, number: int = 0) -> torch.Tensor:
        """One number of each group as it is stored; beyond the type's range the largest value instead of infinity."""
        if self.double:
            signed = self.signed[number : number + 1]
            return dequantize_scales(quantize_scales(scales, signed), signed)
        largest = torch.finfo(self.scale_dtype).max
        return scales.clamp(-largest, largest).to(self.scale_dtype).to(torch.float32)

    @abstractmethod
    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, size) uint8 and scales (n, k) float32 of `groups` (n, size) float32."""

    @abstractmethod
    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Values (n, size) float32 of codes (n, size) and scales (n, k)."""


def _split(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The flattened values as matrices with one group a row: the full groups, and a short last one if there is one."""
    flat = values.reshape(-1)
    full = flat.numel() - flat.numel() % size
    return [part for part in (flat[:full].reshape(-1, size), flat[full:].reshape(1, -1)) if part.numel()]
