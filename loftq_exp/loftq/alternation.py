"""One weight on its way between backbone and factors: what the alternating algorithm holds, and its two moves.

Nothing of the weight's size is made but the codes, and the residual in the type of the solver's products. The rest goes by
tiles of rows that fit a processor's cache; where the residual is wanted in float32, it is told from the codes once more.
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
from loftq_exp.loftq.memory import Rooms, room
from loftq_exp.loftq.pieces import conducted, slices, spread
from loftq_exp.loftq.quantizer import Quantized, Quantizer

if TYPE_CHECKING:
    from typing_extensions import Self

TILE_VALUES = 2**19
"""Values of a weight that are worked on at a time on a processor: 2 MiB in float32."""

TILES_AT_ONCE = 4
"""Tiles whose residual in float32 is in memory at a time."""

TILE_ROWS = 32
"""The fewest rows of a tile: a product of fewer rows spends its time on the other factor."""


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of a weight W (out, in) beside a quantized backbone Q, and how near they come: W is about Q + B A.

    This is all that an alternation goes on from.
    """

    lora_A: torch.Tensor
    """(rank, in) float32; zeros without steps."""
    lora_B: torch.Tensor
    """(out, rank) float32; zeros without steps."""
    errors: tuple[float, ...]
    """Relative Frobenius errors: ||W - quantize(W)|| / ||W||, then ||W - Q_t - B_t A_t|| / ||W|| after each step t.
    NaN after steps whose error was not asked for."""
    norm: float
    """Frobenius norm of W."""
    unit: float
    """The power of two that brings W's largest value near 1."""

    @property
    def steps(self) -> int:
        """Alternating steps taken."""
        return len(self.errors) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.lora_B), self.lora_A.shape[1]

    def truncated(self, rank: int) -> Self:
        """The same after one step at a smaller rank: the same backbone, the leading part of the factors.

        What the dropped components weigh, sigma_i = |b_i| |a_i|, is added to the squared error.
        """
        if self.steps != 1 or not 1 <= rank <= len(self.lora_A):
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
    """Codes and scales of Q, for the quantizer that made them."""

    def backbone(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """Q's values (out, in) in `dtype`, which must be the quantizer's `scale_dtype` or wider to hold them exactly."""
        codes, scales = self.quantized
        values = room(self.shape, dtype, codes.device)

        def restore(tile: slice) -> None:
            groups = quantizer.groups_of(self.shape, tile)
            quantizer.restore(Quantized(codes[tile], scales[groups]), values[tile])

        tiles = _tiles(self.shape, quantizer.aligned_rows(self.shape), codes.device)
        conducted(lambda: spread(restore, tiles), codes.device)
        return values


class _Tile(NamedTuple):
    """Some rows of a weight, and what belongs to them: a pass over a tile finds all of it in a CPU's cache."""

    weight: torch.Tensor
    """In a type that the quantizer's passes take."""
    product: torch.Tensor | None
    """B A; None where there are no factors."""
    codes: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor


class Alternation:
    """The alternation on one weight: `start`, then `fit`, and for each further step `quantize` and `fit`.

    The state is Q (`codes`, `scales`), the factors `lora_A` and `lora_B`, the number of `steps`, and the `errors` so far:
    one of quantization alone and one a step. `result` is where it stands.

    Measuring is apart from the two moves. The error of a step is that of its Q and its factors; it is due from `fit` until the
    next `quantize`, which replaces Q. There it costs least, because each tile's product B A is at hand.

    The residual W - Q is held in units of a power of two near the weight's largest value, which keeps the squares of very
    large or small values in range and changes no digit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Quantizer,
        measure: bool = True,
        unit: float | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        """`measure`: whether the errors after steps are wanted; `unit`: the weight's, where it is known; `rooms`: to work in.

        Raises UserError for a weight that is no finite matrix, where the unit is not known.
        """
        self.weight = weight.detach().contiguous()
        self.quantizer = quantizer
        self.measure = measure
        self.unit = unit or _unit(self.weight)
        device, self.shape = weight.device, tuple(weight.shape)
        groups, numbers = quantizer.scales_shape(self.shape)
        self._rooms = rooms or Rooms()
        self._tiles = _tiles(self.shape, quantizer.aligned_rows(self.shape), device)
        self.codes = self._rooms.take("codes", self.shape, torch.uint8, device)
        self.scales = torch.empty(groups, numbers, dtype=torch.float32, device=device)
        self.residual = self._rooms.take("residual", self.shape, compute_dtype(device, None), device)
        """W - Q in units, in the type of the solver's products."""
        self.lora_A: torch.Tensor | None = None
        self.lora_B: torch.Tensor | None = None
        self.steps = 0
        """Factors fitted so far."""
        self.errors: list[float] = []
        self.norm = 0.0
        """Frobenius norm of W, from `start` or `resume` on."""

    @property
    def rank(self) -> int:
        """Rank of the factors at hand; 0 before the first."""
        return 0 if self.lora_A is None else len(self.lora_A)

    @property
    def error_due(self) -> bool:
        """Whether the error of the last step is still to be measured."""
        return len(self.errors) == self.steps

    # The moves

    def start(self) -> None:
        """Q = quantize(W) and the residual W - Q; measures the norm of W and the error of quantization alone."""

        def pass_over(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            tile = self._tile(rows)
            self._requantize(tile)
            return self._left_norms(tile), _row_norms(tile.weight.to(torch.float32) * self.unit)

        norms = spread(pass_over, self._tiles)
        self.norm = _norm([norm for _, norm in norms]) / self.unit
        self._note_error([left for left, _ in norms])

    def resume(self, start: Factors) -> None:
        """Takes up the factors where `start` left off; backbone and residual are the next `quantize`'s to find."""
        # Copies, because a tensor that maps a file may lie at an address for which matrix products round differently.
        self.lora_B, self.lora_A = (tensor.to(self.weight.device, copy=True) for tensor in (start.lora_B, start.lora_A))
        self.steps, self.errors, self.norm = start.steps, list(start.errors), start.norm

    def quantize(self) -> None:
        """Q = quantize(W - B A) and the residual W - Q; before that, measures the last step's error where it is due."""
        due = self.error_due

        def pass_over(rows: slice) -> torch.Tensor | None:
            tile = self._tile(rows)
            left = self._left_norms(tile) if due else None
            self._requantize(tile)
            return left

        norms = spread(pass_over, self._tiles)
        if due:
            self._note_error([norm for norm in norms if norm is not None])

    def fit(self, rank: int, solver: str) -> None:
        """B A = svd_r(W - Q), started from the factors at hand."""
        start = self.lora_B if self.rank == rank else None
        squares = (self.errors[0] * self.norm * self.unit) ** 2  # read before the first step only
        lora_B, lora_A = leading_factors(self.residual, squares, self._in_float32, rank, solver, start)
        share = math.sqrt(1 / self.unit)
        self.lora_B, self.lora_A = lora_B.mul_(share), lora_A.mul_(share)
        self.steps += 1
        if not self.measure:
            self.errors.append(math.nan)

    def result(self, rank: int = 0) -> Decomposition:
        """The decomposition as it stands, measured. `rank` is that of the zero factors where none were fitted."""
        if self.error_due:
            self._note_error(spread(lambda rows: self._left_norms(self._tile(rows)), self._tiles))
        rows, columns = self.shape
        lora_A = self.scales.new_zeros(rank, columns) if self.lora_A is None else self.lora_A
        lora_B = self.scales.new_zeros(rows, rank) if self.lora_B is None else self.lora_B
        quantized = Quantized(self.codes, self.scales)
        return Decomposition(lora_A, lora_B, tuple(self.errors), self.norm, self.unit, quantized)

    # Passes over a tile

    def _requantize(self, tile: _Tile) -> None:
        """Writes codes, scales and residual of quantize(W - B A)."""
        self.quantizer.requantize(tile.weight, tile.product, self.unit, tile.codes, tile.scales, tile.residual)

    def _left_norms(self, tile: _Tile) -> torch.Tensor:
        """Norms of the rows of W - Q - B A, in units."""
        left = self._scratch(tile.codes.shape, "left")
        self.quantizer.leave(tile.weight, tile.product, self.unit, tile.codes, tile.scales, left)
        return _row_norms(left)

    def _note_error(self, norms: list[torch.Tensor]) -> None:
        """Adds the error that follows from the norms of the rows, in units, of what is left of the weight."""
        self.errors.append(_norm(norms) / self.unit / self.norm if self.norm else 0.0)

    def _in_float32(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The residual in float32, some rows at a time; the next rows take the place of those before."""
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

    def _tile(self, rows: slice) -> _Tile:
        return _Tile(self._weight(rows), self._product(rows), *self._quantized(rows), self.residual[rows])

    def _weight(self, rows: slice) -> torch.Tensor:
        """These rows of W, in a type that the quantizer's passes take."""
        weight = self.weight[rows]
        return weight if weight.dtype in CPU_TYPES else self._scratch(weight.shape, "weight").copy_(weight)

    def _product(self, rows: slice) -> torch.Tensor | None:
        """These rows of B A; None where there are no factors."""
        if self.lora_A is None or self.lora_B is None:
            return None
        lora_B = self.lora_B[rows]
        return torch.mm(lora_B, self.lora_A, out=self._scratch((len(lora_B), self.shape[1]), "product"))

    def _quantized(self, rows: slice) -> Quantized:
        """Codes and scales of these rows, to be read or written."""
        return Quantized(self.codes[rows], self.scales[self.quantizer.groups_of(self.shape, rows)])

    def _scratch(self, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Workspace for a tile's values in float32, on a CPU the same for each tile of a thread."""
        device = self.weight.device
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        return self._rooms.of_thread().take(purpose, shape, torch.float32, device)


def _tiles(shape: tuple[int, ...], aligned: int, device: torch.device) -> list[slice]:
    """The rows of a matrix in tiles of a multiple of `aligned` rows, but for the last."""
    rows, columns = shape
    most = max(TILE_VALUES // columns, TILE_ROWS) if device.type == "cpu" else rows
    size = min(max(most // aligned, 1) * aligned, rows)
    return slices(rows, size)


def _unit(weight: torch.Tensor) -> float:
    """The power of two that brings the largest value near 1; UserError for a weight that is no finite matrix."""
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


def _row_norms(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dim=1)


def _norm(rows: list[torch.Tensor]) -> float:
    """The Frobenius norm of a matrix from the norms of its rows, summed in float64."""
    return float(torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64))
