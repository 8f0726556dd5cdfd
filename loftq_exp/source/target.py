"""A weight to quantize: its place in the model, in the files, and in the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from loftq_exp.storage.packing import STACK


@dataclass(frozen=True)
class Piece:
    """Rows of a weight as a tensor of the files holds them."""

    tensor: str
    rows: int
    index: int | None = None
    """Which matrix of a tensor (experts, ., .); None: the tensor is the matrix."""
    transposed: bool = False
    """Whether it is stored as (in, rows)."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows (rows, in) in its tensor, as a view."""
        matrix = tensor if self.index is None else tensor[self.index]
        return matrix.T if self.transposed else matrix

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (rows, in) in the orientation of the files."""
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class Target:
    """One weight to quantize: its name, its tensor in the checkpoint, its shape (out, in), its block.

    It is the weight of a linear layer, and its name that of the module. Or it is one expert's matrix in a parameter of the
    shape (experts, ., .), and its name ends in the expert's number.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    block: str
    """The module of its block, such as `model.layers.3`."""
    pieces: tuple[Piece, ...] = ()
    """Where its rows are stored, in order. Empty: `tensor` is the weight."""
    expert: int | None = None
    experts: int = 1
    """Number of matrices in its parameter."""
    wrapped: str = ""
    """The PEFT layer of its factors, if that is not its module."""

    @property
    def kind(self) -> str:
        """Its name within the block, such as `self_attn.q_proj`, without the number of an expert."""
        return self.chosen_by.removeprefix(self.block + ".")

    @property
    def chosen_by(self) -> str:
        """The name by which it is selected and adapted: its module's, or that of the parameter that holds it."""
        return self.module if self.expert is None else self.module.removesuffix(f".{self.expert}")

    @property
    def parameter(self) -> str:
        """The model's parameter that holds it."""
        return f"{self.module}.weight" if self.expert is None else self.chosen_by

    @property
    def own_tensor(self) -> str:
        """The name of its tensor in a file that holds each expert's matrix under its own name, as packed ones do."""
        if self.expert is None:
            return self.tensor
        owner, _, name = self.parameter.rpartition(".")
        return f"{owner}.{STACK}{name}.{self.expert}.weight"

    @property
    def layer(self) -> str:
        """The PEFT layer that holds its factors."""
        return self.wrapped or self.module

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that hold its rows."""
        return tuple(piece.tensor for piece in self.pieces) or (self.tensor,)

    def read(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The weight (out, in). `read` gives a stored tensor by name."""
        if not self.pieces:
            return read(self.tensor)
        rows = [piece.of(read(piece.tensor)) for piece in self.pieces]
        return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)

    def stored(self, weight: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece and its values in the orientation of the files, of a weight (out, in)."""
        pieces = self.pieces or (Piece(self.tensor, self.shape[0]),)
        for piece, rows in zip(pieces, weight.split([piece.rows for piece in pieces]), strict=True):
            yield piece, piece.stored(rows)

    def factor(self, factor: str, tensor: torch.Tensor) -> torch.Tensor:
        """Its A (r, in) or B (out, r), as a view, in the tensor in which PEFT holds that of all experts.

        PEFT stacks A by expert, (experts * r, in), and interleaves B, (out, r * experts).
        """
        if self.expert is None:
            return tensor
        if factor == "A":
            return tensor.unflatten(0, (self.experts, -1))[self.expert]
        return tensor.unflatten(1, (-1, self.experts))[:, :, self.expert]

    def factor_shape(self, factor: str, rank: int) -> tuple[int, int]:
        """The shape of the tensor in which PEFT holds its A or B."""
        wide = rank * self.experts
        return (wide, self.shape[1]) if factor == "A" else (self.shape[0], wide)
