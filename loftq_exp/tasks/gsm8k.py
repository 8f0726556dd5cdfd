"""GSM8K (Cobbe et al., 2021): grade-school mathematics, solved step by step and scored by the final number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_exp.tasks.data import Row, shown
from loftq_exp.tasks.generation import Judgement, PromptTask
from loftq_exp.tasks.numbers import numbers, only_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Think about this step by step, and give the final number at the end."
ANSWER_MARK = "The final answer is: "
GOLD_MARK = "####"
"""The mark before the final number in GSM8K's own answers."""


class GSM8K(PromptTask):
    """Rows of a `question` and an `answer`: the worked solution, its last line `#### N`.

    The target is the unchanged solution with its `<<48/2=24>>` annotations, as in the official code.
    """

    kind = "gsm8k"
    columns = ("question", "answer")

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`. An answer must also end in one unambiguous number, which must be the target's final number."""
        problem = super().flaw(row)
        if problem is not None:
            return problem
        line = _gold_line(row)
        if not any(True for _ in numbers(line)):
            return f"holds an answer without '{GOLD_MARK} NUMBER' in column 'answer'"
        gold = only_number(line)
        if gold is None:
            return (
                f"holds {shown(line)} after the last '{GOLD_MARK}' in column 'answer', which is not one number that can be "
                "read for certain (write it as in -1234.5)"
            )
        if final_number(self.target(row)) != gold:
            return f"holds '{ANSWER_MARK}' before the last '{GOLD_MARK}' in column 'answer', and with it another number"
        return None

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the question and, on its own line, the instruction to work step by step towards a number."""
        return f"{row['question']}\n{INSTRUCTION}\n"

    def target(self, row: Row) -> str:
        """Return the solution with its last `####` replaced by `The final answer is: `.

        GSM8K has a space after `####`, so that two spaces precede the number. They are kept, because the published adapters
        were trained on exactly this text and the gold log-likelihood depends on it.
        """
        return ANSWER_MARK.join(str(row["answer"]).rsplit(GOLD_MARK, 1))

    def judge(self, row: Row, generated: str) -> Judgement:
        """Compare the final number of `generated` with the gold number, by value ("18" equals "18.0")."""
        predicted = final_number(generated)
        gold = final_number(self.target(row))
        return Judgement(predicted, gold, correct=predicted is not None and predicted == gold)


def _gold_line(row: Row) -> str:
    """Return the first line after the last `####` that is not empty."""
    _, mark, rest = str(row["answer"]).rpartition(GOLD_MARK)
    return next((line.strip() for line in rest.splitlines() if line.strip()), "") if mark else ""


def final_number(text: str) -> float | None:
    """Return the number that `text` gives as its answer, or None.

    It is the first number after the first `The final answer is: `, or else the last number of the text. None means that
    there is no number, or that `numbers` cannot read it. The result is never infinite, since infinities compare equal.
    """
    for number in numbers(text.partition(ANSWER_MARK)[2]):
        return number
    return next(reversed(list(numbers(text))), None)
