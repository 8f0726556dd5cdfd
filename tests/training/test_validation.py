"""Validation during training: its values, the best step, early stopping, rows of its own, and a resumed run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import TrainerCallback

import loftq_exp
from loftq_exp import RunConfig, RunResult, UserError
from loftq_exp.artifact.folder import read_artifact
from loftq_exp.config.task import TaskConfig
from loftq_exp.evaluation.evaluate import evaluate
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.arithmetic import generate
from loftq_exp.tasks.held_out import hold_out
from loftq_exp.training import finetune as stage
from loftq_exp.training.load import load_model, load_tokenizer
from loftq_exp.training.validation import Patience

Configure = Callable[..., RunConfig]
BEST = ("train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true")
RISING = (
    "train.learning_rate=0.01",
    "train.lr_scheduler_type=constant",
    "train.warmup_ratio=0",
    "task.validation_file=odd.jsonl",
)
"""The validation loss falls for 4 steps and then rises."""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(seed: int, count: int) -> list[dict[str, Any]]:
    return list(islice(generate("train", seed), count))


@pytest.fixture
def configure(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd.jsonl", [row | {"answer": "zq xv zq xv zq xv #### 7"} for row in problems(2, 4)])
    train, scored = write(tmp_path / "train.jsonl", problems(0, 20)), write(tmp_path / "eval.jsonl", problems(1, 4))

    def make(*overrides: str, output: str = "outputs") -> RunConfig:
        return loftq_exp.compose([
            "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4", "quant.iter=1", "task=arithmetic", "device=cpu",
            f"output_dir={tmp_path / output}", f"cache_dir={tmp_path / 'cache'}", f"task.train_file={train}",
            f"task.eval_file={scored}", "task.max_source_length=48", "task.max_target_length=16", "train.bf16=false",
            "train.per_device_train_batch_size=4", "train.max_steps=6", "train.logging_steps=1",
            "stages=[quantize,finetune]", *overrides,
        ])  # fmt: skip

    return make


def adapter(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.run_dir / "adapter" / "adapter_model.safetensors")


def same(one: RunResult, other: RunResult) -> bool:
    left, right = adapter(one), adapter(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(validation: dict[str, Any]) -> list[float]:
    return [values["loss"] for _, values in validation["values"]]


def test_the_best_steps_adapter_is_saved_and_recorded(configure: Configure, capsys: Any) -> None:
    result = loftq_exp.run(configure(*BEST, *RISING))
    found = json.loads((result.run_dir / "metrics.json").read_text())["validation"]
    assert [step for step, _ in found["values"]] == [1, 2, 3, 4, 5, 6]
    best = min(range(6), key=lambda index: losses(found)[index]) + 1
    assert 1 < best < 6, f"{losses(found)}: the test needs a best step before the last"
    assert found["best"] == {"step": best, "metric": "loss", "value": losses(found)[best - 1]}
    assert found["adapter_step"] == best
    assert found["rows"] == 4
    assert result.metrics["finetune"]["rows"] == 20
    (events,) = result.run_dir.glob("tensorboard/*.training")
    logged = [(value.tag, event.step) for event in EventFileLoader(str(events)).Load() for value in event.summary.value]
    assert {("train/loss", 6), ("train/epoch", 6), ("validation/loss", 6)} <= set(logged)
    assert len(logged) == len(set(logged)), "a value of a step is logged twice"
    # A run on the same rows that ends at that step has the same adapter.
    short = loftq_exp.run(configure("train.eval_strategy=epoch", *RISING, f"train.max_steps={best}", output="short"))
    assert same(result, short)
    assert short.metrics["validation"]["best"]["value"] == found["best"]["value"]


def test_the_loss_is_that_of_the_scored_nll(configure: Configure, tmp_path: Path) -> None:
    """The trainer's loss, and nats per target token by the evaluation, of the saved adapter on the same rows."""
    rows = problems(2, 5)
    file = write(tmp_path / "validation.jsonl", rows)
    config = configure("train.eval_strategy=epoch", "train.metric_for_best_model=nll", f"task.validation_file={file}",
                       "train.per_device_eval_batch_size=2", "train.max_steps=5")  # fmt: skip
    result = loftq_exp.run(config)
    (step, values) = result.metrics["validation"]["values"][-1]
    assert step == 5
    assert values["loss"] == pytest.approx(values["nll"], rel=1e-5)
    init = read_artifact(result.init_dir)
    assert init
    model = load_model(init, result.adapter_dir, config, torch.device("cpu"), torch.float32)
    again = evaluate(model, load_tokenizer(init, config), load_task(config.task), rows, 5)
    assert values["nll"] == pytest.approx(again.scores["nll"], rel=1e-5)
    assert set(values) == {"loss", "nll", "accuracy"}
    assert result.metrics["data"]["validation"].startswith("rows:")


