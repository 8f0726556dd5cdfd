"""A linear layer whose frozen weight stays packed: at 2, 3, 4 or 8 bits a value in memory, dense only while it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loftq_exp.loftq.quantizer import Quantized, Quantizer
from loftq_exp.storage.packed import PARTS, check_parts, dequantize, pack, part_specs, product, unpack


class PackedLinear(nn.Linear):
    """y = x Q' + bias, as `nn.Linear`, with Q (out, in) held as codes and scales (see `loftq_exp.storage.packed`).

    Q is frozen. A forward and a backward pass each unpack it into one dense weight of the type that x has, and drop that when
    they are done; nothing dense is kept from one for the other. Gradients flow to x and to the bias.

    `weight` is None: there is no dense weight to read. `dequantize` makes one.
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
        """An empty layer; `from_quantized` or a checkpoint fills it.

        Args:
            in_features: values of an input row.
            out_features: values of an output row.
            quantizer: what packed the weight.
            bias: whether there is one.
            dtype: of the bias and, to those who ask (PEFT), of the computation; none: torch's default.
            device: where the tensors are.

        Raises:
            UserError: where the weight's values are not whole blocks.
        """
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
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
        """The layer of a weight that `quantizer` encoded: codes (out, in), on their device."""
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
        """The tensors that stand for the weight, by name."""
        return {name: tensor for name in PARTS if (tensor := self._buffers.get(name)) is not None}

    def quantized(self) -> Quantized:
        """The weight's codes (out, in) and float32 scales."""
        return unpack(self.parts, self.quantizer, self.shape)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight's values (out, in) in `dtype`: those that would be stored dense, converted."""
        return dequantize(self.parts, self.quantizer, self.shape, dtype)

    def check(self, name: str) -> None:
        """Raises UserError where the tensors do not stand for a weight of this shape; `name` tells which it is."""
        check_parts(name, self.parts, self.quantizer, self.shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), in the input's type or autocast's."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return cast("torch.Tensor", _Product.apply(input, bias, self))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        # `.half()` and the like convert what a layer computes with. The scales are no such thing: they only change place.
        kept = {name: tensor for name, tensor in self.parts.items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = moved.to(tensor.dtype) if tensor.is_meta else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """As nn.Linear's, and how the weight is packed."""
        quantizer = self.quantizer
        double = ", double=True" if quantizer.double else ""
        return f"{super().extra_repr()}, type={quantizer.type}, bits={quantizer.bits}, block_size={quantizer.block_size}{double}"


class _Product(torch.autograd.Function):
    """x Q' + bias and its gradients, with Q unpacked anew in each direction."""

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
