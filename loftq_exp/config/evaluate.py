"""The settings `evaluate`: where a model lies while it is scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loftq_exp.config.schema import setting
from loftq_exp.errors import UserError

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?[KMG]i?B")
"""What accelerate reads. It takes a small b for bits, and has no unit above GiB."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Placement of a model that does not fit on one device. It shapes no result but for rounding, as `device`."""

    device_map: str | None = setting(
        "how the layers are spread over the GPUs, then CPU memory, then disk, as device_map of transformers; null: all on device",
        None,
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
        shapes=(),
    )
    max_memory: Mapping[str, str] | None = setting(
        "memory that the weights may take on each device, such as {0: 20GiB, cpu: 60GiB}; null: what is free. Needs device_map",
        None,
        shapes=(),
    )

    def __post_init__(self) -> None:
        if self.max_memory is not None and self.device_map is None:
            raise UserError(
                "evaluate.max_memory: evaluate.device_map spreads the layers, and is not set; set it to auto"
            )
        for name, size in (self.max_memory or {}).items():
            if not (name == "cpu" or name.isdigit()):
                raise UserError(f"evaluate.max_memory.{name}={size}: not a device; name a GPU by its number, or cpu")
            if not _SIZE.fullmatch(size):
                raise UserError(f"evaluate.max_memory.{name}={size}: not a size; give one such as 20GiB or 500MB")
