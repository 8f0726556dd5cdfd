"""`loftq_init(..., hessian=H)`: against brute force, and what it is for H of odd shapes and values."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from loftq_exp import loftq_init
from loftq_exp.errors import UserError
from loftq_exp.loftq import decompose, make_quantizer, metric_of

ROWS, WIDTH, RANK = 24, 32, 4


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    x = torch.randn(400, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    x = x * torch.logspace(-1, 1, WIDTH)
    return weight, x.T @ x / len(x)


def output_error(
    weight: torch.Tensor, found: tuple[torch.Tensor, ...], hessian: torch.Tensor, scaling: float = 1
) -> float:
    """As the docstring of `loftq_init` says, in float64."""
    backbone, lora_A, lora_B = (tensor.double() for tensor in found[:3])
    wide, h = weight.double(), (hessian if hessian.ndim == 2 else torch.diag(hessian)).double()
    error = wide - backbone - scaling * lora_B @ lora_A
    return math.sqrt(float(torch.trace(error @ h @ error.T) / torch.trace(wide @ h @ wide.T)))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("levels", ["nf", "optimal"])
def test_the_outputs_error_is_less_than_without_it(rounding: str, levels: str) -> None:
    weight, hessian = drawn()
    plain = loftq_init(weight, 2, RANK, 5, levels=levels)
    found = loftq_init(weight, 2, RANK, 5, levels=levels, hessian=hessian, rounding=rounding)
    assert output_error(weight, found, hessian) < 0.7 * output_error(weight, plain, hessian)


def test_factors_of_one_step_are_the_closed_forms() -> None:
    """B A minimises ||W - Q - B A||_H: no other factors of that rank, found by the SVD of (W - Q) S, are better."""
    weight, hessian = drawn()
    backbone, lora_A, lora_B = loftq_init(weight, 3, RANK, 1, hessian=hessian, solver="exact")
    values, vectors = torch.linalg.eigh(damped(hessian))
    root = vectors * values.sqrt()
    left, singular, right = torch.linalg.svd((weight - backbone).double() @ root)
    best = (left[:, :RANK] * singular[:RANK]) @ right[:RANK] @ torch.linalg.inv(root)
    assert torch.allclose((lora_B @ lora_A).double(), best, atol=1e-4)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H as `metric_of` states it, in float64."""
    wide = hessian.double()
    return wide / wide.diagonal().mean() + 0.01 * torch.eye(len(wide), dtype=torch.float64)


@pytest.mark.parametrize("shape", ["full", "diagonal"])
@pytest.mark.parametrize("alpha", [None, 2.0 * RANK])
def test_it_is_decompose_in_that_norm(shape: str, alpha: float | None) -> None:
    weight, hessian = drawn()
    hessian = hessian if shape == "full" else hessian.diagonal()
    quantizer = make_quantizer("nf", 2, 64, torch.float32, levels="optimal", scale="search")
    result = decompose(weight, quantizer, RANK, 5, metric=metric_of(hessian))
    backbone, lora_A, lora_B, errors = loftq_init(
        weight, 2, RANK, 5, levels="optimal", scale="search", hessian=hessian.double(), alpha=alpha, return_errors=True
    )
    assert torch.equal(backbone, result.backbone(quantizer, torch.float32))
    scaling = 1 if alpha is None else alpha / RANK
    assert torch.allclose(scaling * lora_B @ lora_A, result.lora_B @ result.lora_A, atol=1e-5)
    assert errors == result.errors
    error = weight - backbone - scaling * lora_B @ lora_A
    assert float(error.norm() / weight.norm()) == pytest.approx(errors[result.kept_step], rel=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("options", [{"scale": "search"}, {"levels": "optimal"}, {"quant_type": "uniform"}, {}])
def test_the_result_is_the_same_with_and_without_errors(options: dict[str, str], calibrated: bool) -> None:
    weight, hessian = drawn(1)
    more = options | ({"hessian": hessian} if calibrated else {})
    with_errors = loftq_init(weight, 2, RANK, 8, return_errors=True, **more)  # type: ignore[call-overload]
    without = loftq_init(weight, 2, RANK, 8, **more)  # type: ignore[call-overload]
    assert all(torch.equal(one, other) for one, other in zip(with_errors[:3], without, strict=True))


def test_the_best_step_is_returned() -> None:
    weight, hessian = drawn(2)
    steps = [
        output_error(weight, loftq_init(weight, 2, RANK, step, hessian=hessian), damped(hessian))
        for step in range(1, 9)
    ]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(steps))


