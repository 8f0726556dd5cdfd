"""The fast alternation compared with the exact one, and its compiled passes with torch's operations."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loftq_exp.kernels import quantize as kernels
from loftq_exp.loftq import Workspace, alternation, decompose, make_quantizer, quantizers
from loftq_exp.loftq import quantizer as quantizer_base
from loftq_exp.loftq.lowrank import leading_factors, truncated_svd

KINDS = [("nf", 2), ("nf", 3), ("nf", 4), ("nf-symmetric", 2), ("uniform", 2), ("uniform", 4), ("uniform", 8)]
SCALES = [1.0, 1e-30, 1e30, 1e-38, 0.0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values, and zero for the rest."""
    left, right = (torch.linalg.qr(normal(size, len(values), seed=size)).Q for size in (rows, columns))
    return left * values @ right.T


# The compiled passes


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_base, "quantizing", lambda quantizer: None)


def passed(quantizer: quantizers.Quantizer, weight: torch.Tensor, product: torch.Tensor | None) -> list[torch.Tensor]:
    """Codes, scales and residual of one pass, what product and quantized values leave together, and these values."""
    codes, residual = torch.full(weight.shape, 255, dtype=torch.uint8), torch.full(weight.shape, torch.nan)
    scales, left = torch.full(quantizer.scales_shape(tuple(weight.shape)), torch.nan), residual.clone()
    quantizer.requantize(weight, product, 0.25, codes, scales, residual)
    quantizer.leave(weight, product, 0.25, codes, scales, left)
    values = [torch.full(weight.shape, torch.nan, dtype=dtype) for dtype in {torch.float32, quantizer.scale_dtype}]
    for some in values:
        quantizer.restore(quantizers.Quantized(codes, scales), some)
        assert torch.equal(some.float(), quantizer.decode_stored(quantizers.Quantized(codes, scales)))
    return [codes, scales, residual, left]


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([32, 64, 128]),
    st.integers(1, 40), st.integers(1, 200), st.sampled_from(SCALES), st.booleans(), st.integers(0, 99), st.booleans(),
)  # fmt: skip
@example(("uniform", 2), torch.bfloat16, 64, 3, 64, 3e38, True, 0, False)
def test_a_compiled_pass_gives_torchs_bytes(
    kind: tuple[str, int],
    dtype: torch.dtype,
    block: int,
    rows: int,
    columns: int,
    scale: float,
    fitted: bool,
    seed: int,
    narrow: bool,
) -> None:
    quantizer = make_quantizer(*kind, block, dtype)
    weight = (normal(rows, columns, seed=seed) * scale).clamp(-3e38, 3e38)
    weight[rows // 2 :: 3] = 0
    product = weight.flip(0) * 0.1 if fitted else None
    weight = weight.bfloat16() if narrow else weight
    assert kernels.quantizing(quantizer) is not None
    found = passed(quantizer, weight, product)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer_base, "quantizing", lambda quantizer: None)
        expected = passed(quantizer, weight, product)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [("nf", 4), ("uniform", 2)])
def test_without_numba_a_decomposition_has_the_same_bytes_and_one_warning_is_given(
    kind: tuple[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, quantizer = normal(300, 200), make_quantizer(*kind)
    expected = decompose(weight, quantizer, 16, 3)
    monkeypatch.setattr(kernels, "numba", None)
    for cached in (kernels.quantizing, kernels._warn_once):
        cached.cache_clear()
    with caplog.at_level(logging.WARNING):
        decompose(weight, quantizer, 16, 3)
        found = decompose(weight, quantizer, 16, 3)
    kernels.quantizing.cache_clear()
    assert found.errors == expected.errors
    pairs = [
        (found.lora_A, expected.lora_A),
        (found.lora_B, expected.lora_B),
        *zip(found.quantized, expected.quantized, strict=True),
    ]
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.message for record in caplog.records if "numba" in record.message] == [
        "numba is not installed: quantizing is several times slower, with the same result; pip install numba"
    ]


@pytest.mark.parametrize(("kind", "block", "dtype"), [
    (("uniform-clipped", 4), 64, torch.float32), (("uniform-sigma", 2), 64, torch.float32), (("int", 8), 64, torch.float32),
    (("nf", 4), 16, torch.float32), (("nf", 4), 64, torch.float16),
])  # fmt: skip
def test_what_has_no_kernel_goes_through_torch(kind: tuple[str, int], block: int, dtype: torch.dtype) -> None:
    quantizer = make_quantizer(*kind, block, dtype)
    assert kernels.quantizing(quantizer) is None
    weight = normal(30, 70)
    codes, scales, residual, left = passed(quantizer, weight, weight.flip(0) * 0.1)
    quantized = quantizer.encode(weight - weight.flip(0) * 0.1)
    assert torch.equal(codes, quantized.codes)
    assert torch.equal(scales, quantized.scales)
    stored = quantizer.decode_stored(quantized)
    assert torch.equal(residual, (weight - stored) * 0.25)
    assert torch.equal(left, (weight - stored - weight.flip(0) * 0.1) * 0.25)


# The fast alternation


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [("nf", 4), ("nf", 2), ("uniform", 2), ("uniform-clipped", 3), ("int", 8)])
@pytest.mark.parametrize(("shape", "rank"), [((400, 300), 16), ((200, 700), 8), ((640, 256), 64), ((384, 384), 1)])
def test_its_error_is_near_the_exact_ones(shape: tuple[int, int], rank: int, kind: tuple[str, int], steps: int) -> None:
    weight, quantizer = normal(*shape), make_quantizer(*kind)
    exact, fast = (decompose(weight, quantizer, rank, steps, solver).errors for solver in ("exact", "randomized"))
    assert fast[0] == pytest.approx(exact[0], rel=1e-6)
    assert fast[-1] <= 1.012 * exact[-1]


