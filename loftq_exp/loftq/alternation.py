"""The alternation on one weight: its state, and its two moves, quantizing and fitting.

Only the codes and the residual have the weight's size in memory; the residual has the dtype of the solver's products. All
else is computed on tiles of rows that fit a CPU's cache. A float32 residual is recomputed from the codes when needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from loftq_exp.device import compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.kernels.compiled import CPU_TYPES
from loftq_exp.loftq.lowrank import leading_factors
from loftq_exp.loftq.memory import Workspace, empty_buffer
from loftq_exp.loftq.pieces import in_thread_pool, slices, spread
from loftq_exp.loftq.quantizer import Quantized, Quantizer

if TYPE_CHECKING:
    from typing_extensions import Self

TILE_VALUES = 2**19
"""Values per tile on a CPU: 2 MiB in float32."""

TILES_AT_ONCE = 4
"""Number of tiles whose float32 residual is in memory at a time."""

TILE_ROWS = 32
"""Minimum rows per tile. A product of fewer rows spends its time reading the other factor."""


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of a weight W (out, in) with a quantized backbone Q, and their errors: W is about Q + B A.

    An alternation can continue from these alone.
    """

    lora_A: torch.Tensor
    """(rank, in) float32; zeros without steps."""
    lora_B: torch.Tensor
    """(out, rank) float32; zeros without steps."""
    errors: tuple[float, ...]
    """Relative Frobenius errors: ||W - quantize(W)|| / ||W||, then ||W - Q_t - B_t A_t|| / ||W|| after each step t.
    NaN for steps whose error was not measured."""
    norm: float
    """Frobenius norm of W."""
    unit: float
    """The power of two that scales W's largest magnitude to about 1."""
    output_errors: tuple[float, ...]
    """Relative errors in the norm of a `Metric`, as `errors`; empty without one."""
    kept_step: int
    """The step whose backbone and factors these are; `steps`, unless an earlier one had a smaller error."""

    @property
    def steps(self) -> int:
        """Number of alternating steps taken."""
        return len(self.errors) - 1

    @property
    def error(self) -> float:
        """The error of this backbone and these factors: that of the outputs if it is known, else that of the weight."""
        return (self.output_errors or self.errors)[self.kept_step]

    @property
    def continues(self) -> bool:
        """Whether an alternation can continue from these factors: they are those of the last step."""
        return self.kept_step == self.steps

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.lora_B), self.lora_A.shape[1]

    def truncated(self, rank: int) -> Self:
        """Return the result of one step at a smaller rank: the same backbone, and the leading components of the factors.

        The squares of the dropped singular values, sigma_i = |b_i| |a_i|, are added to the squared error.
        """
        if self.steps != 1 or self.output_errors or not 1 <= rank <= len(self.lora_A):
            raise ValueError("only one step can be truncated, to a rank that is not larger")
        sizes = torch.linalg.vector_norm(self.lora_B.double(), dim=0) * torch.linalg.vector_norm(
            self.lora_A.double(), dim=1
        )
        dropped = float(torch.linalg.vector_norm(sizes[rank:])) / self.norm if self.norm else 0.0
        errors = (self.errors[0], math.hypot(self.errors[1], dropped))
        lora_A, lora_B = self.lora_A[:rank].contiguous(), self.lora_B[:, :rank].contiguous()
        return dataclasses.replace(self, lora_A=lora_A, lora_B=lora_B, errors=errors)


