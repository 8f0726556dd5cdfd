"""Several processes and one initialisation: each weight is computed once, whoever asks and whoever dies."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray_cluster import ROOT, two_nodes

import loftq_exp
from loftq_exp.errors import UserError
from loftq_exp.initialise import decomposer
from loftq_exp.initialise.share import in_order

QUICK = ("model=llama-2", "task=arithmetic", "quant.rank=4", "quant.iter=2", "device=cpu", "stages=[quantize]")
WEIGHTS = 14


def digest_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Place:
    """A folder in which several processes work, and what each of them computed."""

    def __init__(self, root: Path, model: Path) -> None:
        self.out, self.log = root / "out", root / "computed"
        self.settings = (*QUICK, f"model.path={model}", f"output_dir={self.out}")

    def start(self, *overrides: str) -> int:
        """Start a process with these overrides; return its number."""
        child = os.fork()
        if child == 0:
            try:
                loftq_exp.run(loftq_exp.compose([*self.settings, *overrides]))
            except BaseException:
                os._exit(1)
            os._exit(0)
        return child

    @property
    def computed(self) -> Counter[str]:
        """How many weights each process computed."""
        return Counter(self.log.read_text().split())

    @property
    def digest(self) -> list[str]:
        (folder,) = (self.out / "inits").glob("[!.]*")
        return [digest_of_file(folder / name) for name in ("model.safetensors", "loftq_init/adapter_model.safetensors")]


def ended(*children: int) -> list[int]:
    """The exit codes of processes, once they end; the negative signal of those that were killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def whole(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The digests of the checkpoint that one process makes alone. It also compiles the kernels, before any fork."""
    place = Place(tmp_path_factory.mktemp("whole"), tiny_llama_dir)
    loftq_exp.run(loftq_exp.compose(place.settings))
    return place.digest


@pytest.fixture
def place(tmp_path: Path, tiny_llama_dir: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path, tiny_llama_dir)
    decompose = decomposer.decompose

    def counted(*arguments: Any, **named: Any) -> Any:
        result = decompose(*arguments, **named)
        with place.log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        return result

    monkeypatch.setattr(decomposer, "decompose", counted)
    return place


def dies_at(weight: int, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> None:
    """Make a process die when it begins with the weight of this number."""
    decompose, begun = decomposer.decompose, []

    def dying(*arguments: Any, **named: Any) -> Any:
        begun.append(1)
        if len(begun) == weight:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        return decompose(*arguments, **named)

    monkeypatch.setattr(decomposer, "decompose", dying)


def test_two_jobs_that_need_one_initialisation_make_it_once(place: Place, whole: list[str]) -> None:
    assert ended(*(place.start(f"train.learning_rate={rate}") for rate in (1e-4, 2e-4))) == [0, 0]
    assert list(place.computed.values()) == [WEIGHTS]  # one computed all, the other waited
    assert place.digest == whole


def test_two_shards_compute_each_weight_once(place: Place, whole: list[str]) -> None:
    shards = [place.start("initialise.shards=2", f"initialise.shard={shard}") for shard in (0, 1)]
    assert ended(*shards) == [0, 0]
    assert place.computed.total() == WEIGHTS
    assert place.digest == whole
    assert not list((place.out / "cache").rglob("*.lock"))


def test_a_shard_that_is_killed_costs_the_weight_in_its_hand(
    place: Place, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        dies_at(3, patched, before=lambda: time.sleep(1))  # it dies while the other one waits for it
        killed = place.start("initialise.shards=2", "initialise.shard=1")
    while not place.log.exists() or len(place.log.read_text().splitlines()) < 2:
        time.sleep(0.01)  # alone, so that a slow start leaves it its two weights
    other = place.start("initialise.shards=2", "initialise.shard=0")
    assert ended(killed, other) == [-signal.SIGKILL, 0]
    assert place.computed == {str(killed): 2, str(other): WEIGHTS - 2}
    assert place.digest == whole


def test_one_shard_of_four_makes_all_if_no_other_comes(place: Place, whole: list[str]) -> None:
    assert ended(place.start("initialise.shards=4", "initialise.shard=2")) == [0]
    assert place.computed.total() == WEIGHTS
    assert place.digest == whole


@pytest.mark.parametrize("settings", [
    ["quant.allocation=error", "quant.bits=3"],
    ["quant.calibration=full", "task.max_train_samples=8", "calibration.samples=4"],
])  # fmt: skip
def test_shards_share_measured_bits_and_calibration(place: Place, settings: list[str]) -> None:
    alone = loftq_exp.run(loftq_exp.compose([*place.settings, *settings, f"output_dir={place.out}-alone"]))
    before = place.computed.total()
    shards = [place.start(*settings, "initialise.shards=2", f"initialise.shard={shard}") for shard in (0, 1)]
    assert ended(*shards) == [0, 0]
    assert place.computed.total() == 2 * before
    assert place.digest[0] == digest_of_file(alone.init_dir / "model.safetensors")
    report = json.loads((alone.init_dir / "init_report.json").read_text())
    (folder,) = (place.out / "inits").glob("[!.]*")
    assert json.loads((folder / "init_report.json").read_text())["key"] == report["key"]


def test_ray_that_is_not_installed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^initialise.engine=ray: not installed; run: pip install 'loftq_exp\[ray\]'$"):
        loftq_exp.run(loftq_exp.compose([*place.settings, "initialise.engine=ray", "initialise.shards=2"]))


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_make_the_same_checkpoint(place: Place, whole: list[str], tmp_path: Path) -> None:
    """Also from a node that was started in another folder, with relative paths."""
    with two_nodes() as address:
        command = [sys.executable, "-m", "loftq_exp", *place.settings, "output_dir=out", "initialise.engine=ray",
                   "initialise.shards=2"]  # fmt: skip
        paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tasks on Ray: 2/2" in done.stdout
    assert "0 computed, 14 from the cache" in done.stdout
    assert place.digest == whole


@given(st.integers(0, 20), st.integers(1, 8), st.data())
def test_every_shard_takes_its_share_first_and_then_all_others(count: int, shards: int, data: st.DataObject) -> None:
    items: Any = list(range(count))
    shard = data.draw(st.integers(0, shards - 1))
    order = in_order(items, shard, shards)
    assert sorted(order) == items
    own = items[shard::shards]
    assert order[: len(own)] == own


@pytest.mark.parametrize(("overrides", "message"), [
    (["initialise.shard=1"], "initialise.shard=1: there are 1 shards, numbered from 0; give at most 0"),
    (["initialise.engine=ray"], "initialise.engine=ray: there is one task; set initialise.shards to the number of tasks"),
    (["initialise.engine=ray", "initialise.shards=2", "initialise.shard=1"], "initialise.shard=1: initialise.engine=ray computes every"),
    (["initialise.shards=0"], "initialise.shards=0: out of range"),
    (["initialise.shards=2", "stages=[quantize,evaluate]"], "initialise.shards=2: the processes share the quantize stage alone"),
    (["initialise.shards=2", "quant=lora", "quant.iter=0"], "initialise.shards=2: lora decomposes no weight"),
    (["initialise.shards=2", "quant.calibration=full", "quant.order=sequential"], "initialise.shards=2: with quant.order=sequen"),
    (["initialise.shards=2", "hub.push=true", "hub.repo_id=a/b"], "initialise.shards=2: each process would push"),
])  # fmt: skip
def test_shards_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        loftq_exp.compose([*QUICK, *overrides])
    assert str(refused.value).startswith(message)
