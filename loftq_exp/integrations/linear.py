"""A linear layer whose frozen weight stays packed in memory, at 2, 3, 4 or 8 bits per value, and is dense only in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loftq_exp.loftq.quantizer import Quantized, Quantizer
from loftq_exp.storage.packed import PARTS, check_parts, dequantize, pack, part_specs, product, unpack


class PackedLinear(nn.Linear):
    """y = x Q' + bias, like `nn.Linear`, with Q (out, in) held as codes and scales (see `loftq_exp.storage.packed`).

    Q is frozen. A forward and a backward pass each unpack it into a dense weight of x's dtype, and free it afterwards. No
    dense weight is kept for the backward pass. Gradients flow to x and to the bias.

    `weight` is None, because there is no dense weight. `dequantize` returns one.
    """

    qweight: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantizer: Quantizer,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Create an uninitialised layer; `from_quantized` or a checkpoint fills it.

        Args:
            in_features: size of an input row.
            out_features: size of an output row.
            quantizer: the quantizer of the weight.
            bias: whether the layer has a bias.
            dtype: dtype of the bias, and the compute dtype that PEFT reads; None: torch's default.
            device: device of the tensors.

        Raises:
            UserError: if the weight's values are not whole blocks.
        """
        nn.Module.__init__(self)  # not nn.Linear's, which would create a dense weight
        self.in_features, self.out_features, self.quantizer = in_features, out_features, quantizer
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.register_parameter("weight", None)
        for name, (kind, shape) in part_specs(quantizer, self.shape).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        filled = nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device)) if bias else None
        self.register_parameter("bias", filled)

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        quantizer: Quantizer,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """Return the layer of a weight that `quantizer` encoded: codes (out, in), on their device."""
        rows, columns = quantized.codes.shape
        layer = cls(columns, rows, quantizer, bias is not None, dtype, quantized.codes.device)
        for name, tensor in pack(quantized, quantizer).items():
            setattr(layer, name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(layer.compute_dtype))
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that represent the weight, by name."""
        return {name: tensor for name in PARTS if (tensor := self._buffers.get(name)) is not None}

    def quantized(self) -> Quantized:
        """Return the weight's codes (out, in) and float32 scales."""
        return unpack(self.parts, self.quantizer, self.shape)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight's values (out, in) in `dtype`: those of dense storage, converted."""
        return dequantize(self.parts, self.quantizer, self.shape, dtype)

    def check(self, name: str) -> None:
        """Raise UserError, with the layer's `name`, if the tensors do not represent a weight of this shape."""
        check_parts(name, self.parts, self.quantizer, self.shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out), in the input's dtype or autocast's."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return cast("torch.Tensor", _Product.apply(input, bias, self))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        # `.half()` and similar calls change the compute dtype. The scales keep their dtype and only change device.
        kept = {name: tensor for name, tensor in self.parts.items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = moved.to(tensor.dtype) if tensor.is_meta else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Return nn.Linear's text, and how the weight is packed."""
        quantizer = self.quantizer
        double = ", double=True" if quantizer.double else ""
        levels = f", levels={quantizer.table}" if quantizer.table != "nf" else ""
        kind = f"type={quantizer.type}, bits={quantizer.bits}, block_size={quantizer.block_size}"
        return f"{super().extra_repr()}, {kind}{double}{levels}"


class _Product(torch.autograd.Function):
    """x Q' + bias and its gradients. Forward and backward each unpack Q."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        found = product(layer.parts, layer.quantizer, layer.shape, input)
        if found is not None:
            return found if bias is None else found + bias
        return nn.functional.linear(input, layer.dequantize(input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        to_input, to_bias, _ = ctx.needs_input_grad
        into_input = gradient @ ctx.layer.dequantize(gradient.dtype) if to_input else None
        into_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0) if to_bias else None
        return into_input, into_bias, None
