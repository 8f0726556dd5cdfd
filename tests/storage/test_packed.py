"""Packed weights: every value survives, however it is read, and the size is as documented."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loftq_exp.config import RunConfig
from loftq_exp.config.quant import BITS_OF_TYPE, BLOCKLESS_TYPES
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import bits_per_weight
from loftq_exp.kernels.unpack import unpacking
from loftq_exp.loftq.quantizers import Quantizer, make_quantizer
from loftq_exp.storage import packed as storage
from loftq_exp.storage.packed import check_parts, dequantize, pack, part_specs, unpack

SHAPE = (40, 96)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [
    (kind, bits, double)
    for kind, widths in BITS_OF_TYPE.items()
    for bits in widths
    for double in ((False,) if kind in BLOCKLESS_TYPES else (False, True))
    if kind != "none"
]


def weight(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    values = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[:64] = 0  # a block of zeros
    return values


def same_values(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal bit for bit, zeros' signs included."""
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == two.dtype and torch.equal(one.view(integers), two.view(integers))


def quantizers() -> list[Quantizer]:
    return [make_quantizer(kind, bits, 32, dtype, double) for kind, bits, double in KINDS for dtype in DTYPES]


def named(quantizer: Quantizer) -> str:
    double = "-double" if quantizer.double else ""
    return f"{quantizer.type}-{quantizer.bits}-{str(quantizer.scale_dtype).removeprefix('torch.')}{double}"


def test_packing_loses_nothing() -> None:
    """Of every quantizer, with single and double scales of every type."""
    for quantizer in quantizers():
        case = named(quantizer)
        quantized = quantizer.encode(weight())
        parts = pack(quantized, quantizer)
        found = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        assert found == part_specs(quantizer, SHAPE), case
        check_parts("w", parts, quantizer, SHAPE)
        back = unpack(parts, quantizer, SHAPE)
        assert torch.equal(back.codes, quantized.codes), case
        assert same_values(back.scales, quantized.scales), case
        stored = quantizer.decode_stored(quantized)
        for dtype in DTYPES:
            assert same_values(dequantize(parts, quantizer, SHAPE, dtype), stored.to(dtype)), (case, dtype)
        assert torch.equal(dequantize(parts, quantizer, SHAPE, torch.float64), stored.double()), case


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
def test_any_chunk_and_the_compiled_kernel_give_the_same_bytes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (7, 192)
    compiled = 0
    for kind, bits, double in KINDS:
        for stored in (torch.float32, torch.bfloat16):
            quantizer = make_quantizer(kind, bits, 64, stored, double)
            parts = pack(quantizer.encode(weight(shape, bits)), quantizer)
            found = {dtype: dequantize(parts, quantizer, shape, dtype) for dtype in DTYPES}
            compiled += unpacking(quantizer, torch.bfloat16) is not None
            with monkeypatch.context() as patch:
                patch.setattr(storage, "unpacking", lambda *_: None)
                patch.setattr(storage, "TORCH_CHUNK_VALUES", chunk)
                for dtype, values in found.items():
                    assert same_values(dequantize(parts, quantizer, shape, dtype), values), (named(quantizer), dtype)
    assert compiled == 2 * 2 * (3 + 1 + 4), "nf, nf-symmetric, and uniform with 2, 3, 4 and 8 bits"


@pytest.mark.parametrize("block", [32, 64, 1024, 4096])
def test_kernels_take_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 128)
    for kind, bits in (("nf", 3), ("uniform", 4)):
        quantizer = make_quantizer(kind, bits, block, torch.bfloat16)
        parts = pack(quantizer.encode(weight(shape)), quantizer)
        assert unpacking(quantizer, torch.bfloat16)
        found = dequantize(parts, quantizer, shape, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "unpacking", lambda *_: None)
            assert same_values(dequantize(parts, quantizer, shape, torch.bfloat16), found)


@pytest.mark.parametrize(
    ("bits", "double", "most"),
    [(2, True, 2.13), (2, False, 2.26), (3, True, 3.13), (3, False, 3.26), (4, True, 4.13), (4, False, 4.26)],
)
def test_bits_a_weight_all_included(bits: int, double: bool, most: float) -> None:
    shape = (512, 512)
    quantizer = make_quantizer("nf", bits, 64, torch.bfloat16, double)
    parts = pack(quantizer.encode(weight(shape)), quantizer)
    taken = 8 * sum(part.nbytes for part in parts.values()) / math.prod(shape)
    assert taken <= most
    assert told(type="nf", bits=bits, double=double) == pytest.approx(taken)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "uniform-sigma", "nf-symmetric"])
