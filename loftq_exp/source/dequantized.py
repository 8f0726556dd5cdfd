"""Read the weights of a checkpoint that is quantized already as values, one at a time, with transformers' dequantizers.

Only formats whose dequantizer runs on a CPU without further packages are read. The stored values are those of the quantized
model: what its quantization lost is lost here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from loftq_exp.errors import UserError
from loftq_exp.source.tensors import CheckpointTensors, open_tensors
from loftq_exp.storage.bnb4 import values_of_four_bit
from loftq_exp.whole import read_object

READ = ("fp8", "mxfp4", "bitsandbytes")
"""The values of `quant_method` that are read."""


@dataclass(frozen=True)
class Dequantized:
    """What was dequantized: the format, how many weights, and the type of their values."""

    method: str
    weights: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (f"already quantized by {self.method}; its {self.weights} weights are read as values in {kind}, without what that "
                "quantization lost")  # fmt: skip

    def record(self) -> dict[str, Any]:
        """The fields in plain containers."""
        return {"method": self.method, "weights": self.weights, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class _Packed:
    """One quantized weight: its shape, its tensors by role, and how they become values."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    """The stored name of each part, by its role."""
    values: Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]


def method_of(folder: Path) -> str | None:
    """The format of the quantized checkpoint in `folder` if it is one of READ; None for any other checkpoint."""
    settings = read_object(folder / "config.json").get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if method in READ else None


def open_values(folder: Path) -> CheckpointTensors:
    """The tensors of the checkpoint in `folder`, as `open_tensors`, with each weight of a quantized one as its values.

    Raises UserError as `open_tensors`, if parts of a weight do not fit each other, and if config.json names a format that no
    weight has.
    """
    tensors = open_tensors(folder)
    method = method_of(folder)
    if method is None:
        return tensors
    with ExitStack() as opened:
        opened.callback(tensors.close)
        settings = read_object(folder / "config.json")
        packed, used = _FIND[method](tensors, settings["quantization_config"], folder)
        if not packed:
            raise UserError(f"model.path={folder}: already quantized by {method}, as quantization_config in config.json says, but "
                            "no weight has the parts that this format stores; download it again, or give the 16-bit "
                            "checkpoint")  # fmt: skip
        opened.pop_all()
        return _DequantizedTensors(tensors, method, packed, used, _dtype(settings))


class _DequantizedTensors(CheckpointTensors):
    """Tensors of which some are computed from several stored ones when they are read."""

    def __init__(
        self, stored: CheckpointTensors, method: str, packed: Mapping[str, _Packed], used: set[str], dtype: torch.dtype
    ) -> None:
        self._stored, self._packed, self._value_type = stored, packed, dtype
        self.names = (*(name for name in stored.names if name not in used), *packed)
        self.dequantized = Dequantized(method, len(packed), dtype)

    def read(self, name: str) -> torch.Tensor:
        packed = self._packed.get(name)
        if packed is None:
            return self._stored.read(name)
        parts = {role: self._stored.read(part) for role, part in packed.parts.items()}
        try:
            return packed.values(parts, self._value_type).reshape(packed.shape)
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise UserError(
                f"model.path: the parts of {name} do not fit each other ({error}); download it again"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        packed = self._packed.get(name)
        return self._stored.shape(name) if packed is None else packed.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(name) if name not in self._packed else self._value_type

    def tied(self) -> dict[str, str]:
        return {name: first for name, first in self._stored.tied().items() if {name, first} <= set(self.names)}

    def close(self) -> None:
        self._stored.close()


_Found = tuple[dict[str, _Packed], set[str]]
"""The quantized weights by the name of their values, and all stored names that these replace."""


def _find_fp8(tensors: CheckpointTensors, settings: Mapping[str, Any], folder: Path) -> _Found:
    """Weights in 8-bit floats with the inverse of a scale for each block, or one for all."""
    names, found, used = set(tensors.names), {}, set()
    block = settings.get("weight_block_size")
    for name in tensors.names:
        scale = f"{name}_scale_inv"
        if not name.endswith(".weight") or scale not in names or tensors.dtype(name) is not torch.float8_e4m3fn:
            continue
        shape, grid = tensors.shape(name), tensors.shape(scale)
        single = math.prod(grid) == 1
        if not single and (
            not block or grid != tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
        ):
            raise UserError(f"model.path={folder}: {scale} has shape {grid}, and {name} of {shape} in blocks of {block} needs "
                            "another; download it again, or give the 16-bit checkpoint")  # fmt: skip
        found[name] = _Packed(
            shape, {"codes": name, "scale": scale}, _fp8_values(None if single else tuple(block or ()))
        )
        used |= {name, scale, name.removesuffix("weight") + "activation_scale"}
    return found, used


def _fp8_values(block: tuple[int, ...] | None) -> Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]:
    def values(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        codes, scale = parts["codes"], parts["scale"]
        rows, columns = codes.shape
        if block is None:
            scale = scale.reshape(1, 1)
        else:  # transformers divides the weight evenly by the grid, which is right for whole blocks alone
            grid = scale.shape
            beyond = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
            codes = functional.pad(codes.view(torch.uint8), beyond).view(codes.dtype)
        return Fp8Dequantize(None)._dequantize_one(codes, scale, dtype)[:rows, :columns]

    return values


def _find_mxfp4(tensors: CheckpointTensors, settings: Mapping[str, Any], folder: Path) -> _Found:
    """gpt-oss's experts: 4-bit floats, two in a byte, with an exponent for each 32."""
    names, found, used = set(tensors.names), {}, set()
    for blocks in tensors.names:
        name = blocks.removesuffix("_blocks")
        if name == blocks or f"{name}_scales" not in names:
            continue
        experts, rows, groups, size = tensors.shape(blocks)
        # transformers holds the experts transposed: (experts, in, out)
        shape = (experts, groups * size * 2, rows)
        found[name] = _Packed(shape, {"blocks": blocks, "scales": f"{name}_scales"}, _mxfp4_values)
        used |= {blocks, f"{name}_scales"}
    return found, used


