"""The truncated singular value decomposition: the best rank-r approximation of a matrix, as balanced factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from loftq_exp.errors import UserError
from loftq_exp.loftq.pieces import slices, spread, torchs_own_threads

SOLVERS = ("randomized", "exact")

SOLVER_VERSION = "3"
"""Part of every cache key: change it when a solver's results change."""

OVERSAMPLING = 16
"""Directions iterated beyond the rank, so that the last wanted ones converge."""

PASSES = 8
"""Subspace iterations from a random start, each two products with the matrix."""

WARM_PASSES = 4
"""Subspace iterations from the factors of a nearby matrix."""

LEAST_GAIN = 0.005
"""From a random start, `leading_factors` sweeps until a sweep captures less than this share of the remaining squared norm.
From the previous step's factors, one sweep is enough."""

MOST_SWEEPS = 10
"""Maximum number of sweeps of `leading_factors`."""

PIECE = 1024
"""Rows or columns per piece of work, in a product of a matrix with a thin one on a CPU."""

SHIFT = 0.3
"""Share of the smallest squared singular value by which `leading_factors` shifts the spectrum."""

STEEPEST = 64.0
"""Largest ratio of leading singular values for which bfloat16 products and float32 squares are accurate enough."""


def truncated_svd(
    matrix: torch.Tensor,
    rank: int,
    solver: str = "randomized",
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (B, A) whose product B A is the best rank-r approximation: B = U_r sqrt(S_r), A = sqrt(S_r) V_r'.

    The same input gives the same bytes on the same machine. No global random state is used. Signs are fixed: the entry of
    largest magnitude in each row of A is positive. A matrix of zeros gives zeros.

    Args:
        matrix: (m, n), finite, float32, any device.
        rank: r, from 1 to min(m, n).
        solver: `exact` computes the full decomposition, and is the reference. `randomized` iterates a subspace of
            r + OVERSAMPLING directions, at a fraction of the cost. The hardest case is a flat spectrum, as a quantization
            residual has; there its Frobenius error stays within 1 % of the exact one. If these directions are more than
            half of min(m, n), the full decomposition is used, because iterating would save little.
        start: factors (B, A) of a nearby matrix, (m, r) and (r, n), to iterate from; `exact` ignores them.

    Returns:
        B (m, r) and A (r, n): float32, contiguous, on the matrix's device.

    Raises:
        UserError: for an unknown solver or a rank out of range.
    """
    check_svd_settings(matrix.shape, rank, solver)
    # Scale to about 1, because squares of very large or small float32 values leave the range.
    peak = matrix.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    relative = matrix / peak
    if solver == "exact" or 2 * (rank + OVERSAMPLING) > min(matrix.shape):
        left, singular, right = _full_svd(relative)
    elif matrix.shape[0] <= matrix.shape[1]:
        left, singular, right = _subspace_svd(relative, rank, None if start is None else start[0])
    else:
        right, singular, left = _subspace_svd(relative.T, rank, None if start is None else start[1].T)
    return _balanced(left[:, :rank], singular[:rank], right[:, :rank], peak)


def leading_factors(
    matrix: torch.Tensor,
    squares: float,
    in_float32: Callable[[], Iterable[tuple[slice, torch.Tensor]]],
    rank: int,
    solver: str,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (B, A) like `truncated_svd`, with only the accuracy that one step of an alternation needs.

    A quantization residual has a flat spectrum, so finding its singular vectors accurately takes many iterations; the next
    step changes them anyway. This function therefore computes few products, in bfloat16 where that is fast, and shifts:

        V = M' U,   U <- orth(M V - c U),   c = SHIFT * (smallest squared singular value in V)

    The shift c subtracts the same amount from every squared singular value. This increases their ratios, which determine
    the rate of convergence. From a warm start it also extrapolates beyond the last solution. For `exact`, for a small
    matrix, and for a spectrum too steep for bfloat16 and a Cholesky factor, this is `truncated_svd`.

    Args:
        matrix: M (m, n), finite, near 1 in magnitude, in the dtype of the products, any device.
        squares: sum of squares of M; used with a random start.
        in_float32: yields M in float32 in pieces: a slice of rows and their values. Each yield overwrites the one before.
        rank: r, from 1 to min(m, n).
        solver: `randomized` or `exact`.
        start: B (m, r) of a nearby matrix; None: random.
    """
    if solver != "exact" and 2 * (rank + OVERSAMPLING) <= min(matrix.shape):
        if start is None:
            left = _orthonormal(_random(matrix.shape[0], rank).to(matrix.device))
        else:
            left = start / torch.linalg.vector_norm(start, dim=0).clamp(min=torch.finfo(torch.float32).tiny)
        found = None if left is None else _sweep(matrix, left, squares if start is None else None)
        if found is not None and start is None:
            # In float32, because the first step's factors may be truncated, and the error is then computed from them.
            right = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.float32)
            for rows, values in in_float32():
                _add_product(right, found[0][rows].T, values)
            found = _turned(found[0], right)
        if found is not None:
            left, singular, right = found
            return _balanced(left, singular, right.T, scale=singular.new_ones(()))
    whole = torch.empty_like(matrix, dtype=torch.float32)
    for rows, values in in_float32():
        whole[rows] = values
    with torchs_own_threads():
        return truncated_svd(whole, rank, solver)


_Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Left vectors (m, r), singular values (r,) in descending order, right vectors as rows (r, n)."""


def _sweep(matrix: torch.Tensor, left: torch.Tensor, total: float | None) -> _Triplets | None:
    """Return the leading triplets after a few sweeps from the orthonormal `left`; None if the spectrum is too steep.

    `total` is the sum of squares of the matrix, which the stopping criterion needs; None: do one sweep.
    """
    found = _ritz(matrix, left)
    captured = 0.0
    for _ in range(MOST_SWEEPS):
        if found is None:
            return None
        left, singular, right = found
        shift = SHIFT * singular[-1].square() / singular
        better = _orthonormal(times_thin(matrix, right.T) - left * shift)
        found = None if better is None else _ritz(matrix, better)
        if total is None or found is None:
            break
        before, captured = captured or float(singular.square().sum()), float(found[1].square().sum())
        if captured - before < LEAST_GAIN * (total - captured):
            break
    return found


def _ritz(matrix: torch.Tensor, left: torch.Tensor) -> _Triplets | None:
    """Return the matrix's triplets within the subspace of the orthonormal `left`; None if their spectrum is too steep.

    Rotating to them in each sweep keeps rounding errors of a large component from swamping the small ones.
    """
    return _turned(left, thin_times(left.T.contiguous(), matrix))  # contiguous: a transposed matrix would be copied


def _turned(left: torch.Tensor, right: torch.Tensor) -> _Triplets | None:
    """Return the triplets of the product of the orthonormal `left` (m, r) and `right` (r, n); None if too steep."""
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(right @ right.T))
    if not squares[0] <= STEEPEST**2 * squares[-1]:
        return None
    singular = squares.sqrt()
    return left @ vectors, singular, (vectors / singular).T @ right


def times_thin(matrix: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
    """Return matrix @ thin, computed in the matrix's dtype, as float32."""
    thin = thin.to(matrix.dtype)
    return torch.cat(spread(lambda rows: (matrix[rows] @ thin).to(torch.float32), _pieces(matrix, 0)))


def thin_times(thin: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return thin @ matrix, computed in the matrix's dtype, as float32."""
    thin = thin.to(matrix.dtype)
    return torch.cat(spread(lambda some: (thin @ matrix[:, some]).to(torch.float32), _pieces(matrix, 1)), dim=1)


def _add_product(total: torch.Tensor, thin: torch.Tensor, matrix: torch.Tensor) -> None:
    """Add thin @ matrix to `total` in place."""
    spread(lambda some: total[:, some].addmm_(thin, matrix[:, some]), _pieces(matrix, 1))


def _pieces(matrix: torch.Tensor, dim: int) -> list[slice]:
    length = matrix.shape[dim]
    return slices(length, PIECE if matrix.device.type == "cpu" else length)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor | None:
    """Return an orthonormal basis of the columns, by Cholesky of their Gram matrix; None if they are dependent."""
    factor, failed = torch.linalg.cholesky_ex((columns.T @ columns).to(torch.float64))
    if failed:
        return None
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return columns @ inverse.T.to(torch.float32)


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def check_svd_settings(shape: torch.Size, rank: int, solver: str) -> None:
    """Raise UserError for an unknown solver or a rank out of range for a matrix of this shape."""
    if solver not in SOLVERS:
        raise UserError(f"solver={solver!r}: unknown; choose {' or '.join(SOLVERS)}")
    if not 1 <= rank <= min(shape):
        raise UserError(f"rank={rank}: does not fit a weight of {shape[0]} x {shape[1]}; choose 1 to {min(shape)}")


def _full_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, singular, right.T


def _subspace_svd(
    matrix: torch.Tensor, rank: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular triplets of a wide matrix (m <= n), by subspace iteration on its short side.

    U = orth(M orth(M' U)) is repeated; each iteration amplifies directions by their squared singular values. The
    decomposition inside the subspace is that of the small triangle T in M' U = V T. The orthonormal bases between products
    prevent the directions from collapsing into the largest one in float32.
    """
    width = rank + OVERSAMPLING
    random = _random(matrix.shape[0], width).to(matrix.device)
    guess = random if start is None else torch.cat([start, random[:, : width - start.shape[1]]], dim=1)
    left = torch.linalg.qr(guess).Q
    for _ in range(PASSES if start is None else WARM_PASSES):
        left = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ left).Q).Q
    right, triangle = torch.linalg.qr(matrix.T @ left)
    inner_right, singular, inner_left = _full_svd(triangle)
    return left @ inner_left, singular, right @ inner_right


def _balanced(
    left: torch.Tensor, singular: torch.Tensor, right: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B = U sqrt(scale S) and A = sqrt(scale S) V', signed so that each row of A has a positive largest entry."""
    peaks = right.gather(0, right.abs().argmax(dim=0, keepdim=True))
    roots = singular.sqrt() * scale.sqrt() * torch.where(peaks < 0, -1.0, 1.0)
    return (left * roots).contiguous(), (right * roots).T.contiguous()
