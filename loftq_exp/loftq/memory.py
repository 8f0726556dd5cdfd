"""Large buffers on a CPU. Allocating one takes as long as a pass over it, a few milliseconds.

Linux clears memory at the first write, in pages of 4 KiB. Huge pages make that faster; reused memory avoids it.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

ALIGNMENT = 64
"""Alignment of buffers in bytes, the same as torch's. Matrix products may round differently at other alignments."""


def empty_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor, in huge pages on a CPU that offers them. numpy asks for them, torch does not."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    whole = np.empty(size + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return torch.from_numpy(whole[start : start + size]).view(dtype).view(shape)


class Workspace:
    """Buffers that successive decompositions of one thread reuse. A decomposition's codes are valid until the next."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._of_threads = threading.local()

    def of_thread(self) -> Workspace:
        """Return the calling thread's own workspace, which lives as long as this one and the thread."""
        workspace: Workspace = self._of_threads.__dict__.setdefault("workspace", Workspace())
        return workspace

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor. It reuses the memory of the previous tensor of the same purpose."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(purpose)
        if held is None or len(held) < size or held.device != device:
            self._held.pop(purpose, None)
            held = self._held[purpose] = empty_buffer((size,), torch.uint8, device)
        return held[:size].view(dtype).view(shape)
