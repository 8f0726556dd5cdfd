"""The tasks: what a model is fine-tuned on and how its answers are scored, one module a task."""

from __future__ import annotations

from loftq_exp.config import TaskConfig
from loftq_exp.tasks.arithmetic import Arithmetic
from loftq_exp.tasks.base import Judgement, Task
from loftq_exp.tasks.gsm8k import GSM8K

__all__ = ["TASKS", "Judgement", "Task", "load_task"]

TASKS: dict[str, type[Task]] = {"gsm8k": GSM8K, "arithmetic": Arithmetic}
"""The task of each `task.kind`."""


def load_task(config: TaskConfig) -> Task:
    """The task that `config.kind` names. Reads no data yet: `Task.rows` does."""
    return TASKS[config.kind](config)
