"""Dense storage: the decoded values, one tensor per weight, which any reader accepts."""

from __future__ import annotations

from collections.abc import Collection

import torch

from loftq_exp.loftq import Quantizer
from loftq_exp.storage.format import Codes, DamagedWeight, StorageFormat, Tensors
from loftq_exp.storage.packed import dequantize, parts_of
from loftq_exp.storage.specs import TensorSpec


class Dense(StorageFormat):
    """Values in the dtype of the checkpoint."""

    name = "dense"
    plain = True
    holds_parameters = True

    def specs(
        self, name: str, shape: tuple[int, int], quantizer: Quantizer | None, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        return {name: TensorSpec(dtype, shape)}

    def encode(self, name: str, codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        parts = parts_of(codes.packed, codes.scales, codes.quantizer)
        return {name: dequantize(parts, codes.quantizer, codes.shape, dtype)}

    def encode_values(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: values}

    def parts(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        return (name,)

    def values(
        self, module: str, name: str, tensors: Tensors, shape: tuple[int, int], quantizer: Quantizer | None
    ) -> torch.Tensor:
        values = tensors[name]
        if tuple(values.shape) != shape or not values.is_floating_point():
            raise DamagedWeight(f"{name} is {values.dtype} {tuple(values.shape)}, not {shape}")
        return values.float()


FORMAT = Dense()
