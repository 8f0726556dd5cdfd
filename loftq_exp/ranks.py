"""Which process of a launch this one is, and how its processes wait for each other.

`torchrun` starts the same command several times; each process is a rank. Rank 0 alone writes and prints, and what it finds
holds for all. Ranks exchange Python objects through the launcher's key-value store: a wait there has no time limit, because
rank 0 may quantize for hours. Gradients go through the process group that `transformers.Trainer` sets up.
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
"""Seconds that a failing rank above 0 leaves to rank 0, whose error line is the one to print."""
_PIECE = 4 << 20
"""Bytes in one value of the store, which takes at most 8 MiB."""
_LONGEST_PAUSE = 0.5
"""Seconds between two looks into the store."""
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_calls = counter()
"""Numbers the exchanges. Every rank makes the same ones in the same order."""


def rank() -> int:
    """The number of this process, from 0; 0 where it was not started by a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """The number of processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, the only one that writes and prints."""
    return rank() == 0


def check_launch() -> None:
    """Raises UserError for a launch whose processes would not know of each other, or of which only one was started."""
    remedy = "use torchrun --nproc-per-node=N, or accelerate launch --multi_gpu --num_processes N, which starts N on CPUs too"
    if "WORLD_SIZE" in os.environ:
        return
    if any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZES):
        raise UserError(f"mpirun: not supported as a launcher; {remedy}")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1":
        # What it leaves when it was asked for several processes and starts one.
        raise UserError(f"accelerate launch: starts one process on CPUs, whatever --num_processes says; {remedy}")


def from_main(work: Callable[[], T]) -> T:
    """Rank 0's result of `work` on every rank: rank 0 does it, the others wait for it, however long it takes.

    The result must be picklable. Where `work` raises on rank 0, the other ranks raise UserError.
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
    """This rank's own result of `work`, which rank 0 has finished before: it fetches what the others then find."""
    done: list[T] = []
    from_main(lambda: done.append(work()))
    return done[0] if done else work()


def gather(value: T) -> list[T]:
    """The `value` of every rank, in the order of the ranks, on every rank. Values must be picklable."""
    if count() == 1:
        return [value]
    key = f"all/{next(_calls)}"
    _put(f"{key}/{rank()}", value)
    return [cast(T, _get(f"{key}/{other}")) for other in range(count())]


def let_main_fail_first() -> None:
    """Gives rank 0 the time to print the error that this rank has met too: the launcher then ends this process.

    Comes back after `GRACE` seconds where rank 0 did not fail.
    """
    if not is_main():
        time.sleep(GRACE)


def _put(key: str, value: Any) -> None:
    data = pickle.dumps(value)
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    for number, piece in enumerate(pieces):
        _store().set(f"{key}/{number}", piece)  # type: ignore[arg-type]  # bytes too
    _store().set(key, str(len(pieces)))  # last: where it is there, all pieces are


def _get(key: str) -> Any:
    store, pause = _store(), 0.01
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return pickle.loads(b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key)))))


@functools.cache
def _store() -> Store:
    """The launcher's store, in a corner of its own."""
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(rendezvous("env://", rank(), count()))
    return PrefixStore(f"loftq_exp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
