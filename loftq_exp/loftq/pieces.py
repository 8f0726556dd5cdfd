"""A weight's work cut into pieces that run side by side, each on one core.

torch's own threads share out every single operation, wait for each other in each, and keep spinning in between, which
costs the small operations of a decomposition more than they take. Here torch takes one thread and whole pieces go side by
side. How a weight is cut depends on its shape alone, so that the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

_local = threading.local()


def conducted(work: Callable[[], T], device: torch.device) -> T:
    """`work()`, with torch's threads for `spread` instead of for torch. On another device than the processor just `work()`."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        return work()

    def conduct() -> T:
        _local.threads = threads
        return work()

    # On a thread of its own, because the number of torch's threads is one of each thread's.
    with ThreadPoolExecutor(1, "conductor", torch.set_num_threads, (1,)) as thread:
        try:
            return thread.submit(conduct).result()
        finally:
            torch.set_num_threads(threads)  # what threads to come start with


def spread(work: Callable[[S], T], pieces: Sequence[S]) -> list[T]:
    """`work` on every piece, in order; within `conducted` side by side."""
    threads = min(getattr(_local, "threads", 1), len(pieces))
    return list(map(work, pieces) if threads == 1 else _pool(threads).map(work, pieces))


@contextlib.contextmanager
def torchs_own_threads() -> Iterator[None]:
    """Gives torch its threads back for an operation that cannot be cut into pieces."""
    usual = torch.get_num_threads()
    torch.set_num_threads(getattr(_local, "threads", usual))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def slices(length: int, size: int) -> list[slice]:
    """0 to `length` in pieces of `size`, but for the last."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch's operations take one thread each."""
    pool = ThreadPoolExecutor(threads, "pieces", torch.set_num_threads, (1,))
    list(pool.map(lambda _: time.sleep(0.01), range(threads)))
    return pool