def _mxfp4_values(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=dtype)


def _find_bitsandbytes(tensors: CheckpointTensors, settings: Mapping[str, Any], folder: Path) -> _Found:
    """Weights of bitsandbytes' 4-bit or 8-bit layers."""
    names, found, used = set(tensors.names), {}, set()
    parts_of: dict[str, dict[str, str]] = {}
    for part in tensors.names:
        name, inside, role = part.partition(".weight.")
        if inside:
            parts_of.setdefault(f"{name}.weight", {})[role] = part
    for name in tensors.names:
        if not name.endswith(".weight"):
            continue
        scale = name.removesuffix("weight") + "SCB"
        if scale in names:
            found[name] = _Packed(tensors.shape(name), {"codes": name, "scale": scale}, _int8_values)
            used |= {name, scale, name.removesuffix("weight") + "weight_format"}
            continue
        parts = parts_of.get(name, {})
        state = next((part for role, part in parts.items() if role.startswith("quant_state.bitsandbytes__")), None)
        if state is not None:
            said = json.loads(bytes(tensors.read(state).tolist()))
            found[name] = _Packed(tuple(said["shape"]), {"codes": name, **parts}, _four_bit_values)
            used |= {name, *parts.values()}
    return found, used


def _int8_values(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    values: torch.Tensor = int8_vectorwise_dequant(parts["codes"], parts["scale"].float())
    return values.to(dtype)


def _four_bit_values(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    state = {role: part for role, part in parts.items() if role != "codes"}
    return values_of_four_bit(parts["codes"], state).to(dtype)


_FIND: dict[str, Callable[[CheckpointTensors, Mapping[str, Any], Path], _Found]] = {
    "fp8": _find_fp8, "mxfp4": _find_mxfp4, "bitsandbytes": _find_bitsandbytes,
}  # fmt: skip


def _dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """The type in which the model computes, as config.json states it; bfloat16 if it does not."""
    stated = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype")), None)
    return stated if stated in (torch.float32, torch.float16) else torch.bfloat16