def test_a_large_h_and_a_small_one_are_the_same() -> None:
    weight, hessian = drawn()
    one, other = (loftq_init(weight, 2, RANK, 3, hessian=hessian * 2.0**power) for power in (-40, 40))
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("case", ["zero", "rank one", "fewer tokens than inputs", "dead inputs", "a huge input"])
def test_singular_h_is_defined(case: str, rounding: str) -> None:
    weight, hessian = drawn()
    if case == "zero":
        hessian = torch.zeros_like(hessian)
    elif case in ("rank one", "fewer tokens than inputs"):
        x = torch.randn(1 if case == "rank one" else WIDTH // 2, WIDTH, generator=torch.Generator().manual_seed(3))
        hessian = x.T @ x / len(x)
    elif case == "dead inputs":
        hessian[:5], hessian[:, :5] = 0, 0
    else:
        hessian[7] *= 1e6
        hessian[:, 7] *= 1e6
    found = loftq_init(weight, 4, RANK, 3, hessian=hessian, rounding=rounding)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    if case == "zero":
        return
    assert output_error(weight, found, hessian) < 0.2
    if case == "dead inputs":
        dead = (weight - found[0] - found[2] @ found[1])[:, :5]
        assert float(dead.norm() / weight[:, :5].norm()) < 0.5, "they stay close to the weight's"


def test_without_steps_scales_are_those_of_the_outputs_error() -> None:
    weight, hessian = drawn()
    plain = loftq_init(weight, 2, RANK, 0, scale="search")
    found = loftq_init(weight, 2, RANK, 0, scale="search", hessian=hessian.diagonal())
    assert output_error(weight, found, hessian.diagonal()) < output_error(weight, plain, hessian.diagonal())
    assert torch.count_nonzero(found[2]) == 0
    assert torch.equal(found[1], plain[1])


@dataclasses.dataclass
class Refusal:
    told: str
    hessian: torch.Tensor | None
    rounding: str = "nearest"


EYE = torch.eye(WIDTH)
REFUSED = {
    "another layer's": Refusal(r"^hessian of 33 inputs: the weight is \(24, 32\); pass E\[x x'\] of its 32 inputs$", torch.eye(33)),
    "three dimensions": Refusal(r"^hessian of shape \(1, 32, 32\)", EYE[None]),
    "whole numbers": Refusal(r"^hessian of shape \(32, 32\) and torch\.int64", EYE.long()),
    "NaN": Refusal(r"^hessian: values are NaN", EYE * torch.nan),
    "negative": Refusal(r"^hessian: values are NaN, infinite, or negative", -EYE),
    "not symmetric": Refusal(r"^hessian: not symmetric", EYE + torch.triu(torch.ones_like(EYE), 1)),
    "indefinite": Refusal(r"^hessian: not positive semidefinite", 3 * torch.ones_like(EYE) - 2 * EYE.flip(0) - 2 * EYE),
    "gptq without it": Refusal(r"^rounding=gptq: not available; choose nearest, or gptq with a hessian$", None, "gptq"),
    "no rounding": Refusal(r"^rounding=floor: not available", EYE, "floor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_second_moment_is_refused(case: str) -> None:
    given = REFUSED[case]
    with pytest.raises(UserError, match=given.told) as caught:
        loftq_init(drawn()[0], 2, RANK, 1, hessian=given.hessian, rounding=given.rounding)
    assert len(str(caught.value).splitlines()) == 1
