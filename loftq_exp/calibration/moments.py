"""The second moments H = E[x x'] of inputs x: hooks that read them, the running sum over tokens, and the mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from loftq_exp.errors import UserError

KINDS = ("full", "diagonal")
"""All of H, or its diagonal."""

CHUNK = 2048
"""Tokens per float32 product. The products are summed in float64."""

PANEL = 2048
"""Rows of H at a time."""

BOUND = 8 * math.sqrt(CHUNK) * torch.finfo(torch.float32).eps
"""Bound on the difference of two collections of the same inputs, in other batches or on other threads, as a multiple of
sqrt(h_ii h_jj). A product of at most CHUNK tokens rounds each sum like a random walk; the sums of products round in float64."""


@dataclass(frozen=True)
class Statistics:
    """The second moment of one layer's inputs."""

    hessian: torch.Tensor
    """H = E[x x'], the mean over tokens: float32 (in, in), or its diagonal (in,)."""
    tokens: int
    """Number of tokens in the mean."""

    @functools.cached_property
    def digest(self) -> str:
        """A hex digest (128-bit XXH3) of H and the number of tokens."""
        digest = xxhash.xxh3_128(f"{tuple(self.hessian.shape)} {self.tokens} ".encode())
        digest.update(self.hessian.contiguous().cpu().numpy().data)
        return digest.hexdigest()


class Moment:
    """The running sum of x x' over tokens, in float64: panels of its upper triangle; what is below them is zero."""

    def __init__(self, kind: str, width: int, device: torch.device) -> None:
        self.kind, self.tokens = kind, 0
        shape = (width, width) if kind == "full" else (width,)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add x x' of every row x of `inputs`, (tokens, in)."""
        for some in inputs.split(CHUNK):
            x = some.to(torch.float32)
            if self.kind == "diagonal":
                self.sum += x.square().sum(dim=0)
                continue
            for first in range(0, x.shape[1], PANEL):
                self.sum[first : first + PANEL, first:] += x[:, first : first + PANEL].T @ x[:, first:]
        self.tokens += len(inputs)


class Moments(dict[Any, Moment]):
    """Running sums by key."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, key: Any, inputs: torch.Tensor) -> None:
        """Add `inputs`, (tokens, in), to the sum of this key, which begins with the first ones."""
        if key not in self:
            self[key] = Moment(self.kind, inputs.shape[1], inputs.device)
        self[key].add(inputs)


def mean_of(moments: Sequence[Moment]) -> Statistics:
    """Return the mean over the tokens of all these, float32, exactly symmetric."""
    tokens = sum(moment.tokens for moment in moments)
    return Statistics(symmetric_mean(functools.reduce(torch.add, (moment.sum for moment in moments)), tokens), tokens)


def symmetric_mean(total: torch.Tensor, count: int) -> torch.Tensor:
    """The float32 quotient of a float64 sum, (in,) or the upper triangle of (in, in), of which it is made symmetric."""
    mean = torch.empty_like(total, dtype=torch.float32)
    for first in range(0, len(mean), PANEL):  # a quotient in float64 is as large as the sum
        mean[first : first + PANEL] = total[first : first + PANEL] / count
    if mean.ndim == 2:
        for row in range(len(mean)):
            mean[row + 1 :, row] = mean[row, row + 1 :]
    return mean


def all_finite(hessian: torch.Tensor) -> bool:
    """Whether no value of H is NaN or infinite, without a copy of it, as `isfinite` would make."""
    return all(map(math.isfinite, hessian.aminmax()))


Read = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""What reads the inputs of a module: its name, the module, and the arguments of its forward."""


@contextmanager
def hooked(modules: Mapping[str, nn.Module], read: Read) -> Iterator[None]:
    """Call `read` before every forward of these modules, by name, inside the block."""
    hooks = [module.register_forward_pre_hook(functools.partial(read, name), with_kwargs=True)
             for name, module in modules.items()]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_finite(name: str, rows: torch.Tensor) -> None:
    """Raise UserError if the inputs of `name` are NaN or infinite."""
    if not bool(torch.isfinite(rows).all()):
        raise UserError(f"{name}: its inputs are NaN or infinite on the calibration text; use float32, or other text")


def counted(name: str, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows (tokens, in) of the inputs of `name` whose `mask` (batch, length) is not 0; without a mask all of them.

    `inputs` are (batch, length, in), or (batch * length, in) as in mixtures. Raises UserError for another shape.
    """
    if mask is None:
        return inputs.reshape(-1, inputs.shape[-1])
    if inputs.shape[:-1] == (mask.numel(),):
        mask = mask.reshape(-1)
    if inputs.shape[:-1] != mask.shape:
        raise UserError(f"{name}: inputs of shape {tuple(inputs.shape)} and a mask of {tuple(mask.shape)} with padding: "
                        "which inputs are padding is not known; give batches of rows of one length")  # fmt: skip
    return inputs[mask.bool().to(inputs.device)]
