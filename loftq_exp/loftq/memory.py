"""Room for much data on a processor. What takes a pass over memory in a few milliseconds takes as long again to be given memory.

Linux clears memory when it is first written to, page by page of 4 KiB. In huge pages that takes less, and in memory that was
written to before it takes nothing.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes that an address is a multiple of, as torch's own are: matrix products may round differently at others."""


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor, on a processor in huge pages where the system gives them to who asks: numpy does, torch does not."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    whole = np.empty(size + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return torch.from_numpy(whole[start : start + size]).view(dtype).view(shape)


class Rooms:
    """Memory that one decomposition after the other works in, and leaves its codes in until the next. For one thread."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._of_threads = threading.local()

    def of_thread(self) -> Rooms:
        """Rooms of the calling thread's own, which last as long as these and the thread."""
        rooms: Rooms = self._of_threads.__dict__.setdefault("rooms", Rooms())
        return rooms

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An empty tensor, which takes the place of the one that was taken for the same purpose before."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(purpose)
        if held is None or len(held) < size or held.device != device:
            self._held.pop(purpose, None)
            held = self._held[purpose] = room((size,), torch.uint8, device)
        return held[:size].view(dtype).view(shape)
