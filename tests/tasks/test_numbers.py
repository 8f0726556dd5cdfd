"""Numbers as people write them: the right value or none, never a wrong one. Plain numbers match the official code."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.tasks import task_settings
from loftq_exp.tasks.gsm8k import ANSWER_MARK, GSM8K, final_number

TASK = GSM8K(task_settings(kind="gsm8k"))


def official(text: str) -> float | None:
    """What GSM8K's official code scores."""
    number, text = re.compile(r"-?\d+\.?\d*"), text.replace(",", "")
    found = number.findall(text.partition(ANSWER_MARK)[2])[:1] or number.findall(text)[-1:]
    return float(found[0]) if found else None


READ = {
    "18": 18, "18.": 18, "18.00": 18, "$18": 18, "18%": 18, "18 %": 18, "18 km/h": 18, "18 dollars.": 18, "x = 5": 5, "+5": 5,
    "=> 5": 5, "**5**": 5, "\\boxed{5}": 5, "(5)": 5, "5 m²": 5, "5\nNote 3": 5, "\n\n5": 5,
    ".5": 0.5, "-.5": -0.5, "$.50": 0.5, "0.5": 0.5,
    "-3": -3, "\u22123": -3, "\u20133": -3, "\u20143": -3, "\uff0d3": -3, "- 5": -5, "\u2212 5": -5, "-$5": -5, "$-5": -5,
    "x = - 5": -5,
    "1/2": 0.5, "1 / 2": 0.5, "1\u20442": 0.5, "-1/2": -0.5, "½": 0.5, "\\frac{1}{2}": 0.5, "3 1/2": 3.5, "-3 1/2": -3.5,
    "3½": 3.5, "3 ½": 3.5, "1 000 1/2": 1000.5, "16/4": 4,
    "1e3": 1000, "1E+3": 1000, "1.5e-2": 0.015,
    "1,000": 1000, "1 000": 1000, "1\u00a0000": 1000, "1\u202f000\u202f000": 10**6, "1'000'000": 10**6, "1’000": 1000,
    "12,34,567": 1234567, "1,234.5": 1234.5, "1{,}000": 1000,
    "٣": 3, "５": 5, "१२": 12,
    "Step 1\nadd\n#### 5": 5, "what #### means\n#### 5": 5,
}  # fmt: skip
REFUSED = (
    "3,5", "1,00", "1.000,5", "1.000.000", "0,125", ",5", "1,2345", "1,000,00", "1,000 000", "1 0000",
    "1/0", "1/2/3", "1.5/2", "3 5/2", "1e400", "1e-400", "1e99999999999", "9" * 400, "9" * 5000, "9007199254740993",
    "Infinity", "nan", "-inf", "two", "", "5 or 6", "5-6", "5\u20136", "5 - 3", "10:30", "5'10", "2^5", "5²", "5!", "±5", "<5",
    "√5", "3 x 10^2", "5 million", "5k", "3 and a half", "5万", "⑤", "A-5", "Rs.500", "5 m2",
)  # fmt: skip


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_a_gold_answer_has_the_value_that_it_says(text: str, value: float) -> None:
    row = {"question": "?", "answer": f"6 + 1 = 7\n#### {text}"}
    assert TASK.flaw(row) is None
    judgement = TASK.judge(row, f"{ANSWER_MARK}{text.rpartition('#### ')[2]}")
    assert judgement.gold == judgement.predicted == value
    assert judgement.correct
    assert TASK.judge(row, f"so it is {value}").correct


@pytest.mark.parametrize("text", REFUSED)
def test_a_gold_answer_that_could_be_misread_is_refused(text: str) -> None:
    flaw = TASK.flaw({"question": "?", "answer": f"6 + 1 = 7\n#### {text}"})
    assert flaw
    assert "'####" in flaw
    assert len(flaw) < 200


def test_a_solution_that_says_the_final_answer_before_its_end_is_refused() -> None:
    row = {"question": "?", "answer": f"{ANSWER_MARK}7\n#### 5"}
    assert "and with it another number" in str(TASK.flaw(row))
    assert TASK.flaw({"question": "?", "answer": f"{ANSWER_MARK}5\n#### 5"}) is None


