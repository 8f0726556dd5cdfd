"""Training whose parameters are spread over processes, by FSDP or DeepSpeed: its settings, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

from loftq_exp import ranks
from loftq_exp.config import RunConfig, TrainConfig, local_path
from loftq_exp.config.train import LOSS
from loftq_exp.device import compute_device
from loftq_exp.errors import UserError

_LAUNCHED = {"train.fsdp": "ACCELERATE_USE_FSDP", "train.deepspeed": "ACCELERATE_USE_DEEPSPEED"}
"""The variables by which `accelerate launch` asks for what these settings ask for."""


def sharding(train: TrainConfig) -> dict[str, Any]:
    """Return the arguments of TrainingArguments by which the parameters are spread over the processes; none without."""
    if train.fsdp:
        return {"fsdp": True, "fsdp_config": str(local_path(train.fsdp))}
    return {"deepspeed": str(local_path(train.deepspeed))} if train.deepspeed else {}


def is_sharded(config: RunConfig) -> bool:
    """Return whether the parameters are spread over the processes, by a setting or by `accelerate launch`."""
    return bool(_asked(config))


def _asked(config: RunConfig) -> dict[str, str]:
    """Return what asks for FSDP or DeepSpeed, in words, by the setting's name."""
    given = {f"train.{name}": value for name in ("fsdp", "deepspeed") if (value := getattr(config.train, name))}
    return {name: f"{name}={given[name]}" if name in given else f"accelerate launch ({variable}=true)"
            for name, variable in _LAUNCHED.items() if name in given or os.environ.get(variable, "false").lower() == "true"}  # fmt: skip


def check_sharding(config: RunConfig) -> None:
    """Raise UserError for settings of FSDP or DeepSpeed that cannot be read, and for what would not train with them."""
    for name in ("fsdp", "deepspeed"):
        if file := getattr(config.train, name):
            _check_file(f"train.{name}", file)
    asked = _asked(config)
    if len(asked) > 1:
        raise UserError(f"{asked['train.deepspeed']}: FSDP is asked for too; leave one out")
    for name, shown in asked.items():
        if name == "train.deepspeed" and importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"{shown}: the package deepspeed is not installed; run: pip install deepspeed")
        if ranks.count() == 1:
            raise UserError(
                f"{shown}: there is one process to spread the parameters over; start several, see docs/multi-device.md"
            )
        if compute_device(config.device).type == "cpu":
            raise UserError(f"{shown}: accelerate spreads no parameters on CPUs, and would train whole copies; use "
                            "conf/accelerate/ddp.yaml there")  # fmt: skip
        if config.save_format != "dense":
            raise UserError(f"{shown}: the layers of save_format={config.save_format} cannot be spread over processes; use "
                            "save_format=dense, which is quantized to the same values while it is loaded")  # fmt: skip
        if config.train.metric_for_best_model != LOSS:
            raise UserError(f"train.metric_for_best_model={config.train.metric_for_best_model}: {shown} validates the loss alone; "
                            "use loss")  # fmt: skip


def _check_file(name: str, file: str) -> None:
    try:
        found = json.loads(local_path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{name}={file}: not a readable JSON file ({error}); give the path of one") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}={file}: holds no JSON object; give settings by name")
