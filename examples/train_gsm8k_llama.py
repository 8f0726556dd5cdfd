"""PEFT's examples/loftq_finetuning/train_gsm8k_llama.py by its own flags, done by loftq_exp. The table: docs/migrating.md.

python examples/train_gsm8k_llama.py --model_name_or_path LoftQ/Llama-2-13b-hf-4bit-64rank --learning_rate 1e-4 ...
"""

from __future__ import annotations

import re
from argparse import ArgumentParser

from peft_flags import override, parse, run, translate

OVERRIDES = {
    "model_name_or_path": "quant.path",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "num_warmup_steps": "train.warmup_steps",
    "num_train_epochs": "train.num_train_epochs",
    "max_train_steps": "train.max_steps",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "per_device_eval_batch_size": "train.per_device_eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "seed": "seed",
    "dataset_name": "task.dataset",
    "dataset_config": "task.dataset_config",
    "train_file": "task.train_file",
    "validation_file": "task.eval_file",
    "max_source_length": "task.max_source_length",
    "max_target_length": "task.max_target_length",
    "pad_to_max_length": "task.pad_to_max_length",
    "output_dir": "output_dir",
}
ALWAYS = ["quant=off-the-shelf", "model=llama-2", "task=gsm8k", "train.warmup_ratio=0", "train.max_grad_norm=0"]
"""What PEFT's script does without a flag: it starts from an initialised checkpoint, warms up by steps alone and does not clip."""


def of_name(path: str) -> list[str]:
    """Model, bits and rank as an initialised checkpoint's name has them, {model}-{bits}bit-{rank}rank."""
    found = re.fullmatch(r"(?P<model>.+?)(-(?P<bits>\d+)bit-(?P<rank>\d+)rank)?", path.rstrip("/").rpartition("/")[2])
    values = found.groupdict() if found else {}
    names = {"model": "model.path", "bits": "quant.bits", "rank": "quant.rank"}
    return [override(names[key], value) for key, value in values.items() if value is not None]


if __name__ == "__main__":
    parser = ArgumentParser(description="Fine-tune on GSM8K, by the flags of PEFT's script of that name.")
    parser.add_argument("--model_name_or_path", required=True, help="an initialised checkpoint: a folder or a hub id")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--lr_scheduler_type", default="linear")
    parser.add_argument("--num_warmup_steps", type=int, default=0)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dataset_name", type=lambda name: {"gsm8k": "openai/gsm8k"}.get(name, name))
    parser.add_argument("--dataset_config", "--dataset_config_name")
    parser.add_argument("--train_file")
    parser.add_argument("--validation_file")
    parser.add_argument("--max_source_length", type=int, default=128)
    parser.add_argument("--max_target_length", type=int, default=128)
    parser.add_argument("--pad_to_max_length", action="store_true")
    parser.add_argument("--output_dir")
    parser.add_argument("--with_tracking", action="store_true", help="nothing to do: every run is logged")
    parser.add_argument("--report_to", default="tensorboard")
    flags = parse(parser)
    logged = [] if flags.report_to in ("tensorboard", "all") else [f"train.report_to=[tensorboard,{flags.report_to}]"]
    run([*ALWAYS, *of_name(flags.model_name_or_path), *translate(flags, OVERRIDES), *logged, *flags.overrides])
