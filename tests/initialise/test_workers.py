"""Several weights at a time: all are processed, in parallel, and the first error stops them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from loftq_exp.initialise.workers import Phases, side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_every_item_is_worked_on_and_two_at_a_time() -> None:
    both, threads = threading.Barrier(2, timeout=10), []

    def work(item: int) -> int:
        both.wait()  # passes only where another worker is at it, too
        threads.append(torch.get_num_threads())
        return item * item

    assert sorted(side_by_side(work, range(8), CPU)) == [item * item for item in range(8)]
    assert set(threads) == {1}, "each worker has its share of the cores"
    assert torch.get_num_threads() == 2
    later = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert threads[-1] == 2, "threads to come are as they were"


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_ends_it_and_what_runs_is_waited_for() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("broken")
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match="broken"):
        list(side_by_side(work, range(100), CPU))
    assert len(begun) < 10
    assert sorted(ended) == [item for item in sorted(begun) if item != 2]


def test_one_thread_is_one_worker() -> None:
    assert torch.get_num_threads() == 1  # see conftest
    order: list[int] = []
    list(side_by_side(order.append, range(20), CPU))
    assert order == list(range(20))


def test_phases_add_up() -> None:
    phases = Phases()
    for _ in range(2):
        with phases.timed("digest"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="broken"), phases.timed("write"):
        raise ValueError("broken")
    assert list(phases.seconds) == ["digest", "write"]
    assert phases.seconds["digest"] >= 0.02
    assert phases.total == sum(phases.seconds.values())
