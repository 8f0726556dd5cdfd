from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.tasks import arithmetic, task_settings
from loftq_exp.tasks.arithmetic import ITEMS, NAMES, ONE_STEP, PROBLEMS, TEMPLATES, Arithmetic, Template, generate
from loftq_exp.tasks.data import Row

SEEDS = st.integers(0, 2**32)
CALCULATION = re.compile(r"^(\d+) ([-+x/]) (\d+) = (\d+) [a-z ]+\.$", re.IGNORECASE)
WORDS = re.compile(rf"\b({'|'.join([*NAMES, *ITEMS])})\b")


def without_words(row: Row) -> str:
    """The problem without names and items: the template and its numbers remain."""
    return WORDS.sub("_", row["question"])


BOTH = pytest.mark.parametrize("templates", PROBLEMS.values(), ids=PROBLEMS)


def test_there_are_templates_enough() -> None:
    assert min(len(templates) for templates in PROBLEMS.values()) >= 6
    assert all(2 <= len(template.steps) <= 3 for template in TEMPLATES)
    assert all(len(template.steps) == 1 for template in ONE_STEP)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(list(PROBLEMS)))
def test_every_solution_is_right_and_small(seed: int, problems: str) -> None:
    for row in islice(generate("train", seed, PROBLEMS[problems]), 50):
        *steps, conclusion = row["answer"].split("\n")
        assert len(steps) in {len(template.steps) for template in PROBLEMS[problems]}
        for step in steps:
            left, sign, right, result = CALCULATION.match(step).groups()
            assert eval(f"{left} {'*' if sign == 'x' else sign} {right}") == int(result)
            assert 1 <= int(result) <= (200 if problems == "several-steps" else 81)
            assert problems == "several-steps" or max(int(left), int(right)) <= 20
        assert conclusion == f"#### {result}"
        assert "{" not in row["question"]
        assert "<<" not in row["answer"]


@BOTH
@settings(max_examples=5, deadline=None)
@given(SEEDS, SEEDS)
def test_splits_share_no_problem_whatever_the_seed_and_the_names(
    templates: Sequence[Template], train_seed: int, eval_seed: int
) -> None:
    train = {without_words(row) for row in islice(generate("train", train_seed, templates), 2000)}
    evaluation = {without_words(row) for row in islice(generate("eval", eval_seed, templates), 200)}
    assert not train & evaluation


@BOTH
def test_no_question_comes_twice(templates: Sequence[Template]) -> None:
    questions = [row["question"] for row in islice(generate("train", 0, templates), 2000)]
    assert len(set(questions)) == len(questions)


@BOTH
def test_both_splits_use_every_template(templates: Sequence[Template]) -> None:
    patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template.question))) for template in templates]
    for split in ("train", "eval"):
        rows = list(islice(generate(split, 0, templates), 200))
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


@pytest.mark.parametrize(
    ("problems", "digest"), [("several-steps", "e7d8ad7d2201a79c"), ("one-step", "055cc2463198e6b7")]
)
def test_measured_results_depend_on_these_bytes(problems: str, digest: str) -> None:
    rows = list(islice(generate("train", 0, PROBLEMS[problems]), 200))
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_the_setting_chooses_the_problems() -> None:
    several, one = (Arithmetic(task_settings(kind="arithmetic", problems=name)) for name in PROBLEMS)
    assert several.rows("eval") == Arithmetic(task_settings(kind="arithmetic")).rows("eval")
    assert one.rows("eval")[0] == next(generate("eval", 0, ONE_STEP))
    assert one.digest("train") != several.digest("train")
    with pytest.raises(UserError, match=r"^task\.problems=one-steps: not a choice \(did you mean 'one-step'\?\)"):
        task_settings(kind="arithmetic", problems="one-steps")


@pytest.mark.parametrize("problems", PROBLEMS)
def test_it_is_scored_like_gsm8k(problems: str) -> None:
    task = Arithmetic(task_settings(kind="arithmetic", max_eval_samples=50, problems=problems))
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
    monkeypatch.setitem(PROBLEMS, "several-steps", TEMPLATES[:1])
    with pytest.raises(UserError, match=r"^task\.max_eval_samples=100000: \d+ different problems can be made"):
        Arithmetic(task_settings(kind="arithmetic", max_eval_samples=100_000)).rows("eval")
