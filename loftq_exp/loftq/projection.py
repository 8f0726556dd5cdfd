"""The leading left singular vectors of a matrix with any spectrum, by subspace iteration.

In the norm of a calibrated decomposition a few directions outweigh all others by orders of magnitude, which
`loftq_exp.loftq.lowrank.leading_factors` cannot resolve. Here products are float32, Gram matrices float64, and columns are
scaled by their singular values before they are made orthonormal.
"""

from __future__ import annotations

import torch

from loftq_exp.loftq.lowrank import OVERSAMPLING, SHIFT, thin_times, times_thin
from loftq_exp.loftq.pieces import torchs_own_threads

LEAST_GAIN = 0.001
"""From a random start, sweeps end when one captures less than this share of the remaining squared norm."""

MOST_SWEEPS = 20
"""Maximum number of sweeps from a random start."""

WARM_SWEEPS = 1
"""Sweeps from the left vectors of the previous step."""


def leading_left(
    matrix: torch.Tensor, squares: float, rank: int, solver: str, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading left singular vectors (m, r), orthonormal, and singular values (r,) in descending order, float32.

    The same input gives the same bytes. A matrix of zeros gives singular values of zero.

    Args:
        matrix: M (m, n), float32, finite.
        squares: sum of squares of M, for the stopping criterion.
        rank: r, from 1 to min(m, n).
        solver: `exact`: a full SVD in float64. `randomized`: subspace iteration, unless the subspace is most of the matrix.
        start: (m, r) columns that span nearly the same space, such as the previous step's B; None: random.
    """
    if solver == "exact" or 2 * (rank + OVERSAMPLING) > min(matrix.shape):
        with torchs_own_threads():
            wide = matrix.double() if solver == "exact" else matrix
            left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
        return left[:, :rank].float(), singular[:rank].float()
    cold = start is None
    width = min(rank + OVERSAMPLING, *matrix.shape)
    left = _orthonormal(_random(matrix.shape[0], width).to(matrix.device) if start is None else start)
    left, singular, right = _rotated(left, matrix)
    captured = float(singular.double().square().sum())
    for _ in range(MOST_SWEEPS if cold else WARM_SWEEPS):
        shift = SHIFT * singular[-1].square() / singular.clamp(min=torch.finfo(torch.float32).tiny)
        left = _orthonormal(times_thin(matrix, right.T) - left * shift)
        left, singular, right = _rotated(left, matrix)
        before, captured = captured, float(singular.double().square().sum())
        if captured - before < LEAST_GAIN * (squares - captured):
            break
    return left[:, :rank].contiguous(), singular[:rank]


def _rotated(left: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the triplets of the matrix within the span of the orthonormal `left`; right vectors are rows."""
    right = thin_times(left.T.contiguous(), matrix)
    wide = right.double()
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(wide @ wide.T))
    singular = squares.clamp(min=0).sqrt()
    inverse = torch.where(singular > 0, 1 / singular, 0.0)
    return left @ vectors.float(), singular.float(), (((vectors * inverse).T) @ wide).float()


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the columns' span; of a larger space if they are dependent."""
    lengths = torch.linalg.vector_norm(columns, dim=0, keepdim=True)
    unit = (columns / lengths.clamp(min=torch.finfo(torch.float32).tiny)).double()
    factor, failed = torch.linalg.cholesky_ex(unit.T @ unit)
    if failed or float(factor.diagonal().min()) < 1e-4:
        return torch.linalg.qr(unit).Q.float()
    return torch.linalg.solve_triangular(factor, unit.T, upper=False).T.float()


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