DEGENERATE = {
    "rank deficient": spectrum(300, 260, torch.ones(20)),
    "one dominant value": spectrum(300, 260, torch.cat([torch.tensor([1e4]), torch.ones(200)])),
    "steep": spectrum(300, 260, torch.logspace(0, -6, 260)),
    "equal values": spectrum(260, 260, torch.ones(260)),
    "zeros": torch.zeros(300, 260),
    "nearly all zeros": torch.nn.functional.pad(torch.ones(1, 1), (0, 259, 0, 299)),
    "constant": torch.full((300, 260), 0.3),
    "outliers": normal(300, 260).index_put((torch.tensor([3, 70]), torch.tensor([9, 200])), torch.tensor([1e4, -1e4])),
    "a column of outliers": torch.cat([normal(300, 259), 100 * normal(300, 1, seed=1)], dim=1),
}


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", [("nf", 4), ("nf", 2), ("uniform", 2)])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_weights(name: str, kind: tuple[str, int], scale: float) -> None:
    weight, quantizer = DEGENERATE[name] * scale, make_quantizer(*kind)
    exact, fast = (decompose(weight, quantizer, 16, 2, solver) for solver in ("exact", "randomized"))
    assert all(math.isfinite(error) for error in fast.errors)
    assert fast.errors[1] <= 1.02 * exact.errors[1] + 1e-6
    assert fast.errors[2] <= 1.05 * exact.errors[2] + 1e-6  # after a step, the two no longer quantize the same matrix
    product = fast.lora_B.double() @ fast.lora_A.double()
    left = weight.double() - quantizer.decode_stored(fast.quantized).double() - product
    norm = float(weight.double().norm())
    assert fast.errors[2] == pytest.approx(float(left.norm()) / norm if norm else 0.0, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", DEGENERATE)
def test_leading_factors_of_a_degenerate_matrix_are_near_the_best(name: str) -> None:
    matrix = DEGENERATE[name] / DEGENERATE[name].abs().amax().clamp(min=1e-30)
    squares = float(matrix.square().sum())
    best = matrix - torch.mm(*truncated_svd(matrix, 16, "exact"))
    for fast in (matrix, matrix.bfloat16()):
        B, A = leading_factors(fast, squares, lambda: [(slice(0, 300), matrix)], 16, "randomized")
        assert float((matrix - B @ A).norm()) <= 1.02 * float(best.norm()) + 1e-4 * float(matrix.norm())
        B, A = leading_factors(fast, squares, lambda: [(slice(0, 300), matrix)], 16, "randomized", start=B)
        assert float((matrix - B @ A).norm()) <= 1.02 * float(best.norm()) + 1e-4 * float(matrix.norm())


@pytest.mark.parametrize("shape", [(256, 300), (700, 400)])
@pytest.mark.parametrize("kind", [("nf", 4), ("nf", 2), ("uniform", 2)])
def test_a_truncated_step_knows_its_error_to_float32(shape: tuple[int, int], kind: tuple[str, int]) -> None:
    weight, quantizer = normal(*shape), make_quantizer(*kind)
    whole = decompose(weight, quantizer, 64, 1)
    left = weight.double() - quantizer.decode_stored(whole.quantized).double()
    for rank in (1, 8, 63, 64):
        cut = whole.truncated(rank)
        error = float((left - cut.lora_B.double() @ cut.lora_A.double()).norm() / weight.double().norm())
        assert cut.errors[1] == pytest.approx(error, rel=5e-7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (65, 99), (127, 33), (600, 1000)])
def test_tiles_leave_nothing_out(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantizer = normal(*shape), make_quantizer("nf", 4)
    whole = decompose(weight, quantizer, 1, 2)
    monkeypatch.setattr(alternation, "TILE_VALUES", 1)
    tiled = decompose(weight, quantizer, 1, 2)
    assert torch.equal(tiled.quantized.codes, whole.quantized.codes)
    assert tiled.errors == pytest.approx(whole.errors, rel=1e-5, abs=1e-7)
    assert torch.equal(tiled.backbone(quantizer, torch.float32), quantizer.decode(tiled.quantized))


@pytest.mark.parametrize("shape", [(900, 1100), (2500, 1300)])
def test_the_bytes_are_those_of_one_thread(shape: tuple[int, int]) -> None:
    weight, quantizer = normal(*shape), make_quantizer("nf", 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(decompose(weight, quantizer, 32, 3))
    finally:
        torch.set_num_threads(threads)
    one, two, again = results
    for other in (two, again):
        assert other.errors == one.errors
        assert torch.equal(other.lora_A, one.lora_A)
        assert torch.equal(other.lora_B, one.lora_B)
        assert all(map(torch.equal, other.quantized, one.quantized))
    assert torch.get_num_threads() == threads


def test_decompositions_in_the_same_rooms_are_those_of_each_alone() -> None:
    workspace = Workspace()
    taken = workspace.take("codes", (3, 7), torch.bfloat16, torch.device("cpu"))
    assert taken.data_ptr() % 64 == 0, "as torch's own: products may round differently elsewhere"
    for shape, kind in (((300, 200), ("nf", 4)), ((40, 50), ("uniform", 2)), ((200, 350), ("nf", 2))):
        weight, quantizer = normal(*shape), make_quantizer(*kind)
        alone, within = decompose(weight, quantizer, 8, 2), decompose(weight, quantizer, 8, 2, workspace=workspace)
        assert within.errors == alone.errors
        assert torch.equal(within.lora_A, alone.lora_A)
        assert torch.equal(within.lora_B, alone.lora_B)
        assert all(map(torch.equal, within.quantized, alone.quantized))
