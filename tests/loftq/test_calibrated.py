"""The alternation in the norm of the outputs, against brute force in float64 and a plain GPTQ."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.kernels import feedback
from loftq_exp.loftq import Decomposition, decompose, make_quantizer
from loftq_exp.loftq.metric import Metric, metric_of
from loftq_exp.loftq.projection import leading_left
from loftq_exp.loftq.quantizer import Quantizer

NF2 = make_quantizer("nf", 2)
SEARCHED = make_quantizer("nf", 2, levels="optimal", scale="search")


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(width: int, tokens: int = 300, seed: int = 1) -> torch.Tensor:
    """The second moment of correlated inputs, some of which are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    values *= torch.randn(width, generator=generator).exp()
    values[:, 0] *= 100
    return (values.double().T @ values.double() / tokens).float()


def output_error(weight: torch.Tensor, result: Decomposition, quantizer: Quantizer, metric: Metric) -> float:
    """||W - Q - B A||_H / ||W||_H in float64."""
    hessian = metric.root.double() @ metric.root.double().T if metric.full else torch.diag(metric.root.double() ** 2)
    product = result.lora_B.double() @ result.lora_A.double()
    left = weight.double() - quantizer.decode_stored(result.quantized).double() - product
    wide = weight.double()
    return float((torch.trace(left @ hessian @ left.T) / torch.trace(wide @ hessian @ wide.T)).sqrt())


@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 70),
    rank=st.integers(1, 8),
    diagonal=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=25)
def test_factors_are_the_closed_form(rows: int, columns: int, rank: int, diagonal: bool, seed: int) -> None:
    rank = min(rank, rows, columns)
    weight, hessian = weight_of(rows, columns, seed), hessian_of(columns, seed=seed)
    metric = metric_of(hessian.diagonal().clone() if diagonal else hessian)
    result = decompose(weight, NF2, rank, 1, metric=metric)
    root = torch.diag(metric.root.double()) if diagonal else metric.root.double()
    image = (weight.double() - NF2.decode_stored(result.quantized).double()) @ root
    _left, singular, _right = torch.linalg.svd(image, full_matrices=False)
    best = float(singular[rank:].norm() / (weight.double() @ root).norm())
    assert result.output_errors[1] == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert output_error(weight, result, NF2, metric) == pytest.approx(best, rel=1e-3, abs=1e-5)


