"""A whole run on a tiny llama: its files, and that finished stages are not run again."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import loftq_exp
from loftq_exp import RunConfig, UserError
from loftq_exp.evaluation import score
from loftq_exp.initialise.decomposition_cache import DecompositionCache
from loftq_exp.keys import identify
from loftq_exp.training import finetune

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path, tiny_llama_dir: Path) -> Configure:
    """Composes a run of the tiny llama on a few generated problems, with further overrides."""

    def make(*overrides: str) -> RunConfig:
        settings = [
            "model=llama-2", f"model.path={tiny_llama_dir}", "quant.rank=4", "quant.iter=2", "quant.dropout=0",
            f"output_dir={tmp_path / 'outputs'}", "task.max_train_samples=16", "task.max_eval_samples=4",
            "task.max_source_length=48", "task.max_target_length=16", "train.per_device_train_batch_size=4",
            "train.logging_steps=1", "device=cpu", *overrides,
        ]  # fmt: skip
        return loftq_exp.compose(settings)

    return make


def test_run_leaves_metrics_samples_and_log(configure: Configure) -> None:
    config = configure()
    result = loftq_exp.run(config)
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert set(metrics["scores"]) == {"nll", "accuracy"}
    assert metrics["scored_adapter"] == "fine-tuned"
    assert metrics["config"]["quant"]["rank"] == 4
    assert metrics["init"]["weights"] == 14  # 7 linear layers in each of 2 blocks
    assert metrics["init"]["mean_error"] < metrics["init"]["mean_error_quantized"]
    assert metrics["init"]["bits_per_weight"] == 4 + 16 / 64
    assert set(metrics["seconds"]) == set(metrics["peak_memory"]) == {"quantize", "finetune", "evaluate"}
    assert metrics["data"]["train"] != metrics["data"]["eval"]
    assert metrics["provenance"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert metrics["backbone_bytes"] == (result.init_dir / "model.safetensors").stat().st_size
    assert [step for step, _ in metrics["losses"]] == [1, 2, 3, 4]
    samples = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert sum(sample["correct"] for sample in samples) / 4 == metrics["scores"]["accuracy"]


def test_tensorboard_holds_errors_losses_scores_settings(configure: Configure) -> None:
    result = loftq_exp.run(configure())
    log = EventAccumulator(str(result.run_dir / "tensorboard"), size_guidance={"histograms": 0, "images": 0})
    log.Reload()
    tags = log.Tags()
    assert {"train/loss", "train/learning_rate", "score/nll", "score/accuracy", "init_error_mean"} <= set(
        tags["scalars"]
    )
    assert not [tag for tag in tags["scalars"] if "proj" in tag], "no chart of each weight"
    weights = json.loads((result.init_dir / "init_report.json").read_text())["weights"]
    for step, event in enumerate(log.Histograms("init_error")):
        errors = [weight["errors"][step] for weight in weights]
        found = event.histogram_value
        assert (event.step, found.num) == (step, 14)
        assert (found.min, found.max, found.sum) == pytest.approx((min(errors), max(errors), sum(errors)))
        assert log.Scalars("init_error_mean")[step].value == pytest.approx(sum(errors) / 14, rel=1e-6)
    assert step == 2
    (image,) = log.Images("init_error_by_layer")
    assert min(image.width, image.height) > 200
    assert "config/text_summary" in tags["tensors"]
    (samples,) = log.Tensors("samples/text_summary")
    text = samples.tensor_proto.string_val[0].decode()
    rows = [json.loads(block) for block in text.split("\n\n---\n\n")]
    assert rows == [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [event.step for event in log.Scalars("score/nll")] == [samples.step] == [4]
    start = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {"seed", "quant.rank", "train.learning_rate", "quant.block_size", "quant.alpha", "model", "task"} <= set(
        hparams
    )
    assert hparams["quant.rank"].number_value == 4


def test_scores_of_the_initial_factors_stand_at_step_0(configure: Configure) -> None:
    result = loftq_exp.run(configure("stages=[quantize,evaluate]"))
    log = EventAccumulator(str(result.run_dir / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("score/nll")] == [0]


def test_same_command_does_nothing_again(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loftq_exp.run(configure())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a stage whose result is there was run again")

    monkeypatch.setattr(finetune, "finetune", never)
    monkeypatch.setattr(score, "score", never)
    monkeypatch.setattr(DecompositionCache, "put", never)
    logs = sorted((first.run_dir / "tensorboard").iterdir())
    again = loftq_exp.run(configure())
    assert sorted((first.run_dir / "tensorboard").iterdir()) == logs
    assert again.metrics == first.metrics, "also what made each result: a run that does nothing makes none"


def test_training_lowers_the_loss_and_the_score(configure: Configure) -> None:
    more = ("task.max_train_samples=64", "train.learning_rate=1e-2", "train.num_train_epochs=2")
    before = loftq_exp.run(configure("stages=[quantize,evaluate]", *more))
    assert before.metrics["scored_adapter"] == "initial"
    assert before.adapter_dir is None
    after = loftq_exp.run(configure(*more))
    losses = [loss for _, loss in after.metrics["losses"]]
    assert losses[-1] < losses[0]
    assert after.scores["nll"] < before.scores["nll"]


def test_killed_run_resumes_to_the_same_adapter(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ("train.save_steps=1", "stages=[quantize,finetune]")
    whole = loftq_exp.run(configure(*often, f"output_dir={tmp_path / 'whole'}"))

    class Killed(Exception):
        pass

    def kill_after_two(self: object, args: object, state: object, control: object, **_: object) -> None:
        if getattr(state, "global_step") == 2 and not getattr(control, "should_save"):  # noqa: B009
            raise Killed

    monkeypatch.setattr(finetune._Report, "on_step_begin", kill_after_two, raising=False)
    config = configure(*often, f"output_dir={tmp_path / 'cut'}")
    with pytest.raises(Killed):
        loftq_exp.run(config)
    assert not (identify(config).run_dir / "adapter").exists()
    monkeypatch.undo()
    # What a kill in the middle of writing leaves: a newer checkpoint without its last file.
    (identify(config).run_dir / "checkpoints" / "checkpoint-3").mkdir()

    resumed = loftq_exp.run(config)
    assert json.loads((resumed.run_dir / "finetune.json").read_text())["resumed_from"] == "checkpoint-2"
    assert not (resumed.run_dir / "checkpoints").exists()
    assert resumed.adapter_dir
    assert whole.adapter_dir
    expected, found = (load_file(d / "adapter_model.safetensors") for d in (whole.adapter_dir, resumed.adapter_dir))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("backbone", ["bnb4", "dense"])
def test_backbones_score_alike(configure: Configure, backbone: str) -> None:
    result = loftq_exp.run(
        configure("stages=[quantize,evaluate]", "train.bf16=false", "save_dtype=float32", f"train.backbone={backbone}")
    )
    other = {"bnb4": "dense", "dense": "bnb4"}[backbone]
    twin = loftq_exp.run(
        configure("stages=[quantize,evaluate]", "train.bf16=false", "save_dtype=float32", f"train.backbone={other}")
    )
    assert result.scores["nll"] == pytest.approx(twin.scores["nll"], rel=1e-4)


@pytest.mark.parametrize("quant", ["quant=qlora", "quant=lora", "quant.type=uniform", "quant.bits=3", "quant.alpha=16"])
def test_every_method_runs_from_command_to_score(configure: Configure, quant: str) -> None:
    iterless = () if quant not in ("quant=qlora", "quant=lora") else ("quant.iter=0",)
    result = loftq_exp.run(configure(quant, *iterless))
    assert result.scores["nll"] > 0
    assert result.metrics["finetune"]["backbone"] == ("bnb4" if quant in ("quant=qlora", "quant.alpha=16") else "dense")


def test_gsm8k_from_local_files(configure: Configure, shared_data: Path) -> None:
    files = [
        f"task.{split}_file={shared_data / 'gsm8k' / name}"
        for split, name in (("train", "train.jsonl"), ("eval", "test.jsonl"))
    ]
    result = loftq_exp.run(configure("task=gsm8k", *files, "task.pad_to_max_length=true"))
    assert set(result.scores) == {"nll", "accuracy"}


def test_gradient_checkpointing_changes_no_gradient(configure: Configure) -> None:
    plain = loftq_exp.run(configure("stages=[quantize,finetune]"))
    checkpointed = loftq_exp.run(configure("stages=[quantize,finetune]", "train.gradient_checkpointing=true"))
    assert [loss for _, loss in checkpointed.metrics["losses"]] == pytest.approx(
        [loss for _, loss in plain.metrics["losses"]], rel=1e-4
    )


def test_finetune_without_checkpoint_is_refused(configure: Configure) -> None:
    with pytest.raises(UserError, match="add quantize to stages"):
        loftq_exp.run(configure("stages=[finetune]"))


def test_task_and_model_that_do_not_fit_are_refused(configure: Configure) -> None:
    with pytest.raises(UserError, match="needs a causal model"):
        loftq_exp.run(configure("model=bert"))


def test_accumulation_divides_the_steps_and_the_schedule(configure: Configure) -> None:
    """16 rows in batches of 4, two a step: 2 steps an epoch, and the rate falls to zero over just these."""
    more = ("stages=[quantize,finetune]", "train.gradient_accumulation_steps=2", "train.num_train_epochs=2")
    result = loftq_exp.run(configure(*more, "train.warmup_ratio=0", "train.lr_scheduler_type=linear"))
    assert result.metrics["finetune"]["steps"] == 4
    log = EventAccumulator(str(result.run_dir / "tensorboard"))
    log.Reload()
    rates = [event.value for event in log.Scalars("train/learning_rate")]
    assert rates == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4], rel=1e-4)


# Training that diverges -----------------------------------------------------------------------------------------------


def test_diverged_training_saves_no_adapter_and_no_score(configure: Configure) -> None:
    config = configure(
        "train.learning_rate=1e20", "train.max_grad_norm=0", "train.warmup_ratio=0", "train.save_steps=1"
    )
    with pytest.raises(UserError, match=r"train.learning_rate=1e\+20: training diverged at step 2 ") as refusal:
        loftq_exp.run(config)
    assert "\n" not in str(refusal.value)
    written = {path.name for path in identify(config).run_dir.iterdir() if path.suffix != ".lock"}
    assert written == {"config.json", "manifest.json", "tensorboard", "checkpoints"}
    (kept,) = (identify(config).run_dir / "checkpoints").glob("checkpoint-*")
    assert kept.name == "checkpoint-1"
    assert all(value.isfinite().all() for value in load_file(kept / "adapter_model.safetensors").values())
    with pytest.raises(UserError, match="diverged at step 2"):  # from the checkpoint, and to the same end
        loftq_exp.run(config)


def test_a_score_that_is_no_number_is_not_written(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_exp.tasks.arithmetic import Arithmetic

    scored = Arithmetic.score

    def undefined(*args: object) -> object:
        result = scored(*args)  # type: ignore[arg-type]
        return dataclasses.replace(result, scores=result.scores | {"accuracy": float("nan")})

    monkeypatch.setattr(Arithmetic, "score", undefined)
    config = configure("stages=[quantize,evaluate]")
    with pytest.raises(UserError, match=r"^evaluate: the score accuracy is nan"):
        loftq_exp.run(config)
    assert not list(identify(config).run_dir.glob("*.jsonl"))
    assert {path.name for path in identify(config).run_dir.glob("*.json")} == {"config.json", "manifest.json"}


# Results of something else --------------------------------------------------------------------------------------------

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(1, 5)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(run_dir: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / f"{stage}.json").read_text())
    return found


def other_weights(folder: Path, seed: int) -> None:
    """Weights of the same names and shapes, at the same path."""
    torch.manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value + 0.05 * torch.randn_like(value) for name, value in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


@pytest.mark.parametrize("change", ["rows", "weights", "nothing"])
def test_training_goes_on_only_from_checkpoints_of_its_own(
    configure: Configure, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, change: str,
) -> None:  # fmt: skip
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = ("task=gsm8k", f"task.train_file={rows}", f"model.path={model}", "train.save_steps=1", "train.max_steps=2",
                 "stages=[quantize,finetune]")  # fmt: skip

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            loftq_exp.run(configure(*arguments))
    if change == "rows":
        write_rows(rows, [*ROWS[:3], {"question": "What is 4 + 4?", "answer": "4 + 4 = 9\n#### 9"}])  # of the same size
    elif change == "weights":
        other_weights(Path(model), 1)
    with caplog.at_level(logging.INFO):
        result = loftq_exp.run(configure(*arguments))
    again = record(result.run_dir, "finetune")
    told = [line for line in caplog.messages if line.startswith("finetune: starts over, because the checkpoints in ")]
    expected_lines = 1 if change == "rows" else 0  # other weights have a folder of their own
    assert (again["resumed_from"], len(told)) == ("checkpoint-2" if change == "nothing" else None, expected_lines)
    fresh = loftq_exp.run(configure(*arguments, f"output_dir={tmp_path / 'fresh'}"))
    expected, found = (load_file(run.run_dir / "adapter" / "adapter_model.safetensors") for run in (fresh, result))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_rows_beyond_those_that_are_used_do_not_count(configure: Configure, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:3])
    arguments = ("task=gsm8k", f"task.train_file={rows}", "task.max_train_samples=2", "stages=[quantize,finetune]")
    first = loftq_exp.run(configure(*arguments))
    write_rows(rows, ROWS)
    again = loftq_exp.run(configure(*arguments))
    assert record(again.run_dir, "finetune")["seconds"] == first.metrics["seconds"]["finetune"]


def test_an_adapter_of_other_weights_is_not_scored(configure: Configure, tmp_path: Path, tiny_llama_dir: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    config = configure(f"model.path={model}")
    assert loftq_exp.run(config).metrics["scored_adapter"] == "fine-tuned"
    other_weights(model, 1)
    result = loftq_exp.run(configure(f"model.path={model}", "stages=[quantize,evaluate]"))
    assert result.adapter_dir is None
    assert result.metrics["scored_adapter"] == "initial"
    assert result.metrics["finetune"] is None
    assert result.metrics["losses"] == []
    alone = loftq_exp.run(
        configure(f"model.path={model}", "stages=[quantize,evaluate]", f"output_dir={tmp_path / 'b'}")
    )
    assert result.scores == alone.scores
    both = loftq_exp.run(config)
    assert both.metrics["scored_adapter"] == "fine-tuned"
    assert both.scores != alone.scores


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_an_adapter_that_was_deleted_or_replaced_is_trained_again(configure: Configure, change: str) -> None:
    config = configure("train.learning_rate=1e-2")
    first = loftq_exp.run(config)
    assert first.adapter_dir
    weights = first.adapter_dir / "adapter_model.safetensors"
    before = load_file(weights)
    if change == "deleted":
        shutil.rmtree(first.adapter_dir)
    else:
        save_file({name: torch.zeros_like(value) for name, value in before.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="was deleted or changed since it was trained; add finetune to stages"):
        loftq_exp.run(configure("train.learning_rate=1e-2", "stages=[evaluate]"))
    scores = loftq_exp.run(config).scores
    assert scores == first.scores
    assert all(torch.equal(value, before[name]) for name, value in load_file(weights).items())


def test_scores_whose_samples_are_gone_are_made_again(configure: Configure) -> None:
    first = loftq_exp.run(configure("stages=[quantize,evaluate]"))
    samples = first.run_dir / "samples.jsonl"
    before = samples.read_text()
    for damage in (samples.unlink, lambda: samples.write_text("{}\n")):
        damage()
        assert loftq_exp.run(configure("stages=[quantize,evaluate]")).scores == first.scores
        assert samples.read_text() == before


def test_scores_of_an_earlier_adapter_are_not_shown_beside_a_new_one(configure: Configure, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = ("task=gsm8k", f"task.train_file={rows}", f"task.eval_file={rows}", "train.warmup_ratio=0")
    assert loftq_exp.run(configure(*arguments)).scores
    kept = loftq_exp.run(configure(*arguments, "stages=[quantize,finetune]"))
    assert kept.metrics["scored_adapter"] == "fine-tuned"
    write_rows(rows, ROWS[:2])
    other = loftq_exp.run(configure(*arguments, "stages=[quantize,finetune]"))
    assert other.scores == {}
    assert other.metrics["scored_adapter"] is None
