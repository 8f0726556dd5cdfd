"""The split of a product between its factors: the product stays, the rows of A become orthonormal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp import loftq_init
from loftq_exp.errors import UserError
from loftq_exp.loftq import split_factors


def factors(rows: int, columns: int, rank: int, seed: int, spread: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (-spread * torch.linspace(0, 1, rank))
    return (torch.randn(rank, columns, generator=generator) * scales[:, None],
            torch.randn(rows, rank, generator=generator))  # fmt: skip


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 6), st.sampled_from([0.25, 1.0, 2.0, 3.7])
)
def test_the_product_stays(rows: int, columns: int, rank: int, spread: float, scaling: float) -> None:
    A, B = factors(rows, columns, min(rank, rows, columns), 1, spread)
    for how in ("balanced", "orthonormal"):
        new_A, new_B = split_factors(A, B, scaling, how)
        assert (new_A.shape, new_B.shape) == (A.shape, B.shape)
        assert new_A.dtype == new_B.dtype == torch.float32
        product = B.double() @ A.double()
        torch.testing.assert_close(scaling * (new_B.double() @ new_A.double()), product, rtol=0,
                                   atol=float(2e-6 * product.norm()))  # fmt: skip


@given(st.integers(1, 24), st.integers(0, 3))
def test_rows_are_orthonormal_and_columns_carry_the_singular_values(rank: int, seed: int) -> None:
    A, B = factors(24, 64, rank, seed)
    new_A, new_B = split_factors(A, B, 2.0, "orthonormal")
    torch.testing.assert_close(new_A @ new_A.T, torch.eye(rank), rtol=0, atol=1e-6)
    lengths = new_B.norm(dim=0)
    assert bool((lengths.diff() <= 1e-5).all())  # the singular values, descending
    torch.testing.assert_close(lengths, torch.linalg.svdvals(B @ A)[:rank] / 2, rtol=1e-4, atol=1e-5)


def test_balanced_factors_are_those_that_are_given() -> None:
    A, B = factors(8, 12, 4, 0)
    new_A, new_B = split_factors(A, B, 1.0, "balanced")
    assert torch.equal(new_A, A)
    assert torch.equal(new_B, B)


def test_a_product_of_lower_rank_and_of_zeros() -> None:
    A, B = factors(16, 20, 4, 0)
    for product_B in (torch.cat([B[:, :2], torch.zeros(16, 2)], dim=1), torch.zeros_like(B)):
        new_A, new_B = split_factors(A, product_B, 1.0, "orthonormal")
        torch.testing.assert_close(new_B @ new_A, product_B @ A, rtol=0, atol=1e-5)
        torch.testing.assert_close(new_A @ new_A.T, torch.eye(4), rtol=0, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    A, B = factors(512, 768, 16, 0)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(split_factors(A, B, 1.0, "orthonormal"))
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_loftq_init_splits_and_refuses() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    Q, A, B = loftq_init(weight, 2, 8, 2, alpha=16.0)
    other_Q, other_A, other_B = loftq_init(weight, 2, 8, 2, alpha=16.0, factors="orthonormal")
    assert torch.equal(Q, other_Q)
    torch.testing.assert_close(other_B @ other_A, B @ A, rtol=0, atol=1e-5)
    torch.testing.assert_close(other_A @ other_A.T, torch.eye(8), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"^factors=even: not a split; choose from: balanced, orthonormal$"):
        loftq_init(weight, 2, 8, 2, factors="even")
