"""Training that diverges stops at that step, however it logs, clips or accumulates, and saves nothing from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from loftq_exp.errors import UserError
from loftq_exp.training.divergence import FiniteTrainer


class Loss(nn.Module):
    """A weight of ones, and a loss of it that depends on how often it was asked for."""

    def __init__(self, of: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.of, self.calls = nn.Parameter(torch.ones(4)), of, 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"loss": self.of(self.weight, self.calls)}


def train(folder: Path, of: Callable[[torch.Tensor, int], torch.Tensor], **arguments: Any) -> None:
    settings: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
        "logging_steps": 100,
        "save_steps": 1,
    } | arguments
    FiniteTrainer(
        model=Loss(of), train_dataset=[{"x": torch.ones(1)}] * 12,
        args=TrainingArguments(str(folder), per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
                               lr_scheduler_type="constant", remove_unused_columns=False, logging_nan_inf_filter=False,
                               **settings),
    ).train()  # fmt: skip


def nan_in_batch(number: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda weight, calls: weight.sum() * (float("nan") if calls == number else 1.0)


def train_scaled(
    folder: Path, of: Callable[[torch.Tensor, int], torch.Tensor], scale: float, steps: int
) -> FiniteTrainer:
    """As float16 trains on a GPU: the loss is scaled, and a step whose gradients overflow is skipped."""
    trainer = FiniteTrainer(
        model=Loss(of), train_dataset=[{"x": torch.ones(1)}] * steps,
        args=TrainingArguments(str(folder), per_device_train_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True,
                               lr_scheduler_type="constant", save_strategy="no", optim="sgd", learning_rate=1e-6, num_train_epochs=1,
                               max_grad_norm=0.0, remove_unused_columns=False, logging_nan_inf_filter=False),
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.train()
    return trainer


def test_a_scale_of_the_loss_that_is_too_large_is_halved(tmp_path: Path) -> None:
    """Gradients of 1e4 at a scale of 2^16 overflow float16 until the scale is 4."""
    trainer = train_scaled(tmp_path, lambda weight, calls: (weight.half() * 1e4).float().sum(), 2.0**16, 20)
    assert trainer.accelerator.scaler.get_scale() == 4
    assert trainer.state.global_step == 20
    weight = trainer.model.get_parameter("weight")
    assert weight.isfinite().all()
    assert (weight < 1).all()


@pytest.mark.parametrize(("of", "step"), [
    (nan_in_batch(3), 3),  # a loss that is not finite is no matter of the scale
    (lambda weight, calls: (weight * 0).sqrt().sum(), 4),  # at scales of 4, 2 and 1 the step is skipped
], ids=["loss", "gradients"])  # fmt: skip
def test_divergence_in_float16_is_none_of_the_scales(
    tmp_path: Path, of: Callable[[torch.Tensor, int], torch.Tensor], step: int
) -> None:
    with pytest.raises(UserError, match=f"training diverged at step {step} "):
        train_scaled(tmp_path, of, 4.0, 12)


@pytest.mark.parametrize(("of", "arguments", "step", "what"), [
    (nan_in_batch(3), {}, 3, "loss nan"),
    (nan_in_batch(3), {"gradient_accumulation_steps": 2}, 2, "loss nan"),
    (nan_in_batch(4), {"gradient_accumulation_steps": 2, "bf16": True}, 2, "loss nan"),
    (nan_in_batch(1), {"max_grad_norm": 0.0}, 1, "loss nan"),
    (lambda weight, calls: weight.sum() * float("inf"), {}, 1, "loss inf"),
    (lambda weight, calls: (weight * 0).sqrt().sum(), {}, 1, "loss 0, gradient norm nan"),  # its slope is 0 * inf
    (lambda weight, calls: (weight * 0).sqrt().sum(), {"max_grad_norm": 0.0}, 1, "loss 0, gradient norm nan"),
    # Finite gradients of an infinite norm, which clipping would turn into zeros: nothing would ever be learnt.
    (lambda weight, calls: (weight * 1e30 - 1e30).sum(), {}, 1, "loss 0, gradient norm inf"),
    (lambda weight, calls: weight.sum() * 10, {"optim": "sgd", "learning_rate": 3e38, "max_grad_norm": 0.0}, 1, "parameter"),
])  # fmt: skip
def test_divergence_is_named_by_its_step(
    tmp_path: Path, of: Callable[[torch.Tensor, int], torch.Tensor], arguments: dict[str, Any], step: int, what: str
) -> None:
    with pytest.raises(
        UserError, match=f"^train.learning_rate=.*: training diverged at step {step} .*{what}"
    ) as refusal:
        train(tmp_path, of, **arguments)
    assert "\n" not in str(refusal.value)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{before}" for before in range(1, step)}
    for name in kept:
        assert all(value.isfinite().all() for value in load_file(tmp_path / name / "model.safetensors").values())
        assert "NaN" not in (tmp_path / name / "trainer_state.json").read_text()


def test_sound_training_runs_to_its_end(tmp_path: Path) -> None:
    train(tmp_path, lambda weight, calls: weight.square().sum(), logging_steps=1)
    state = json.loads((tmp_path / "checkpoint-18" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 18
    assert losses[0] == 4.0
    assert losses == sorted(losses, reverse=True)
