"""GSM8K (Cobbe et al., 2021): grade-school mathematics, solved step by step and scored by the final number."""

from __future__ import annotations

import math
import re

from loftq_exp.tasks.data import Row
from loftq_exp.tasks.generation import Judgement, PromptTask

INSTRUCTION = "Think about this step by step, and give the final number at the end."
ANSWER_MARK = "The final answer is: "
GOLD_MARK = "####"
"""What stands before the final number in GSM8K's own answers."""
_NUMBER = re.compile(r"-?\d+\.?\d*")


class GSM8K(PromptTask):
    """Rows of a `question` and an `answer`: the worked solution, its last line `#### N`.

    The target keeps the solution as it is, its `<<48/2=24>>` annotations included, as the official code does.
    """

    columns = ("question", "answer")

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`; an answer must also end in a number, or nothing could ever be right for it."""
        problem = super().flaw(row)
        if problem is None and not _NUMBER.search(row["answer"].partition(GOLD_MARK)[2]):
            problem = f"holds an answer without '{GOLD_MARK} NUMBER' in column 'answer'"
        return problem

    def prompt(self, row: Row) -> str:
        """The question and, on a line of its own, the request to work step by step towards a number."""
        return f"{row['question']}\n{INSTRUCTION}\n"

    def target(self, row: Row) -> str:
        """The solution with `####` replaced by `The final answer is: `.

        GSM8K puts a blank after `####`, so that two stand before the number: kept, because the published adapters were
        trained on exactly this text and the gold log-likelihood depends on it.
        """
        return str(row["answer"]).replace(GOLD_MARK, ANSWER_MARK)

    def judge(self, row: Row, generated: str) -> Judgement:
        """Whether the final number of `generated` equals the gold one, as numbers ("18" equals "18.0")."""
        predicted = final_number(generated)
        gold = final_number(self.target(row))
        return Judgement(predicted, gold, correct=predicted is not None and predicted == gold)


def final_number(text: str) -> float | None:
    """The number that `text` gives as its answer, commas dropped, or None.

    It is the first one after the first `The final answer is: `; where there is none, the last one of the text. None
    stands for no number, or for one too large for a float: never infinity, which would equal another infinity.
    """
    text = text.replace(",", "")
    number = _NUMBER.search(text.partition(ANSWER_MARK)[2])
    if number:
        return _finite(number.group())
    numbers = _NUMBER.findall(text)
    return _finite(numbers[-1]) if numbers else None


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None
