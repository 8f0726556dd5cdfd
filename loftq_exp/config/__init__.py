"""Every setting of a run: one frozen dataclass per group. Each field states its meaning, unit, range and what it shapes.

Imports errors and schemes, nothing else of loftq_exp. It does not import torch, so that a typo is reported at once.
"""

from loftq_exp.config.calibration import CalibrationConfig
from loftq_exp.config.digest import digest_of
from loftq_exp.config.evaluate import EvaluateConfig
from loftq_exp.config.initialise import InitialiseConfig
from loftq_exp.config.model import KINDS, ModelConfig
from loftq_exp.config.paths import local_path
from loftq_exp.config.publishing import HUB_ID, HubConfig
from loftq_exp.config.quant import QuantConfig
from loftq_exp.config.report import ReportConfig
from loftq_exp.config.run_config import STAGES, RunConfig
from loftq_exp.config.task import TaskConfig
from loftq_exp.config.train import TrainConfig

__all__ = [
    "HUB_ID",
    "KINDS",
    "STAGES",
    "CalibrationConfig",
    "EvaluateConfig",
    "HubConfig",
    "InitialiseConfig",
    "ModelConfig",
    "QuantConfig",
    "ReportConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "digest_of",
    "local_path",
]
