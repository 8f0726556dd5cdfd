"""Fine-tuning: the optimiser, its schedule, and how the backbone is held."""

from __future__ import annotations

from dataclasses import dataclass

from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser's side, named as in transformers.TrainingArguments, and how the backbone is held."""

    backbone: str = setting(
        "bnb4: bitsandbytes 4-bit layers; dense: the dequantized values; auto: bnb4 where it holds the values exactly",
        "auto",
        choices=("auto", "bnb4", "dense"),
        shapes=(ADAPTER, SCORES),
    )
    learning_rate: float = setting("peak learning rate", 3e-4, gt=0, shapes=(ADAPTER,))
    weight_decay: float = setting("decoupled weight decay", 0.0, ge=0, shapes=(ADAPTER,))
    lr_scheduler_type: str = setting(
        "schedule of the learning rate",
        "linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
        shapes=(ADAPTER,),
    )
    warmup_steps: int = setting("steps of linear warmup; beats warmup_ratio", 0, ge=0, shapes=(ADAPTER,))
    warmup_ratio: float = setting("share of all steps used for warmup", 0.0, ge=0, lt=1, shapes=(ADAPTER,))
    num_train_epochs: float = setting("passes over the training data", 1.0, gt=0, shapes=(ADAPTER,))
    max_steps: int = setting("optimiser steps; -1: as num_train_epochs says", -1, ge=-1, shapes=(ADAPTER,))
    per_device_train_batch_size: int = setting("rows a step and device", 4, ge=1, shapes=(ADAPTER,))
    per_device_eval_batch_size: int = setting("rows a batch when scoring", 16, ge=1, shapes=())
    gradient_accumulation_steps: int = setting("batches whose gradients make one step", 1, ge=1, shapes=(ADAPTER,))
    optim: str = setting("optimiser, as TrainingArguments names it", "adamw_torch", shapes=(ADAPTER,))
    adam_beta1: float = setting("AdamW's first moment", 0.9, ge=0, lt=1, shapes=(ADAPTER,))
    adam_beta2: float = setting("AdamW's second moment", 0.999, ge=0, lt=1, shapes=(ADAPTER,))
    adam_epsilon: float = setting("AdamW's epsilon", 1e-8, gt=0, shapes=(ADAPTER,))
    max_grad_norm: float = setting("gradients are clipped to this norm; 0: not at all", 1.0, ge=0, shapes=(ADAPTER,))
    gradient_checkpointing: bool = setting("recompute activations to save memory", False, shapes=())
    bf16: bool | None = setting("bfloat16 compute; none: where the processor has it", None, shapes=(ADAPTER, SCORES))
    logging_steps: int = setting("steps between two logged losses", 10, ge=1, shapes=())
    save_steps: int = setting("steps between two checkpoints, from which a killed run resumes", 100, ge=1, shapes=())
    save_total_limit: int = setting("checkpoints kept", 1, ge=1, shapes=())
    train_sampling_strategy: str = setting(
        "order of the rows: random, or group_by_length, which saves padding",
        "random",
        choices=("random", "group_by_length"),
        shapes=(ADAPTER,),
    )
    dataloader_num_workers: int = setting("processes that load data", 0, ge=0, shapes=())

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise UserError("train.max_steps=0: nothing would be trained; give a number of steps, -1 for all epochs, "
                            "or leave finetune out of stages")  # fmt: skip
