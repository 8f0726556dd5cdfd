"""The tasks: what a model is fine-tuned on and how its answers are scored, one module a task."""

from __future__ import annotations

from loftq_exp.config import KINDS, TaskConfig
from loftq_exp.tasks.anli import Anli
from loftq_exp.tasks.arithmetic import Arithmetic
from loftq_exp.tasks.base import Task
from loftq_exp.tasks.glue import Glue
from loftq_exp.tasks.gsm8k import GSM8K
from loftq_exp.tasks.squad import Squad
from loftq_exp.tasks.summarization import Summarization
from loftq_exp.tasks.wikitext import WikiText

__all__ = ["TASKS", "Task", "load_task", "pairs_that_fit"]

TASKS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "arithmetic": Arithmetic,
    "glue": Glue,
    "anli": Anli,
    "squad": Squad,
    "summarization": Summarization,
    "wikitext": WikiText,
}
"""The task of each `task.kind`."""


def load_task(config: TaskConfig) -> Task:
    """The task that `config.kind` names. Reads no data yet: `Task.rows` does."""
    return TASKS[config.kind](config)


def pairs_that_fit() -> str:
    """Each `model.kind` with the tasks that need it, as an error lists them."""
    kinds = [kind for kind in KINDS if any(task.model_kind == kind for task in TASKS.values())]
    return "; ".join(
        f"{kind} with {', '.join(name for name, task in TASKS.items() if task.model_kind == kind)}" for kind in kinds
    )
