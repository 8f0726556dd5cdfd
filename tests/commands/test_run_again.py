"""`python -m loftq_exp.rerun`: equal results are reported as equal, others are listed, and a bad record is a one-line error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Outcome
from safetensors.torch import load_file, save_file

import loftq_exp
from loftq_exp.commands.run_again import main

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(1, 5)]
Rerun = Callable[..., Outcome]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A folder with a finished run in runs/, its model and its rows."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_llama_dir, folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    loftq_exp.run(loftq_exp.compose(settings(folder)))
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    rows = folder / "rows.jsonl"
    return ["model=llama-2", f"model.path={folder / 'model'}", "quant.rank=4", "quant.iter=1", "task=gsm8k",
            f"task.train_file={rows}", f"task.eval_file={rows}", "task.max_target_length=8", "task.max_source_length=48",
            "train.max_steps=2", "train.per_device_train_batch_size=2", "train.logging_steps=1",
            "train.warmup_ratio=0", "train.learning_rate=1e-2", "device=cpu", f"output_dir={folder / 'out'}", *more]  # fmt: skip


@pytest.fixture
def run_dir(finished: Path) -> Path:
    (found,) = (finished / "out" / "runs").iterdir()
    return found


@pytest.fixture
def record(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run's record, to be damaged: its rows and model stay where they are."""
    copy = tmp_path / "out" / "runs" / run_dir.name
    copy.mkdir(parents=True)
    for name in ("config.json", "metrics.json", "finetune.json", "evaluate.json"):
        shutil.copy(run_dir / name, copy)
    return copy


@pytest.fixture
def rerun(cli: Command) -> Rerun:
    return lambda *arguments: cli.call(lambda: sys.exit(main([str(argument) for argument in arguments])))


def refusal(outcome: Outcome) -> str:
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "quantize:" not in outcome.out  # before the work
    return outcome.err.removeprefix("error: ")


