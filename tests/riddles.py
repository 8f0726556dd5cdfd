"""The source of a task, as somebody adds one: a module with its settings, its prompt and its judgement."""

from __future__ import annotations

RIDDLES = '''
from dataclasses import dataclass

from loftq_exp.config.schema import ADAPTER, SCORES, setting
from loftq_exp.tasks.generation import Judgement, PromptConfig, PromptTask


@dataclass(frozen=True)
class RiddlesConfig(PromptConfig):
    """The settings of a prompt task and of riddles."""

    hints: int = setting("number of hints given with each riddle", 0, ge=0, shapes=(ADAPTER, SCORES))


class Riddles(PromptTask):
    """Riddles with hints."""

    kind = "riddles"
    config: RiddlesConfig
    columns = ("question", "answer")

    def prompt(self, row, tokenizer):
        return row["question"] + " Hint." * self.config.hints

    def target(self, row):
        return row["answer"]

    def judge(self, row, generated):
        return Judgement(None, None, correct=True)
'''
