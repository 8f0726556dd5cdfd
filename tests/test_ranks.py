"""Two ranks give the results of one process, with torchrun and accelerate over gloo; only rank 0 writes and prints."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file
from torch.distributed import TCPStore

import loftq_exp
from loftq_exp import RunResult, UserError, ranks
from loftq_exp.evaluation import evaluate as evaluation
from loftq_exp.manifest import faults
from loftq_exp.tasks.base import Nll, Request

TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2")
CONFIGS = Path(__file__).parents[1] / "conf" / "accelerate"
ACCELERATE = ("accelerate.commands.launch", f"--config_file={CONFIGS / 'ddp.yaml'}")
FSDP2 = ("accelerate.commands.launch", f"--config_file={CONFIGS / 'fsdp2.yaml'}")
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run of seconds in float32 without dropout: 4 steps of a global batch of 4, 7 rows to score."""
    return (
        "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4", "quant.iter=2", "quant.dropout=0",
        "task=arithmetic", "task.max_train_samples=16", "task.max_eval_samples=7", "task.max_source_length=48",
        "task.max_target_length=8", "train.learning_rate=1e-3", "train.logging_steps=1", "train.bf16=false",
        "train.per_device_eval_batch_size=2", "save_dtype=float32", "device=cpu",
        f"cache_dir={tmp_path_factory.mktemp('cache')}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One process with the whole batch."""
    output = tmp_path_factory.mktemp("alone")
    return loftq_exp.run(loftq_exp.compose([*settings, "train.per_device_train_batch_size=4", f"output_dir={output}"]))


@pytest.fixture
def launch(settings: tuple[str, ...], tmp_path: Path) -> Launch:
    """Two processes with half the batch each, under a launcher."""

    def start(
        launcher: tuple[str, ...], *overrides: str, program: tuple[str, ...] = ("-m", "loftq_exp")
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loftq_exp.__file__).parents[1])}
        run = (*program, *settings, "train.per_device_train_batch_size=2", f"output_dir={tmp_path / 'out'}")
        return subprocess.run([sys.executable, "-m", *launcher, *run, *overrides], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)  # fmt: skip

    return start


def folder_of(output: Path) -> Path:
    (folder,) = (output / "runs").iterdir()
    return folder


def losses(metrics: dict[str, Any]) -> list[float]:
    return [loss for _, loss in metrics["losses"]]


def check_same(alone: RunResult, folder: Path) -> None:
    """The tolerances of docs/run.md: the initialisation bit for bit, the rest up to the order of float32 sums."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scores"] == pytest.approx(alone.scores, rel=1e-5)
    assert losses(metrics) == pytest.approx(losses(alone.metrics), rel=1e-5)
    assert metrics["finetune"] == alone.metrics["finetune"] | {"ranks": 2}
    assert alone.metrics["finetune"]["ranks"] == 1
    (before, after) = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (alone.run_dir, folder))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    assert metrics["init"]["mean_error"] == alone.metrics["init"]["mean_error"]
    samples = [[json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
               for run in (alone.run_dir, folder)]  # fmt: skip
    assert len(samples[1]) == 7
    assert [sample["correct"] for sample in samples[1]] == [sample["correct"] for sample in samples[0]]


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_two_ranks_equal_one_process(alone: RunResult, launch: Launch, tmp_path: Path) -> None:
    done = launch(TORCHRUN)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path / "out")
    check_same(alone, folder)
    # Rank 0 alone wrote and printed: TensorBoard's files bear the process that wrote them.
    assert written(folder) == written(alone.run_dir)
    writers = {path.name.split(".")[5] for path in (folder / "tensorboard").iterdir()}
    assert len(writers) == 1
    assert len(re.findall(r"^quantize: .* 14 weights", done.stdout, re.MULTILINE)) == 1
    assert done.stdout.count("tensorboard --logdir") == 1
    assert "finetune: 4/4" in done.stdout
    assert len(re.findall(r"^evaluate: 4/4 .*greedy generation", done.stdout, re.MULTILINE)) == 1  # its share of 7
    assert not re.search("warning|error", done.stderr, re.IGNORECASE), done.stderr


SLOW = """
import sys, time
from loftq_exp import ranks
from loftq_exp.commands.run import main
from loftq_exp.records import Records
from loftq_exp.training import checkpoints, finetune

def slow(function):
    def call(*args):
        time.sleep(3)
        return function(*args)
    return call

