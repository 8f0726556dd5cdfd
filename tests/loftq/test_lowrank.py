"""The truncated SVD compared with torch's full SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.loftq.lowrank import SOLVERS, truncated_svd

FAST = settings(max_examples=40, deadline=None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(matrix, factors):
    return torch.linalg.matrix_norm(matrix.double() - factors[0].double() @ factors[1].double()).item()


def optimal_error(matrix, rank):
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt().item()


@FAST
@given(st.integers(1, 90), st.integers(1, 90), st.data())
def test_exact_is_optimal_balanced_and_signed(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = normal(rows, columns, seed=data.draw(st.integers(0, 2**31)))
    B, A = truncated_svd(matrix, rank, "exact")
    assert (B.shape, A.shape) == ((rows, rank), (rank, columns))
    assert B.is_contiguous()
    assert A.is_contiguous()
    assert error_of(matrix, (B, A)) == pytest.approx(optimal_error(matrix, rank), rel=1e-5, abs=1e-4)
    torch.testing.assert_close(B.T @ B, A @ A.T, atol=1e-4, rtol=1e-4)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) >= 0).all()


@pytest.mark.parametrize("shape", [(128, 300), (300, 128), (200, 200), (576, 192)])
def test_randomized_is_within_a_percent_on_a_flat_spectrum(shape):
    matrix = normal(*shape)
    for rank in (1, 8, 32, 64):
        assert error_of(matrix, truncated_svd(matrix, rank)) <= 1.01 * optimal_error(matrix, rank), rank


@FAST
@given(st.integers(1, 150), st.integers(1, 150), st.data())
def test_randomized_on_any_shape_and_decay(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    decay = torch.logspace(0, -data.draw(st.floats(0, 5)), min(rows, columns))
    seed = data.draw(st.integers(0, 2**31))
    left, right = (torch.linalg.qr(normal(size, len(decay), seed=seed + size)).Q for size in (rows, columns))
    matrix = left * decay @ right.T
    rounding = 1e-5 + 16 * torch.finfo(matrix.dtype).eps * matrix.norm().item()  # at full rank nothing else is left
    assert error_of(matrix, truncated_svd(matrix, rank)) <= 1.02 * optimal_error(matrix, rank) + rounding


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_does_not_matter(scale, solver):
    matrix = normal(120, 80)
    expected = torch.matmul(*truncated_svd(matrix, 10, solver))
    B, A = truncated_svd(matrix * scale, 10, solver)
    torch.testing.assert_close(B.double() @ A.double() / scale, expected.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
class TestDegenerate:
    def test_zeros(self, solver):
        B, A = truncated_svd(torch.zeros(100, 60), 5, solver)
        assert not B.any()
        assert not A.any()

    def test_rank_deficient_is_recovered(self, solver):
        matrix = normal(120, 4) @ normal(4, 90, seed=1)
        assert error_of(matrix, truncated_svd(matrix, 10, solver)) <= 1e-5 * matrix.norm()

    def test_equal_singular_values(self, solver):
        matrix = torch.linalg.qr(normal(120, 120)).Q
        assert error_of(matrix, truncated_svd(matrix, 20, solver)) == pytest.approx(10.0, rel=1e-4)

    def test_single_entry(self, solver):
        matrix = torch.zeros(100, 80)
        matrix[3, 4] = -2
        assert error_of(matrix, truncated_svd(matrix, 1, solver)) <= 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(150, 90), (90, 150)])
def test_same_bytes_and_global_random_state_untouched(solver, shape):
    matrix = normal(*shape)
    before = torch.get_rng_state()
    first = truncated_svd(matrix, 12, solver)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the global generator has no part in it
        second = truncated_svd(matrix.clone(), 12, solver)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(300, 128), (128, 300)])
def test_start_of_a_nearby_matrix_is_enough(shape):
    matrix = normal(*shape)
    nearby = matrix + 0.3 * normal(*shape, seed=1)
    factors = truncated_svd(matrix, 32, start=truncated_svd(nearby, 32, "exact"))
    assert error_of(matrix, factors) <= 1.01 * optimal_error(matrix, 32)


@pytest.mark.parametrize("shape", [(300, 128), (128, 300)])
def test_start_of_zeros_does_no_harm(shape):
    matrix = normal(*shape)
    factors = truncated_svd(matrix, 16, start=(torch.zeros(shape[0], 16), torch.zeros(16, shape[1])))
    assert all(factor.isfinite().all() for factor in factors)
    assert error_of(matrix, factors) <= 1.02 * optimal_error(matrix, 16)


def test_randomized_is_exact_where_the_subspace_is_most_of_the_matrix():
    matrix = normal(40, 70)
    expected = truncated_svd(matrix, 10, "exact")
    assert all(map(torch.equal, truncated_svd(matrix, 10), expected))


@pytest.mark.parametrize(("rank", "solver"), [(0, "exact"), (-1, "randomized"), (11, "exact"), (5, "lanczos")])
def test_refuses_what_does_not_fit(rank, solver):
    with pytest.raises(UserError, match=r"rank=|lanczos"):
        truncated_svd(normal(10, 20), rank, solver)
