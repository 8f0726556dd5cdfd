"""The arguments of the trainer, and the checkpoint that it resumes from."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command

import loftq_exp
from loftq_exp.config import ModelConfig, RunConfig, TrainConfig
from loftq_exp.config.quant import QuantConfig
from loftq_exp.device import compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.tasks import task_settings
from loftq_exp.training.checkpoints import last_whole_checkpoint
from loftq_exp.training.finetune import training_arguments
from loftq_exp.training.validation import ValidatingTrainer


def run_config(**train: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="x", kind="causal"),
        quant=QuantConfig(method="loftq"),
        task=task_settings(kind="gsm8k"),
        train=TrainConfig(**train),
        seed=7,
    )


def arguments(tmp_path: Path, dtype: torch.dtype = torch.float32, **train: Any) -> Any:
    return training_arguments(run_config(**train), tmp_path, torch.device("cpu"), dtype)


def test_every_shared_name_is_handed_on(tmp_path: Path) -> None:
    """A setting that TrainingArguments has under the same name must not get lost on the way."""
    changed = {
        "learning_rate": 1e-5, "weight_decay": 0.25, "lr_scheduler_type": "cosine", "num_train_epochs": 3.0,
        "max_steps": 17, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "optim": "adamw_torch_fused",
        "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "logging_steps": 2,
        "save_steps": 9, "save_total_limit": 4, "dataloader_num_workers": 1, "warmup_steps": 6,
        "train_sampling_strategy": "group_by_length", "eval_strategy": "steps", "eval_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "per_device_eval_batch_size": 5,
        "torch_compile": True,
    }  # fmt: skip
    made = arguments(tmp_path, **changed)
    # A checkpoint at each validation; a callback saves at the others (test_validation.py).
    assert {name: getattr(made, name) for name in changed} == changed | {"save_steps": 3}
    assert arguments(tmp_path, save_steps=9).save_steps == 9
    assert made.seed == 7
    # Handled elsewhere: how the backbone is held, scoring, checkpointing, the computing type, the ratio (below).
    elsewhere = {
        "backbone",
        "gradient_checkpointing",
        "bf16",
        "fp16",
        "warmup_ratio",
        "early_stopping_patience",
        "report_to",
        "fsdp",
        "deepspeed",
    }
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(changed) | elsewhere


@pytest.mark.parametrize(
    ("steps", "ratio", "total", "expected"), [(0, 0.03, 100, 3), (5, 0.5, 100, 5), (0, 0.0, 100, 0)]
)
def test_warmup_in_steps_beats_warmup_as_a_ratio(
    tmp_path: Path, steps: int, ratio: float, total: int, expected: int
) -> None:
    made = arguments(tmp_path, warmup_steps=steps, warmup_ratio=ratio)
    assert made.get_warmup_steps(total) == expected


def test_mixed_precision_follows_the_computing_type(tmp_path: Path) -> None:
    for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "no")):
        made = arguments(tmp_path, dtype)
        assert (made.bf16, made.fp16) == (expected == "bf16", expected == "fp16")
        assert made.mixed_precision == expected


def test_one_type_to_compute_in() -> None:
    with pytest.raises(UserError, match=r"^train.fp16=true: train.bf16=true is set too; choose one of the two$"):
        TrainConfig(fp16=True, bf16=True)
    assert compute_dtype(torch.device("cuda"), None, fp16=True) == torch.float16


@pytest.mark.parametrize("stages", ["quantize,finetune", "quantize,evaluate"])
def test_float16_on_a_cpu_is_refused_before_the_work(cli: Command, stages: str) -> None:
    """accelerate ignores it there: it would train in another type without a word."""
    line = cli.refused(*cli.tiny, "train.fp16=true", f"stages=[{stages}]", "output_dir=o")
    assert line.startswith("train.fp16=true: float16 is trained and scored on a GPU only")
    assert not list(Path().glob("o/inits/*"))


def test_last_whole_checkpoint_drops_half_written_ones(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "absent") is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


class Stopped(Exception):
    pass


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers of the finetune stage, which stops before their first step."""
    made: list[Any] = []

    def train(self: Any, **_: Any) -> None:
        self.dynamo = str(self.accelerator.state.dynamo_plugin.backend)  # the state is shared by all trainers
        made.append(self)
        raise Stopped

    monkeypatch.setattr(ValidatingTrainer, "train", train)
    return made


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_implementation_reaches_the_model(
    cli: Command, trainers: list[Any], tmp_path: Path, name: str
) -> None:
    with pytest.raises(Stopped):
        loftq_exp.run(loftq_exp.compose([*cli.tiny, f"model.attn_implementation={name}", f"output_dir={tmp_path}"]))
    assert trainers[0].model.get_base_model().config._attn_implementation == name


def test_torch_compile_reaches_the_trainer_and_not_the_next_run(
    cli: Command, trainers: list[Any], tmp_path: Path
) -> None:
    for given in ("true", "false"):
        with pytest.raises(Stopped):
            loftq_exp.run(loftq_exp.compose([*cli.tiny, f"train.torch_compile={given}", f"output_dir={tmp_path}"]))
    assert [trainer.dynamo for trainer in trainers] == ["INDUCTOR", "NO"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_model_trains_as_another(cli: Command, tmp_path: Path) -> None:
    shared = (*cli.tiny, "quant.dropout=0", "train.bf16=false", "train.logging_steps=1", "stages=[quantize,finetune]")
    found = [
        loftq_exp.run(loftq_exp.compose([*shared, f"train.torch_compile={given}", f"output_dir={tmp_path / given}"]))
        for given in ("true", "false")
    ]
    losses = [[loss for _, loss in run.metrics["losses"]] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("overrides", "message"), [
    ("model.attn_implementation=flash_attention_2", "model.attn_implementation=flash_attention_2: needs a GPU"),
    ("model.attn_implementation=flash", "model.attn_implementation=flash: not a choice"),
    ("train.fsdp=absent.json", "train.fsdp=absent.json: not a readable JSON file"),
    ("train.fsdp=list.json", "train.fsdp=list.json: holds no JSON object"),
    ("train.fsdp=empty.json", "train.fsdp=empty.json: there is one process to spread the parameters over"),
    ("train.deepspeed=empty.json", "train.deepspeed=empty.json: the package deepspeed is not installed; run: pip install deepspeed"),
])  # fmt: skip
def test_what_would_not_train_is_refused(cli: Command, overrides: str, message: str) -> None:
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("{}")
    if "deepspeed" in overrides and importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    assert cli.refused(*cli.tiny, overrides).startswith(message)


def test_a_launch_for_fsdp_is_checked_too(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert cli.refused(*cli.tiny).startswith("accelerate launch (ACCELERATE_USE_FSDP=true): there is one process")