@dataclass(frozen=True)
class Decomposition(Factors):
    """A weight as a quantized backbone and low-rank factors."""

    quantized: Quantized
    """Codes and scales of Q. Decode them with the quantizer that made them."""

    def to(self, device: torch.device) -> Self:
        """Return the same with tensors on `device`."""
        codes, scales = self.quantized
        return dataclasses.replace(self, lora_A=self.lora_A.to(device), lora_B=self.lora_B.to(device),
                                   quantized=Quantized(codes.to(device), scales.to(device)))  # fmt: skip

    def copied(self) -> Self:
        """Return the same with memory of its own, which no later step overwrites."""
        codes, scales = self.quantized
        return dataclasses.replace(
            self,
            lora_A=self.lora_A.clone(),
            lora_B=self.lora_B.clone(),
            quantized=Quantized(codes.clone(), scales.clone()),
        )

    def backbone(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """Return Q's values, (out, in) in `dtype`. They are exact if `dtype` is the quantizer's `scale_dtype` or wider."""
        codes, scales = self.quantized
        values = empty_buffer(self.shape, dtype, codes.device)

        def restore(tile: slice) -> None:
            groups = quantizer.groups_of(self.shape, tile)
            quantizer.restore(Quantized(codes[tile], scales[groups]), values[tile])

        tiles = _tiles(self.shape, quantizer.aligned_rows(self.shape), codes.device)
        in_thread_pool(lambda: spread(restore, tiles), codes.device)
        return values


class Tile(NamedTuple):
    """Some rows of a weight with their codes, scales and residual, few enough to fit a CPU's cache."""

    rows: slice
    weight: torch.Tensor
    """In a dtype that the quantizer's passes accept."""
    product: torch.Tensor | None
    """B A; None without factors."""
    codes: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor


class Alternation:
    """The alternation on one weight: call `start`, then `fit`, then `quantize` and `fit` for each further step.

    The state is Q (`codes`, `scales`), the factors `lora_A` and `lora_B`, the number of `steps`, and the `errors` so far.
    The errors are one for quantization alone and one per step. `result` returns the current decomposition.

    Measuring is separate from the two moves. The error of a step is due from `fit` until the next `quantize`, which replaces
    Q. It is measured in that `quantize`, where it costs least: each tile's product B A is already computed.

    The residual W - Q is scaled by a power of two, so that the weight's largest magnitude is about 1. This keeps the squares
    of very large or small values in range and is exact.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        measure: bool = True,
        unit: float | None = None,
        workspace: Workspace | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the codes, scales and residual of `weight`, (out, in).

        Args:
            weight: W.
            quantizer: makes Q.
            measure: whether to measure the error after each step.
            unit: `Factors.unit` of the weight; None: compute it.
            workspace: memory to reuse; None: new memory.
            residual_dtype: dtype of the solver's products; None: the device's fastest.

        Raises:
            UserError: if `unit` is None and the weight is not a finite matrix.
        """
        self.weight = weight.detach().contiguous()
        self.quantizer = quantizer
        self.measure = measure
        self.importance: torch.Tensor | None = None
        """Weight of each input in the search of scales, (in,) float32; None: all the same."""
        self.unit = unit or unit_of(self.weight)
        device, self.shape = weight.device, tuple(weight.shape)
        groups, numbers = quantizer.scales_shape(self.shape)
        self._workspace = workspace or Workspace()
        self._tiles = _tiles(self.shape, quantizer.aligned_rows(self.shape), device)
        self.codes = self._workspace.take("codes", self.shape, torch.uint8, device)
        self.scales = torch.empty(groups, numbers, dtype=torch.float32, device=device)
        self.residual = self._workspace.take(
            "residual", self.shape, residual_dtype or compute_dtype(device, None), device
        )
        """(W - Q) * unit, in the dtype of the solver's products."""
        self.lora_A: torch.Tensor | None = None
        self.lora_B: torch.Tensor | None = None
        self.steps = 0
        """Number of steps taken so far."""
        self.errors: list[float] = []
        self.norm = 0.0
        """Frobenius norm of W; set by `start` and `resume`."""

    @property
    def rank(self) -> int:
        """Rank of the current factors; 0 before the first `fit`."""
        return 0 if self.lora_A is None else len(self.lora_A)

    @property
    def error_due(self) -> bool:
        """Whether the error of the last step has not been measured yet."""
        return len(self.errors) == self.steps

    # The moves

    def start(self) -> None:
        """Compute Q = quantize(W) and the residual W - Q; measure the norm of W and the error of quantization alone."""

        def pass_over(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            tile = self._tile(rows)
            self._requantize(tile)
            return self._left_norms(tile), row_norms(tile.weight.to(torch.float32) * self.unit)

        norms = spread(pass_over, self._tiles)
        self.norm = norm_of_rows([norm for _, norm in norms]) / self.unit
        self._note_error([left for left, _ in norms])

    def resume(self, start: Factors) -> None:
        """Continue from the factors of `start`. The next `quantize` computes the backbone and the residual."""
        # Copy, because a memory-mapped tensor may have an alignment for which matrix products round differently.
        self.lora_B, self.lora_A = (tensor.to(self.weight.device, copy=True) for tensor in (start.lora_B, start.lora_A))
        self.steps, self.errors, self.norm = start.steps, list(start.errors), start.norm

    def quantize(self) -> None:
        """Compute Q = quantize(W - B A) and the residual W - Q; first measure the last step's error if it is due."""
        due = self.error_due

        def pass_over(rows: slice) -> torch.Tensor | None:
            tile = self._tile(rows)
            left = self._left_norms(tile) if due else None
            self._requantize(tile)
            return left

        norms = spread(pass_over, self._tiles)
        if due:
            self._note_error([norm for norm in norms if norm is not None])

    def quantize_around(self, lora_B: torch.Tensor, lora_A: torch.Tensor) -> None:
        """Take a step to these factors: compute Q = quantize(W - B A)."""
        self.lora_B, self.lora_A = lora_B, lora_A
        spread(lambda rows: self._requantize(self._tile(rows)), self._tiles)
        self.steps += 1

    def fit(self, rank: int, solver: str) -> None:
        """Compute B A = svd_r(W - Q), starting from the current factors."""
        start = self.lora_B if self.rank == rank else None
        squares = (self.errors[0] * self.norm * self.unit) ** 2  # used in the first step only
        lora_B, lora_A = leading_factors(self.residual, squares, self._in_float32, rank, solver, start)
        share = math.sqrt(1 / self.unit)
        self.lora_B, self.lora_A = lora_B.mul_(share), lora_A.mul_(share)
        self.steps += 1
        if not self.measure:
            self.errors.append(math.nan)

    def result(self, rank: int = 0) -> Decomposition:
        """Return the current decomposition with its error measured. If no factors were fitted, they are zeros of `rank`."""
        if self.error_due:
            self._note_error(spread(lambda rows: self._left_norms(self._tile(rows)), self._tiles))
        rows, columns = self.shape
        lora_A = self.scales.new_zeros(rank, columns) if self.lora_A is None else self.lora_A
        lora_B = self.scales.new_zeros(rows, rank) if self.lora_B is None else self.lora_B
        quantized = Quantized(self.codes, self.scales)
        return Decomposition(lora_A, lora_B, tuple(self.errors), self.norm, self.unit, (), self.steps, quantized)

    # Passes over a tile

    def _requantize(self, tile: Tile) -> None:
        """Write codes, scales and residual of quantize(W - B A)."""
        self.quantizer.requantize(
            tile.weight, tile.product, self.unit, tile.codes, tile.scales, tile.residual, self.importance
        )

    def _left_norms(self, tile: Tile) -> torch.Tensor:
        """Return the norms of the rows of (W - Q - B A) * unit."""
        left = self._scratch(tile.codes.shape, "left")
        self.quantizer.leave(tile.weight, tile.product, self.unit, tile.codes, tile.scales, left)
        return row_norms(left)

    def _note_error(self, norms: list[torch.Tensor]) -> None:
        """Append the relative error, given the norms of the rows of (W - Q - B A) * unit."""
        self.errors.append(norm_of_rows(norms) / self.unit / self.norm if self.norm else 0.0)

    def _in_float32(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield row slices and the float32 residual of these rows. Each yield overwrites the buffer of the one before."""
        if self.residual.dtype == torch.float32:
            yield slice(0, self.shape[0]), self.residual
            return
        wide = self.scales.new_empty(0)
        for some in slices(len(self._tiles), TILES_AT_ONCE):
            tiles = self._tiles[some]
            first, last = tiles[0].start, tiles[-1].stop
            wide = self.scales.new_empty(last - first, self.shape[1]) if not wide.numel() else wide[: last - first]

            def fill(rows: slice, wide: torch.Tensor = wide, first: int = first) -> None:
                out = wide[rows.start - first : rows.stop - first]
                self.quantizer.leave(self._weight(rows), None, self.unit, *self._quantized(rows), out)

            spread(fill, tiles)
            yield slice(first, last), wide

    def _tile(self, rows: slice) -> Tile:
        return Tile(rows, self._weight(rows), self._product(rows), *self._quantized(rows), self.residual[rows])

    def _weight(self, rows: slice) -> torch.Tensor:
        """Return these rows of W, in a dtype that the quantizer's passes accept."""
        weight = self.weight[rows]
        return weight if weight.dtype in CPU_TYPES else self._scratch(weight.shape, "weight").copy_(weight)

    def _product(self, rows: slice) -> torch.Tensor | None:
        """Return these rows of B A; None without factors."""
        if self.lora_A is None or self.lora_B is None:
            return None
        lora_B = self.lora_B[rows]
        return torch.mm(lora_B, self.lora_A, out=self._scratch((len(lora_B), self.shape[1]), "product"))

    def _quantized(self, rows: slice) -> Quantized:
        """Return views of the codes and scales of these rows."""
        return Quantized(self.codes[rows], self.scales[self.quantizer.groups_of(self.shape, rows)])

    def _scratch(self, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Return a float32 buffer for a tile. On a CPU, all tiles of a thread share it."""
        device = self.weight.device
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        return self._workspace.of_thread().take(purpose, shape, torch.float32, device)


def _tiles(shape: tuple[int, ...], aligned: int, device: torch.device) -> list[slice]:
    """Split the rows of a matrix into tiles of a multiple of `aligned` rows; the last may be shorter."""
    rows, columns = shape
    most = max(TILE_VALUES // columns, TILE_ROWS) if device.type == "cpu" else rows
    size = min(max(most // aligned, 1) * aligned, rows)
    return slices(rows, size)


def unit_of(weight: torch.Tensor) -> float:
    """Return the power of two that scales the largest magnitude to about 1. Raise UserError if not a finite matrix."""
    name = f"weight of shape {tuple(weight.shape)}"
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UserError(f"{name} and {weight.dtype}: not a floating-point matrix; pass one of shape (out, in)")
    ends = spread(lambda rows: torch.stack(torch.aminmax(weight[rows])), _tiles(tuple(weight.shape), 1, weight.device))
    low, high = (float(end.to(torch.float32)) for end in torch.stack(ends).aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        lost = weight.numel() - int(torch.isfinite(weight.to(torch.float32)).sum())
        raise UserError(
            f"{name}: {lost} of {weight.numel()} values are NaN or infinite in float32; get the weight again"
        )
    return 2.0 ** -min(max(math.frexp(max(-low, high))[1], -126), 126)


def row_norms(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dim=1)


def norm_of_rows(rows: list[torch.Tensor]) -> float:
    """Return the Frobenius norm of a matrix from the norms of its rows, summed in float64."""
    return float(torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64))
