"""Quantizers: a weight becomes small integer codes and a few numbers per group of values, and comes back.

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

import functools
import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import torch

from loftq_exp.config.quant import BITS_OF_TYPE, BLOCKLESS_TYPES
from loftq_exp.errors import UserError
from loftq_exp.kernels.quantize import FUSED_TYPES, SMALLEST_ABSMAX, Kernels, fused
from loftq_exp.loftq.scales import SCALES_PER_STEP, dequantize_scales, quantize_scales

QUANTIZER_VERSION = 1
"""Part of every cache key: raise it when a quantizer's results change."""

NORMAL_OFFSET = 0.9677083
"""Probability of the outermost normal quantile of NormalFloat; bitsandbytes' and the paper's value."""


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
    """Name in `loftq_exp.config.quant.BITS_OF_TYPE`."""
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
        whole, kernels = self._fused_part(codes) if out.dtype in FUSED_TYPES else (0, None)
        if kernels:
            kernels.restore(codes, scales, out)
        if whole < codes.numel():
            rest = codes.view(-1)[whole:] if whole else codes
            stored = self.decode_stored(Quantized(rest, scales[whole // self.block_size :]))
            out.view(-1)[whole:] = stored.view(-1)

    def _fused_part(self, values: torch.Tensor) -> tuple[int, Kernels | None]:
        """How many leading values the compiled passes take, whole blocks, and these passes."""
        whole = values.numel() - values.numel() % self.block_size
        kernels = fused(self) if values.device.type == "cpu" and whole else None
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


class NormalFloat(Quantizer):
    """NF2, NF3, NF4 (type `nf`) and symmetric NF2 (`nf-symmetric`): absmax a block, nearest level.

    NF4 with float32 scales equals `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4")` bit for bit in codes,
    absmax and values, ties (to the lower level) and a short last block included.
    """

    kernel_family = "levels"

    def levels(self) -> torch.Tensor:
        return normal_float_levels(self.type, self.bits)

    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = groups.abs().amax(dim=1, keepdim=True)
        if groups.shape[1] < self.block_size:
            # bitsandbytes treats the short last block apart: it bounds the absmax itself, and divides by it where full
            # blocks are multiplied by the reciprocal. A last-bit difference here could move a value over a threshold.
            absmax = self._round(absmax.clamp(min=SMALLEST_ABSMAX))
            scaled = groups / absmax.clamp(min=SMALLEST_ABSMAX)
        else:
            absmax = self._round(absmax)
            scaled = groups * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))
        return self._nearest(scaled.clamp_(-1, 1)), absmax

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._look_up(codes).mul_(scales)


class UniformSigma(Quantizer):
    """Uniform levels of early official code and PEFT (`uniform-sigma`): levels linspace(-1, 1, 2**bits) times a scale.

    The scale of a block is mean + 2.5 standard deviations of its signed values (the deviation is the unbiased one).
    That may be negative, which only turns the levels round. Values beyond the scale take the outermost level.
    """

    signed = (True,)

    def levels(self) -> torch.Tensor:
        return torch.linspace(-1, 1, 2**self.bits)

    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = _mean_and_deviation(groups)
        scale = self._round(mean + 2.5 * deviation)
        scaled = torch.where(scale == 0, 0.0, groups / scale)
        return self._nearest(scaled.clamp_(-1, 1)), scale

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._look_up(codes).mul_(scales)


class Uniform(Quantizer):
    """Uniform quantization of the paper's equation 1 (`uniform`, the default of the three published variants).

    Of each block X, with F(X) = (X - min X) / (max X - min X):  codes = round((2**bits - 1) F(X)).
    Scales hold the minimum and the step, (max X - min X) / (2**bits - 1). A constant block has step 0 and comes back
    as its minimum.
    """

    numbers = 2
    signed = (True, False)
    kernel_family: ClassVar[str | None] = "uniform"

    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self._range(groups)
        top = 2**self.bits - 1
        minimum = self._round(low) + 0.0  # which of two zeros is the smaller one is left open: take the positive one
        # From the rounded minimum, so that the topmost level still reaches the maximum.
        step = self._round(((high - minimum) / top).clamp_(min=0), 1)
        codes = ((groups - minimum) / torch.where(step == 0, torch.inf, step)).round_().clamp_(0, top)
        return codes.to(torch.uint8), torch.cat([minimum, step], dim=1)

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        minimum, step = scales[:, :1], scales[:, 1:]
        return codes.to(torch.float32).mul_(step).add_(minimum)

    def _range(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = groups.aminmax(dim=1, keepdim=True)
        return low, high


class UniformClipped(Uniform):
    """Uniform quantization of the official GLUE code (`uniform-clipped`): the whole weight, clipped to mean +- 2 sigma.

    As `Uniform` with the weight as its only block, over the range that is left after clipping (the deviation is the
    unbiased one). The official code adds 1e-8 to the range against a division by zero; here the range is not changed.
    """

    kernel_family = None

    @property
    def identity(self) -> dict[str, str | int]:
        return _without_block_size(super().identity)

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

    def _range(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super()._range(groups)
        mean, deviation = _mean_and_deviation(groups)
        return torch.maximum(low, mean - 2 * deviation), torch.minimum(high, mean + 2 * deviation)


class RowInt(Quantizer):
    """Symmetric int8 a row (`int`): round(127 w / absmax), stored as code - 128; absmax over the last dimension.

    Equals `bitsandbytes.functional.int8_vectorwise_quant` without outlier threshold, except for a row of zeros, which
    is undefined there and zero here.
    """

    @property
    def identity(self) -> dict[str, str | int]:
        return _without_block_size(super().identity)

    def _group_size(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def _encode_groups(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = self._round(groups.abs().amax(dim=1, keepdim=True))
        # Below SMALLEST_ABSMAX the factor would overflow, and a row of zeros turn into 0 * inf.
        values = (groups * (127.0 / absmax.clamp(min=SMALLEST_ABSMAX))).round_().clamp_(-127, 127)
        return values.add_(128).to(torch.uint8), absmax

    def _decode_groups(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        # Two products in bitsandbytes' order; a division by 127 would differ in the last bit.
        return codes.to(torch.float32).sub_(128).mul_(scales).mul_(1 / 127)


_CLASS_OF_TYPE: dict[str, type[Quantizer]] = {
    "nf": NormalFloat,
    "nf-symmetric": NormalFloat,
    "uniform": Uniform,
    "uniform-clipped": UniformClipped,
    "uniform-sigma": UniformSigma,
    "int": RowInt,
}


def make_quantizer(
    type: str, bits: int, block_size: int = 64, scale_dtype: torch.dtype = torch.float32, double: bool = False
) -> Quantizer:
    """The quantizer of this type.

    Args:
        type: nf, nf-symmetric, uniform (paper's equation 1), uniform-clipped, uniform-sigma or int.
        bits: bits a value; which are allowed depends on the type, see `loftq_exp.config.quant.BITS_OF_TYPE`.
        block_size: consecutive values (row-major) that share scales; uniform-clipped and int take no notice of it.
        scale_dtype: float32, bfloat16 or float16, the type the scales and decoded values will be stored in.
        double: whether the scales of blocks are quantized to 8 bits themselves.

    Raises:
        UserError: for a type, bits, block size or scale type that does not exist or does not fit.
    """
    if type not in _CLASS_OF_TYPE:
        raise UserError(f"quantizer type {type!r}: unknown; choose one of {', '.join(_CLASS_OF_TYPE)}")
    if bits not in BITS_OF_TYPE[type]:
        widths = ", ".join(map(str, BITS_OF_TYPE[type]))
        raise UserError(f"bits={bits}: quantizer type {type} has {widths} bits; choose one of them or another type")
    if block_size < 1:
        raise UserError(f"block_size={block_size}: not a number of values; choose a positive one (64 is usual)")
    if scale_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"scale_dtype={scale_dtype}: not a type for scales; choose float32, bfloat16 or float16")
    if double and type in BLOCKLESS_TYPES:
        raise UserError(
            f"quant.double=true: type {type} has no blocks whose scales are worth it; leave quant.double out"
        )
    return _CLASS_OF_TYPE[type](type, bits, block_size, scale_dtype, double)


@functools.cache
def normal_float_levels(type: str, bits: int) -> torch.Tensor:
    """The ascending levels of a NormalFloat type in [-1, 1]: float32, (2**bits,).

    `nf`: the normal quantiles of 2**(bits-1) probabilities from NORMAL_OFFSET towards 1/2, zero, and minus the
    quantiles of 2**(bits-1) - 1 such probabilities. `nf-symmetric`: midpoints of the quantiles that bound bins of equal
    probability, and no zero. Both divided by the largest. Every NF2 level is an NF4 level.
    """
    count = 2**bits
    if type == "nf-symmetric":
        bounds = _normal_quantiles(1 - NORMAL_OFFSET, NORMAL_OFFSET, count + 1)
        levels = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
    else:
        positive = _normal_quantiles(NORMAL_OFFSET, 0.5, count // 2 + 1)[:-1]
        negative = [-quantile for quantile in _normal_quantiles(NORMAL_OFFSET, 0.5, count // 2)[:-1]]
        levels = sorted([*negative, 0.0, *positive])
    table = torch.tensor(levels, dtype=torch.float32)
    return table / table.max()


def _normal_quantiles(start: float, end: float, count: int) -> list[float]:
    """Standard normal quantiles (float64) of `count` evenly spaced probabilities."""
    # Probabilities in float32, because bitsandbytes' table was made so; in float64 some levels differ in the last bit.
    return [NormalDist().inv_cdf(p) for p in torch.linspace(start, end, count, dtype=torch.float32).tolist()]


def _split(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The flattened values as matrices with one group a row: the full groups, and a short last one if there is one."""
    flat = values.reshape(-1)
    full = flat.numel() - flat.numel() % size
    return [part for part in (flat[:full].reshape(-1, size), flat[full:].reshape(1, -1)) if part.numel()]


def _mean_and_deviation(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation of each row, (n, 1) each; a single value deviates by 0."""
    # Relative to the row's absmax, because squares of very large or small float32 values leave the range.
    absmax = groups.abs().amax(dim=1, keepdim=True)
    relative = groups / torch.where(absmax == 0, 1.0, absmax)
    deviation, mean = torch.std_mean(relative, dim=1, keepdim=True, correction=min(1, groups.shape[1] - 1))
    return mean * absmax, deviation * absmax


def _without_block_size(identity: dict[str, str | int]) -> dict[str, str | int]:
    return {name: value for name, value in identity.items() if name != "block_size"}
