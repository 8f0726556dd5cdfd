"""Experiments with LoftQ: LoRA-fine-tuning-aware quantization.

`loftq_init` initialises one weight, for which `collect_statistics` may observe its inputs. `apply` initialises a model in memory. `run(compose(overrides))` does the
same as the command with these overrides.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from loftq_exp.integrations.registration import register

if TYPE_CHECKING:
    from loftq_exp.calibration import collect_statistics
    from loftq_exp.commands.run import compose
    from loftq_exp.config import RunConfig
    from loftq_exp.errors import UserError
    from loftq_exp.initialise.apply import apply
    from loftq_exp.loftq import loftq_init
    from loftq_exp.pipeline import RunResult, run

__version__ = version("loftq_exp")
__all__ = [
    "RunConfig",
    "RunResult",
    "UserError",
    "__version__",
    "apply",
    "collect_statistics",
    "compose",
    "loftq_init",
    "run",
]

register()

_PLACES = {
    "RunConfig": "loftq_exp.config.run_config",
    "RunResult": "loftq_exp.pipeline",
    "UserError": "loftq_exp.errors",
    "apply": "loftq_exp.initialise.apply",
    "collect_statistics": "loftq_exp.calibration",
    "compose": "loftq_exp.commands.run",
    "loftq_init": "loftq_exp.loftq",
    "run": "loftq_exp.pipeline",
}


def __getattr__(name: str) -> Any:
    # Import lazily: torch and transformers take seconds, which `--help` and a mistyped setting should not cost.
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
