"""The inputs of linear layers, collected by hooks while their model reads text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loftq_exp.calibration.moments import Moments, Statistics, all_finite, check_finite, counted, hooked, mean_of
from loftq_exp.errors import UserError

_Read = tuple[str, int]
"""An input by the first layer that reads it, and how many that layer has read before in the same batch."""


class LinearCollector:
    """Accumulates the inputs of some linear layers while their model runs. Layers that read one tensor share one sum."""

    def __init__(self, modules: Mapping[str, nn.Module], kind: str) -> None:
        """Prepare to collect from these linear layers, by name."""
        self._modules = modules
        self._reads: dict[str, list[_Read]] = {}
        self._moments = Moments(kind)
        self._seen: dict[int, tuple[torch.Tensor, _Read]] = {}
        self._calls: Counter[str] = Counter()
        self._mask: torch.Tensor | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from every forward inside the block."""
        try:
            with hooked(self._modules, self._read):
                yield
        finally:
            self._seen.clear()

    def next_batch(self, mask: torch.Tensor | None = None) -> None:
        """Begin a batch. `mask` (batch, length) is 0 for padding, which is not counted; None: there is none."""
        self._seen.clear()
        self._calls.clear()
        self._mask = mask

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        # The reference keeps the tensor alive, so that no later one has its id.
        _, read = self._seen.setdefault(id(inputs), (inputs, (name, self._calls[name])))
        reads, call = self._reads.setdefault(name, []), self._calls[name]
        self._calls[name] += 1
        if call == len(reads):
            reads.append(read)
        elif reads[call] != read:
            raise UserError(f"{name}: shares its input with different layers in different batches; "
                            "collect from it alone")  # fmt: skip
        if read != (name, call):
            return
        rows = counted(name, inputs.detach(), self._mask)
        check_finite(name, rows)
        self._moments.add(read, rows)

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of every layer; layers that share their input share the tensor.

        Raises UserError if a layer has read nothing.
        """
        if unread := [name for name in self._modules if name not in self._reads]:
            raise UserError(f"{unread[0]}: has read no calibration text ({len(unread)} such layers); "
                            "give text that reaches it, or name the other layers in `modules`")  # fmt: skip
        found: dict[tuple[_Read, ...], Statistics] = {}
        for name in self._modules:
            reads = tuple(self._reads[name])
            if reads in found:
                continue
            found[reads] = mean_of([self._moments[read] for read in reads])
            if not all_finite(found[reads].hessian):
                raise UserError(f"{name}: the squares of its inputs are too large for float32, or it has read no token that "
                                "counts; give other text")  # fmt: skip
        return {name: found[tuple(self._reads[name])] for name in self._modules}
