"""bitsandbytes' packed form of a weight: NF4 in blocks of 64, two codes per byte, and the state needed to decode them.

Codes of our quantizers are only repacked. Values without codes are quantized by bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loftq_exp.loftq import Quantizer
from loftq_exp.schemes import Scheme
from loftq_exp.storage.codes import CHUNK_CODES, pack_codes, unpack_codes
from loftq_exp.storage.format import Codes, DamagedWeight, LoadCode, StorageFormat, Tensors
from loftq_exp.storage.specs import TensorSpec

BLOCK = 64
TYPE = "nf4"


class Bnb4(StorageFormat):
    """bitsandbytes' NF4 layers. transformers loads them directly, or creates them from dense weights of the same values."""

    name = "bnb4"
    method = "bitsandbytes"
    needs_plain_linears = True
    keeps_types = True
    export_note = "in bitsandbytes' NF4"

    def specs(
        self, name: str, shape: tuple[int, int], quantizer: Quantizer | None, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        return four_bit_specs(name, shape, dtype)

    def encode(self, name: str, codes: Codes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return four_bit_of_codes(name, codes.packed, codes.scales, codes.shape, codes.quantizer)

    def encode_values(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return four_bit_of_values(name, values)

    def parts(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        return (name, *(part for part in names if part.startswith(f"{name}.")))

    def values(
        self, module: str, name: str, tensors: Tensors, shape: tuple[int, int], quantizer: Quantizer | None
    ) -> torch.Tensor:
        state = {part.removeprefix(f"{name}."): tensor for part, tensor in tensors.items() if part != name}
        try:
            values = values_of_four_bit(tensors[name], state)
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise DamagedWeight(f"{name} is not a packed 4-bit weight") from error
        if tuple(values.shape) != shape or not values.is_floating_point():
            raise DamagedWeight(f"{name} is {values.dtype} {tuple(values.shape)}, not {shape}")
        return values.float()

    def quantization_config(
        self,
        scheme: Scheme | None,
        bits: Mapping[str, int],
        other_linears: Sequence[str],
        dtype: torch.dtype,
        parameters: Sequence[str] = (),
    ) -> Any:
        return bnb4_config(other_linears, dtype)

    def cannot_hold(self, columns: int, device: torch.device) -> str | None:
        # bitsandbytes 0.50 gives wrong results for other rows with AVX-512, so they are refused on every CPU.
        if device.type == "cpu" and columns % BLOCK:
            return f"on a CPU bitsandbytes computes correctly only with whole blocks of {BLOCK}"
        return None

    def settle(self, model: Any, modules: Iterable[str], dtype: torch.dtype) -> None:
        from bitsandbytes.nn import Linear4bit

        for name in modules:
            module = model.get_submodule(name)
            if type(module) is nn.Linear:  # kept in float32 by its model class, which reads its dtype: t5's wo
                continue
            if not isinstance(module, Linear4bit):  # transformers keeps subclasses of nn.Linear dense (falcon's)
                module = _as_four_bit_layer(module, dtype)
                model.set_submodule(name, module)
            module.compute_dtype = dtype
            if dtype != torch.bfloat16:
                # On a CPU with AVX512_BF16 the layer would ignore compute_dtype in evaluation and use bfloat16.
                module.support_avx512bf16_for_cpu = False
        # transformers leaves the other weights of a stored 4-bit checkpoint in their stored dtype, beside biases in `dtype`.
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, value in model.named_parameters():
            if value.is_floating_point() and kept.isdisjoint(name.split(".")):
                value.data = value.data.to(dtype)

    def load_code(self, other_linears: Sequence[str], dtype: str) -> LoadCode:
        settings = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{TYPE}"',
            "bnb_4bit_use_double_quant=False",
            f"bnb_4bit_compute_dtype={dtype}",
        ]
        # transformers packs every linear layer except a language model's output layer.
        if set(other_linears) - {"lm_head"}:
            settings.append(f"llm_int8_skip_modules={other_linears}")
        lines = ("four_bit = BitsAndBytesConfig(", *(f"    {setting}," for setting in settings), ")")
        return LoadCode(("BitsAndBytesConfig",), lines, "quantization_config=four_bit")


FORMAT = Bnb4()


def bnb4_config(other_linears: Sequence[str], compute_dtype: torch.dtype) -> Any:
    """Return a BitsAndBytesConfig that loads all linear layers except `other_linears` as bitsandbytes NF4 layers."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=TYPE,
        bnb_4bit_use_double_quant=False,  # quantizing the scales would change the values
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(other_linears) or ["lm_head"],
    )


def _as_four_bit_layer(linear: nn.Linear, dtype: torch.dtype) -> Any:
    """Return a 4-bit layer with the values of a dense linear layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features, linear.out_features, has_bias, dtype, compress_statistics=False, quant_type=TYPE
    )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False, quant_type=TYPE)
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.to(linear.weight.device)


def four_bit_of_codes(
    name: str, packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], quantizer: Quantizer
) -> dict[str, torch.Tensor]:
    """Return bitsandbytes' tensors, by name, for the values that `quantizer` decodes.

    Args:
        name: name of the weight. It has a multiple of 64 values.
        packed: its codes, packed by `pack_codes`.
        scales: one number per block.
        shape: (out, in).
        quantizer: NF4, NF2 or optimal levels, with blocks of 64.
    """
    low_first = packed
    if not torch.equal(quantizer.levels(), _levels()):
        codes = unpack_codes(packed, quantizer.bits, math.prod(shape))
        low_first = pack_codes(_as_nf4(codes, quantizer), 4)
    return {name: _swapped(low_first).reshape(-1, 1)} | _state(name, scales.reshape(-1), shape, quantizer.scale_dtype)


def _swapped(codes: torch.Tensor) -> torch.Tensor:
    """Return bytes with their halves swapped, from a multiple of 8 bytes: eight at a time, in pieces that fit a CPU's cache."""
    low, swapped = 0x0F0F0F0F0F0F0F0F, torch.empty_like(codes)
    pieces = (tensor.view(torch.int64).split(CHUNK_CODES // 8) for tensor in (codes, swapped))
    for some, there in zip(*pieces, strict=True):
        torch.bitwise_and(some, low, out=there)
        there.bitwise_left_shift_(4).bitwise_or_((some >> 4).bitwise_and_(low))
    return swapped


def four_bit_of_values(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return bitsandbytes' tensors, by name, for values that it quantizes to NF4."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(values, blocksize=BLOCK, quant_type=TYPE)
    return {name: codes} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}


def values_of_four_bit(codes: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the values of packed codes, given the state by bitsandbytes' names.

    If the state does not match, raise ValueError, KeyError, AssertionError or RuntimeError, as bitsandbytes does.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    known = QuantState.from_dict(state, torch.device("cpu"))
    shape, known.shape = known.shape, torch.Size([codes.numel() * 2])  # one row, which has whole blocks
    values: torch.Tensor = dequantize_4bit(codes, known).reshape(shape)
    return values


def four_bit_specs(name: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return dtypes and shapes of bitsandbytes' tensors for a weight of this shape and dtype."""
    values = math.prod(shape)
    parts = _state(name, torch.empty(-(-values // BLOCK)), shape, dtype)
    specs = {part: TensorSpec(tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    return {name: TensorSpec(torch.uint8, (-(-values // 2), 1))} | specs


def _as_nf4(codes: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Return the NF4 codes of the levels that these codes represent."""
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
