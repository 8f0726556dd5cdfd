"""Every setting of a run: one frozen dataclass a group, with each field's meaning, unit and range.

Imports errors and nothing else of loftq_exp; without torch, so that a typo is refused at once.
"""

from loftq_exp.config.run_config import (
    HUB_ID,
    KINDS,
    NAMES_OF_TASK,
    STAGES,
    HubConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    digest_of,
    local_path,
)

__all__ = [
    "HUB_ID",
    "KINDS",
    "NAMES_OF_TASK",
    "STAGES",
    "HubConfig",
    "ModelConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "digest_of",
    "local_path",
]
