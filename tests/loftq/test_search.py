"""Searched scales and optimal levels: against brute force in float64, and through bitsandbytes' NF4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.loftq import Quantizer, decompose, loftq_init, make_quantizer
from loftq_exp.loftq import quantizer as quantizer_base
from loftq_exp.loftq.quantizers import normal_float_levels, optimal_levels

KINDS = [
    ("nf", 2, "nf"), ("nf", 3, "nf"), ("nf", 4, "nf"), ("nf", 2, "optimal"), ("nf", 3, "optimal"), ("nf", 4, "optimal"),
    ("nf-symmetric", 2, "nf"), ("uniform", 2, "nf"), ("uniform", 4, "nf"), ("uniform", 8, "nf"),
]  # fmt: skip
FACTORS = torch.linspace(0.3, 1, 15, dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def bitsandbytes_without_compiler() -> Iterator[None]:
    """bitsandbytes recompiles its kernel for each odd shape, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def searching(
    kind: tuple[str, int, str], block: int = 64, dtype: torch.dtype = torch.float32, **more: bool
) -> Quantizer:
    return make_quantizer(kind[0], kind[1], block, dtype, levels=kind[2], scale="search", **more)


def best_error(block: torch.Tensor, weights: torch.Tensor, kind: tuple[str, int, str], dtype: torch.dtype) -> float:
    """The smallest weighted squared error of 15 ranges, by brute force in float64."""
    block, weights, errors = block.double(), weights.double(), []
    for factor in FACTORS:
        if kind[0] == "uniform":
            low, high = block.min(), block.max()
            middle, top = (low + high) / 2, 2 ** kind[1] - 1
            minimum = (middle - factor * (middle - low)).to(dtype).double()
            step = ((middle + factor * (high - middle) - minimum) / top).to(dtype).double()
            values = minimum + step * torch.arange(top + 1)
        else:
            levels = optimal_levels(kind[1]) if kind[2] == "optimal" else normal_float_levels(kind[0], kind[1])
            values = levels.double() * (factor * block.abs().max()).to(dtype).double()
        errors.append(float((weights * (block[:, None] - values).square().amin(1)).sum()))
    return min(errors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_has_the_smallest_error_of_fifteen_scales(
    kind: tuple[str, int, str], dtype: torch.dtype, weighted: bool
) -> None:
    weight, columns = normal(6, 96) + 0.3, 96
    importance = normal(columns, seed=1).square() * 10 if weighted else None
    quantizer = searching(kind, 64, dtype)
    values = quantizer.decode(quantizer.encode(weight, importance)).double()
    each = (torch.ones(columns) if importance is None else importance).expand(weight.shape).reshape(-1, 64)
    for block, found, weights in zip(weight.reshape(-1, 64), values.reshape(-1, 64), each, strict=True):
        error = float((weights.double() * (block.double() - found).square()).sum())
        assert error == pytest.approx(best_error(block, weights, kind, dtype), rel=1e-4)


@pytest.mark.parametrize(("kind", "error"), [
    (("nf", 2, "nf"), 0.378), (("nf", 2, "optimal"), 0.335), (("nf", 3, "optimal"), 0.178), (("nf", 4, "optimal"), 0.087),
    (("nf", 4, "nf"), 0.087), (("uniform", 2, "nf"), 0.333),
])  # fmt: skip
def test_errors_of_normal_weights(kind: tuple[str, int, str], error: float) -> None:
    weight = normal(1000, 64)
    for dtype in (torch.float32, torch.bfloat16):
        left = searching(kind, 64, dtype).quantize(weight) - weight
        assert float(left.norm() / weight.norm()) == pytest.approx(error, abs=0.003)


def passed(quantizer: Quantizer, weight: torch.Tensor, importance: torch.Tensor | None) -> list[torch.Tensor]:
    codes, residual = torch.full(weight.shape, 255, dtype=torch.uint8), torch.full(weight.shape, torch.nan)
    scales = torch.full(quantizer.scales_shape(tuple(weight.shape)), torch.nan)
    quantizer.requantize(weight, weight.float().flip(0) * 0.1, 0.25, codes, scales, residual, importance)
    return [codes, scales, residual]


COMPILED = [  # each is compiled for some seconds
    (("nf", 2, "optimal"), torch.bfloat16, 64), (("nf", 3, "nf"), torch.float32, 32), (("nf", 4, "nf"), torch.bfloat16, 256),
    (("uniform", 2, "nf"), torch.bfloat16, 64), (("uniform", 8, "nf"), torch.float32, 32),
]  # fmt: skip


@settings(max_examples=80)
@given(
    st.sampled_from(COMPILED), st.integers(1, 40), st.integers(1, 200),
    st.sampled_from([1.0, 1e-30, 1e30, 3e38, 1e-38, 1e-42, 0.0]), st.integers(0, 99),
    st.sampled_from([None, 0.0, 1e-20, 1.0, 1e20]),
)  # fmt: skip
def test_a_compiled_search_gives_torchs_bytes(
    case: tuple[tuple[str, int, str], torch.dtype, int],
    rows: int,
    columns: int,
    scale: float,
    seed: int,
    weighing: float | None,
) -> None:
    kind, dtype, block = case
    quantizer = searching(kind, block, dtype)
    weight = (normal(rows, columns, seed=seed) * scale).clamp(-3e38, 3e38)
    weight[rows // 2 :: 3] = 0
    weight = weight.to(dtype)
    importance = None if weighing is None else normal(columns, seed=seed + 1).square() * weighing
    if importance is not None:
        importance[::3] = 0
    found = passed(quantizer, weight, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer_base, "quantizing", lambda quantizer: None)
        expected = passed(quantizer, weight, importance)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
    direct = quantizer.encode(weight.float() - weight.float().flip(0) * 0.1, importance)
    assert torch.equal(direct.codes, found[0])
    assert torch.equal(direct.scales, found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tie_keeps_the_larger_factor(kind: tuple[str, int, str]) -> None:
    weight = normal(4, 128)
    plain = make_quantizer(kind[0], kind[1], levels=kind[2]).encode(weight)
    for same in (searching(kind).encode(weight, torch.zeros(128)), searching(kind).encode(torch.zeros(4, 128))):
        expected = (
            plain if bool(same.scales.any()) else make_quantizer(kind[0], kind[1], levels=kind[2]).encode(weight * 0)
        )
        assert torch.equal(same.codes, expected.codes)
        assert torch.equal(same.scales, expected.scales)


def test_a_tie_between_smaller_factors_keeps_the_larger() -> None:
    # Only the zeros weigh, and NF2's level 0 represents them at every scale.
    weight = torch.zeros(1, 64)
    weight[0, :5] = normal(5)
    importance = (weight[0] == 0).float()
    assert searching(("nf", 2, "nf")).encode(weight, importance).scales.item() == weight.abs().max()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(-60, 60), st.integers(-60, 60))
def test_powers_of_two_change_nothing(kind: tuple[str, int, str], weight_power: int, importance_power: int) -> None:
    weight, importance = normal(3, 70), normal(70, seed=1).square()
    quantizer = searching(kind)
    expected = quantizer.encode(weight, importance)
    found = quantizer.encode(weight * 2.0**weight_power, importance * 2.0**importance_power)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales * 2.0**weight_power)


def test_importance_lowers_the_error_where_it_lies_and_absmax_ignores_it() -> None:
    weight, importance = normal(64, 256), torch.ones(256)
    importance[::8] = 100
    for kind in KINDS[:5]:
        plain, weighted = searching(kind).quantize(weight), searching(kind).quantize(weight, importance)
        before, after = (((values - weight).square() * importance).sum() for values in (plain, weighted))
        assert after < before
        absmax = make_quantizer(kind[0], kind[1], levels=kind[2])
        assert torch.equal(absmax.quantize(weight, importance), absmax.quantize(weight))


@pytest.mark.parametrize(
    "wrong", [torch.ones(63), torch.ones(2, 64), -torch.ones(64), torch.ones(64) / 0, torch.ones(64) * torch.nan]
)
def test_a_wrong_importance_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"^importance"):
        searching(("nf", 2, "nf")).encode(torch.ones(2, 64), wrong)
    with pytest.raises(UserError, match=r"^importance"):
        passed(searching(("nf", 2, "nf")), torch.ones(2, 64), wrong)


