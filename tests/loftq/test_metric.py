"""The norm of the outputs: scaling, damping, degenerate second moments, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.loftq.metric import DAMPING, metric_of


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with one huge and one dead column, (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    values[:, 0] *= 1000
    values[:, -1] = 0
    return values


def second_moment(values: torch.Tensor) -> torch.Tensor:
    return (values.double().T @ values.double() / len(values)).float()


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """H as the module defines it, in float64."""
    wide = hessian.double()
    mean = wide.diagonal().mean()
    wide = wide / mean if mean else torch.eye(len(wide), dtype=torch.float64)
    return wide + damping * torch.eye(len(wide), dtype=torch.float64)


@given(tokens=st.integers(1, 80), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_norm_is_that_of_the_outputs(tokens: int, width: int, seed: int) -> None:
    hessian = second_moment(inputs(tokens, width, seed))  # with fewer tokens than inputs: singular
    error = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    wide = error.double()
    expected = torch.trace(wide @ damped(hessian) @ wide.T).sqrt()
    found = metric_of(hessian).times_root(error).double().norm()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_root_is_upper_triangular_with_a_positive_diagonal() -> None:
    hessian = second_moment(inputs(50, 24))
    root = metric_of(hessian).root.double()
    assert torch.equal(root, root.triu())
    assert bool((root.diagonal() > 0).all())
    expected = damped(hessian)
    torch.testing.assert_close(root @ root.T, expected, rtol=0, atol=1e-6 * float(expected.max()))


def test_diagonal_is_the_full_form_of_a_diagonal_matrix() -> None:
    diagonal = second_moment(inputs(50, 16)).diagonal().clone()
    error = torch.randn(3, 16)
    full, thin = metric_of(torch.diag(diagonal)), metric_of(diagonal)
    assert torch.equal(full.importance, thin.importance)
    torch.testing.assert_close(full.times_root(error), thin.times_root(error))
    torch.testing.assert_close(full.root, torch.diag(thin.root))


def test_scale_of_the_inputs_does_not_matter() -> None:
    hessian = second_moment(inputs(50, 16))
    assert torch.equal(metric_of(hessian).root, metric_of(hessian * 4.0).root)


@pytest.mark.parametrize("hessian", [torch.zeros(8, 8), torch.zeros(8)])
def test_without_any_input_all_columns_weigh_the_same(hessian: torch.Tensor) -> None:
    importance = metric_of(hessian).importance
    assert torch.equal(importance, importance[:1].expand(8))


def test_dead_inputs_weigh_the_damping() -> None:
    hessian = torch.diag(torch.tensor([2.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(metric_of(hessian).importance, torch.tensor([2.0, 0.0, 1.0, 1.0]) + DAMPING)


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.ones(3, 4), "shape"),
        (torch.ones(3, 3, dtype=torch.int64), "int64"),
        (torch.full((3, 3), torch.nan), "NaN"),
        (-torch.eye(3), "negative"),
        (torch.tensor([1.0, -1.0]), "negative"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 3.0], [3.0, 1.0]]), "semidefinite"),
    ],
)
def test_what_is_no_second_moment_is_refused(hessian: torch.Tensor, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        metric_of(hessian)
