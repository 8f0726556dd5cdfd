"""Process several weights concurrently: while one is read, hashed or written, another is computed.

Each worker processes a weight from its file to the output, with its share of the cores for torch operations. Two cores
computing one weight each are faster than two on the same weight. A weight's result does not depend on the others.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from loftq_exp.costs import Stopwatch

T = TypeVar("T")
U = TypeVar("U")

WORKERS = 2
"""Concurrent weights. Each needs about a dozen bytes per value."""


class Phases:
    """The seconds that one weight spent in each phase, by the phase's name. Compiling kernels is not part of any."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """The sum over all phases, in seconds."""
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        watch = Stopwatch()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + watch.seconds


def side_by_side(work: Callable[[T], U], items: Iterable[T], device: torch.device) -> Iterator[U]:
    """Yield `work(item)` for every item in order of completion, on a thread pool.

    The first error is raised once running work is done.
    """
    threads = torch.get_num_threads()
    workers = min(WORKERS, threads) if device.type == "cpu" else WORKERS
    keep_freed_memory_low()
    if device.type == "cuda":
        # torch loads CUDA's linear algebra at its first use, which must not happen in two threads at once.
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    pool = ThreadPoolExecutor(workers, "weights", torch.set_num_threads, (max(threads // workers, 1),))
    running: set[Future[U]] = set()
    try:
        for item in items:  # the next one is asked for once a worker is free
            running.add(pool.submit(work, item))
            if len(running) == workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # also the default of later threads


def keep_freed_memory_low() -> None:
    """Make glibc (Linux) return large blocks when they are freed. By default it adapts to keep blocks of up to 32 MiB."""
    M_MMAP_THRESHOLD = -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not supported by other C libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)
