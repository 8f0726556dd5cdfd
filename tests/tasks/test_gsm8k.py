from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loftq_exp.tasks import task_settings
from loftq_exp.tasks.gsm8k import ANSWER_MARK, GSM8K, final_number

TASK = GSM8K(task_settings(kind="gsm8k"))
ROW = {"question": "How many eggs?", "answer": "16 - 3 = <<16-3=13>>13 eggs.\n13 * 2 = 26\n#### 1,026"}


def test_prompt_is_the_question_and_a_line_of_instruction(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    question, instruction, end = TASK.prompt(ROW, tiny_tokenizer).split("\n")
    assert question == "How many eggs?"
    assert "step by step" in instruction
    assert "final number" in instruction
    assert end == ""


def test_target_is_the_answer_with_the_mark_replaced() -> None:
    assert TASK.target(ROW) == "16 - 3 = <<16-3=13>>13 eggs.\n13 * 2 = 26\nThe final answer is:  1,026"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The final answer is: 18", 18.0),
        ("The final answer is:  18.", 18.0),
        ("7 and 8. The final answer is: $1,234.50 or 9. The final answer is: 3", 1234.5),
        ("The final answer is: -4 degrees", -4.0),
        ("The final answer is: unknown, maybe 5? 6?", 5.0),
        ("It was 12, then 13. The final answer is: thirteen", 13.0),
        ("3 + 4 = 7", 7.0),
        ("The final answer is: ", None),
        ("no number at all", None),
        ("", None),
        ("inf nan The final answer is: inf", None),
        ("9" * 400, None),
        ("5. The final answer is: " + "9" * 400, None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("generated", ["The final answer is: 1026", "The final answer is: 1,026.0", "so 1026."])
def test_numbers_are_compared_as_numbers(generated: str) -> None:
    judgement = TASK.judge(ROW, generated)
    assert judgement.correct
    assert judgement.predicted == judgement.gold == 1026.0


@pytest.mark.parametrize("generated", ["The final answer is: 1027", "", "The final answer is: 102.6", "inf"])
def test_other_answers_are_wrong(generated: str) -> None:
    assert not TASK.judge(ROW, generated).correct


@pytest.mark.parametrize("answer", ["#### inf", "#### infinity", "####", "#### " + "9" * 400])
def test_slip_infinite_prediction_equal_to_infinite_gold_is_wrong(answer: str) -> None:
    row = {"question": "?", "answer": answer}
    judgement = TASK.judge(row, TASK.target(row))
    assert not judgement.correct
    assert judgement.gold is None


@given(st.text(), st.integers(-(10**9), 10**9))
def test_the_number_after_the_mark_wins(text: str, number: int) -> None:
    before = text.replace(",", "").replace(ANSWER_MARK, "")
    assert final_number(f"{before}\n{ANSWER_MARK}{number:,}\nand 5 more") == number


@given(st.text())
def test_any_text_gives_a_finite_number_or_none(text: str) -> None:
    number = final_number(text)
    assert number is None or abs(number) < float("inf")


def test_slip_no_row_is_left_out_unsaid(shared_data: Path) -> None:
    file = shared_data / "gsm8k" / "train.jsonl"
    rows = GSM8K(task_settings(kind="gsm8k", train_file=str(file))).rows("train")
    assert len(rows) == len(file.read_bytes().splitlines())


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_gold_answer_parses_and_is_right_for_itself(shared_data: Path, name: str) -> None:
    task = GSM8K(task_settings(kind="gsm8k", eval_file=str(shared_data / "gsm8k" / f"{name}.jsonl")))
    for row in task.rows("eval"):
        judgement = task.judge(row, task.target(row))
        assert judgement.correct
        assert judgement.gold == float(row["answer"].split("#### ")[1].replace(",", ""))