@pytest.mark.parametrize("kind", [("nf", 2, "optimal"), ("uniform", 2, "nf")])
def test_double_quantization_rounds_the_scales_that_were_searched(kind: tuple[str, int, str]) -> None:
    weight, importance = normal(300, 128), normal(128, seed=1).square()
    single, double = searching(kind), searching(kind, double=True)
    expected, found = single.encode(weight, importance), double.encode(weight, importance)
    if kind[0] != "uniform":  # whose step depends on the rounded minimum
        assert torch.equal(found.scales, double._round(expected.scales))
    torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=float(expected.scales.abs().max()) / 100)
    errors = [float((one.quantize(weight, importance) - weight).norm() / weight.norm()) for one in (single, double)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


class TestOptimalLevels:
    def test_are_nf4_levels_bit_for_bit(self) -> None:
        nf4 = normal_float_levels("nf", 4)
        expected = {2: [-1, -0.2844, 0.3379, 1], 3: [-1, -0.5251, -0.2844, -0.0911, 0.1609, 0.3379, 0.5626, 1]}
        for bits, levels in expected.items():
            torch.testing.assert_close(optimal_levels(bits), torch.tensor(levels), atol=5e-5, rtol=0)
            assert set(optimal_levels(bits).tolist()) < set(nf4.tolist())
        assert torch.equal(optimal_levels(4), nf4)

    def test_two_bits_are_the_best_subset_of_nf4(self) -> None:
        blocks, nf4 = normal(400, 64), normal_float_levels("nf", 4)
        absmax = blocks.abs().amax(1, keepdim=True)

        def error(inner: tuple[int, ...]) -> float:
            levels = nf4[[0, *inner, 15]]
            ratios = [blocks / (absmax * factor) for factor in FACTORS.float()]
            middles = (levels[:-1] + levels[1:]) / 2
            errors = [
                ((ratio - levels[torch.bucketize(ratio, middles)]) * absmax * factor).square().sum(1)
                for ratio, factor in zip(ratios, FACTORS.float(), strict=True)
            ]
            return float(torch.stack(errors).amin(0).sum())

        assert min(itertools.combinations(range(1, 15), 2), key=error) == (4, 11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("scale", ["absmax", "search"])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(1, 20), st.integers(1, 150), st.integers(0, 2**31), st.integers(-36, 30), st.integers(0, 130),
        st.sampled_from([1.0, -1e4, 0.0]), st.booleans(),
    )  # fmt: skip
    def test_stored_values_reload_exactly_through_bitsandbytes(
        self,
        dtype: torch.dtype,
        scale: str,
        bits: int,
        rows: int,
        columns: int,
        seed: int,
        power: int,
        zeros: int,
        outlier: float,
        weighted: bool,
    ) -> None:
        weight = normal(rows, columns, seed=seed) * 10.0**power
        weight.view(-1)[:zeros] = 0
        weight.view(-1)[seed % weight.numel()] *= outlier
        importance = normal(columns, seed=seed + 1).square() if weighted else None
        quantizer = make_quantizer("nf", bits, 64, dtype, levels="optimal", scale=scale)
        stored = quantizer.decode(quantizer.encode(weight, importance)).to(dtype)
        codes, state = bnb.quantize_4bit(stored.flatten(), blocksize=64, quant_type="nf4")
        reloaded = bnb.dequantize_4bit(codes, state).reshape(stored.shape)
        assert reloaded.dtype == dtype
        assert torch.equal(reloaded, stored)
        assert torch.equal(quantizer.quantize(weight, importance), stored.float())

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_every_block_keeps_a_value_at_the_end_of_the_table(self, bits: int) -> None:
        importance = normal(64, seed=1).abs() ** 8  # nearly all weight on a few columns: the smallest scales are chosen
        quantizer = make_quantizer("nf", bits, 64, torch.bfloat16, levels="optimal", scale="search")
        codes, scales = quantizer.encode(normal(500, 64), importance)
        assert bool(((codes == 0) | (codes == 2**bits - 1)).any(dim=1).all())
        assert bool((scales <= normal(500, 64).abs().amax(1, keepdim=True).bfloat16().float()).all())


def test_a_decomposition_measures_the_searched_backbone() -> None:
    weight = normal(192, 160) * 0.02
    quantizer = searching(("nf", 2, "optimal"), 64, torch.bfloat16)
    result = decompose(weight, quantizer, 8, 2)
    stored = quantizer.decode_stored(result.quantized).double()
    left = weight.double() - stored - result.lora_B.double() @ result.lora_A.double()
    assert result.errors[-1] == pytest.approx(float(left.norm() / weight.double().norm()), rel=1e-4)
    assert result.errors[0] < 0.34


def test_loftq_init_takes_both() -> None:
    weight = normal(64, 64)
    plain, searched = (
        loftq_init(weight, 2, 4, 3, return_errors=True, **settings)  # type: ignore[call-overload]
        for settings in ({}, {"scale": "search", "levels": "optimal"})
    )
    assert searched[3][-1] < plain[3][-1]
    relative = searched[0] / searched[0].abs().amax(1, keepdim=True)
    assert float((relative[..., None] - optimal_levels(2)).abs().amin(-1).max()) < 1e-6


def test_identity_has_them_only_where_they_are_used() -> None:
    plain = make_quantizer("nf", 2, 64, torch.bfloat16).identity
    assert make_quantizer("nf", 2, 64, torch.bfloat16, levels="nf", scale="absmax").identity == plain
    assert searching(("nf", 2, "nf"), 64, torch.bfloat16).identity == plain | {"scale": "search"}
    both = searching(("nf", 2, "optimal"), 64, torch.bfloat16).identity
    assert both == plain | {"scale": "search", "levels": "optimal"}


@pytest.mark.parametrize(("arguments", "message"), [
    (("uniform-clipped", 4, "nf", "search"), "scale=search: quantizer type uniform-clipped has no range per block to search"),
    (("uniform-sigma", 4, "nf", "search"), "scale=search: quantizer type uniform-sigma has"),
    (("int", 8, "nf", "search"), "scale=search: quantizer type int has"),
    (("nf", 4, "nf", "absmin"), "scale=absmin: unknown; choose one of absmax, search"),
    (("nf", 4, "best", "absmax"), "levels=best: unknown; choose one of nf, optimal"),
    (("nf-symmetric", 2, "optimal", "absmax"), "levels=optimal: quantizer type nf-symmetric has its own levels"),
    (("uniform", 2, "optimal", "search"), "levels=optimal: quantizer type uniform has its own levels"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(arguments: tuple[str, int, str, str], message: str) -> None:
    type, bits, levels, scale = arguments
    with pytest.raises(UserError) as refused:
        make_quantizer(type, bits, levels=levels, scale=scale)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
