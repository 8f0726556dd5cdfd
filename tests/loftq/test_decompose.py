"""The alternating algorithm compared with an independent float64 version, the closed form for T = 1, and PEFT's algorithm."""

import dataclasses
import itertools
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import weight_like

from loftq_exp.errors import UserError
from loftq_exp.loftq import Decomposition, decompose, loftq_init, make_quantizer
from loftq_exp.loftq.quantizers import normal_float_levels

NF4 = make_quantizer("nf", 4)


@pytest.fixture(autouse=True, scope="module")
def bitsandbytes_without_compiler():
    """bitsandbytes recompiles its kernel for each odd shape, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def naive_quantize(weight, levels):
    """Nearest level by brute force in float64, blocks of 64 under their absmax."""
    blocks = torch.split(weight.flatten(), 64)
    values = []
    for block in blocks:
        absmax = block.abs().max()
        values.append(levels[((block / absmax)[:, None] - levels).abs().argmin(dim=1)] * absmax)
    return torch.cat(values).reshape(weight.shape)


def naive_loftq(weight, levels, rank, num_iter):
    """LoftQ as the paper writes it, in float64 with a full SVD: the errors, Q, and B A."""
    weight = weight.double()
    levels = levels.double()
    backbone, product = naive_quantize(weight, levels), torch.zeros_like(weight)
    errors = [torch.linalg.matrix_norm(weight - backbone)]
    for _ in range(num_iter):
        backbone = naive_quantize(weight - product, levels)
        U, S, Vh = torch.linalg.svd(weight - backbone)
        product = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
        errors.append(torch.linalg.matrix_norm(weight - backbone - product))
    return [float(error / torch.linalg.matrix_norm(weight)) for error in errors], backbone, product


def same_bytes(one: Decomposition, two: Decomposition) -> bool:
    pairs = zip((*one.quantized, one.lora_A, one.lora_B), (*two.quantized, two.lora_A, two.lora_B), strict=True)
    return one.errors == two.errors and one.norm == two.norm and all(torch.equal(left, right) for left, right in pairs)


class TestAlgorithm:
    def test_equals_an_independent_float64_version(self):
        for shape, bits, num_iter in itertools.product([(96, 160), (160, 96), (65, 99)], (2, 3, 4), (0, 1)):
            weight = weight_like(*shape)
            quantizer = make_quantizer("nf", bits)
            result = decompose(weight, quantizer, 16, num_iter, "exact")
            errors, backbone, product = naive_loftq(weight, normal_float_levels("nf", bits), 16, num_iter)
            assert result.errors == pytest.approx(errors, rel=1e-5), (shape, bits, num_iter)
            torch.testing.assert_close(quantizer.decode(result.quantized), backbone.float())
            torch.testing.assert_close(result.lora_B @ result.lora_A, product.float(), atol=1e-6, rtol=1e-3)

    @pytest.mark.parametrize("solver", ["exact", "randomized"])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_five_steps_of_the_independent_version(self, solver, bits):
        # A value near a threshold may fall to either side, and each step builds on the last: only errors need agree.
        weight = weight_like(96, 160)
        result = decompose(weight, make_quantizer("nf", bits), 16, 5, solver)
        errors, _, _ = naive_loftq(weight, normal_float_levels("nf", bits), 16, 5)
        assert result.steps == 5
        assert result.errors == pytest.approx(errors, rel=1e-3 if solver == "exact" else 1e-2)

    @pytest.mark.parametrize("num_iter", [0, 1, 4])
    def test_errors_are_those_of_the_result(self, num_iter):
        weight = weight_like(70, 130).bfloat16()
        quantizer = make_quantizer("nf", 4, scale_dtype=torch.bfloat16)
        result = decompose(weight, quantizer, 8, num_iter)
        stored = quantizer.decode(result.quantized).bfloat16().double()
        left = weight.double() - stored - result.lora_B.double() @ result.lora_A.double()
        assert result.norm == pytest.approx(weight.double().norm().item(), rel=1e-6)
        assert result.errors[-1] == pytest.approx((left.norm() / weight.double().norm()).item(), rel=1e-5)
        assert len(result.errors) == num_iter + 1

    @pytest.mark.parametrize("type", ["nf", "uniform"])
    def test_steps_lower_the_error_at_4_bits(self, type):
        errors = decompose(weight_like(192, 160), make_quantizer(type, 4), 16, 5).errors
        assert all(after < before for before, after in itertools.pairwise(errors))

    def test_without_steps_the_factors_are_zero(self):
        result = decompose(weight_like(20, 30), NF4, 4, 0)
        assert (result.lora_A.shape, result.lora_B.shape) == ((4, 30), (20, 4))
        assert not result.lora_A.any()
        assert not result.lora_B.any()

    @pytest.mark.parametrize("shape", [(128, 300), (300, 128)])
    @pytest.mark.parametrize("bits", [2, 4])
    def test_randomized_ends_as_low_as_exact(self, shape, bits):
        # On average: the steps amplify any difference, and on weights this small one scatters by 1 % both ways.
        quantizer = make_quantizer("nf", bits)
        weights = [weight_like(*shape, seed=seed) for seed in range(6)]
        exact, randomized = (
            sum(decompose(weight, quantizer, 32, 5, solver).errors[-1] for weight in weights)
            for solver in ("exact", "randomized")
        )
        assert randomized <= 1.005 * exact


class TestContinuation:
    @pytest.mark.parametrize("shape", [(96, 160), (160, 96), (40, 33)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("solver", ["exact", "randomized"])
    def test_has_the_bytes_of_a_run_from_scratch(self, shape, dtype, solver):
        weight = weight_like(*shape).to(dtype)
        quantizer = make_quantizer("nf", 2, scale_dtype=dtype)
        scratch = decompose(weight, quantizer, 16, 4, solver)
        for steps in (0, 1, 3):
            start = decompose(weight, quantizer, 16, steps, solver)
            assert same_bytes(decompose(weight, quantizer, 16, 4, solver, start=start), scratch)
        assert same_bytes(decompose(weight, quantizer, 16, 4, solver), scratch)

    def test_from_tensors_at_odd_addresses(self):
        weight = weight_like(96, 160)
        start = decompose(weight, NF4, 16, 2)
        moved = dataclasses.replace(start, lora_A=shifted(start.lora_A), lora_B=shifted(start.lora_B))
        assert same_bytes(decompose(shifted(weight), NF4, 16, 4, start=moved), decompose(weight, NF4, 16, 4))

    def test_refuses_a_start_that_cannot_be(self):
        weight = weight_like(40, 50)
        start = decompose(weight, NF4, 4, 2)
        for other, rank, num_iter in ((weight, 4, 1), (weight, 4, 2), (weight, 5, 3), (weight[:, :49], 4, 3)):
            with pytest.raises(ValueError, match="start"):
                decompose(other, NF4, rank, num_iter, start=start)


class TestDefinedOnAnything:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 80),
        st.integers(1, 140),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        st.sampled_from(
            [("nf", 2), ("nf", 4), ("nf-symmetric", 2), ("uniform", 3), ("uniform-clipped", 4), ("int", 8)]
        ),
        st.integers(0, 3),
        st.data(),
    )
    def test_any_shape_type_and_rank(self, rows, columns, dtype, quantizer, num_iter, data):
        weight = weight_like(rows, columns, seed=data.draw(st.integers(0, 99))).to(dtype)
        weight[: data.draw(st.integers(0, rows))] = 0
        rank = data.draw(st.integers(1, min(rows, columns)))
        before = weight.clone()
        for solver in ("exact", "randomized"):
            backbone, A, B, errors = loftq_init(
                weight, quantizer[1], rank, num_iter, quant_type=quantizer[0], solver=solver, return_errors=True
            )
            assert (backbone.dtype, backbone.shape) == (dtype, weight.shape)
            assert (A.dtype, A.shape, B.dtype, B.shape) == (torch.float32, (rank, columns), torch.float32, (rows, rank))
            assert all(tensor.isfinite().all() for tensor in (backbone, A, B))
            assert all(0 <= error < 2 for error in errors)
            assert num_iter == 0 or errors[1] <= errors[0] * (1 + 1e-6) + 1e-6
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extreme_scales(self, scale, dtype):
        weight = weight_like(96, 64)
        quantizer = make_quantizer("nf", 4)
        expected = decompose(weight, quantizer, 8, 2, "exact").errors
        result = decompose((weight * scale).to(dtype), quantizer, 8, 2, "exact")
        assert result.errors == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-2)
        assert result.norm == pytest.approx(weight.norm().item() * scale, rel=1e-2)

    def test_zeros(self):
        types = ("nf", "nf-symmetric", "uniform", "uniform-clipped", "uniform-sigma")
        for type, num_iter in itertools.product(types, (0, 1, 3)):
            result = decompose(torch.zeros(40, 50), make_quantizer(type, 2), 4, num_iter)
            assert (result.errors, result.norm) == ((0.0,) * (num_iter + 1), 0), (type, num_iter)
            assert result.lora_A.isfinite().all(), (type, num_iter)
            assert result.lora_B.isfinite().all(), (type, num_iter)

    def test_layout_does_not_matter(self):
        weight = weight_like(50, 60)
        assert same_bytes(decompose(weight.T.contiguous().T, NF4, 8, 3), decompose(weight, NF4, 8, 3))

    @pytest.mark.parametrize(
        ("weight", "rank", "num_iter", "named"),
        [
            (torch.full((4, 4), math.nan), 2, 1, "16 of 16 values are NaN"),
            (torch.tensor([[1.0, math.inf], [0.0, 1.0]]), 1, 1, "1 of 4 values"),
            (torch.full((2, 2), 1e300, dtype=torch.float64), 1, 1, "infinite in float32"),
            (torch.ones(4), 1, 1, r"shape \(4,\)"),
            (torch.ones(2, 2, 2), 1, 1, "not a floating-point matrix"),
            (torch.ones(0, 4), 1, 1, "not a floating-point matrix"),
            (torch.ones(4, 4, dtype=torch.int8), 1, 1, "torch.int8"),
            (torch.ones(4, 6), 0, 1, "rank=0"),
            (torch.ones(4, 6), -3, 1, "rank=-3"),
            (torch.ones(4, 6), 5, 0, "rank=5: does not fit a weight of 4 x 6"),
            (torch.ones(4, 6), 2, -1, "num_iter=-1"),
        ],
    )
    def test_refuses_in_one_line(self, weight, rank, num_iter, named):
        with pytest.raises(UserError, match=named) as refused:
            loftq_init(weight, 4, rank, num_iter)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"num_bits": 5}, "bits=5"),
            ({"quant_type": "fp4"}, "fp4"),
            ({"solver": "lanczos", "num_iter": 0}, "lanczos"),
            ({"alpha": 0}, "alpha=0"),
            ({"alpha": math.nan}, "alpha=nan"),
        ],
    )
    def test_refuses_unknown_settings(self, settings, named):
        with pytest.raises(UserError, match=named):
            loftq_init(torch.ones(8, 8), **{"num_bits": 4, "reduced_rank": 2, **settings})


class TestScaling:
    @pytest.mark.parametrize("alpha", [1, 4, 8, 16, 32])
    def test_closed_form_of_what_ignoring_it_costs(self, alpha):
        weight, rank = weight_like(96, 160), 8
        s = alpha / rank
        backbone, A, B = loftq_init(weight, 4, rank, 1, solver="exact")
        squares = torch.linalg.svdvals((weight - backbone).double()).square()
        ignored = (weight - backbone - s * (B @ A)).double().square().sum()
        closed_form = (1 - s) ** 2 * squares[:rank].sum() + squares[rank:].sum()
        torch.testing.assert_close(ignored, closed_form, rtol=1e-5, atol=0)
        backbone, A, B = loftq_init(weight, 4, rank, 1, alpha=alpha, solver="exact")
        absorbed = (weight - backbone - s * (B @ A)).double().square().sum()
        torch.testing.assert_close(absorbed, squares[rank:].sum(), rtol=1e-5, atol=0)

    def test_is_shared_evenly(self):
        weight = weight_like(96, 160)
        _, A, B = loftq_init(weight, 4, 8, 2)
        _, scaled_A, scaled_B = loftq_init(weight, 4, 8, 2, alpha=32)
        torch.testing.assert_close(scaled_A * 2, A)
        torch.testing.assert_close(scaled_B * 2, B)


class TestLoftqInit:
    @pytest.mark.parametrize("shape", [(96, 160), (65, 99)])
    @pytest.mark.parametrize("num_bits", [4, 8])
    @pytest.mark.parametrize("num_iter", [1, 3])
    def test_is_pefts_algorithm(self, shape, num_bits, num_iter):
        weight = weight_like(*shape)
        residual = weight
        for _ in range(num_iter):
            expected = bnb_round_trip(residual, num_bits)
            U, S, Vh = torch.linalg.svd(weight - expected, full_matrices=False)
            product = U[:, :16] * S[:16] @ Vh[:16]
            residual = weight - product
        backbone, A, B = loftq_init(weight, num_bits, 16, num_iter, solver="exact")
        if num_iter == 1:
            assert torch.equal(backbone, expected)
            torch.testing.assert_close(B @ A, product, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(
            (weight - backbone - B @ A).norm(), (weight - expected - product).norm(), rtol=1e-3, atol=0
        )

    def test_qlora_draws_a_as_lora_does(self):
        weight = weight_like(30, 100)
        before = torch.get_rng_state()
        backbone, A, B, errors = loftq_init(weight, 4, 8, 0, alpha=99, seed=7, return_errors=True)
        assert torch.equal(torch.get_rng_state(), before)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            assert torch.equal(A, torch.nn.init.kaiming_uniform_(torch.empty(8, 100), a=math.sqrt(5)))
        assert not B.any()
        assert torch.equal(backbone, NF4.quantize(weight))
        assert len(errors) == 1
        assert not torch.equal(A, loftq_init(weight, 4, 8, 0, seed=8)[1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_factors_fit_the_rounded_backbone_that_is_returned(self, dtype):
        weight = weight_like(96, 160).to(dtype)
        backbone, A, B, errors = loftq_init(weight, 4, 16, 3, return_errors=True)
        left = torch.linalg.matrix_norm(weight.double() - backbone.double() - B.double() @ A.double())
        assert (left / weight.double().norm()).item() == pytest.approx(errors[-1], rel=1e-5)
        best = torch.linalg.svdvals(weight.double() - backbone.double())[16:].square().sum().sqrt()
        assert left <= best * 1.01

    @pytest.mark.parametrize(("rows", "columns", "rank"), [(256, 192, 8), (96, 320, 64), (20, 30, 4)])
    @pytest.mark.parametrize("num_iter", [0, 1, 3])
    def test_telling_errors_changes_no_byte(self, rows, columns, rank, num_iter):
        weight = weight_like(rows, columns)
        rank = min(rank, rows, columns)
        *told, errors = loftq_init(weight, 4, rank, num_iter, return_errors=True)
        assert len(errors) == num_iter + 1
        assert all(map(math.isfinite, errors))
        for with_errors, without in zip(told, loftq_init(weight, 4, rank, num_iter), strict=True):
            assert torch.equal(with_errors, without)

    def test_parameter_in_plain_tensors_out(self):
        results = loftq_init(torch.nn.Parameter(weight_like(20, 30)), 4, 4)
        assert not any(isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad for tensor in results)


def shifted(tensor):
    """The same values at an address that is 4 bytes off the usual alignment."""
    return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def bnb_round_trip(weight, num_bits):
    """bitsandbytes' quantized values, as peft.utils.loftq_utils.loftq_init takes them."""
    if num_bits == 4:
        # Flat, because with AVX-512 it dequantizes rows that are not whole blocks with other blocks' scales.
        flat = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.flatten(), quant_type="nf4", blocksize=64))
        return flat.reshape(weight.shape)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    return bnb.int8_vectorwise_dequant(codes, absmax)


def test_principal_factors_are_the_leading_components_and_the_rest_is_quantized():
    weight = weight_like(96, 128)
    result = decompose(weight, NF4, 8, 1, principal=True)
    left, singular, right = torch.linalg.svd(weight.double())
    leading = left[:, :8] * singular[:8] @ right[:8]
    product = result.lora_B.double() @ result.lora_A.double()
    torch.testing.assert_close(product, leading, rtol=0, atol=1e-3 * float(weight.abs().max()))
    backbone = NF4.decode_stored(result.quantized)
    assert torch.equal(backbone, NF4.quantize(weight - result.lora_B @ result.lora_A))
    error = torch.linalg.matrix_norm(weight - backbone - result.lora_B @ result.lora_A) / torch.linalg.matrix_norm(
        weight
    )
    assert result.errors[1] == pytest.approx(float(error), rel=1e-4)
    with pytest.raises(UserError, match="principal factors are fitted once"):
        decompose(weight, NF4, 8, 2, principal=True)
