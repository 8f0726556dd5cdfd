"""The quantizer interface: encode a weight as integer codes and a few numbers per group of values, and decode it.

A group has one row of `scales`. It is a block of `block_size` consecutive values of the flattened row-major weight (`nf`,
`nf-symmetric`, `uniform`, `uniform-sigma`), the whole weight (`uniform-clipped`) or a row (`int`). Blocks run across
rows, as in bitsandbytes. The last block is short if `block_size` does not divide the number of values.

Scales are rounded to `scale_dtype`, the type they are stored in, *before* codes are chosen and values decoded. Consider a
backbone of type `nf` with 4 or 2 bits, or optimal levels, and blocks of 64, stored in that type (bfloat16 or float32).
bitsandbytes, which quantizes it to NF4 again on load, therefore reproduces every value: all levels are NF4's, and a scale
of at most the absmax keeps a value at -1 or 1 in every block.

Arithmetic is float32 for every input type, on the weight's device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from loftq_exp.errors import UserError
from loftq_exp.kernels.compiled import CPU_TYPES
from loftq_exp.kernels.quantize import QuantizerPasses, quantizing
from loftq_exp.loftq.scales import SCALES_PER_STEP, dequantize_scales, quantize_scales

QUANTIZER_VERSION = 1
"""Part of every cache key: increment it when a quantizer's results change."""


class Quantized(NamedTuple):
    """A quantized weight. The quantizer that made it can decode it."""

    codes: torch.Tensor
    """uint8, the weight's shape: one code per value, unpacked."""
    scales: torch.Tensor
    """float32, (groups, numbers per group): absmax or scale, or minimum and step."""


