"""The finetune stage: `transformers.Trainer` trains the adapter on a frozen backbone. A killed run resumes."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, TrainingArguments

from loftq_exp import manifest, ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.origin import Origin, adapter_digest
from loftq_exp.config import RunConfig
from loftq_exp.costs import StageWatch
from loftq_exp.device import compute_device, compute_dtype
from loftq_exp.errors import UserError
from loftq_exp.foreign import reason_of
from loftq_exp.progress import Advance, progress
from loftq_exp.tasks.base import Task
from loftq_exp.training.checkpoints import (
    KeepCheckpoints,
    ListCheckpoints,
    Reached,
    checkpoint,
    read_state,
    resume_from,
)
from loftq_exp.training.isolation import check_isolation
from loftq_exp.training.load import backbone_form, load_model
from loftq_exp.training.padding import settle_padding
from loftq_exp.training.sharding import is_sharded, sharding
from loftq_exp.training.validation import Patience, ValidatingTrainer, Validation, record_of, validations
from loftq_exp.whole import whole_folder

if TYPE_CHECKING:
    from loftq_exp.training.preflight import Prepared

log = logging.getLogger(__name__)

Scalars = Callable[[int, dict[str, float]], None]
"""Receives what the trainer logs: the optimiser step, and values by name."""
History = Sequence[tuple[int, dict[str, float]]]
"""What the trainer logged before it was killed, up to the checkpoint that it resumes from."""


def finetune(
    init: Initialised,
    prepared: Prepared,
    task: Task,
    config: RunConfig,
    folder: Path,
    origin: Origin,
    begin: Callable[[History], None],
    scalars: Scalars,
    validation: Validation | None = None,
) -> dict[str, Any]:
    """Train the adapter of `init` on the `prepared` rows and save it atomically as `folder`/adapter.

    With a `validation`, as `config.train` says: validate, keep the best step's adapter, stop early.

    Returns the stage's record: losses, steps, seconds, the adapter's digest and more. Training resumes from checkpoints
    under `folder`/checkpoints if they have this `origin`; the caller removes them once it has kept the record. `begin`
    receives the history of a resumed training before the first of `scalars`. Raises UserError, which names the step, if a
    loss, gradient or parameter is NaN or infinite. The last checkpoint before that step is kept.

    With several ranks, each trains on its own batches. Rank 0 saves; seconds and peak memory are those of rank 0.
    """
    watch = StageWatch()
    device = compute_device(config.device)
    dtype = compute_dtype(device, config.train.bf16, config.train.fp16)
    checkpoints = folder / "checkpoints"
    resumed = ranks.from_main(lambda: resume_from(checkpoints, origin, config.train.load_best_model_at_end))
    if resumed:
        log.info("finetune: resumes from %s", resumed.name)
    patience = _patience(config, validation)
    found = read_state(resumed) if resumed else None
    if ranks.is_main():
        begin(_logged(found.history) if found else ())
    trainer = None
    if found is None or not (found.is_last or (patience and patience.ran_out(found.history))):
        keep = KeepCheckpoints(config.train.save_steps, checkpoints) if config.train.load_best_model_at_end else None
        with progress("finetune") as advance:
            shown = [_Report(advance, scalars), ListCheckpoints(checkpoints, origin), *filter(None, (keep, patience))]
            trainer = _trained(init, prepared, task, config, checkpoints, shown, validation, resumed)
        found = Reached(trainer.state.global_step, True, trainer.state.log_history)
    validated = record_of(found, config.train, validation) if validation else None
    _check_best(checkpoints, config, validated)

    # Every rank takes part in putting the parameters together.
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer and is_sharded(config) else None

    def save() -> None:
        if trainer:
            _save_adapter(trainer.model, folder / "adapter", origin, whole)
        else:  # the run was killed after the last step
            assert resumed
            best = checkpoint(checkpoints, validated["adapter_step"]) if validated else resumed
            _save_adapter(load_model(init, best, config, device, dtype, task.num_labels), folder / "adapter", origin)

    ranks.from_main(save)
    return {
        "losses": [[entry["step"], entry["loss"]] for entry in found.history if "loss" in entry],
        "steps": found.step,
        "validation": validated,
        "adapter": adapter_digest(folder / "adapter"),
        "backbone": backbone_form(init, config, device),
        "ranks": ranks.count(),
        "dtype": str(dtype).removeprefix("torch."),
        "resumed_from": resumed.name if resumed else None,
        **watch.costs(),
    }


def _trained(
    init: Initialised,
    prepared: Prepared,
    task: Task,
    config: RunConfig,
    checkpoints: Path,
    callbacks: list[TrainerCallback],
    validation: Validation | None,
    resumed: Path | None,
) -> ValidatingTrainer:
    """Return the trainer of the adapter of `init` after its last step, with the adapter that is to be saved."""
    device = compute_device(config.device)
    dtype = compute_dtype(device, config.train.bf16, config.train.fp16)
    transformers.set_seed(config.seed)
    model = load_model(init, None, config, device, dtype, task.num_labels)
    settle_padding(model, prepared.tokenizer)
    if config.train.gradient_checkpointing:
        model.enable_input_require_grads()  # without it no gradient reaches a checkpointed block
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator = task.collator(prepared.tokenizer)
    check_isolation(model, prepared.train, collator)
    trainer = ValidatingTrainer(
        model=model,
        args=training_arguments(config, checkpoints, device, dtype, validation),
        train_dataset=prepared.train,
        data_collator=collator,
        callbacks=callbacks,
        validation=validation,
    )
    if task.model_kind != "causal":
        # In transformers only decoders divide the loss by the tokens of all accumulated batches. The other classes
        # return the mean of each batch, which the trainer must divide by the number of batches.
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    # PEFT casts an adapter's input to float32, and autocast casts it back to 16 bits. Skipping both casts gives the
    # same values in three quarters of the time.
    with disable_input_dtype_casting(model, active=dtype != torch.float32):
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except pickle.UnpicklingError as error:  # torch raises it for a file that needs code to load
            raise UserError(f"{resumed}: a file in it is no plain state of a trainer, and is not loaded ({reason_of(error)}); "
                            f"delete {checkpoints} and run again") from error  # fmt: skip
    return trainer


def _patience(config: RunConfig, validation: Validation | None) -> Patience | None:
    train = config.train
    if validation is None or train.early_stopping_patience is None:
        return None
    return Patience(train.early_stopping_patience, train.metric_for_best_model, validation.lower_is_better)


def _check_best(checkpoints: Path, config: RunConfig, validated: dict[str, Any] | None) -> None:
    """Log which step's adapter is kept. Raises UserError if it is gone: the trainer would keep the last step's."""
    if validated is None or not config.train.load_best_model_at_end:
        return
    best = checkpoint(checkpoints, validated["adapter_step"])
    if not best.is_dir():
        raise UserError(f"train.load_best_model_at_end=true: {best} is missing; delete {checkpoints} and run again")
    log.info("finetune: the adapter of step %d is kept (validation %s %.4g)", validated["adapter_step"],
             config.train.metric_for_best_model, validated["best"]["value"])  # fmt: skip


def training_arguments(
    config: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype, validation: Validation | None = None
) -> TrainingArguments:
    """Return the TrainingArguments for `config`. A `warmup_steps` below 1 is a fraction of all steps."""
    train = config.train
    checkpoints: dict[str, Any] = {"save_strategy": "steps", "save_steps": train.save_steps}
    if train.load_best_model_at_end:
        # transformers wants a checkpoint at each validation. `KeepCheckpoints` saves the others.
        checkpoints = {"save_strategy": train.eval_strategy, "save_steps": train.eval_steps or train.save_steps}
    lower = validation is None or validation.lower_is_better
    chosen: dict[str, Any] = (
        {"metric_for_best_model": train.metric_for_best_model, "greater_is_better": not lower}
        if train.validates
        else {}
    )
    same_name = ("learning_rate", "weight_decay", "lr_scheduler_type", "num_train_epochs", "max_steps",
                 "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "adam_beta1", "adam_beta2",
                 "adam_epsilon", "max_grad_norm", "logging_steps", "save_total_limit", "eval_strategy",
                 "eval_steps", "torch_compile", "load_best_model_at_end", "per_device_eval_batch_size",
                 "train_sampling_strategy", "dataloader_num_workers")  # fmt: skip
    try:
        return TrainingArguments(
            output_dir=str(folder),
            **{name: getattr(train, name) for name in same_name},
            warmup_steps=train.warmup_steps or train.warmup_ratio,
            seed=config.seed,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=device.type == "cpu",
            **checkpoints,
            **chosen,
            **sharding(train),
            report_to="none",  # losses go to the run's own TensorBoard log
            disable_tqdm=True,  # progress is shown by _Report
            logging_first_step=True,
            logging_nan_inf_filter=False,  # the filter would replace NaN by the mean of earlier losses
            remove_unused_columns=False,
            ddp_find_unused_parameters=not train.gradient_checkpointing,  # DDP cannot search with recomputation
            dataloader_pin_memory=device.type == "cuda",
        )
    except ValueError as error:
        raise UserError(f"train.*: transformers rejects these arguments: {error}") from None


def _logged(history: Sequence[Mapping[str, Any]]) -> History:
    """Return what the trainer logged, by step."""
    return [(entry["step"], _numbers(entry)) for entry in history]


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """The finite values that are logged of a step. A validation repeats the epoch, which its step may have logged already.

    The gradient norm is infinite in a step that float16's scale of the loss was too large for, and that is left out.
    """
    left_out = {"step", "epoch"} if validations([{"step": 0, **logs}]) else {"step"}
    return {name: value for name, value in logs.items()
            if name not in left_out and isinstance(value, (int, float)) and math.isfinite(value)}  # fmt: skip


def _save_adapter(model: Any, place: Path, origin: Origin, values: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter of `model`, with the `values` of its parameters if they are spread over the ranks."""
    with whole_folder(place) as partial:
        model.save_pretrained(str(partial), state_dict=values)
        origin.write(partial)
        manifest.complete(partial)


class _Report(TrainerCallback):
    """Shows progress after each step, logs the last step's loss too, and forwards what the trainer logs."""

    def __init__(self, advance: Advance, scalars: Scalars) -> None:
        self.advance, self.scalars, self.loss = advance, scalars, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the loss for the display and forward all values."""
        values = _numbers(logs or {})
        if "train_runtime" in values:  # the summary, which after a resume would be of the last part alone
            return
        if "loss" in values:
            self.loss = f"loss {values['loss']:.4f}"
        if state.is_world_process_zero:
            self.scalars(state.global_step, values)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the display by one optimiser step. The last step is always logged, as the first is."""
        control.should_log = control.should_log or state.global_step >= state.max_steps
        if state.is_world_process_zero:
            self.advance(state.global_step, state.max_steps, self.loss)
