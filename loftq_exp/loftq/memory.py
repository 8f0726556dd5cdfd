"""Room for much data on a processor. What takes a pass over memory in a few milliseconds takes as long again to be given memory.

Linux clears memory when it is first written to, page by page of 4 KiB. In huge pages that takes less, and in memory that was
written to before it takes nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor, on a processor in huge pages where the system gives them to who asks: numpy does, torch does not."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Rooms:
    """Memory that one decomposition after the other works in, and leaves its codes in until the next. For one thread."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An empty tensor, which takes the place of the one that was taken for the same purpose before."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(purpose)
        if held is None or len(held) < size or held.device != device:
            self._held.pop(purpose, None)
            held = self._held[purpose] = room((size,), torch.uint8, device)
        return held[:size].view(dtype).view(shape)
