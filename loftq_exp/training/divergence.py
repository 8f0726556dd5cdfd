"""A trainer that stops when training diverges. No NaN or infinite value is logged, saved or used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback

from loftq_exp.errors import UserError

TRAINING = (
    "no adapter is saved and earlier checkpoints are kept; lower it, or set train.max_grad_norm=1 and a longer warmup"
)
"""What to do when fine-tuning diverges."""


class FiniteTrainer(Trainer):
    """A Trainer that raises UserError, which names the step, if a loss, gradient norm or parameter is NaN or infinite.

    In float16 the loss is scaled up. If gradients overflow, the step is skipped and the scale halved, which is no divergence
    until the scale is below 1.

    Losses and gradients are checked before clipping, which turns infinite gradients into zeros and NaN. Parameters may
    overflow in the optimiser step. They are checked after it and before a checkpoint is saved. The error names `setting`,
    that of the learning rate, and ends with `advice`.
    """

    def __init__(self, *args: Any, advice: str = TRAINING, setting: str = "train.learning_rate", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[torch.Tensor] = []
        self._blamed = f"{setting}={self.args.learning_rate:g}", advice
        self.add_callback(_FiniteParameters(self._blamed))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch, and check the gradients once all batches of a step are accumulated."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        if self.accelerator.sync_gradients:  # the last of the step's accumulated batches
            assert self.model is not None
            # The mean over the ranks, so that all stop at the same step. Gradients are already equal on all ranks.
            losses, self._losses = float(self.accelerator.reduce(torch.stack(self._losses).sum(), "mean")), []
            norm = float(
                _whole(get_total_norm([value.grad for value in self.model.parameters() if value.grad is not None]))
            )
            if not (math.isfinite(losses) and (math.isfinite(norm) or self._scale() >= 1)):
                raise _diverged(self._blamed, self.state.global_step + 1, f"loss {losses:g}, gradient norm {norm:g}")
        return loss

    def _scale(self) -> float:
        """Return the factor of the loss in float16; 0 in other types, whose loss is not scaled."""
        scaler = self.accelerator.scaler
        return 0.0 if scaler is None else float(scaler.get_scale())


class _FiniteParameters(TrainerCallback):
    def __init__(self, blamed: tuple[str, str]) -> None:
        self._blamed = blamed

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raise UserError if the step made a trained parameter NaN or infinite."""
        largest = [
            _whole(value.detach().abs().max()) for value in model.parameters() if value.requires_grad and value.numel()
        ]
        if not bool(torch.stack(largest).isfinite().all()):
            raise _diverged(self._blamed, state.global_step, "a trained parameter is NaN or infinite after it")


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Return a value that FSDP has spread over the ranks as one tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _diverged(blamed: tuple[str, str], step: int, what: str) -> UserError:
    setting, advice = blamed
    return UserError(f"{setting}: training diverged at step {step} ({what}); {advice}")