@pytest.mark.parametrize(
    "text", ["3,5", "1,00", "1.2.3", "1/0", "1/2/3", "10:30", "2^5", "5²", "3 x 10^2", "3 and a half", "1e999"]
)
def test_a_generated_number_that_cannot_be_read_is_none(text: str) -> None:
    assert final_number(f"{ANSWER_MARK}{text}") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("from 3\u20135", 5), ("16-3=13", 13), ("10 - $5", 5), ("Left:\n- 5 apples", 5), ("Week 3:210 pages", 210),
        ("12 / 4 = <<12/4=3>>3 pens", 3), ("2 - 1/2 = 1 1/2 cups", 1.5), ("the answer is.5 apples", 5), ("16 million", 16),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, value: float) -> None:
    assert final_number(text) == value


def grouped(digits: str, separator: str) -> str:
    return f"{int(digits):,}".replace(",", separator)


@st.composite
def written_numbers(draw: st.DrawFn) -> tuple[str, float]:
    """A number in one of the forms that are read, and its value."""
    sign = draw(st.sampled_from(["", "-", "\u2212", "- ", "\u2013"]))
    whole = draw(st.integers(0, 10**9))
    separator = draw(st.sampled_from(["", ",", " ", "\u00a0", "\u202f", "'", "_"]))
    text, value = grouped(str(whole), separator), Fraction(whole)
    form = draw(st.sampled_from(["whole", "decimal", "fraction", "mixed", "power"]))
    if form == "decimal":
        decimals = draw(st.text("0123456789", min_size=1, max_size=4))
        text, value = f"{text}.{decimals}", value + Fraction(int(decimals), 10 ** len(decimals))
        text = text.removeprefix("0") if draw(st.booleans()) else text
    elif form in ("fraction", "mixed"):
        below = draw(st.integers(2, 99))
        above = draw(st.integers(0, below - 1))
        text = f"{text} {above}/{below}" if form == "mixed" else f"{above}/{below}"
        value = Fraction(above, below) + (value if form == "mixed" else 0)
    elif form == "power":
        power = draw(st.integers(-9, 9))
        text, value = f"{whole}e{power}", value * Fraction(10) ** power
    currency = draw(st.sampled_from(["", "$", "€"])) if sign != "- " else ""
    after = draw(st.sampled_from(["", ".", "%", " eggs", " km/h", "\nand 7"]))
    return f"{sign}{currency}{text}{after}", float(-value if sign else value)


@given(written_numbers())
def test_any_number_in_any_form_reads_back(written: tuple[str, float]) -> None:
    text, value = written
    row = {"question": "?", "answer": f"1 + 2 = 3\n#### {text}"}
    assert TASK.flaw(row) is None
    assert final_number(TASK.target(row)) == value
    assert final_number(f"7 {ANSWER_MARK}{text}") == value


PLAIN = st.integers(-(10**7), 10**7).flatmap(
    lambda whole: st.sampled_from(
        [f"{whole}", f"{whole:,}", f"{whole}.", f"{whole}.50", f"${abs(whole):,}", f"{abs(whole)}%"]
    )
)
BETWEEN = st.sampled_from(
    [" eggs ", " + ", " - ", " x ", " = ", "\n", ", ", ". ", " and ", "=", " (", ") ", ": ", f" {ANSWER_MARK}", ">>"]
)


@given(st.lists(st.tuples(PLAIN, BETWEEN), max_size=6), BETWEEN)
def test_plain_numbers_are_those_of_the_official_code(pieces: list[tuple[str, str]], start: str) -> None:
    text = start + "".join(number + between for number, between in pieces)
    text = re.sub(r"([-=(:] *)- (?=[$\d])|^ *- ", r"\1", text)  # a sign apart from its number is no plain one
    assert final_number(text) == official(text)


@pytest.mark.parametrize(("name", "rows"), [("train", 7473), ("test", 1319)])
def test_real_answers_are_read_as_before(shared_data: Path, name: str, rows: int) -> None:
    lines = (shared_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
    assert len(lines) == rows
    for line in lines:
        row = json.loads(line)
        assert TASK.flaw(row) is None
        assert TASK.target(row) == row["answer"].replace("####", ANSWER_MARK)
        assert final_number(TASK.target(row)) == official(TASK.target(row)) is not None
