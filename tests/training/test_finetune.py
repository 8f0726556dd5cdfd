"""The arguments of the trainer, and the checkpoint that it resumes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_exp.config import ModelConfig, RunConfig, TrainConfig
from loftq_exp.config.quant import QuantConfig
from loftq_exp.tasks import task_settings
from loftq_exp.training.finetune import last_whole_checkpoint, training_arguments


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
        "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    made = arguments(tmp_path, **changed)
    assert {name: getattr(made, name) for name in changed} == changed
    assert made.seed == 7
    # Handled elsewhere: how the backbone is held, scoring, checkpointing, the computing type, the ratio (below).
    elsewhere = {"backbone", "per_device_eval_batch_size", "gradient_checkpointing", "bf16", "warmup_ratio"}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(changed) | elsewhere


@pytest.mark.parametrize(
    ("steps", "ratio", "total", "expected"), [(0, 0.03, 100, 3), (5, 0.5, 100, 5), (0, 0.0, 100, 0)]
)
def test_warmup_in_steps_beats_warmup_as_a_ratio(
    tmp_path: Path, steps: int, ratio: float, total: int, expected: int
) -> None:
    made = arguments(tmp_path, warmup_steps=steps, warmup_ratio=ratio)
    assert made.get_warmup_steps(total) == expected


def test_bfloat16_follows_the_computing_type(tmp_path: Path) -> None:
    assert arguments(tmp_path, torch.bfloat16).bf16
    assert not arguments(tmp_path, torch.float32).bf16


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
