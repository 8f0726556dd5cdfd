"""One weight on its way between backbone and factors: what the alternating algorithm holds, and its two moves.

Nothing of the weight's size is made but the codes, and the residual in the type of the solver's products. The rest goes by
tiles of rows that fit a processor's cache; where the residual is wanted in float32, it is told from the codes once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loftq_exp.device import compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.kernels.quantize import FUSED_TYPES
from loftq_exp.loftq.lowrank import leading_factors
from loftq_exp.loftq.memory import Rooms, room
from loftq_exp.loftq.pieces import conducted, slices, spread
from loftq_exp.loftq.quantizers import Quantized, Quantizer

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


class Alternation:
    """The alternation on one weight. `quantize` and `fit` are the two halves of a step; `result` is where it stands.

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
        self.unit = unit or _unit(self.weight)
        device, self.shape = weight.device, tuple(weight.shape)
        groups, numbers = quantizer.scales_shape(self.shape)
        self._rooms = rooms or Rooms()
        self.codes = self._rooms.take("codes", self.shape, torch.uint8, device)
        self.scales = torch.empty(groups, numbers, dtype=torch.float32, device=device)
        self.residual = self._rooms.take("residual", self.shape, compute_dtype(device, None), device)
        """W - Q in units, in the type of the solver's products."""
        self.lora_A: torch.Tensor | None = None
        self.lora_B: torch.Tensor | None = None
        self.measure = measure
        self._unmeasured = False
        self.errors: list[float] = []
        self.norm = 0.0
        self._tiles = _tiles(self.shape, quantizer.aligned_rows(self.shape), device)

    @property
    def rank(self) -> int:
        """Rank of the factors at hand; 0 before the first."""
        return 0 if self.lora_A is None else len(self.lora_A)

    @property
    def steps(self) -> int:
        """Factors fitted so far."""
        return max(len(self.errors) - 1, 0) + self._unmeasured

    def quantize(self) -> None:
        """Q = quantize(W - B A), and the residual W - Q. Tells the error of the factors before, which costs little here."""
        first = not self.errors
        norms = spread(self._quantize_tile, self._tiles)
        if first:
            self.norm = _norm([norm for _, norm in norms]) / self.unit
        if first or self._unmeasured:
            self._measured([left for left, _ in norms])

    def _quantize_tile(self, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms in units of the tile's rows: of what the error is told from, and in the first pass of W."""
        weight, product = self._weight(tile), self._product(tile)
        codes, scales = self._quantized(tile)
        left = norm = self.scales[:0, 0]
        if self._unmeasured:
            left = self._left_norms(tile, weight, product)
        self.quantizer.requantize(weight, product, self.unit, codes, scales, self.residual[tile])
        if not self.errors:
            left, norm = self._left_norms(tile, weight, product), _row_norms(weight.to(torch.float32) * self.unit)
        return left, norm

    def fit(self, rank: int, solver: str) -> None:
        """B A = svd_r(W - Q), started from the factors at hand."""
        start = self.lora_B if self.rank == rank else None
        squares = (self.errors[0] * self.norm * self.unit) ** 2  # read before the first step only
        lora_B, lora_A = leading_factors(self.residual, squares, self._in_float32, rank, solver, start)
        share = math.sqrt(1 / self.unit)
        self.lora_B, self.lora_A = lora_B.mul_(share), lora_A.mul_(share)
        if self.measure:
            self._unmeasured = True
        else:
            self.errors.append(math.nan)

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

            def fill(tile: slice, wide: torch.Tensor = wide, first: int = first) -> None:
                out = wide[tile.start - first : tile.stop - first]
                self.quantizer.leave(self._weight(tile), None, self.unit, *self._quantized(tile), out)

            spread(fill, tiles)
            yield slice(first, last), wide

    def resume(self, start: Factors) -> None:
        """Takes up the factors where `start` left off; backbone and residual are the next `quantize`'s to find."""
        # Copies, because a tensor that maps a file may lie at an address for which matrix products round differently.
        self.lora_B, self.lora_A = (tensor.to(self.weight.device, copy=True) for tensor in (start.lora_B, start.lora_A))
        self.errors, self.norm, self._unmeasured = list(start.errors), start.norm, False

    def result(self, rank: int = 0) -> Decomposition:
        """The decomposition as it stands. `rank` is that of the zero factors where none were fitted."""
        if self._unmeasured:
            self._measured(
                spread(lambda tile: self._left_norms(tile, self._weight(tile), self._product(tile)), self._tiles)
            )
        rows, columns = self.shape
        lora_A = self.scales.new_zeros(rank, columns) if self.lora_A is None else self.lora_A
        lora_B = self.scales.new_zeros(rows, rank) if self.lora_B is None else self.lora_B
        quantized = Quantized(self.codes, self.scales)
        return Decomposition(lora_A, lora_B, tuple(self.errors), self.norm, self.unit, quantized)

    def _measured(self, norms: list[torch.Tensor]) -> None:
        """Notes an error from the norms of the rows, in units, of what is left of the weight."""
        self.errors.append(_norm(norms) / self.unit / self.norm if self.norm else 0.0)
        self._unmeasured = False

    def _product(self, tile: slice) -> torch.Tensor | None:
        """These rows of B A; None where there are no factors."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return torch.mm(self.lora_B[tile], self.lora_A, out=self._scratch(tile, "product"))

    def _weight(self, tile: slice) -> torch.Tensor:
        """These rows of W, in a type that the quantizer's passes take."""
        weight = self.weight[tile]
        return weight if weight.dtype in FUSED_TYPES else self._scratch(tile, "weight").copy_(weight)

    def _scratch(self, tile: slice, purpose: str) -> torch.Tensor:
        """Room for a tile's values in float32, on a processor the same for each tile of a thread."""
        shape, device = (tile.stop - tile.start, self.shape[1]), self.weight.device
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        return self._rooms.of_thread().take(purpose, shape, torch.float32, device)

    def _quantized(self, tile: slice) -> Quantized:
        """Codes and scales of these rows, to be read or written."""
        return Quantized(self.codes[tile], self.scales[self.quantizer.groups_of(self.shape, tile)])

    def _left_norms(self, tile: slice, weight: torch.Tensor, product: torch.Tensor | None) -> torch.Tensor:
        """Norms of these rows of W - Q - B A, in units."""
        left = self._scratch(tile, "left")
        self.quantizer.leave(weight, product, self.unit, *self._quantized(tile), left)
        return _row_norms(left)


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
