"""The Triton kernels for packed weights, in Triton's interpreter on the CPU, compared with the torch code.

Run by tests/kernels/test_triton.py in a process of its own, because the interpreter is chosen before Triton is imported:

    TRITON_INTERPRET=1 python -m pytest --noconftest tests/kernels/interpreted_triton.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from weights import DTYPES, KINDS

from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.loftq.quantizers import Quantizer, make_quantizer
from loftq_exp.schemes import BLOCKLESS_TYPES
from loftq_exp.storage import packed as storage
from loftq_exp.storage.packed import pack

MULTIPLIED = [kind for kind in KINDS if kind[1] in (2, 3, 4, 8)]


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels; the interpreter's bfloat16 is repaired: it truncates in place of rounding, and multiplies the bits."""
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    from loftq_exp.kernels import triton_product, triton_unpack
    from loftq_exp.kernels.gpu import GpuKernels

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        return torch.from_numpy(handle.data.view(np.int16).copy()).view(torch.bfloat16).float().numpy()

    def converted(data: Any, source: Any, target: Any, mode: Any, others: Any = interpreter._convert_float) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return others(data, source, target, mode).reshape(data.shape)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(widened(a), widened(b)) + total.data, total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", converted)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield GpuKernels(triton_unpack.unpack, triton_product.multiplies, triton_product.multiply)


def weight(shape: tuple[int, int]) -> torch.Tensor:
    values = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    values.view(-1)[:64] = 0  # a block of zeros
    return values


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def unpacked(kernels: Any, quantizer: Quantizer, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernel's values are the torch code's, bit for bit."""
    quantized = quantizer.encode(weight(shape))
    found = torch.full(shape, torch.nan, dtype=dtype)
    kernels.unpack(pack(quantized, quantizer), quantizer, shape, found)
    return torch.equal(bits_of(found), bits_of(quantizer.decode_stored(quantized).to(dtype)))


@pytest.mark.parametrize(("kind", "bits", "double", "levels"), KINDS)
def test_unpacking_gives_the_bytes_of_torch(kernels: Any, kind: str, bits: int, double: bool, levels: str) -> None:
    """In every type of scales and of values."""
    for stored in DTYPES:
        quantizer = make_quantizer(kind, bits, 32, stored, double, levels=levels)
        for dtype in DTYPES:
            assert unpacked(kernels, quantizer, (7, 96), dtype), (stored, dtype)


@pytest.mark.parametrize(
    ("kind", "bits", "block", "shape"),
    [
        ("nf", 3, 15, (3, 45)),  # blocks that are no whole units
        ("nf", 2, 64, (64, 64)),  # one whole tile
        ("uniform", 4, 64, (65, 192)),  # three tiles and a part, blocks across rows
        ("uniform", 3, 4096, (64, 128)),
        ("nf", 3, 8, (3, 8)),  # bytes that are no whole words
        ("int", 8, 64, (100, 45)),  # rows that are no whole units
        ("uniform-clipped", 3, 64, (3, 45)),
        ("nf", 2, 64, (1, 64 * 300)),  # more scales than one step
    ],
)
@pytest.mark.parametrize("double", [False, True])
def test_unpacking_any_shape(
    kernels: Any, kind: str, bits: int, block: int, shape: tuple[int, int], double: bool
) -> None:
    double = double and kind not in BLOCKLESS_TYPES
    quantizer = make_quantizer(kind, bits, block, torch.bfloat16, double)
    assert unpacked(kernels, quantizer, shape, torch.bfloat16)


def test_nothing_beside_the_values_is_written(kernels: Any) -> None:
    quantizer = make_quantizer("nf", 4, 32)
    place = torch.full((3, 7 * 96), torch.nan)
    kernels.unpack(pack(quantizer.encode(weight((7, 96))), quantizer), quantizer, (7, 96), place[1].view(7, 96))
    assert place.isnan().sum(dim=1).tolist() == [7 * 96, 0, 7 * 96]


def multiplied(kernels: Any, quantizer: Quantizer, shape: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    """Compare with float64: sums within float32's error, then rounded once to the rows' type."""
    quantized = quantizer.encode(weight(shape))
    rows = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
    found = torch.full((count, shape[0]), torch.nan, dtype=dtype)
    assert kernels.multiplies(quantizer, shape, count, dtype)
    kernels.multiply(pack(quantized, quantizer), quantizer, shape, rows, found)
    values = quantizer.decode_stored(quantized).to(dtype).double()
    expected, magnitude = rows.double() @ values.T, rows.double().abs() @ values.T.abs()
    error = (found.double() - expected).abs()
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01
    assert bool((error <= rounding * expected.abs() + 1e-6 * magnitude + 1e-7).all()), (dtype, count, error.max())


@pytest.mark.parametrize(("kind", "bits", "double", "levels"), MULTIPLIED)
def test_products_of_few_rows(kernels: Any, kind: str, bits: int, double: bool, levels: str) -> None:
    """More outputs than a program's tile, and columns that fill a part of it."""
    quantizer = make_quantizer(kind, bits, 32, torch.bfloat16, double, levels=levels)
    for count, dtype in ((1, torch.bfloat16), (2, torch.float32), (5, torch.bfloat16)):
        multiplied(kernels, quantizer, (9, 96), count, dtype)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize(
    ("kind", "bits", "block"), [("nf", 3, 64), ("nf", 2, 64), ("uniform", 4, 1088), ("int", 8, 64)]
)
def test_products_of_several_tiles(kernels: Any, kind: str, bits: int, block: int, count: int) -> None:
    multiplied(kernels, make_quantizer(kind, bits, block, torch.bfloat16), (17, 1088), count, torch.float16)


@pytest.mark.parametrize("count", [1, 4, 17])
def test_a_layer_uses_them(kernels: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, of rows that are not contiguous: few from codes, many unpacked."""
    called: list[str] = []

    def counted(name: str) -> Any:
        return lambda *given: called.append(name) or getattr(kernels, name)(*given)

    spied = kernels._replace(unpack=counted("unpack"), multiply=counted("multiply"))
    monkeypatch.setattr(storage, "gpu_kernels", lambda _: spied)
    quantizer = make_quantizer("nf", 3, 32, torch.bfloat16)
    quantized = quantizer.encode(weight((9, 96)))
    layer = PackedLinear.from_quantized(quantized, quantizer, torch.ones(9), torch.float32)
    given = torch.randn(96, count, 1, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0).requires_grad_()
    out = layer(given)
    (gradient,) = torch.autograd.grad(out.sum(), given)
    values = quantizer.decode_stored(quantized)
    torch.testing.assert_close(out, given @ values.T + 1)
    torch.testing.assert_close(gradient, values.sum(dim=0).expand(count, 1, 96))
    assert called == ["unpack" if count > 16 else "multiply", "unpack"]


def test_what_the_product_does_not_take(kernels: Any) -> None:
    """Rows that are not whole blocks or words, many rows, and other types: the caller unpacks."""
    takes, quantizer = kernels.multiplies, make_quantizer("nf", 4, 64)
    assert takes(quantizer, (8, 128), 16, torch.bfloat16)
    assert not takes(quantizer, (8, 128), 17, torch.bfloat16)
    assert not takes(quantizer, (8, 128), 0, torch.bfloat16)
    assert not takes(quantizer, (8, 96), 1, torch.bfloat16)
    assert not takes(quantizer, (8, 128), 1, torch.float64)
    assert not takes(make_quantizer("int", 8), (8, 45), 1, torch.bfloat16)
