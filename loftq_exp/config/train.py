"""The settings `train`: optimiser, schedule, and the form of the backbone in memory."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.errors import UserError

LOSS = "loss"
"""The value of `train.metric_for_best_model` that every task has."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tuning. All settings but `backbone` are named as in transformers.TrainingArguments."""

    backbone: str = setting(
        "form of the backbone in memory. bnb4: bitsandbytes 4-bit layers; dense: dequantized values; auto: packed for a "
        "packed checkpoint, else bnb4 if it represents the values exactly, else dense",
        "auto",
        choices=("auto", "bnb4", "dense"),
        shapes=(ADAPTER, SCORES),
    )
    learning_rate: float = setting("peak learning rate", 3e-4, gt=0, shapes=(ADAPTER,))
    weight_decay: float = setting("weight decay coefficient (decoupled, as in AdamW)", 0.0, ge=0, shapes=(ADAPTER,))
    lr_scheduler_type: str = setting(
        "learning rate schedule",
        "linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
        shapes=(ADAPTER,),
    )
    warmup_steps: int = setting(
        "number of linear warmup steps; takes precedence over warmup_ratio", 0, ge=0, shapes=(ADAPTER,)
    )
    warmup_ratio: float = setting("fraction of all steps used for linear warmup", 0.0, ge=0, lt=1, shapes=(ADAPTER,))
    num_train_epochs: float = setting("number of passes over the training data", 1.0, gt=0, shapes=(ADAPTER,))
    max_steps: int = setting("number of optimiser steps; -1: given by num_train_epochs", -1, ge=-1, shapes=(ADAPTER,))
    per_device_train_batch_size: int = setting("training batch size per device", 4, ge=1, shapes=(ADAPTER,))
    per_device_eval_batch_size: int = setting("evaluation batch size per device", 16, ge=1, shapes=())
    gradient_accumulation_steps: int = setting(
        "number of batches whose gradients form one optimiser step", 1, ge=1, lt=LONGEST + 1, shapes=(ADAPTER,)
    )
    optim: str = setting("optimiser, by its transformers name", "adamw_torch", shapes=(ADAPTER,))
    adam_beta1: float = setting("AdamW decay rate of the first moment", 0.9, ge=0, lt=1, shapes=(ADAPTER,))
    adam_beta2: float = setting("AdamW decay rate of the second moment", 0.999, ge=0, lt=1, shapes=(ADAPTER,))
    adam_epsilon: float = setting("AdamW epsilon, added to the denominator", 1e-8, gt=0, shapes=(ADAPTER,))
    max_grad_norm: float = setting("maximum gradient norm for clipping; 0: no clipping", 1.0, ge=0, shapes=(ADAPTER,))
    gradient_checkpointing: bool = setting(
        "recompute activations in the backward pass to save memory", False, shapes=()
    )
    bf16: bool | None = setting("compute in bfloat16; null: if the device supports it", None, shapes=(ADAPTER, SCORES))
    fp16: bool = setting(
        "compute in float16 and scale the loss, for GPUs without bfloat16; not on CPUs", False, shapes=(ADAPTER, SCORES)
    )
    logging_steps: int = setting("optimiser steps between two logged losses", 10, ge=1, shapes=())
    save_steps: int = setting(
        "optimiser steps between two checkpoints; a killed run resumes from the last", 100, ge=1, shapes=()
    )
    save_total_limit: int = setting(
        "maximum number of trainer checkpoints kept; of two, one is left if the other is damaged", 2, ge=1, shapes=()
    )
    eval_strategy: str = setting(
        "when to validate during training: no, at the end of each epoch, or every train.eval_steps steps; also after the last "
        "step. On rows of their own: task.validation_file, task.validation_split or task.validation_size",
        "no",
        choices=("no", "epoch", "steps"),
        shapes=(ADAPTER,),
        before="no",
    )
    eval_steps: int | None = setting(
        "optimiser steps between two validations, with train.eval_strategy=steps", None, ge=1, shapes=(ADAPTER,)
    )
    load_best_model_at_end: bool = setting(
        "keep the adapter of the step with the best train.metric_for_best_model instead of the last step's",
        False,
        shapes=(ADAPTER,),
    )
    metric_for_best_model: str = setting(
        "what validation compares: loss, the training loss on the validation rows, or a score of the task such as accuracy, "
        "which is computed at each validation",
        LOSS,
        shapes=(ADAPTER,),
        before=LOSS,
    )
    early_stopping_patience: int | None = setting(
        "number of validations in a row without a better train.metric_for_best_model after which training stops; null: never",
        None,
        ge=1,
        shapes=(ADAPTER,),
    )
    report_to: tuple[str, ...] = setting(
        "loggers of the run, each but TensorBoard installed by the extra of its name; []: none",
        ("tensorboard",),
        choices=("tensorboard", "wandb", "mlflow", "trackio"),
        shapes=(),
    )
    torch_compile: bool = setting("compile the model with torch.compile for training", False, shapes=(ADAPTER,))
    fsdp: str | None = setting(
        "JSON file with the settings of FSDP, as fsdp_config of TrainingArguments; for several processes",
        None,
        shapes=(),
    )
    deepspeed: str | None = setting(
        "JSON file with the settings of DeepSpeed, as in TrainingArguments; needs the package deepspeed",
        None,
        shapes=(),
    )
    train_sampling_strategy: str = setting(
        "order of the training rows: random, or group_by_length, which reduces padding",
        "random",
        choices=("random", "group_by_length"),
        shapes=(ADAPTER,),
    )
    dataloader_num_workers: int = setting(
        "number of data loader processes; 0: load in the main process", 0, ge=0, lt=1025, shapes=()
    )

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise UserError("train.max_steps=0: nothing would be trained; give a number of steps, -1 for all epochs, "
                            "or leave finetune out of stages")  # fmt: skip
        if self.fp16 and self.bf16:
            raise UserError("train.fp16=true: train.bf16=true is set too; choose one of the two")
        if len(set(self.report_to)) < len(self.report_to):
            raise UserError(f"train.report_to=[{','.join(self.report_to)}]: a logger is named twice; name each once")
        self._check_validation()

    def _check_validation(self) -> None:
        steps = self.eval_strategy == "steps"
        if steps and self.eval_steps is None:
            raise UserError("train.eval_steps=null: train.eval_strategy=steps needs it; give train.eval_steps=N")
        if self.eval_steps is not None and not steps:
            raise UserError(f"train.eval_steps={self.eval_steps}: not used by train.eval_strategy={self.eval_strategy}; leave it out, "
                            "or set train.eval_strategy=steps")  # fmt: skip
        if not self.validates:
            for name, off in (
                ("load_best_model_at_end", False),
                ("metric_for_best_model", LOSS),
                ("early_stopping_patience", None),
            ):
                if (value := getattr(self, name)) != off:
                    given = str(value).lower() if isinstance(value, bool) else value
                    raise UserError(f"train.{name}={given}: nothing is validated; set train.eval_strategy=epoch or steps, or leave "
                                    "it out")  # fmt: skip

    @property
    def validates(self) -> bool:
        """Whether the model is validated during training."""
        return self.eval_strategy != "no"

    @property
    def validation_chooses(self) -> bool:
        """Whether the adapter depends on the values of the validation: the best one is kept, or training stops early."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None
