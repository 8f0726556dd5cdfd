"""The tasks: what a model is fine-tuned on and how its answers are scored. One module per task.

Every module here is imported, then those of installed packages. Each class with a `kind` is the task of that `task.kind`. No module imports torch at
import time, because the settings of a run are checked without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from loftq_exp.config import KINDS, TaskConfig
from loftq_exp.config.schema import build
from loftq_exp.tasks.base import TASKS, Task
from loftq_exp.tasks.outside import import_installed

__all__ = ["TASKS", "Task", "load_task", "pairs_that_fit", "task_settings"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
import_installed()


def task_settings(kind: str, **settings: Any) -> TaskConfig:
    """Return the settings of the task `kind`: those given, and the defaults of its dataclass. conf/task/ is not read.

    Raises UserError for an unknown setting or an invalid value.
    """
    return build(TaskConfig, {"kind": kind, **settings}, "task.")


def load_task(config: TaskConfig) -> Task:
    """Return the task that `config.kind` names. No data is read until `Task.rows` is called."""
    return TASKS[config.kind](config)


def pairs_that_fit() -> str:
    """Return each `model.kind` with the tasks that need it, for error messages."""
    kinds = [kind for kind in KINDS if any(task.model_kind == kind for task in TASKS.values())]
    return "; ".join(
        f"{kind} with {', '.join(name for name, task in TASKS.items() if task.model_kind == kind)}" for kind in kinds
    )
