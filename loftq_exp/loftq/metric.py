"""The norm of a weight's errors in a calibrated decomposition: the error of the layer's outputs over calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

from loftq_exp.errors import UserError
from loftq_exp.loftq.pieces import in_thread_pool, slices, spread

DAMPING = 0.01
"""Share of H's mean diagonal added to its diagonal. It keeps H definite, and directions without data from being free."""

METRIC_VERSION = 3
"""Part of the cache keys of calibrated results: increment it when damping, scaling, the root or a rounding change."""

PANEL = 256
"""Columns of the triangular root per piece of a product."""

TILE_ROWS = 256
"""Rows of the other factor per piece of a product."""


@dataclass(frozen=True)
class Metric:
    """The norm ||D||_H = sqrt(tr(D H D')) of an error D (out, in), for a root S of H = S S'.

    H = E[x x'] is the second moment of the layer's inputs, so ||D||_H^2 = E||D x||^2. It is scaled to a mean diagonal of 1
    and damped, see `metric_of`. S is the upper triangular root, or a vector if H is diagonal. Column j of D S thus depends on
    the columns of D up to j alone, which GPTQ's rounding uses.
    """

    root: torch.Tensor
    """S: float32 (in, in), upper triangular with a positive diagonal, or (in,) for a diagonal H."""
    importance: torch.Tensor
    """The diagonal of H: float32 (in,), positive."""

    @property
    def full(self) -> bool:
        """Whether H has more than a diagonal."""
        return self.root.ndim == 2

    def times_root(self, matrix: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return matrix @ S, float32 (rows, in), whose Frobenius norm is ||matrix||_H. Skips the zeros of S."""
        out = torch.empty_like(matrix, dtype=torch.float32) if out is None else out
        if not self.full:
            return torch.mul(matrix, self.root, out=out)
        root, columns = self.root, matrix.shape[1]

        def product(rows: slice) -> None:
            for panel in slices(columns, PANEL):
                torch.mm(matrix[rows, : panel.stop], root[: panel.stop, panel], out=out[rows, panel])

        spread(product, slices(len(matrix), TILE_ROWS if matrix.device.type == "cpu" else len(matrix)))
        return out


def metric_of(hessian: torch.Tensor, damping: float = DAMPING) -> Metric:
    """Return the norm of H: scaled to a mean diagonal of 1, with `damping` added to the diagonal.

    Inputs that are always zero therefore still weigh `damping`, so that their columns stay close to the weight's. If H is
    zero, all inputs weigh the same.

    Args:
        hessian: H (in, in), symmetric positive semidefinite, or its diagonal (in,); any floating type.
        damping: share of the mean diagonal, positive.

    Raises:
        UserError: if H is not finite, not symmetric, or not positive semidefinite.
    """
    return in_thread_pool(lambda: _metric_of(hessian, damping), hessian.device)


@torch.no_grad()
def _metric_of(hessian: torch.Tensor, damping: float) -> Metric:
    _check(hessian)
    diagonal = (hessian.diagonal() if hessian.ndim == 2 else hessian).double()
    mean = float(diagonal.mean())
    scaled = diagonal / mean if mean else torch.ones_like(diagonal)
    importance = (scaled + damping).to(torch.float32)
    if hessian.ndim == 1:
        return Metric((scaled + damping).sqrt().to(torch.float32), importance)
    # With both axes reversed, a lower Cholesky factor is the upper triangular root.
    damped = hessian.flip(0, 1).double()
    damped = damped.div_(mean) if mean else damped.zero_()
    damped.diagonal().copy_((scaled + damping).flip(0))
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise UserError("hessian: not positive semidefinite; pass E[x x'] of the layer's inputs")
    del damped  # as large as the root
    return Metric(root.to(torch.float32).flip(0, 1).contiguous(), importance)


def _check(hessian: torch.Tensor) -> None:
    shape = tuple(hessian.shape)
    if not hessian.is_floating_point() or not (len(shape) == 1 or (len(shape) == 2 and shape[0] == shape[1])):
        raise UserError(
            f"hessian of shape {shape} and {hessian.dtype}: pass a floating-point (in, in) matrix, or its diagonal"
        )
    diagonal = hessian.diagonal() if len(shape) == 2 else hessian
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise UserError(
            "hessian: values are NaN, infinite, or negative on the diagonal; pass E[x x'] of the layer's inputs"
        )
    peak = float(diagonal.max())
    if len(shape) == 2 and not torch.allclose(hessian, hessian.T, rtol=1e-4, atol=1e-5 * peak):
        raise UserError("hessian: not symmetric; pass E[x x'] of the layer's inputs")


def hessian_digest(hessian: torch.Tensor) -> str:
    """A hex digest (128-bit XXH3) of the values, type and shape of H, for cache keys."""
    digest = xxhash.xxh3_128(f"{hessian.dtype} {tuple(hessian.shape)} ".encode())
    digest.update(hessian.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_metric(metric: Metric, weight: torch.Tensor) -> None:
    """Raise UserError unless the metric's H has as many inputs as the weight (out, in)."""
    if len(metric.importance) != weight.shape[-1]:
        raise UserError(f"hessian of {len(metric.importance)} inputs: the weight is {tuple(weight.shape)}; "
                        f"pass E[x x'] of its {weight.shape[-1]} inputs")  # fmt: skip