if ranks.is_main():
    finetune._save_adapter = slow(finetune._save_adapter)
    checkpoints.ListCheckpoints._list = slow(checkpoints.ListCheckpoints._list)
    Records.keep = slow(Records.keep)
sys.exit(main())
"""


@pytest.mark.slow
def test_the_other_rank_scores_the_adapter_that_a_slow_rank_0_saved(
    alone: RunResult, launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    done = launch(TORCHRUN, "train.save_steps=2", program=(str(tmp_path / "slow.py"),))
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path / "out")
    check_same(alone, folder)
    assert json.loads((folder / "evaluate.json").read_text())["adapter"] == "fine-tuned"
    assert list(faults(folder / "adapter")) == []


@pytest.mark.slow
def test_accelerate_starts_two_ranks_on_cpus(alone: RunResult, launch: Launch, tmp_path: Path) -> None:
    done = launch(ACCELERATE)
    assert done.returncode == 0, done.stderr
    check_same(alone, folder_of(tmp_path / "out"))


@pytest.mark.slow
def test_scores_of_an_odd_number_of_rows_are_those_of_one_process(
    settings: tuple[str, ...], launch: Launch, tmp_path: Path
) -> None:
    """7 rows in batches of 2 and 3 over 2 ranks: no row is padded, and none counts twice. Exactly equal, digit by digit."""
    for size in (2, 3):
        given = ("stages=[quantize,evaluate]", f"train.per_device_eval_batch_size={size}")
        one = loftq_exp.run(loftq_exp.compose([*settings, *given, f"output_dir={tmp_path / f'one{size}'}"]))
        done = launch(TORCHRUN, *given, f"output_dir={tmp_path / f'two{size}'}")
        assert done.returncode == 0, done.stderr
        folder = folder_of(tmp_path / f"two{size}")
        assert json.loads((folder / "metrics.json").read_text())["scores"] == one.scores
        assert (folder / "samples.jsonl").read_text() == (one.run_dir / "samples.jsonl").read_text()
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 7


@pytest.mark.slow
def test_validation_of_an_odd_number_of_rows_is_that_of_one_process(
    settings: tuple[str, ...], launch: Launch, tmp_path: Path
) -> None:
    """5 rows over 2 ranks, on 4-bit layers. The best step is the same."""
    given = ("train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true", "train.max_steps=2",
             "task.validation_size=5", "train.backbone=bnb4")  # fmt: skip
    one = loftq_exp.run(
        loftq_exp.compose([*settings, *given, "train.per_device_train_batch_size=4", f"output_dir={tmp_path / 'one'}"])
    )
    done = launch(TORCHRUN, *given)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder_of(tmp_path / "out") / "metrics.json").read_text())
    assert found["finetune"]["ranks"] == 2
    ours, theirs = found["validation"], one.metrics["validation"]
    assert (ours["rows"], ours["adapter_step"]) == (theirs["rows"], theirs["adapter_step"]) == (5, ours["adapter_step"])
    for (_, mine), (_, other) in zip(ours["values"], theirs["values"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert found["scores"] == pytest.approx(one.scores, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["launch", "setting"])
def test_fsdp_on_cpus_is_refused_because_nothing_would_be_spread(launch: Launch, tmp_path: Path, asked: str) -> None:
    (tmp_path / "fsdp.json").write_text("{}")
    done = launch(FSDP2) if asked == "launch" else launch(TORCHRUN, "train.fsdp=fsdp.json")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, done.stderr
    shown = "accelerate launch (ACCELERATE_USE_FSDP=true)" if asked == "launch" else "train.fsdp=fsdp.json"
    assert ours[0].startswith(f"error: {shown}: accelerate spreads no parameters on CPUs")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_on_cpus_says_why_it_does_not_start_two(launch: Launch, tmp_path: Path) -> None:
    done = launch(("accelerate.commands.launch", "--num_processes=2", "--cpu"))
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, done.stderr
    assert ours[0].startswith(
        "error: accelerate launch: starts one process on CPUs, whatever --num_processes says; use torchrun"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_divergence_stops_all_ranks_with_one_line(launch: Launch, tmp_path: Path) -> None:
    done = launch(TORCHRUN, "train.learning_rate=1e20", "train.max_grad_norm=0", "train.warmup_ratio=0")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, done.stderr
    assert re.match(r"error: train.learning_rate=1e\+20: training diverged at step 2 ", ours[0])
    assert "UserError" not in done.stderr
    assert "adapter" not in written(folder_of(tmp_path / "out"))


@pytest.mark.slow
def test_recomputed_activations_train_with_two_ranks(alone: RunResult, launch: Launch, tmp_path: Path) -> None:
    done = launch(TORCHRUN, "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2",
                  "train.per_device_train_batch_size=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_same(alone, folder_of(tmp_path / "out"))


# A launch, seen from one of its ranks -------------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes this process the given rank of two, with a store of its own; the exchanges are counted from the first again."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "GRACE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def become(number: int) -> None:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setattr(ranks, "_calls", count())

    yield become
    logging.disable(logging.NOTSET)  # the command silences ranks above 0


def never() -> bytes:
    raise AssertionError("a rank above 0 did the work of rank 0")


def test_all_ranks_have_what_rank_0_found(rank: Callable[[int], None]) -> None:
    large = os.urandom(9 << 20)  # more than one value of the store takes
    rank(0)
    assert ranks.from_main(lambda: large) == large
    assert ranks.main_first(lambda: "its own") == "its own"
    rank(1)
    assert ranks.from_main(never) == large
    assert ranks.main_first(lambda: "its own too") == "its own too"


@pytest.mark.parametrize(("error", "told"), [
    (UserError("quant.rank=9: too high"), "quant.rank=9: too high"),
    (OSError("no space"), "rank 0 failed: OSError"),
])  # fmt: skip
def test_what_stops_rank_0_stops_the_others(rank: Callable[[int], None], error: Exception, told: str) -> None:
    def fails() -> None:
        raise error

    rank(0)
    with pytest.raises(type(error)):
        ranks.from_main(fails)
    rank(1)
    with pytest.raises(UserError, match=f"^{told}$"):
        ranks.from_main(never)


def test_each_batch_is_answered_by_one_rank(rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("reading", [{"input_ids": [0] * length} for length in (3, 9, 1, 4, 1, 5, 2)])
    batches: list[list[int]] = []

    def answers(model: Any, tokenizer: Any, request: Request, features: list[dict[str, list[int]]]) -> list[Nll]:
        batches.append([len(feature["input_ids"]) for feature in features])
        return [Nll(float(len(feature["input_ids"])), 1) for feature in features]

    monkeypatch.setattr(evaluation, "_batch_answers", answers)

    class Share(Exception):
        pass

    def keep(value: Any) -> Any:
        shares.append(value)
        raise Share

    shares: list[Any] = []
    for number in (0, 1):
        rank(number)
        monkeypatch.setattr(ranks, "gather", keep)
        with pytest.raises(Share):
            evaluation._answers(None, None, request, 2, lambda *_: None)  # type: ignore[arg-type]
    assert batches == [[9, 5], [2, 1], [4, 3], [1]]  # those that one process would make, by turns
    monkeypatch.setattr(ranks, "gather", lambda value: shares)
    found = evaluation._answers(None, None, request, 2, lambda *_: None)  # type: ignore[arg-type]
    assert [answer.total for answer in found] == [3, 9, 1, 4, 1, 5, 2]
    # An output that is no number stops both, whichever met it.
    monkeypatch.setattr(ranks, "gather", lambda value: [shares[0], ({}, UserError("row 3 is NaN"))])
    with pytest.raises(UserError, match=r"^row 3 is NaN$"):
        evaluation._answers(None, None, request, 2, lambda *_: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1])
def test_a_multirun_is_refused(cli: Command, rank: Callable[[int], None], number: int) -> None:
    rank(number)
    assert cli.refused("-m", "seed=1,2").startswith("-m: not supported with several processes, ")
    assert not list(Path.cwd().iterdir())


def test_a_rank_above_0_prints_an_error_only_where_rank_0_had_none(
    cli: Command, rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    monkeypatch.setattr(ranks, "GRACE", 30.0)
    rank(0)
    assert cli.refused("quant.bitz=3").startswith("quant.bitz=3: there is no such setting")
    assert not waited
    rank(1)
    assert cli.refused("quant.bitz=3").startswith("quant.bitz=3: there is no such setting")
    assert waited == [30.0]  # the launcher ends it before, once rank 0 has failed


@pytest.mark.parametrize(("environment", "told"), [
    ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch: starts one process on CPUs"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun: not supported"),
])  # fmt: skip
def test_a_launch_whose_processes_do_not_know_each_other_is_refused(
    cli: Command, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.refused(*cli.tiny).startswith(told)


@pytest.mark.parametrize("environment", [
    {}, {"ACCELERATE_MIXED_PRECISION": "no"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"MASTER_ADDR": "127.0.0.1"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"},
])  # fmt: skip
def test_other_launches_are_not(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ranks.check_launch()
