"""Rank of this process in a distributed launch, and exchange of objects between ranks.

`torchrun` starts the same command several times; each process is a rank. Only rank 0 writes and prints, and its results hold
for all. Ranks exchange Python objects through the launcher's key-value store. A wait there has no time limit, because rank 0
may quantize for hours. Gradients use the process group that `transformers.Trainer` sets up.
"""

from __future__ import annotations

import functools
import os
import pickle
import time
from collections.abc import Callable
from itertools import count as counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loftq_exp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

GRACE = 30.0
"""Seconds that a failing rank above 0 waits, so that rank 0 prints the error."""
_PIECE = 4 << 20
"""Bytes per value in the store, which accepts at most 8 MiB."""
_LONGEST_PAUSE = 0.5
"""Maximum seconds between two polls of the store."""
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_calls = counter()
"""Number of the next exchange. Every rank makes the same exchanges in the same order."""


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """Return the number of processes in the launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process is rank 0, the only one that writes and prints."""
    return rank() == 0


def check_launch() -> None:
    """Raise UserError for a launch whose processes cannot find each other, or that started only one process."""
    remedy = "use torchrun --nproc-per-node=N, or accelerate launch --multi_gpu --num_processes N, which starts N on CPUs too"
    if "WORLD_SIZE" in os.environ:
        return
    if any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZES):
        raise UserError(f"mpirun: not supported as a launcher; {remedy}")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1":
        # accelerate sets these when several processes were requested and it starts one.
        raise UserError(f"accelerate launch: starts one process on CPUs, whatever --num_processes says; {remedy}")


def from_main(work: Callable[[], T]) -> T:
    """Return rank 0's result of `work` on every rank. Only rank 0 calls it; the others wait without a time limit.

    The result must be picklable. If `work` raises on rank 0, the other ranks raise UserError.
    """
    if count() == 1:
        return work()
    key = f"main/{next(_calls)}"
    if not is_main():
        result, failure = _get(key)
        if failure is not None:
            raise UserError(failure)
        return cast(T, result)
    try:
        result = work()
    except BaseException as error:
        _put(key, (None, str(error) if isinstance(error, UserError) else f"rank 0 failed: {type(error).__name__}"))
        raise
    _put(key, (result, None))
    return result


def main_first(work: Callable[[], T]) -> T:
    """Return this rank's own result of `work`. Rank 0 runs it first, for example to download what the others then find."""
    done: list[T] = []
    from_main(lambda: done.append(work()))
    return done[0] if done else work()


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank. Values must be picklable."""
    if count() == 1:
        return [value]
    key = f"all/{next(_calls)}"
    _put(f"{key}/{rank()}", value)
    return [cast(T, _get(f"{key}/{other}")) for other in range(count())]


def let_main_fail_first() -> None:
    """Wait for rank 0 to fail and print the error that this rank has, too; the launcher then ends this process.

    Return after `GRACE` seconds if rank 0 did not fail.
    """
    if not is_main():
        time.sleep(GRACE)


def _put(key: str, value: Any) -> None:
    data = pickle.dumps(value)
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    for number, piece in enumerate(pieces):
        _store().set(f"{key}/{number}", piece)  # type: ignore[arg-type]  # bytes too
    _store().set(key, str(len(pieces)))  # last, so that all pieces exist once it does


def _get(key: str) -> Any:
    store, pause = _store(), 0.01
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return pickle.loads(b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key)))))


@functools.cache
def _store() -> Store:
    """Return the launcher's store, with a key prefix of our own."""
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(rendezvous("env://", rank(), count()))
    return PrefixStore(f"loftq_exp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
