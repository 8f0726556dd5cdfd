"""The tensors of a packed weight, in files and in memory, and how to decode them.

    qweight      uint8 (bytes,): the bit-packed codes, see `loftq_exp.storage.codes`
    scales       (groups, numbers): scale_dtype, or uint8 with double quantization
    scale_steps  float32 (groups / 256 rounded up, numbers): only with double quantization

Groups and numbers are those of the quantizer, see `loftq_exp.loftq.quantizer`. Decoded values equal those of
`Quantizer.decode_stored`, which are rounded to the storage dtype.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from loftq_exp.errors import UserError
from loftq_exp.kernels.gpu import GPU_TYPES, gpu_kernels
from loftq_exp.kernels.unpack import multiplying, unpacking
from loftq_exp.loftq.quantizer import Quantized, Quantizer
from loftq_exp.loftq.scales import SCALES_PER_STEP, QuantizedScales, dequantize_scales, quantize_scales
from loftq_exp.schemes import BLOCKLESS_TYPES, Scheme
from loftq_exp.storage.codes import CODES_PER_GROUP, pack_codes, packed_bytes, unpack_codes
from loftq_exp.storage.format import Codes, StorageFormat, Tensors
from loftq_exp.storage.packing import METHOD, Packing
from loftq_exp.storage.specs import TensorSpec

PARTS = ("qweight", "scales", "scale_steps")
"""Names of the tensors that represent one weight."""

TORCH_CHUNK_VALUES = 2**20
"""Values that the torch code decodes at a time. This bounds its memory besides the result."""


class Packed(StorageFormat):
    """Bit-packed codes. `loftq_exp.integrations` makes transformers load them into packed layers."""

    name = "packed"
    method = METHOD
    first_part = PARTS[0]
    takes_values = False
    holds_parameters = True
    card_imports = ("import loftq_exp  # reads packed weights: pip install loftq_exp",)

    def specs(
        self, name: str, shape: tuple[int, int], quantizer: Quantizer | None, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        assert quantizer is not None
        return {packed_name(name, part): TensorSpec(*spec) for part, spec in part_specs(quantizer, shape).items()}

    def encode(self, name: str, codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        parts = parts_of(codes.packed, codes.scales, codes.quantizer)
        return {packed_name(name, part): tensor for part, tensor in parts.items()}

    def parts(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        return tuple(part_name for part in PARTS if (part_name := packed_name(name, part)) in names)

    def values(
        self, module: str, name: str, tensors: Tensors, shape: tuple[int, int], quantizer: Quantizer | None
    ) -> torch.Tensor:
        assert quantizer is not None
        parts = {part.rpartition(".")[2]: tensor for part, tensor in tensors.items()}
        check_parts(module, parts, quantizer, shape)
        return dequantize(parts, quantizer, shape, torch.float32)

    def quantization_config(
        self,
        scheme: Scheme | None,
        bits: Mapping[str, int],
        other_linears: Sequence[str],
        dtype: torch.dtype,
        parameters: Sequence[str] = (),
    ) -> Any:
        assert scheme is not None
        scale_dtype = str(dtype).removeprefix("torch.")
        return Packing(
            dict(bits), scheme.type, scheme.block_size, scheme.double, scale_dtype, scheme.levels, parameters
        ).settings

    def modules(self, settings: Mapping[str, Any]) -> Collection[str]:
        return Packing.of(settings).bits

    def quantizer_of(self, module: str, settings: Mapping[str, Any]) -> Quantizer:
        packing = Packing.of(settings)
        return packing.quantizer(packing.bits[module])


FORMAT = Packed()


def packed_name(tensor: str, part: str) -> str:
    """Return the stored name of a part of a packed weight. `tensor` is the name of the dense weight."""
    return tensor.removesuffix("weight") + part


def part_specs(quantizer: Quantizer, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor that represents a weight of this shape.

    Raise UserError if the weight's values are not whole blocks.
    """
    values = math.prod(shape)
    _check_whole_blocks(quantizer, shape)
    groups, numbers = quantizer.scales_shape(shape)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.uint8, (packed_bytes(values, quantizer.bits),)),
        "scales": (torch.uint8 if quantizer.double else quantizer.scale_dtype, (groups, numbers)),
    }
    if quantizer.double:
        specs["scale_steps"] = (torch.float32, (-(-groups // SCALES_PER_STEP), numbers))
    return specs


def pack(quantized: Quantized, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """Return the packed tensors of a weight that `quantizer` encoded. Packing is lossless: the scales are already rounded."""
    _check_whole_blocks(quantizer, tuple(quantized.codes.shape))
    return parts_of(pack_codes(quantized.codes, quantizer.bits), quantized.scales, quantizer)


def parts_of(packed: torch.Tensor, scales: torch.Tensor, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """Like `pack`, for codes that are already packed, and float32 scales."""
    if quantizer.double:
        codes, steps = quantize_scales(scales, quantizer.signed)
        return {"qweight": packed, "scales": codes, "scale_steps": steps}
    return {"qweight": packed, "scales": scales.to(quantizer.scale_dtype)}


def _check_whole_blocks(quantizer: Quantizer, shape: tuple[int, ...]) -> None:
    values = math.prod(shape)
    if quantizer.type not in BLOCKLESS_TYPES and values % quantizer.block_size:
        raise UserError(f"block size {quantizer.block_size}: does not divide the {values} values of a weight of "
                        f"{shape[0]} x {shape[1]}, and only whole blocks are packed; choose a smaller power of two")  # fmt: skip


def float_scales(parts: Mapping[str, torch.Tensor], quantizer: Quantizer) -> torch.Tensor:
    """Return the scales in float32, (groups, numbers)."""
    if quantizer.double:
        return dequantize_scales(QuantizedScales(parts["scales"], parts["scale_steps"]), quantizer.signed)
    return parts["scales"].to(torch.float32)


def unpack(parts: Mapping[str, torch.Tensor], quantizer: Quantizer, shape: tuple[int, int]) -> Quantized:
    """Return codes and scales of a packed weight of this shape, as they were passed to `pack`."""
    codes = unpack_codes(parts["qweight"], quantizer.bits, math.prod(shape)).reshape(shape)
    return Quantized(codes, float_scales(parts, quantizer))


def dequantize(
    parts: Mapping[str, torch.Tensor], quantizer: Quantizer, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the values of a packed weight, (out, in) in `dtype`: those of dense storage, converted.

    Besides the result only a chunk of values is in memory.
    """
    qweight = parts["qweight"]
    values = torch.empty(shape, dtype=dtype, device=qweight.device)
    gpu = gpu_kernels(qweight.device)
    if gpu and dtype in GPU_TYPES:
        gpu.unpack(parts, quantizer, shape, values)
        return values
    scales = float_scales(parts, quantizer)
    kernel = unpacking(quantizer, dtype) if qweight.device.type == "cpu" else None
    if kernel:
        kernel(qweight, scales, values.view(-1))
        return values
    chunk = _chunk_values(quantizer, shape)
    flat = values.view(-1)
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        some = qweight[start // CODES_PER_GROUP * quantizer.bits : packed_bytes(stop, quantizer.bits)]
        rows = slice(start // shape[1], -(-stop // shape[1]))
        codes = unpack_codes(some, quantizer.bits, stop - start)
        if quantizer.type in BLOCKLESS_TYPES:  # groups are rows, or the whole weight
            codes, part = codes.reshape(-1, shape[1]), scales[quantizer.groups_of(shape, rows)]
        else:
            part = scales[start // quantizer.block_size : stop // quantizer.block_size]
        flat[start:stop] = quantizer.decode_stored(Quantized(codes, part)).view(-1)
    return values


FEW_ROWS = 8
"""Maximum number of rows that a CPU multiplies by packed codes directly. For more rows, unpacking once is faster."""


def product(
    parts: Mapping[str, torch.Tensor], quantizer: Quantizer, shape: tuple[int, int], rows: torch.Tensor
) -> torch.Tensor | None:
    """Return rows (..., in) times the transpose of a packed weight (out, in), in the rows' dtype, with float32 sums.

    Return None for many rows (on a CPU more than `FEW_ROWS`), and without a kernel. Then use `dequantize`.
    """
    count = rows.numel() // shape[1]
    gpu = gpu_kernels(rows.device)
    if gpu:
        if not gpu.multiplies(quantizer, shape, count, rows.dtype):
            return None
        found = torch.empty(*rows.shape[:-1], shape[0], dtype=rows.dtype, device=rows.device)
        gpu.multiply(parts, quantizer, shape, rows.detach().reshape(count, -1).contiguous(), found.view(count, -1))
        return found
    if rows.device.type != "cpu" or not 0 < count <= FEW_ROWS or shape[1] % quantizer.block_size:
        return None
    kernel = multiplying(quantizer)
    # The kernel does not round values to the storage dtype. That is acceptable only if the rows' dtype is no more precise.
    if kernel is None or torch.finfo(rows.dtype).eps < torch.finfo(quantizer.scale_dtype).eps:
        return None
    products = torch.empty(count, shape[0], dtype=torch.float32)
    scales = float_scales(parts, quantizer) if quantizer.double else parts["scales"]
    kernel(parts["qweight"], scales, rows.detach().reshape(count, -1).to(torch.float32).contiguous(), products)
    return products.to(rows.dtype).reshape(*rows.shape[:-1], shape[0])


def _chunk_values(quantizer: Quantizer, shape: tuple[int, int]) -> int:
    """Return the number of values to decode at a time: whole blocks or rows, and whole bytes."""
    unit = shape[1] if quantizer.type in BLOCKLESS_TYPES else quantizer.block_size
    unit = math.lcm(unit, CODES_PER_GROUP)
    return max(TORCH_CHUNK_VALUES // unit, 1) * unit


def check_specs(
    name: str,
    found: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
    quantizer: Quantizer,
    shape: tuple[int, int],
) -> None:
    """Raise UserError if tensors of these dtypes and shapes, by part, do not represent a weight of this shape."""
    for part, (dtype, expected) in part_specs(quantizer, shape).items():
        if found.get(part) != (dtype, expected):
            stored = f"{_kind(found[part][0])} {found[part][1]}" if part in found else "missing"
            raise UserError(f"{name}.{part}: {stored}, but a weight of {shape[0]} x {shape[1]} at {quantizer.bits} bits "
                            f"has {_kind(dtype)} {expected}; get the file again")  # fmt: skip


def check_parts(name: str, parts: Mapping[str, torch.Tensor], quantizer: Quantizer, shape: tuple[int, int]) -> None:
    """Raise UserError if length, dtype or content of the tensors do not match a weight of this shape.

    The content of a weight that is offloaded to disk is not looked at: its tensors are on the meta device.
    """
    check_specs(name, {part: (found.dtype, tuple(found.shape)) for part, found in parts.items()}, quantizer, shape)
    if any(part.is_meta for part in parts.values()):
        return
    scales = parts.get("scale_steps", parts["scales"])
    if not bool(torch.isfinite(scales).all()):
        raise UserError(
            f"{name}: {int((~torch.isfinite(scales)).sum())} of its scales are NaN or infinite; get the file again"
        )
    spare = -math.prod(shape) % CODES_PER_GROUP
    last = unpack_codes(parts["qweight"][-quantizer.bits :], quantizer.bits, CODES_PER_GROUP)
    if spare and bool(last[CODES_PER_GROUP - spare :].any()):
        raise UserError(f"{name}.qweight: nonzero codes after the weight's last value; get the file again")
    if quantizer.type == "int" and bool((parts["qweight"][: math.prod(shape)] == 0).any()):
        raise UserError(f"{name}.qweight: a code is out of range, type int has 1 to 255; get the file again")


def _kind(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
