"""Several weights at a time: while one is read, hashed or written, another is computed, and every core has work.

Each worker takes a weight from its file to its place in the output and gives torch's operations its share of the cores.
Two cores thus compute two weights, one each, which is faster than both on one, and a weight's bytes do not depend on
what else is worked on.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

WORKERS = 2
"""Weights at a time: each needs about a dozen bytes a value."""


class Phases:
    """How long one weight spent in each phase of its way, in seconds by the phase's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds in all phases."""
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the phase `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def side_by_side(work: Callable[[T], U], items: Iterable[T], device: torch.device) -> Iterator[U]:
    """`work(item)` of every item as it gets done, on a few threads. The first error ends it once running work is done."""
    threads = torch.get_num_threads()
    workers = min(WORKERS, threads) if device.type == "cpu" else WORKERS
    keep_freed_memory_low()
    pool = ThreadPoolExecutor(workers, "weights", torch.set_num_threads, (max(threads // workers, 1),))
    running: set[Future[U]] = set()
    try:
        for item in items:
            if len(running) == workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            running.add(pool.submit(work, item))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come start with, too


def keep_freed_memory_low() -> None:
    """Has glibc (Linux) give large blocks back when they are freed. By itself it learns to keep them, up to 32 MiB each."""
    M_MMAP_THRESHOLD = -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has ways of its own
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)