def test_a_validation_that_chooses_nothing_changes_nothing(configure: Configure, tmp_path: Path) -> None:
    """Dropout and the order of rows are drawn as without it."""
    file = write(tmp_path / "validation.jsonl", problems(2, 5))
    plain = loftq_exp.run(configure("quant.dropout=0.1", output="plain"))
    validated = loftq_exp.run(configure(
        "quant.dropout=0.1", "train.eval_strategy=steps", "train.eval_steps=2", "train.metric_for_best_model=accuracy",
        f"task.validation_file={file}"))  # fmt: skip
    assert same(plain, validated)
    assert plain.metrics["validation"] is None
    keys = [json.loads((run.run_dir / "finetune.json").read_text())["key"] for run in (plain, validated)]
    assert keys[0] == keys[1]
    assert [step for step, _ in validated.metrics["validation"]["values"]] == [2, 4, 6]


def test_training_stops_once_patience_has_run_out(configure: Configure) -> None:
    result = loftq_exp.run(configure(*BEST, *RISING, "train.early_stopping_patience=2", "train.max_steps=12"))
    found = result.metrics["validation"]
    assert result.metrics["losses"][-1][0] == result.metrics["finetune"]["steps"] == found["best"]["step"] + 2 < 12
    assert found["adapter_step"] == found["best"]["step"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("killed_at", "more"), [
    (3, ()), (5, ("train.early_stopping_patience=2", "train.max_steps=12")),
    ("saved", ("train.early_stopping_patience=2", "train.max_steps=12")),
    ("saved", ("train.eval_steps=2", "train.save_steps=3")),
])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed_at: int | str, more: tuple[str, ...]
) -> None:
    settings = (*BEST, *RISING, "quant.dropout=0.1", "train.save_steps=2", *more)
    whole = loftq_exp.run(configure(*settings, output="whole"))

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == killed_at:
                raise Killed

    def never(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if killed_at == "saved":  # after the last checkpoint
            patch.setattr(stage, "_save_adapter", never)
        else:
            real = stage._trained
            patch.setattr(stage, "_trained", lambda *given: real(*given[:5], [*given[5], Kill()], *given[6:]))
        with pytest.raises(Killed):
            loftq_exp.run(configure(*settings))
    # The best checkpoint is found where the folder is now.
    (tmp_path / "outputs").rename(tmp_path / "moved")
    resumed = loftq_exp.run(configure(*settings, output="moved"))
    record = json.loads((resumed.run_dir / "finetune.json").read_text())
    assert record["resumed_from"]
    assert same(whole, resumed)
    for name in ("validation", "losses", "scores"):
        assert resumed.metrics[name] == whole.metrics[name]


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_a_training_whose_best_checkpoint_is_no_longer_whole_is_repeated(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A changed byte is still a tensor that loads, which would be saved as the best step's adapter."""
    settings = (*BEST, *RISING)
    whole = loftq_exp.run(configure(*settings, output="whole"))
    best = whole.metrics["validation"]["adapter_step"]
    assert best < 6

    def never(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_save_adapter", never)
        with pytest.raises(Killed):
            loftq_exp.run(configure(*settings))
    (folder,) = Path("outputs").glob(f"runs/*/checkpoints/checkpoint-{best}")
    if fault == "missing":
        shutil.rmtree(folder)
    else:
        place = folder / "adapter_model.safetensors"
        data = bytearray(place.read_bytes())
        data[-2] ^= 64
        place.write_bytes(data)
    resumed = loftq_exp.run(configure(*settings))
    assert same(whole, resumed)
    assert resumed.metrics["validation"] == whole.metrics["validation"]
    assert json.loads((resumed.run_dir / "finetune.json").read_text())["resumed_from"] is None


def test_patience_counts_validations_since_the_best() -> None:
    def history(*values: float) -> list[dict[str, Any]]:
        return [{"step": step, "eval_loss": 0.0, "eval_f1": value} for step, value in enumerate(values)]

    higher = Patience(2, "f1", lower_is_better=False)
    for values, stops in (((), False), ((1, 1), False), ((1, 1, 1), True), ((1, 0, 2), False), ((2, 1, 0), True)):
        assert higher.ran_out(history(*values)) == stops, values
    assert Patience(1, "f1", lower_is_better=True).ran_out(history(1, 2))


# The rows -------------------------------------------------------------------------------------------------------------


def test_equal_rows_are_held_out_together_whatever_their_order() -> None:
    rows = [{"text": str(number % 10)} for number in range(30)]
    kept, held = hold_out(rows, rows, 0.3, seed=0)
    assert len(held) == 9
    assert not {row["text"] for row in held} & {row["text"] for row in kept}
    again = hold_out(rows[::-1], rows[::-1], 0.3, seed=0)[1]
    assert {row["text"] for row in again} == {row["text"] for row in held}
    assert hold_out(rows, rows, 0.3, seed=1)[1] != held
    assert len({row["text"] for row in hold_out(rows, rows, 4, seed=0)[1]}) == 4
    with pytest.raises(
        UserError, match=r"^task.validation_size=10: there are 10 distinct rows, and none would be left"
    ):
        hold_out(rows, rows, 10, seed=0)


def units(rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    return load_task(task_settings(**settings)).units(rows)


def test_rows_on_one_thing_are_one_unit() -> None:
    questions = [{"id": str(number), "context": "a" if number < 2 else "b", "question": "?"} for number in range(3)]
    assert units(questions, kind="squad") == ["a", "a", "b"]
    assert len({str(unit) for unit in units([{"sentence": "a", "idx": 1}, {"sentence": "a", "idx": 2}],
                                            kind="glue", name="sst2")}) == 1  # fmt: skip
    metamath = [{"query": q, "response": "1", "original_question": "o"} for q in "ab"]
    assert units(metamath, kind="metamath") == ["o", "o"]
    lines = [" = One = \n", " = = Part = = \n", " text \n", " = Two = \n", " more \n"]
    one, two = "= One =\n= = Part = =\ntext", "= Two =\nmore"
    assert units([{"text": line} for line in lines], kind="wikitext") == [one, one, one, two, two]
    paragraphs = [{"text": line} for line in ("a", "b", "", "c")]
    assert units(paragraphs, kind="wikitext") == ["a\nb", "a\nb", "c", "c"]


@pytest.mark.parametrize(("overrides", "message"), [
    (("train.eval_strategy=steps",), "train.eval_steps=null: train.eval_strategy=steps needs it"),
    (("train.eval_steps=2",), "train.eval_steps=2: not used by train.eval_strategy=no"),
    (("train.load_best_model_at_end=true",), "train.load_best_model_at_end=true: nothing is validated"),
    (("train.early_stopping_patience=2",), "train.early_stopping_patience=2: nothing is validated"),
    (("task.validation_size=0.2",), "task.validation_size=0.2: nothing is validated"),
    (("train.eval_strategy=epoch", "task.validation_size=1.5"), "task.validation_size=1.5: neither a share nor a number"),
    (("train.eval_strategy=epoch", "task.validation_size=3", "task.validation_split=dev"),
     "task.validation_split=dev: task.validation_size=3 is given too"),
    (("train.eval_strategy=epoch", "train.metric_for_best_model=acuracy"),
     "train.metric_for_best_model=acuracy: not known; choose from: loss, nll, accuracy"),
    (("train.eval_strategy=epoch", "task.validation_size=20"), "task.validation_size=20: there are 20 distinct rows"),
    (("train.eval_strategy=epoch", "task.validation_file={eval}", "stages=[quantize,finetune,evaluate]"),
     "task.validation_file={eval}: 4 of its rows are scored too"),
    (("train.eval_strategy=epoch", "task.validation_file=absent.jsonl"), "task.validation_file=absent.jsonl: there is no such file"),
])  # fmt: skip
def test_what_is_refused(configure: Configure, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    place = str(tmp_path / "eval.jsonl")
    with pytest.raises(UserError) as refused:
        loftq_exp.run(configure(*(each.format(eval=place) for each in overrides)))
    assert str(refused.value).startswith(message.format(eval=place)), refused.value
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "outputs").exists()


def test_the_log_says_what_is_validated(cli: Command) -> None:
    outcome = cli(
        *cli.tiny, "train.eval_strategy=epoch", "train.load_best_model_at_end=true", "stages=[quantize,finetune]"
    )
    assert outcome.code == 0, outcome
    assert "validation: 1 rows, held out of the training rows; 7 rows to train on" in outcome.out
    assert re.search(r"finetune: the adapter of step [12] is kept \(validation loss \d", outcome.out)


def test_every_task_has_a_source_of_validation_rows() -> None:
    for kind, settings in TaskConfig.variants().items():
        if kind == "lm_eval":  # it only scores
            continue
        names = settings.names[:1] or (None,)
        config = task_settings(kind=kind, name=names[0], validation_file="x.jsonl")
        source = load_task(config).source("validation")
        assert (source.split, source.file, source.is_given) == ("validation", "x.jsonl", True)


# Every kind of task ---------------------------------------------------------------------------------------------------


def squad_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "question": f"what is {number}", "context": f"the {number} is {number * 2} here",
         "answers": {"text": [str(number * 2)], "answer_start": [len(f"the {number} is ")]}}
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "task", "rows", "metric"), [
    ("bert", ("task=glue", "task.name=sst2"), [{"sentence": f"a film {n}", "label": n % 2} for n in range(12)], "accuracy"),
    ("bert", ("task=glue", "task.name=stsb"),
     [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n / 3} for n in range(12)], "pearson"),
    ("bert", ("task=squad", "model.kind=question-answering"), squad_rows(12), "f1"),
    ("t5", ("task=summarization", "task.name=xsum"),
     [{"document": f"one two {n}", "summary": f"two {n}"} for n in range(12)], "nll"),
    ("llama-2", ("task=instruct", "task.packing=true"),
     [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(12)], "nll"),
    ("llama-2", ("task=wikitext", "task.block_size=16"), [{"text": line} for n in range(12) for line in (f"some words {n}" * 4, "")],
     "perplexity"),
])  # fmt: skip
def test_each_task_is_validated(
    cli: Command, checkpoint: Callable[[str], tuple[str, str]], tmp_path: Path, model: str, task: tuple[str, ...],
    rows: list[dict[str, Any]], metric: str,
) -> None:  # fmt: skip
    train = write(tmp_path / "train.jsonl", rows)
    arguments = [*(cli.tiny[:2] if model == "llama-2" else checkpoint(model)), "device=cpu", "quant.rank=4", "quant.iter=1", *task,
                 f"task.train_file={train}", "train.bf16=false", "train.max_steps=3", "train.per_device_train_batch_size=4",
                 "train.eval_strategy=steps", "train.eval_steps=2", "train.load_best_model_at_end=true",
                 f"train.metric_for_best_model={metric}", "task.validation_size=4", "stages=[quantize,finetune]"]  # fmt: skip
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome
    (record,) = Path("outputs/runs").glob("*/metrics.json")
    found = json.loads(record.read_text())
    assert [step for step, _ in found["validation"]["values"]] == [2, 3]
    assert found["validation"]["best"]["metric"] == metric
    values = [values[metric] for _, values in found["validation"]["values"]]
    assert found["validation"]["best"]["value"] == (min if metric in ("nll", "perplexity") else max)(values)
    if metric == "nll":
        for _, each in found["validation"]["values"]:
            assert each["loss"] == pytest.approx(each["nll"], rel=1e-4)