def test_closed_form_is_the_minimum_of_gradient_descent() -> None:
    """Brute force: minimise tr(D H D') over B and A in float64 from several starts; none gets below the closed form."""
    weight, metric = weight_of(12, 16), metric_of(hessian_of(16))
    result = decompose(weight, NF2, 2, 1, metric=metric)
    hessian = metric.root.double() @ metric.root.double().T
    residual = weight.double() - NF2.decode_stored(result.quantized).double()
    norm = float(torch.trace(weight.double() @ hessian @ weight.double().T).sqrt())
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        B = torch.randn(12, 2, dtype=torch.float64, generator=generator).requires_grad_()
        A = torch.randn(2, 16, dtype=torch.float64, generator=generator).requires_grad_()
        optimiser = torch.optim.LBFGS([A, B], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def loss(
            A: torch.Tensor = A, B: torch.Tensor = B, optimiser: torch.optim.Optimizer = optimiser
        ) -> torch.Tensor:
            optimiser.zero_grad()
            left = residual - 0.01 * B @ A
            value = torch.trace(left @ hessian @ left.T)
            value.backward()
            return value

        optimiser.step(loss)  # type: ignore[arg-type]
        found.append(float(loss().detach().sqrt()) / norm)
    assert min(found) == pytest.approx(result.output_errors[1], rel=1e-3)


@pytest.mark.parametrize("shape", [(96, 320), (320, 192)])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("quantizer", [NF2, SEARCHED], ids=["absmax", "searched"])
def test_reported_errors_are_true_and_the_best_step_is_kept(
    shape: tuple[int, int], rounding: str, quantizer: Quantizer
) -> None:
    weight, metric = weight_of(*shape), metric_of(hessian_of(shape[1], 500))
    result = decompose(weight, quantizer, 16, 4, metric=metric, rounding=rounding)
    assert len(result.output_errors) == len(result.errors) == 5
    assert result.output_errors[result.kept_step] == min(result.output_errors[1:])
    assert output_error(weight, result, quantizer, metric) == pytest.approx(
        result.output_errors[result.kept_step], rel=1e-3
    )
    left = weight - quantizer.decode_stored(result.quantized) - result.lora_B @ result.lora_A
    assert float(left.norm() / weight.norm()) == pytest.approx(result.errors[result.kept_step], rel=1e-4)
    if quantizer is SEARCHED:  # under absmax scales the error of NF2 rises again
        assert result.kept_step == 4


def test_output_errors_are_smaller_than_without_calibration() -> None:
    weight, metric = weight_of(96, 320), metric_of(hessian_of(320, 500))
    plain, calibrated = decompose(weight, SEARCHED, 16, 4), decompose(weight, SEARCHED, 16, 4, metric=metric)
    assert output_error(weight, calibrated, SEARCHED, metric) < 0.7 * output_error(weight, plain, SEARCHED, metric)


def test_randomized_solver_is_as_good_as_the_exact_one() -> None:
    weight, metric = weight_of(256, 320), metric_of(hessian_of(320, 1000))
    exact = decompose(weight, NF2, 16, 3, "exact", metric=metric).output_errors
    assert decompose(weight, NF2, 16, 3, metric=metric).output_errors == pytest.approx(exact, rel=0.01)


def test_leading_left_resolves_a_steep_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(500, 400, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(4, 0, 400, dtype=torch.float64)
    matrix = (left * spectrum @ right.T).float()
    found, singular = leading_left(matrix, float(matrix.double().square().sum()), 32, "randomized")
    torch.testing.assert_close(found.T @ found, torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(singular.double(), spectrum[:32], rtol=5e-3, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_same_bytes_from_a_shorter_run_and_on_any_number_of_threads(rounding: str) -> None:
    weight, metric = weight_of(96, 320), metric_of(hessian_of(320, 500))
    whole = decompose(weight, NF2, 8, 3, metric=metric, rounding=rounding)
    short = decompose(weight, NF2, 8, 1, metric=metric, rounding=rounding)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other = decompose(weight, NF2, 8, 3, metric=metric, rounding=rounding, start=short)
    finally:
        torch.set_num_threads(threads)
    assert whole.errors == other.errors
    assert whole.output_errors == other.output_errors
    for one, two in itertools.zip_longest(
        (whole.lora_A, whole.lora_B, *whole.quantized), (other.lora_A, other.lora_B, *other.quantized)
    ):
        assert torch.equal(one, two)


def plain_gptq(
    values: torch.Tensor, hessian: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """GPTQ as its paper writes it: one column after the other, in float64. Returns codes."""
    values, rows = values.double().clone(), len(values)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    codes = torch.zeros(values.shape, dtype=torch.long)
    for j in range(values.shape[1]):
        column = values[:, j]
        nearest = (column[:, None] / scales[:, j : j + 1].double() - levels.double()).abs().argmin(dim=1)
        ends = torch.where(column > 0, len(levels) - 1, 0)
        codes[:, j] = torch.where(anchors[:, j], ends, nearest)
        error = (column - levels.double()[codes[:, j]] * scales[:, j].double()) / factor[j, j]
        values[:, j + 1 :] -= error.reshape(rows, 1) * factor[j, j + 1 :]
    return codes


@pytest.mark.parametrize("columns", [128, 160, 320])  # blocks of 64 inside rows, across rows, more than a panel
def test_gptq_against_a_plain_one(columns: int) -> None:
    weight, metric = weight_of(16, columns), metric_of(hessian_of(columns, 2000))
    result = decompose(weight, NF2, 1, 0, metric=metric, rounding="gptq")
    nearest = NF2.encode(weight)
    scales = nearest.scales.repeat_interleave(64).reshape(weight.shape)
    largest = weight.abs().reshape(-1, 64).argmax(dim=1) + torch.arange(0, weight.numel(), 64)
    anchors = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, largest, True).reshape(weight.shape)
    hessian = metric.root.double() @ metric.root.double().T
    expected = plain_gptq(weight, hessian, NF2.levels(), scales, anchors)
    assert torch.equal(result.quantized.scales, nearest.scales)
    assert (result.quantized.codes.long() == expected).float().mean() > 0.995
    assert result.output_errors[0] < decompose(weight, NF2, 1, 0, metric=metric).output_errors[0]


def test_every_block_of_gptq_keeps_a_value_at_its_scale() -> None:
    weight, metric = weight_of(32, 192), metric_of(hessian_of(192))
    codes = decompose(weight, NF2, 4, 3, metric=metric, rounding="gptq").quantized.codes.reshape(-1, 64)
    assert bool(((codes == 0) | (codes == 3)).any(dim=1).all())


@pytest.mark.parametrize("type", ["nf", "nf-symmetric", "uniform", "uniform-clipped", "uniform-sigma", "int"])
def test_any_quantizer(type: str) -> None:
    quantizer = make_quantizer(type, {"int": 8}.get(type, 2))
    weight, metric = weight_of(64, 128), metric_of(hessian_of(128))
    result = decompose(weight, quantizer, 4, 2, metric=metric)
    assert output_error(weight, result, quantizer, metric) == pytest.approx(
        result.output_errors[result.kept_step], rel=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_singular_second_moments_with_huge_and_dead_columns(tokens: int) -> None:
    hessian = hessian_of(128, tokens)
    hessian[-3:] = hessian[:, -3:] = 0
    hessian[0, 0] *= 1e6
    result = decompose(weight_of(64, 128), NF2, 8, 3, metric=metric_of(hessian))
    assert all(0 <= error < 1 for error in result.output_errors)
    assert bool(torch.isfinite(result.lora_A).all())
    assert bool(torch.isfinite(result.lora_B).all())


def test_weight_of_zeros() -> None:
    result = decompose(torch.zeros(64, 128), NF2, 4, 2, metric=metric_of(hessian_of(128)))
    assert result.output_errors == (0.0, 0.0, 0.0)
    assert not bool(result.lora_B.any())


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of(64, 128)
    with pytest.raises(UserError, match="hessian of 64 inputs"):
        decompose(weight, NF2, 4, 1, metric=metric_of(hessian_of(64)))
    with pytest.raises(UserError, match="rounding=gptq"):
        decompose(weight, NF2, 4, 1, rounding="gptq")
    with pytest.raises(UserError, match="int"):
        decompose(weight, make_quantizer("int", 8), 4, 1, metric=metric_of(hessian_of(128)), rounding="gptq")
    start = dataclasses.replace(decompose(weight, NF2, 4, 2, metric=metric_of(hessian_of(128))), kept_step=1)
    with pytest.raises(ValueError, match="last step"):
        decompose(weight, NF2, 4, 3, metric=metric_of(hessian_of(128)), start=start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type", ["nf", "uniform"])
@pytest.mark.parametrize("shape", [(16, 192), (100, 160)])  # 100 rows: one whole group of the compiled pass and a part
def test_gptq_in_torch_equals_the_compiled_one(
    shape: tuple[int, int], type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = make_quantizer(type, 2, scale_dtype=dtype)
    weight, metric = weight_of(*shape), metric_of(hessian_of(shape[1]))
    compiled = decompose(weight, quantizer, 4, 1, metric=metric, rounding="gptq")
    monkeypatch.setattr(feedback, "numba", None)
    feedback.rounding_panel.cache_clear()
    in_torch = decompose(weight, quantizer, 4, 1, metric=metric, rounding="gptq")
    feedback.rounding_panel.cache_clear()
    assert torch.equal(compiled.quantized.codes, in_torch.quantized.codes)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("type", ["nf", "uniform"])
def test_gptq_compensates_the_error_of_values_as_stored(type: str, double: bool) -> None:
    """With 4 bits and bfloat16, rounding a stored value is a part of its error. The image has it too."""
    quantizer = make_quantizer(type, 4, scale_dtype=torch.bfloat16, double=double)
    weight, metric = weight_of(96, 320), metric_of(hessian_of(320, 500))
    result = decompose(weight, quantizer, 4, 0, metric=metric, rounding="gptq")
    assert output_error(weight, result, quantizer, metric) == pytest.approx(result.output_errors[0], rel=1e-4)