def change(record: Path, name: str, changed: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((record / name).read_text())
    changed(value)
    (record / name).write_text(json.dumps(value))


def test_a_run_that_is_done_again_is_equal(rerun: Rerun, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    outcome = rerun(run_dir)
    assert outcome.code == 0, outcome
    assert "results are equal, bit for bit" in outcome.out
    assert "scores.nll" in outcome.out
    assert "7 computed" in outcome.out or "14 computed" in outcome.out  # nothing is taken from the run's own cache
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    (fresh,) = (run_dir.parent.parent / "reruns" / run_dir.name).iterdir()
    (new,) = (fresh / "runs").iterdir()
    samples = [(folder / "samples.jsonl").read_text() for folder in (run_dir, new)]
    assert samples[0] == samples[1]
    assert "hf_not_to_be_seen" not in outcome.out + outcome.err
    assert not any(b"hf_not_to_be_seen" in path.read_bytes() for path in fresh.rglob("*") if path.is_file())


def test_every_number_that_differs_is_listed(rerun: Rerun, record: Path, tmp_path: Path) -> None:
    def other(metrics: dict[str, Any]) -> None:
        metrics["scores"]["nll"] += 0.5
        metrics["losses"][1][1] -= 1
        metrics["init"]["mean_error"] *= 2
        metrics["provenance"]["versions"]["torch"] = "1.0"

    change(record, "metrics.json", other)
    outcome = rerun(record, "--output-dir", tmp_path / "again")
    assert outcome.code == 1
    rows = {
        line.split("│")[1].strip(): line.split("│")[4].strip()
        for line in outcome.out.splitlines()
        if line.count("│") == 5
    }
    assert rows["scores.nll"] == "-0.5"
    assert rows["scores.accuracy"] == "none"
    assert rows["loss at step.2"] == "+1"
    assert rows["init.mean_error"].startswith("-0.0")
    assert rows["versions.torch"] == "differs"
    assert "3 of " in outcome.out
    assert (tmp_path / "again" / "runs").is_dir()
    assert "is not empty" in refusal(rerun(record, "--output-dir", tmp_path / "again"))


def test_changed_rows_are_named_before_the_work(rerun: Rerun, finished: Path, record: Path) -> None:
    rows = finished / "rows.jsonl"
    before = rows.read_bytes()
    try:
        write_rows(rows, [*ROWS[:3], {"question": "What is 4 + 4?", "answer": "4 + 4 = 9\n#### 9"}])
        line = refusal(rerun(record))
        assert line.startswith(f"the training rows changed since {record.name} (digest ")
        assert "the evaluation rows changed" in line
        outcome = rerun(record, "--anyway")
        assert outcome.code == 1
        for name in ("data.train", "data.eval", "adapter digest", "samples digest", "loss at step.2"):
            assert name in outcome.out
        rows.unlink()
        assert "rows.jsonl: there is no such file" in refusal(rerun(record))
    finally:
        rows.write_bytes(before)


def test_a_changed_or_absent_model_is_named_before_the_work(rerun: Rerun, finished: Path, record: Path) -> None:
    weights = finished / "model" / "model.safetensors"
    kept = shutil.copytree(finished / "model", finished / "kept")
    try:
        save_file({name: value + 0.01 * torch.ones_like(value) for name, value in load_file(weights).items()}, weights,
                  {"format": "pt"})  # fmt: skip
        assert refusal(rerun(record)).startswith(f"model.path={finished / 'model'}: the model, or what this version ")
        shutil.rmtree(finished / "model")
        assert refusal(rerun(record)).startswith(f"model.path={finished / 'model'}")
    finally:
        shutil.rmtree(finished / "model", ignore_errors=True)
        kept.rename(finished / "model")  # with the dates that it had


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value.pop(name)


@pytest.mark.parametrize(("damage", "told"), [
    (lambda record: (record / "metrics.json").unlink(), "no finished run (there is no metrics.json)"),
    (lambda record: shutil.rmtree(record), "no finished run"),
    (lambda record: (record / "metrics.json").write_text('{"scores": {'), "metrics.json: damaged"),
    (lambda record: (record / "metrics.json").write_bytes(b"\xff\xfe"), "metrics.json: damaged"),
    (lambda record: (record / "metrics.json").write_text("[]"), "metrics.json: damaged"),
    (lambda record: change(record, "metrics.json", without("losses")), "metrics.json: damaged, or of another version: it has no sound 'losses'"),
    (lambda record: change(record, "metrics.json", lambda value: value.update(losses=3)), "metrics.json: damaged"),
    (lambda record: change(record, "metrics.json", lambda value: value.update(config=3)), "metrics.json: damaged"),
    (lambda record: change(record, "metrics.json", lambda value: value["config"]["quant"].update(bitz=3)), "quant.bitz"),
    (lambda record: (record / "finetune.json").unlink(), "finetune.json is missing"),
    (lambda record: (record / "evaluate.json").write_text("{"), "evaluate.json: damaged"),
])  # fmt: skip
def test_a_damaged_record_is_one_line(rerun: Rerun, record: Path, damage: Callable[[Path], Any], told: str) -> None:
    damage(record)
    assert told in refusal(rerun(record))


def test_initial_factors_that_were_scored_before_they_were_trained(
    rerun: Rerun, finished: Path, tmp_path: Path
) -> None:
    for stages in ("stages=[quantize,evaluate]", "stages=[quantize,finetune]"):
        result = loftq_exp.run(loftq_exp.compose(settings(finished, f"output_dir={tmp_path / 'two'}", stages)))
    assert result.metrics["scored_adapter"] == "initial"
    assert result.metrics["finetune"]
    outcome = rerun(result.run_dir, "--cache-dir", finished / "out" / "cache")
    assert outcome.code == 0, outcome.out
    assert "equal, bit for bit" in outcome.out
