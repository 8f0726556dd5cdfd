"""Split a weight's work into pieces that run in parallel, one core each.

torch's own threads split every single operation, synchronise in each, and spin in between. For the small operations of a
decomposition this overhead exceeds the work. Here torch uses one thread per piece, and a thread pool runs whole pieces in
parallel. The split depends on the weight's shape alone, so results do not depend on the number of threads.
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


def in_thread_pool(work: Callable[[], T], device: torch.device) -> T:
    """Return `work()`, run so that `spread` uses torch's threads as a pool. On other devices than the CPU, just call it."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        return work()

    def run() -> T:
        _local.threads = threads
        return work()

    # On a thread of its own, because torch's number of threads is set per thread.
    with ThreadPoolExecutor(1, "decompose", torch.set_num_threads, (1,)) as thread:
        try:
            return thread.submit(run).result()
        finally:
            torch.set_num_threads(threads)  # the initial value of new threads


def spread(work: Callable[[S], T], pieces: Sequence[S]) -> list[T]:
    """Return `work(piece)` for every piece, in order. Within `in_thread_pool` the pieces run in parallel."""
    threads = min(getattr(_local, "threads", 1), len(pieces))
    return list(map(work, pieces) if threads == 1 else _pool(threads).map(work, pieces))


@contextlib.contextmanager
def torchs_own_threads() -> Iterator[None]:
    """Restore torch's threads for an operation that cannot be split into pieces."""
    usual = torch.get_num_threads()
    torch.set_num_threads(getattr(_local, "threads", usual))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def slices(length: int, size: int) -> list[slice]:
    """Split 0 to `length` into slices of `size`; the last may be shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a thread pool in which each thread's torch operations use one thread."""
    pool = ThreadPoolExecutor(threads, "pieces", torch.set_num_threads, (1,))
    list(pool.map(lambda _: time.sleep(0.01), range(threads)))
    return pool
