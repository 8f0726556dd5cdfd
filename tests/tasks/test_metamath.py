from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.metamath import MetaMath, answer_number

TASK = MetaMath(task_settings("metamath"))  # type: ignore[arg-type]
TRAIN = {"query": "How many?", "response": "2 + 3 = 5\n#### 5\nThe answer is: 5", "type": "GSM_AnsAug"}
SCORED = {"question": "How many eggs?", "answer": "16 - 3 = 13\n#### 1,013"}


def test_rows_of_each_split_have_the_boards_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert TASK.prompt(TRAIN, tiny_tokenizer) == "Question: How many? Think step by step.\nAnswer:"
    assert TASK.prompt(SCORED, tiny_tokenizer) == "Question: How many eggs? Think step by step.\nAnswer:"
    assert TASK.target(TRAIN) == " 2 + 3 = 5\n#### 5\nThe answer is: 5"
    assert [TASK.source(split).dataset for split in ("train", "eval")] == ["meta-math/MetaMathQA", "openai/gsm8k"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("7. The answer is: 12", 12.0), ("#### 4\nThe answer is: 5", 5.0), ("3 #### 4", 4.0), ("1 and 2", 2.0), ("no", None),
     ("The answer is: x. The answer is: 9, not 8", 9.0), ("5. The answer is: none", None)],
)  # fmt: skip
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert answer_number(text) == number


def test_an_answer_is_judged_by_value() -> None:
    assert TASK.judge(SCORED, "so\nThe answer is: 1013").correct
    assert not TASK.judge(SCORED, "The answer is: 1014").correct


def test_rows_of_the_other_split_are_refused(tmp_path: Path) -> None:
    train, scored = tmp_path / "train.jsonl", tmp_path / "scored.jsonl"
    train.write_text(json.dumps(TRAIN))
    scored.write_text(json.dumps(SCORED))
    right = load_task(task_settings("metamath", train_file=str(train), eval_file=str(scored)))
    assert (right.rows("train"), right.rows("eval")) == ([TRAIN], [SCORED])
    wrong = load_task(task_settings("metamath", train_file=str(scored), eval_file=str(train)))
    with pytest.raises(UserError, match=r"row 1 has no column 'query'; the train rows of metamath have query and resp"):
        wrong.rows("train")
    with pytest.raises(UserError, match=r"row 1 has no column 'question'; the eval rows of metamath have question and"):
        wrong.rows("eval")
    train.write_text(json.dumps({"query": "a", "response": ""}))
    with pytest.raises(UserError, match=r"line 1 holds an empty text in column 'response'"):
        right.rows("train")
