from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.tasks import arithmetic, task_settings
from loftq_exp.tasks.arithmetic import ITEMS, NAMES, TEMPLATES, Arithmetic, generate
from loftq_exp.tasks.data import Row

SEEDS = st.integers(0, 2**32)
CALCULATION = re.compile(r"^(\d+) ([-+x/]) (\d+) = (\d+) [a-z ]+\.$", re.IGNORECASE)
WORDS = re.compile(rf"\b({'|'.join([*NAMES, *ITEMS])})\b")


def without_words(row: Row) -> str:
    """The problem without names and items: the template and its numbers remain."""
    return WORDS.sub("_", row["question"])


def test_there_are_templates_enough() -> None:
    assert len(TEMPLATES) >= 6
    assert all(2 <= len(template.steps) <= 3 for template in TEMPLATES)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_every_solution_is_right_and_small(seed: int) -> None:
    for row in islice(generate("train", seed), 50):
        *steps, conclusion = row["answer"].split("\n")
        assert 2 <= len(steps) <= 3
        for step in steps:
            left, sign, right, result = CALCULATION.match(step).groups()
            assert eval(f"{left} {'*' if sign == 'x' else sign} {right}") == int(result)
            assert 1 <= int(result) <= 200
        assert conclusion == f"#### {result}"
        assert "{" not in row["question"]
        assert "<<" not in row["answer"]


@settings(max_examples=5, deadline=None)
@given(SEEDS, SEEDS)
def test_splits_share_no_problem_whatever_the_seed_and_the_names(train_seed: int, eval_seed: int) -> None:
    train = {without_words(row) for row in islice(generate("train", train_seed), 2000)}
    evaluation = {without_words(row) for row in islice(generate("eval", eval_seed), 200)}
    assert not train & evaluation


def test_no_question_comes_twice() -> None:
    questions = [row["question"] for row in islice(generate("train", 0), 2000)]
    assert len(set(questions)) == len(questions)


def test_both_splits_use_every_template() -> None:
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template.question))) for template in TEMPLATES]
    for split in ("train", "eval"):
        rows = list(islice(generate(split, 0), 200))
        assert all(any(pattern.fullmatch(row["question"]) for row in rows) for pattern in patterns)


def test_more_rows_only_add_to_the_end() -> None:
    few = Arithmetic(task_settings(kind="arithmetic", max_train_samples=10)).rows("train")
    many = Arithmetic(task_settings(kind="arithmetic", max_train_samples=300)).rows("train")
    assert many[:10] == few


def test_default_sizes_and_digest() -> None:
    task = Arithmetic(task_settings(kind="arithmetic"))
    assert len(task.rows("train")) == 2000
    assert len(task.rows("eval")) == 200
    assert task.digest("train") == Arithmetic(task_settings(kind="arithmetic")).digest("train") != task.digest("eval")
    assert task.digest("eval") != Arithmetic(task_settings(kind="arithmetic", data_seed=1)).digest("eval")


def test_a_seed_keeps_its_problems() -> None:
    """The same seed gives the same problems on any machine; measured results depend on it."""
    (row,) = islice(generate("eval", 0), 1)
    assert row == {
        "question": "Paula earns 20 dollars an hour and works for 2 hours. Then Paula spends 21 dollars on cards. "
        "How many dollars are left?",
        "answer": "20 x 2 = 40 dollars earned.\n40 - 21 = 19 dollars left.\n#### 19",
    }


def test_it_is_scored_like_gsm8k() -> None:
    task = Arithmetic(task_settings(kind="arithmetic", max_eval_samples=50))
    for row in task.rows("eval"):
        assert task.target(row).count("The final answer is: ") == 1
        assert task.judge(row, task.target(row)).correct
        assert task.flaw(row) is None


def test_a_local_file_stands_in_for_its_split_only(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "#### 2"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    task = Arithmetic(task_settings(kind="arithmetic", train_file=str(file)))
    assert task.rows("train") == [row]
    assert len(task.rows("eval")) == 200


def test_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "NAMES", ["Ada", "Ben"])
    monkeypatch.setattr(arithmetic, "ITEMS", ["pens"])
    monkeypatch.setattr(arithmetic, "TEMPLATES", TEMPLATES[:1])
    with pytest.raises(UserError, match=r"^task\.max_eval_samples=100000: \d+ different problems can be made"):
        Arithmetic(task_settings(kind="arithmetic", max_eval_samples=100_000)).rows("eval")