def test_the_bits_a_weight_that_are_told_are_those_of_the_tensors(kind: str, double: bool) -> None:
    shape = (512, 512)
    quantizer = make_quantizer(kind, 2, 64, torch.bfloat16, double)
    taken = 8 * sum(part.nbytes for part in pack(quantizer.encode(weight(shape)), quantizer).values())
    assert told(type=kind, bits=2, double=double) == pytest.approx(taken / math.prod(shape))


def told(**quant: Any) -> float:
    """Bits a weight as the run's report has them."""
    values = {
        "model": {"path": "m", "kind": "causal"},
        "quant": {"method": "loftq", **quant},
        "task": {"kind": "gsm8k"},
        "train": {},
    }
    return bits_per_weight(RunConfig.from_mapping(values), quant["bits"])


def test_a_weight_that_is_not_whole_blocks_is_refused() -> None:
    quantizer = make_quantizer("nf", 2, 64)
    with pytest.raises(UserError, match=r"block size 64: does not divide the 96 values of a weight of 2 x 48"):
        pack(quantizer.encode(weight((2, 48))), quantizer)


def test_rows_of_any_length_are_packed_without_blocks() -> None:
    for kind in ("int", "uniform-clipped"):
        quantizer = make_quantizer(kind, 8, scale_dtype=torch.bfloat16)
        shape = (3, 45)
        quantized = quantizer.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        parts = pack(quantized, quantizer)
        check_parts("w", parts, quantizer, shape)
        assert same_values(dequantize(parts, quantizer, shape, torch.float32), quantizer.decode_stored(quantized))


def broken(kind: str, bits: int, shape: tuple[int, int], double: bool, part: str, change: Any) -> str:
    """How a packed weight is refused after `change`."""
    quantizer = make_quantizer(kind, bits, 64, torch.bfloat16, double)
    generator = torch.Generator().manual_seed(0)
    parts = pack(quantizer.encode(torch.randn(shape, generator=generator)), quantizer)
    check_parts("layer", parts, quantizer, shape)
    parts = dict(parts)
    changed = change(parts.pop(part).clone())
    with pytest.raises(UserError) as caught:
        check_parts("layer", parts if changed is None else parts | {part: changed}, quantizer, shape)
    message = str(caught.value)
    assert "\n" not in message
    return message


def put(index: Any, value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def test_what_is_no_packed_weight_is_refused() -> None:
    nf3 = ("nf", 3, (8, 64), False)
    assert broken(*nf3, "qweight", lambda tensor: tensor[:-1]) == (
        "layer.qweight: uint8 (191,), but a weight of 8 x 64 at 3 bits has uint8 (192,); get the file again")  # fmt: skip
    assert broken(*nf3, "qweight", lambda tensor: tensor.view(torch.int8)).startswith(
        "layer.qweight: int8 (192,), but "
    )
    assert broken(*nf3, "qweight", lambda _: None) == (
        "layer.qweight: missing, but a weight of 8 x 64 at 3 bits has uint8 (192,); get the file again")  # fmt: skip
    assert broken(*nf3, "scales", lambda tensor: tensor.float()).startswith("layer.scales: float32 (8, 1), but ")
    assert broken(*nf3, "scales", lambda tensor: tensor.flatten()).startswith("layer.scales: bfloat16 (8,), but ")
    assert broken(*nf3, "scales", put((3, 0), math.nan)) == (
        "layer: 1 of its scales are NaN or infinite; get the file again")  # fmt: skip
    assert broken("uniform", 2, (8, 64), False, "scales", put(slice(2, 4), math.inf)).startswith("layer: 4 of its scal")
    assert broken("nf", 2, (8, 64), True, "scale_steps", put((0, 0), -math.inf)).startswith("layer: 1 of its scales ")
    assert broken("nf", 2, (8, 64), True, "scale_steps", lambda _: None).startswith("layer.scale_steps: missing")
    assert broken("int", 8, (3, 45), False, "qweight", put(7, 0)) == (
        "layer.qweight: a code is out of range, type int has 1 to 255; get the file again")  # fmt: skip
    beyond = "layer.qweight: nonzero codes after the weight's last value; get the file again"
    assert broken("int", 8, (3, 45), False, "qweight", put(-1, 9)) == beyond
    assert broken("uniform-clipped", 3, (3, 45), False, "qweight", put(-1, 0x80)) == beyond
