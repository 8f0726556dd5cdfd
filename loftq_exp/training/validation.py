"""Validation during training: the loss and scores of the model on rows of their own, the best step, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import TrainerCallback

from loftq_exp import ranks
from loftq_exp.config import TrainConfig
from loftq_exp.config.train import LOSS
from loftq_exp.errors import UserError
from loftq_exp.tasks.encode import IGNORED, Features
from loftq_exp.training.checkpoints import Reached
from loftq_exp.training.divergence import FiniteTrainer

_PREFIX = "eval_"
"""Precedes the names of the values in the trainer's log."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Validation:
    """What a model is validated on.

    Attributes:
        features: the encoded rows, with labels; not necessarily one for each row.
        rows: the number of rows.
        score: returns the task's scores of a model on the rows; None if only the loss is compared.
        lower_is_better: whether the best value of `train.metric_for_best_model` is the lowest.
    """

    features: Sequence[Features]
    rows: int
    score: Callable[[Any], Mapping[str, float]] | None = None
    lower_is_better: bool = True


class ValidatingTrainer(FiniteTrainer):
    """A FiniteTrainer that validates with `Validation`, in batches that do not depend on the number of ranks.

    The loss is the mean over all target tokens, or rows where a row has one label. The trainer's own would be a mean over
    batches, which depends on their size. No random number is drawn, so that validation does not change the training.
    """

    def __init__(self, *args: Any, validation: Validation | None, **kwargs: Any) -> None:
        super().__init__(*args, eval_dataset=list(validation.features) if validation else None, **kwargs)
        self._validation = validation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the loss and scores on the validation rows, and log them. Raises UserError for one that is not finite."""
        assert self.model is not None
        assert self._validation is not None
        self.model.eval()  # each training step sets the training mode again
        values = {LOSS: self._loss()}
        if self._validation.score:
            values |= self._validation.score(self.model)
        metrics = {_PREFIX + name: value for name, value in values.items()}
        wanted = str(self.args.metric_for_best_model)
        if wanted not in values:
            raise UserError(f"train.metric_for_best_model={wanted}: the validation rows have no such score; "
                            f"choose from: {', '.join(values)}")  # fmt: skip
        if not all(math.isfinite(value) for value in values.values()):
            raise UserError(f"train.eval_strategy: a validation value is NaN or infinite at step {self.state.global_step} ({values}); "
                            "lower train.learning_rate")  # fmt: skip
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loss(self) -> float:
        """Return the mean loss, summed exactly, so that it does not depend on which rank had which batch."""
        assert self._validation is not None
        features, size = self._validation.features, self.args.per_device_eval_batch_size
        order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # all ranks must run each batch together
        share = batches if sharded else islice(batches, ranks.rank(), None, ranks.count())
        found = [self._loss_of_batch([features[index] for index in indices]) for indices in share]
        sums = found if sharded else [each for of_rank in ranks.gather(found) for each in of_rank]
        count = sum(number for _, number in sums)
        if not count:
            raise UserError("task.validation_file: no row has a token to validate on; give other rows")
        return math.fsum(total for total, _ in sums) / count

    def _loss_of_batch(self, features: Sequence[Features]) -> tuple[float, int]:
        """Return the summed loss of a batch, and the number of tokens or rows that it is the mean over."""
        batch: Batch = self._prepare_inputs(self.data_collator(list(features)))
        count = _counted(batch, self.model)
        if not count:
            return 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.model(**batch).loss  # type: ignore[misc]
        return float(loss) * count, count


def _counted(batch: Batch, model: Any) -> int:
    """Return the number of labels over which a model's loss is the mean."""
    labels = batch.get("labels")
    if labels is None or labels.dim() == 1:  # a class, a value, or the two ends of a span
        return len(batch["input_ids"])
    if not model.config.is_encoder_decoder:
        labels = labels[:, 1:]  # a decoder predicts a token from those before it
    return int((labels != IGNORED).sum())


class Patience(TrainerCallback):
    """Stops training after `patience` validations in a row without a better value.

    It counts in the trainer's log, which a checkpoint holds, so that a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int, metric: str, lower_is_better: bool) -> None:
        self._patience, self._metric, self._lower = patience, metric, lower_is_better

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop training once patience has run out."""
        if self.ran_out(state.log_history):
            control.should_training_stop = True

    def ran_out(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last validations of a trainer's log were without a better value."""
        values = [value for _, named in validations(history) for name, value in named.items() if name == self._metric]
        if not values:
            return False
        best = min(values) if self._lower else max(values)
        return len(values) - 1 - values.index(best) >= self._patience


def validations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return the step and the values of each validation in a trainer's log."""
    return [(int(entry["step"]), {name.removeprefix(_PREFIX): value for name, value in entry.items() if name.startswith(_PREFIX)})
            for entry in history if _PREFIX + LOSS in entry]  # fmt: skip


def record_of(reached: Reached, train: TrainConfig, validation: Validation) -> dict[str, Any]:
    """Return the record of the validations: all values by step, the best, and the step of the adapter that is saved."""
    values, metric = validations(reached.history), train.metric_for_best_model
    best_step, best = (min if validation.lower_is_better else max)(values, key=lambda each: each[1][metric])
    return {
        "rows": validation.rows,
        "values": [[step, named] for step, named in values],
        "best": {"step": best_step, "metric": metric, "value": best[metric]},
        "adapter_step": best_step if train.load_best_model_at_end else reached.step,
    }
