"""Tables on the terminal: every number is whole, and what has no room is named."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.report.console import print_table

CELLS = st.one_of(
    st.integers(0, 10**9).map(str), st.floats(0, 1).map("{:.4f} ± 0.1234".format), st.just("LoftQ NF4 iter 5 gptq")
)


@given(st.data(), st.integers(12, 120), st.integers(1, 8), st.integers(0, 3))
def test_no_number_is_cut_and_each_column_is_shown_or_named(
    data: st.DataObject, width: int, columns: int, count: int
) -> None:
    headings = [f"name {index}" for index in range(columns)]
    rows = [[data.draw(CELLS) for _ in headings] for _ in range(count)]
    drop = data.draw(st.permutations(headings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        out = _printed(headings, rows, drop)
    missing = re.search(r"no room for:(.*)", " ".join(out.split()))
    left_out = [name.strip() for name in missing[1].split(",")] if missing else []
    assert headings[0] not in left_out
    assert "…" not in out
    kept = [index for index, heading in enumerate(headings) if heading not in left_out]
    numbers = [word for row in rows for index in kept for word in row[index].split() if word[0].isdigit()]
    table = [line for line in out.splitlines() if line.startswith("│")]
    assert sorted(re.findall(r"(?<![\w.])\d[\d.]*", " ".join(table))) == sorted(numbers)


def _printed(headings: list[str], rows: list[list[str]], drop: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_table("rows", headings, rows, drop=drop)
    return printed.getvalue()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")


@pytest.mark.usefixtures("narrow")
def test_columns_are_left_out_in_the_given_order_and_what_fits_again_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    headings, row = ["run", "small", "wide", "seconds", "score"], ["LoftQ", "1", "1234567890" * 3, "12", "0.5"]
    print_table("1 run", headings, [row], drop=["seconds", "small", "wide"], notes=["a note"], elsewhere="see table.md")
    title, *_, note, below = capsys.readouterr().out.splitlines()
    assert title.split() == ["1", "run"]
    assert (note, below) == ("a note", "no room for: wide; see table.md")


def test_long_paths_are_folded_and_cost_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    print_table("jobs", ["job", "overrides", "score"], [["0", f"task.eval_file=/{'folder/' * 20}", "0.123456"]])
    out = capsys.readouterr().out
    assert "0.123456" in out
    assert "no room" not in out
    assert max(map(len, out.splitlines())) <= 50


def test_a_pipe_has_all_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table("wide", [f"heading {index}" for index in range(40)], [["x" * 20] * 40])
    assert capsys.readouterr().out.count("x" * 20) == 40
