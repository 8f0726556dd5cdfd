"""The part of a run's name that shows which settings are not the usual ones."""

from __future__ import annotations

from typing import Any

SHOWN: dict[str, tuple[Any, ...]] = {
    "seed": ("seed", 11),
    "train.learning_rate": ("lr", 3e-4),
    "train.max_steps": ("steps", -1),
    "train.num_train_epochs": ("ep", 1.0),
    "train.per_device_train_batch_size": ("bs", 16),
    "train.gradient_accumulation_steps": ("acc", 1),
    "task.max_train_samples": ("n", None, 96),
    "quant.calibration": ("cal", "none"),
    "quant.rounding": ("round", "nearest"),
    "quant.order": ("order", "parallel"),
    "quant.polish_steps": ("polish", 0),
    "quant.scale": ("scale", "absmax"),
    "quant.levels": ("levels", "nf"),
    "quant.alpha": ("alpha", None),
    "quant.dropout": ("drop", 0.1),
    "quant.block_size": ("block", 64),
    "quant.double": ("double", False),
    "quant.solver": ("solver", "randomized"),
    "train.weight_decay": ("wd", 0.1),
    "train.lr_scheduler_type": ("sched", "cosine"),
    "train.warmup_ratio": ("warm", 0.03),
    "train.warmup_steps": ("warmsteps", 0),
    "train.max_grad_norm": ("clip", 1.0),
    "train.optim": ("optim", "adamw_torch"),
    "save_format": ("save", "dense"),
    "calibration.samples": ("calsamples", 128),
}
"""Settings that people sweep, the most swept first: how a name shows each, then its usual values, those of conf/."""

MOST_CHARACTERS = 80
"""Settings are shown while they fit. The digest at the end of a folder's name covers all of them."""


def shown(config: Any) -> dict[str, Any]:
    """Return the values of the settings of SHOWN by name. A setting that the run's task lacks has its usual value."""
    values = {}
    for name, (_, *usual) in SHOWN.items():
        group, _, field = name.rpartition(".")
        values[name] = getattr(getattr(config, group) if group else config, field, usual[0])
    return values


def unusual(config: Any) -> str:
    """Return "-seed12-lr0.001": the settings of SHOWN that differ from their usual values, in that order, with 4 digits.

    A word follows a hyphen, as in "-cal-full", and a setting that is on stands alone, as in "-double".
    """
    text = ""
    for name, value in shown(config).items():
        short, *usual = SHOWN[name]
        part = "" if value in usual else f"-{short}{_as_part(value)}"
        if len(text + part) > MOST_CHARACTERS:
            return text
        text += part
    return text


def _as_part(value: Any) -> str:
    if value is True:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"-{value}" if isinstance(value, str) else str(value)
