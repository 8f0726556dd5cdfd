"""Weights on their way: read ahead of the work, and copied to a GPU and back while it computes.

A thread reads and digests the next weight while others are computed and written. On CUDA it goes through pinned memory, and a
stream of its own copies it: a copy neither waits for kernels that are queued nor holds them up. Results come back the same
way. torch keeps and reuses pinned memory. On a CPU nothing is copied: a weight stays where its file is mapped.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

AHEAD = 1
"""Weights that are read before a worker is free for them. With those in work, `AHEAD` + `workers.WORKERS` are in memory."""


def read_ahead(read: Callable[[T], U], items: Iterable[T], ahead: int = AHEAD) -> Generator[U]:
    """Yield `read(item)` of every item, in order. One thread reads; at most `ahead` + 1 results wait to be taken.

    An error of `read` is raised in the place of its item. Close the iterator to end the thread before all is read: it
    finishes the item that it is at, and begins no other.
    """
    pool = ThreadPoolExecutor(1, "reader")
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Copied:
    """A tensor whose copy to its device may still be under way."""

    _values: torch.Tensor
    _done: torch.cuda.Event | None = None

    def take(self) -> torch.Tensor:
        """Return the tensor. Work that the calling thread queues from here on waits for the copy; the thread does not."""
        if self._done is not None:
            stream = torch.cuda.current_stream(self._values.device)
            stream.wait_event(self._done)
            self._values.record_stream(stream)  # its memory is of the copying stream
        return self._values


def to_device(tensor: torch.Tensor, device: torch.device) -> Copied:
    """Begin to copy a tensor to `device`: to CUDA through pinned memory, on the copying stream."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return Copied(tensor.to(device))
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    stream = _copying(device, "up")
    with torch.cuda.stream(stream):
        return Copied(pinned.to(device, non_blocking=True), stream.record_event())


def to_host(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return contiguous copies on the CPU. From CUDA the thread waits for what is queued now, and not for later kernels."""
    given = [tensor.contiguous() for tensor in tensors]
    device = given[0].device
    if device.type != "cuda":
        return [tensor.cpu() for tensor in given]
    stream = _copying(device, "down")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in given
        ]
        done = stream.record_event()
    done.synchronize()
    return copies


@functools.cache
def _copying(device: torch.device, direction: str) -> torch.cuda.Stream:
    """Return the stream that copies in one direction; a GPU has an engine for each."""
    return torch.cuda.Stream(device)