@dataclass(frozen=True)
class Quantizer(ABC):
    """Encodes a weight as codes and scales, and decodes it; `make_quantizer` makes one.

    A subclass defines the group size, and how a matrix with one group per row is encoded and decoded.
    """

    type: str
    """Name in `loftq_exp.schemes.BITS_OF_TYPE`."""
    bits: int
    """Bits per code; codes are below 2**bits."""
    block_size: int = 64
    """Consecutive values that share scales, for block-wise types."""
    scale_dtype: torch.dtype = torch.float32
    """Type in which scales and the decoded backbone are stored."""
    double: bool = False
    """Whether the scales are quantized themselves, see `loftq_exp.loftq.scales`, instead of stored in `scale_dtype`."""
    table: str = "nf"
    """Levels of type `nf`: `nf` or `optimal`, see `loftq_exp.loftq.normal_float`."""
    scale: str = "absmax"
    """How a block's scale is chosen: `absmax` (its whole range) or `search` (by squared error), see `loftq_exp.loftq.search`."""

    def encode(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Quantized:
        """Return codes and scales of a finite weight of any shape, floating type and device.

        `importance` weighs the squared error of each column in the search for scales: float32, (in,), non-negative and
        finite; None: 1 everywhere. Without a search it has no effect.

        Raises:
            UserError: if the importance has another length, or a value is negative or not finite.
        """
        return self._encode(weight, self._checked(importance, weight))

    def _encode(self, weight: torch.Tensor, importance: torch.Tensor | None) -> Quantized:
        """As `encode`, with an importance that is checked, and has any shape that expands to the weight's."""
        size = self._group_size(weight.shape)
        groups = _split(weight.detach().to(torch.float32), size)
        each = [None] * 2 if importance is None else _split(importance.expand(weight.shape), size)
        parts = [self._encode_groups(*pair) for pair in zip(groups, each, strict=False)]
        codes = torch.cat([codes.reshape(-1) for codes, _ in parts])
        return Quantized(codes.reshape(weight.shape), torch.cat([scales for _, scales in parts]))

    def decode(self, quantized: Quantized) -> torch.Tensor:
        """Return the values that codes and scales represent: float32, the weight's shape."""
        codes, scales = quantized
        groups = _split(codes, self._group_size(codes.shape))
        rows = torch.split(scales, [len(group) for group in groups])
        values = [self._decode_groups(group, row).reshape(-1) for group, row in zip(groups, rows, strict=True)]
        return torch.cat(values).reshape(codes.shape)

    def decode_stored(self, quantized: Quantized) -> torch.Tensor:
        """Return the result of `decode`, rounded to `scale_dtype` as if stored and read again: float32, the weight's shape."""
        return self.decode(quantized).to(self.scale_dtype).to(torch.float32)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of `Quantized.scales` for a weight of this shape: groups, and numbers per group."""
        return -(-math.prod(shape) // self._group_size(shape)), self.numbers

    def aligned_rows(self, shape: tuple[int, ...]) -> int:
        """Return the smallest number of rows of a matrix of this shape that is whole groups; at most all rows.

        Groups whose scales are quantized together count as one group.
        """
        size = self._group_size(shape) * (SCALES_PER_STEP if self.double else 1)
        return min(size // math.gcd(size, shape[1]), shape[0])

    def groups_of(self, shape: tuple[int, ...], rows: slice) -> slice:
        """Return the rows of `Quantized.scales` for these rows of the weight. They begin at a multiple of `aligned_rows`
        and end at one or at the end of the weight.
        """
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
        importance: torch.Tensor | None = None,
    ) -> None:
        """Compute Q = encode(W - P, importance) and the residual (W - decode_stored(Q)) * unit.

        Args:
            weight: W, float32 or bfloat16, contiguous: whole blocks, or a whole weight.
            product: P, of the same shape, or None for zero.
            unit: a power of two.
            codes: output, uint8, W's shape.
            scales: output, the rows of these blocks.
            residual: output, float32 or bfloat16, W's shape.
            importance: one number per column, see `encode`.
        """
        whole, kernels = self._fused_part(weight)
        columns = weight.shape[-1]
        importance = self._checked(importance, weight)
        if kernels:
            each = torch.empty(0)
            if self.scale == "search":
                each = torch.ones(columns) if importance is None else importance
            kernels.requantize(weight, weight[:0] if product is None else product, unit, codes, scales, residual, each)
        if whole < weight.numel():
            rest, less = self._rest(whole, weight, product)
            if importance is not None and whole:
                importance = importance[torch.arange(whole, weight.numel()) % columns]
            quantized = self._encode(rest if less is None else rest - less, importance)
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
        """Compute (W - decode_stored(Q) - P) * unit.

        Args:
            weight: W, float32 or bfloat16, contiguous: whole blocks, or a whole weight.
            product: P, of the same shape, or None for zero.
            unit: a power of two.
            codes: of Q, uint8, W's shape.
            scales: of Q, the rows of these blocks.
            out: output, float32, W's shape.
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
        """Write the values of `decode_stored` to `out`.

        Args:
            quantized: codes and scales, contiguous: whole blocks, or a whole weight.
            out: output, the codes' shape, in `scale_dtype` or a wider type, contiguous.
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
        """Return the number of leading values that the compiled passes process (whole blocks), and these passes."""
        whole = values.numel() - values.numel() % self.block_size
        kernels = quantizing(self) if values.device.type == "cpu" and whole else None
        return (whole if kernels else 0), kernels

    @staticmethod
    def _rest(
        done: int, weight: torch.Tensor, product: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the part that torch processes after the compiled passes: the short last block, or everything."""
        rest = (weight.view(-1)[done:] if done else weight).to(torch.float32)
        return rest, None if product is None else product.view(-1)[done:].view(rest.shape)

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Return decode_stored(encode(weight, importance)): float32, the weight's shape."""
        return self.decode_stored(self.encode(weight, importance))

    def _checked(self, importance: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the importance if it is used, as contiguous float32 on the weight's device; else None."""
        if importance is None or self.scale != "search":
            return None
        if importance.shape != weight.shape[-1:]:
            raise UserError(f"importance of shape {tuple(importance.shape)}: not one number per column; "
                            f"give {weight.shape[-1]} numbers")  # fmt: skip
        low, high = importance.aminmax()
        if not 0 <= float(low) <= float(high) < math.inf:
            raise UserError("importance: a number is negative, infinite or NaN; give finite numbers of at least 0")
        return importance.to(weight.device, torch.float32).contiguous()

    numbers: ClassVar[int] = 1
    """Numbers per group in `Quantized.scales`."""
    signed: ClassVar[tuple[bool, ...]] = (False,)
    """For each of these numbers, whether it may be negative."""
    kernel_family: ClassVar[str | None] = None
    """The kernels in `loftq_exp.kernels.quantize` for this quantizer: `levels`, `uniform`, or None."""

    def levels(self) -> torch.Tensor:
        """Return the ascending levels in [-1, 1] of a quantizer with a table of levels: float32, (2**bits,)."""
        raise NotImplementedError(f"{self.type} has no table of levels")

    def thresholds(self) -> torch.Tensor:
        """Return the midpoints between adjacent levels: float32, (2**bits - 1,)."""
        levels = self.levels()
        return (levels[:-1] + levels[1:]) / 2

    def _nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the index (uint8) of the nearest level. A tie takes the lower level, as in bitsandbytes."""
        return torch.bucketize(scaled, self.thresholds().to(scaled.device), out_int32=True).to(torch.uint8)

    def _look_up(self, codes: torch.Tensor) -> torch.Tensor:
        indices = codes.reshape(-1).to(torch.int32)
        return self.levels().to(codes.device).index_select(0, indices).reshape(codes.shape)

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that determines the result, for cache keys."""
        return {
            "type": self.type,
            "bits": self.bits,
            "block_size": self.block_size,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "version": QUANTIZER_VERSION,
            **({"double": True} if self.double else {}),
            **({"levels": self.table} if self.table != "nf" else {}),
            **({"scale": self.scale} if self.scale != "absmax" else {}),
        }

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return self.block_size

    def _round(self, scales: torch.Tensor, number: int = 0) -> torch.Tensor:
        """Round one number of each group as it is stored. Values out of range become the largest finite value."""
        if self.double:
            signed = self.signed[number : number + 1]
            return dequantize_scales(quantize_scales(scales, signed), signed)
        largest = torch.finfo(self.scale_dtype).max
        return scales.clamp(-largest, largest).to(self.scale_dtype).to(torch.float32)

    def _round_alone(self, scales: torch.Tensor, number: int = 0) -> torch.Tensor:
        """As `_round`, for a search; scales that are quantized together are searched before that."""
        return scales if self.double else self._round(scales, number)

    @abstractmethod
    def _encode_groups(
        self, groups: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (n, size) uint8 and scales (n, k) float32 of `groups` (n, size) float32.

        `importance`, of the same shape, is only for a search for scales. None: 1 everywhere.
        """

    @abstractmethod
    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return values (n, size) float32 of codes (n, size) and scales (n, k)."""


def _split(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return the flattened values as matrices with one group per row: the full groups, and the short last one, if any."""
    flat = values.reshape(-1)
    full = flat.numel() - flat.numel() % size
    return [part for part in (flat[:full].reshape(-1, size), flat[full:].reshape(1, -1)) if part.numel()]
