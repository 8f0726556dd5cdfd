"""Weights are read ahead of the work: in order, a bounded number of them, with the reader's own errors, and to an end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_exp.errors import UserError
from loftq_exp.initialise import stage
from loftq_exp.initialise.decomposer import Decomposer
from loftq_exp.initialise.transfer import AHEAD, read_ahead, to_device, to_host
from loftq_exp.initialise.workers import WORKERS, side_by_side
from loftq_exp.source.tensors import CheckpointTensors

CPU = torch.device("cpu")


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_it_reads_the_next_one_while_one_is_in_work() -> None:
    begun = {number: threading.Event() for number in range(5)}

    def read(number: int) -> int:
        begun[number].set()
        return number * number

    results = read_ahead(read, begun)
    for number in range(5):
        assert next(results) == number * number
        if number < 4:
            assert begun[number + 1].wait(10)
    assert list(results) == []
    assert readers() == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_at_most_so_many_are_in_memory(ahead: int) -> None:
    lock, held, most = threading.Lock(), 0, 0

    def read(number: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return number

    def work(number: int) -> int:
        nonlocal held
        time.sleep(0.01)
        with lock:
            held -= 1
        return number

    threads = torch.get_num_threads()
    torch.set_num_threads(WORKERS)
    try:
        found = list(side_by_side(work, read_ahead(read, range(30), ahead), CPU))
    finally:
        torch.set_num_threads(threads)
    assert sorted(found) == list(range(30))
    assert 0 < most <= WORKERS + ahead


def test_an_error_of_the_reader_comes_in_its_place() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise UserError("model.path: weight 3 cannot be read")
        return number

    results = read_ahead(read, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^model.path: weight 3 cannot be read$"):
        next(results)
    assert readers() == []


def test_closing_it_ends_the_reader() -> None:
    begun = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    results = read_ahead(read, range(1000))
    next(results)
    results.close()
    assert len(begun) <= AHEAD + 1
    assert readers() == []


def test_on_a_cpu_nothing_is_copied() -> None:
    weight = torch.arange(6.0).view(2, 3)
    assert to_device(weight, CPU).take().data_ptr() == weight.data_ptr()
    (there,) = to_host([weight.T])
    assert there.is_contiguous()
    assert torch.equal(there, weight.T)


# The stage


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_the_stage_writes_the_bytes_that_it_writes_without(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = (*cli.tiny, "stages=[quantize]", "quant.iter=2", "save_format=bnb4")
    assert cli(*quantize, "save_dir=ahead", "cache_dir=one").code == 0
    monkeypatch.setattr(stage, "read_ahead", lambda read, items: (read(item) for item in items))
    assert cli(*quantize, "save_dir=alone", "cache_dir=two").code == 0
    found = files(Path("ahead"))
    assert len(found) == 2
    assert found == files(Path("alone"))


def test_what_the_reader_cannot_read_is_the_stages_own_error(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CheckpointTensors.read

    def broken(self: CheckpointTensors, name: str) -> torch.Tensor:
        if threading.current_thread().name.startswith("reader") and name.endswith("layers.1.mlp.up_proj.weight"):
            raise UserError(f"model.path: {name} cannot be read")
        return read(self, name)

    monkeypatch.setattr(CheckpointTensors, "read", broken)
    line = cli.refused(*cli.tiny, "stages=[quantize]", "save_dir=made")
    assert line == "model.path: model.layers.1.mlp.up_proj.weight cannot be read"
    assert readers() == []


def test_an_interrupted_stage_leaves_no_reader(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decomposer, "decomposed", interrupted)
    outcome = cli(*cli.tiny, "stages=[quantize]", "save_dir=made")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert readers() == []
