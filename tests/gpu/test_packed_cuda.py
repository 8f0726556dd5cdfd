"""Packed layers on CUDA: the Triton kernels against torch's operations and the dense layer, with shapes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from weights import DTYPES, KINDS

from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.kernels.gpu import gpu_kernels
from loftq_exp.loftq.quantizers import Quantizer, make_quantizer
from loftq_exp.storage import packed as storage
from loftq_exp.storage.packed import dequantize, pack, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (130, 1088)]


@pytest.fixture(autouse=True)
def kernels() -> Any:
    found = gpu_kernels(torch.device("cuda", 0))
    if found is None:
        pytest.skip("no Triton, or a device without bfloat16: packed layers use torch's operations")
    return found


def weight(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    values = 0.05 * torch.randn(shape, generator=generator, device="cuda")
    values.view(-1)[:64] = 0  # a block of zeros
    return values


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == two.dtype and torch.equal(one.view(integers), two.view(integers))


@pytest.mark.parametrize(("kind", "bits", "double", "levels"), KINDS)
def test_unpacking_gives_the_bytes_of_torch(
    kind: str, bits: int, double: bool, levels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU and on the CPU, in every type of scales and of values."""
    for shape in ((264, 704), (7, 192)):
        for stored in DTYPES:
            quantizer = make_quantizer(kind, bits, 64, stored, double, levels=levels)
            parts = pack(quantizer.encode(weight(shape)), quantizer)
            on_cpu = {name: part.cpu() for name, part in parts.items()}
            for dtype in DTYPES:
                found = dequantize(parts, quantizer, shape, dtype)
                assert same_bytes(found.cpu(), dequantize(on_cpu, quantizer, shape, dtype)), (stored, dtype)
                with monkeypatch.context() as patch:
                    patch.setattr(storage, "gpu_kernels", lambda _: None)
                    assert same_bytes(found, dequantize(parts, quantizer, shape, dtype)), (stored, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unpacking_weights_of_real_models(shape: tuple[int, int], bits: int) -> None:
    for double in (False, True):
        quantizer = make_quantizer("nf", bits, 64, torch.bfloat16, double)
        quantized = quantizer.encode(weight(shape))
        found = dequantize(pack(quantized, quantizer), quantizer, shape, torch.bfloat16)
        assert same_bytes(found, quantizer.decode_stored(quantized).to(torch.bfloat16)), double


def multiplied(quantizer: Quantizer, shape: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    """Compare with float64: sums within float32's error, then rounded once to the rows' type. The same bytes again."""
    quantized = quantizer.encode(weight(shape))
    parts = pack(quantized, quantizer)
    rows = torch.randn(count, shape[1], generator=torch.Generator("cuda").manual_seed(count), device="cuda").to(dtype)
    found = product(parts, quantizer, shape, rows)
    assert found is not None
    values = quantizer.decode_stored(quantized).to(dtype).double()
    expected, magnitude = rows.double() @ values.T, rows.double().abs() @ values.T.abs()
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01
    excess = (found.double() - expected).abs() - rounding * expected.abs() - 2e-6 * magnitude - 1e-7
    assert float(excess.max()) <= 0, (dtype, count)
    again = product(parts, quantizer, shape, rows)
    assert again is not None
    assert same_bytes(found, again), "another order of summation"


@pytest.mark.parametrize(("kind", "bits", "double", "levels"), [kind for kind in KINDS if kind[1] in (2, 3, 4, 8)])
def test_products_of_few_rows(kind: str, bits: int, double: bool, levels: str) -> None:
    quantizer = make_quantizer(kind, bits, 64, torch.bfloat16, double, levels=levels)
    for count, dtype in ((1, torch.bfloat16), (5, torch.bfloat16), (2, torch.float32)):
        multiplied(quantizer, (130, 1088), count, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_with_weights_of_real_models(shape: tuple[int, int], bits: int) -> None:
    quantizer = make_quantizer("nf", bits, 64, torch.bfloat16)
    for count, dtype in ((1, torch.float16), (4, torch.bfloat16), (16, torch.float16)):
        multiplied(quantizer, shape, count, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_layer_is_the_dense_layer(bits: int, dtype: torch.dtype) -> None:
    """Forward and backward within the type's precision. The unpacked weight alone has the same bytes.

    For many rows cuBLAS multiplies both, and may choose another algorithm for a weight at another address.
    """
    shape = (4096, 1024)
    quantizer = make_quantizer("nf", bits, 64, torch.bfloat16, double=True)
    quantized = quantizer.encode(weight(shape))
    bias = torch.randn(shape[0], generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    layer = PackedLinear.from_quantized(quantized, quantizer, bias, dtype)
    dense = torch.nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    dense.weight.data, dense.bias.data = quantizer.decode_stored(quantized).to(dtype), bias.clone()
    assert same_bytes(layer.dequantize(dtype), dense.weight.data)
    for count in (2, 512):
        rows = torch.randn(count, shape[1], generator=torch.Generator("cuda").manual_seed(2), device="cuda").to(dtype)
        pairs = []
        for module in (layer, dense):
            given = rows.clone().requires_grad_()
            out = module(given)
            module.bias.grad = None
            out.backward(torch.ones_like(out) / 64)
            pairs.append((out.detach(), given.grad, module.bias.grad))
        for found, expected in zip(*pairs, strict=True):
            assert found is not None
            assert expected is not None
            close = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=close, atol=close * float(expected.abs().max()))
