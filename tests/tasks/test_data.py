from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loftq_exp.errors import UserError
from loftq_exp.tasks import Task, load_task, task_settings
from loftq_exp.tasks.data import DataSource, data_digest, read_rows

GOOD = {"question": "How many?", "answer": "Two.\n#### 2"}


def task_of(file: Path, **settings: object) -> Task:
    return load_task(task_settings(kind="gsm8k", train_file=str(file), **settings))


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        task_of(file).rows("train")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"task.train_file={file}: ")
    return message


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n"),
        ("rows.JSONL", f"\ufeff{json.dumps(GOOD)}\r\n{json.dumps(GOOD)}"),
        ("rows.json", json.dumps([GOOD, GOOD], indent=2)),
        ("lines.json", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n"),
        ("rows.csv", 'question,answer\nHow many?,"Two.\n#### 2"\n\nHow many?,"Two.\n#### 2"\n'),
    ],
)
def test_reads_each_format(tmp_path: Path, name: str, text: str) -> None:
    assert task_of(written(tmp_path, name, text)).rows("train") == [GOOD, GOOD]


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), escape=st.booleans())
def test_jsonl_keeps_any_text_but_for_its_line_ends(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], escape: bool
) -> None:
    rows = [{"question": text, "answer": "#### 1"} for text in texts]
    lines = "\n".join(json.dumps(row, ensure_ascii=escape) for row in rows)
    file = written(tmp_path_factory.getbasetemp(), "any.jsonl", lines.encode(errors="surrogatepass"))
    ends = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    assert task_of(file).rows("train") == [{"question": text, "answer": "#### 1"} for text in ends]


def test_line_separators_within_a_text_do_not_break_the_line(tmp_path: Path) -> None:
    row = GOOD | {"question": "one\u2028two\x85three"}
    file = written(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False))
    assert task_of(file).rows("train") == [row]


def test_limits_apply_to_their_split(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl", "\n".join(json.dumps(GOOD | {"id": number}) for number in range(9)))
    task = task_of(file, eval_file=str(file), max_train_samples=3, max_eval_samples=20)
    assert [row["id"] for row in task.rows("train")] == [0, 1, 2]
    assert len(task.rows("eval")) == 9


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.jsonl", "", ["empty", "give"]),
        ("rows.jsonl", " \n\n", ["empty"]),
        ("rows.json", "[]", ["no rows"]),
        ("rows.csv", "question,answer\n", ["no rows"]),
        ("rows.txt", "x", ["'.txt'", ".json, .jsonl, .csv or .parquet"]),
        ("rows", "x", ["extension ''", ".json, .jsonl, .csv or .parquet"]),
        (
            "rows.jsonl",
            f'{json.dumps(GOOD)}\n\n{{"question": "x", }}\n',
            ["line 3 is malformed", "one JSON object a line"],
        ),
        ("rows.jsonl", "[" * 100_000, ["line 1 is malformed"]),
        ("rows.jsonl", "9" * 5000, ["line 1 is malformed"]),
        ("rows.jsonl", f"{json.dumps(GOOD)}\n[1]", ["line 2 is not an object", "[1]"]),
        ("rows.jsonl", json.dumps(GOOD).encode() + b"\n\xff", ["line 2 is not UTF-8"]),
        ("rows.json", '[\n{"question": 1},\n{]', ["line 3 is malformed", "array"]),
        ("rows.json", json.dumps([GOOD, {"question": "x"}]), ["row 2", "no column 'answer'", "found: question"]),
        ("rows.jsonl", '{"q": "x", "a": "y"}', ["line 1", "no column 'question'", "found: q, a"]),
        ("rows.jsonl", f"{json.dumps(GOOD)}\n{{}}", ["line 2", "no column 'question'", "found: none"]),
        ("rows.jsonl", json.dumps(GOOD | {"answer": None}), ["line 1", "nothing in column 'answer'"]),
        ("rows.jsonl", json.dumps(GOOD | {"question": " \n"}), ["line 1", "an empty text in column 'question'"]),
        ("rows.jsonl", json.dumps(GOOD | {"answer": 18}), ["line 1", "18 in column 'answer'", "text is needed"]),
        ("rows.jsonl", json.dumps(GOOD | {"answer": "18"}), ["line 1", "'#### NUMBER'"]),
        ("rows.jsonl", json.dumps(GOOD | {"answer": "18 #### many"}), ["line 1", "'#### NUMBER'"]),
        ("rows.csv", "q,a\nx,y\n", ["line 2", "no column 'question'", "found: q, a"]),
        ("rows.csv", 'question,answer\n"a\nb",#### 1\nx\n', ["line 4 is malformed", "1 cells where the header has 2"]),
        ("rows.csv", 'question,answer\n"a\nb",#### 1\nx,\n', ["line 4", "an empty text in column 'answer'"]),
        ("rows.csv", 'question,answer\nx,"#### 1', ["line 2 is malformed"]),
        ("rows.csv", "question,answer,answer\nx,#### 1,#### 2\n", ["line 1 is malformed", "column 'answer' twice"]),
        ("rows.csv", '""\nx\n', ["line 2 has no column 'question'"]),
        ("rows.csv", b"question,answer\nx,#### 1\n\0,#### 1\n", ["line 3 holds a NUL", "UTF-16"]),
        ("rows.csv", "question,answer\rx,#### 1\ry,", ["line 3", "an empty text in column 'answer'"]),
        ("rows.jsonl", "\ufeffäö\n\n".encode() + b"\xff", ["line 3 is not UTF-8"]),
        ("rows.jsonl", "\ufeffäöü".encode() + b"\xff", ["line 1 is not UTF-8"]),
        ("rows.jsonl", json.dumps(GOOD).encode("utf-16"), ["line 1 is not UTF-8"]),
        ("rows.jsonl", json.dumps(GOOD).encode("utf-16-le"), ["line 1 holds a NUL"]),
        (
            "rows.jsonl",
            json.dumps(GOOD | {"question": "\ud83d?"}),
            ["line 1", r"'\ud83d', half of a character, in column 'question'"],
        ),
        (
            "rows.json",
            json.dumps([GOOD, GOOD | {"answer": "\udc00 #### 1"}]),
            ["row 2", r"'\udc00', half of a character"],
        ),
        ("rows.jsonl", '{"\\ud83d": 1}', ["line 1", "no column 'question'", r"found: \ud83d"]),
        (
            "rows.jsonl",
            '{"question": "x", "question": "y", "answer": "#### 1"}',
            ["line 1 is malformed", "'question' stands twice"],
        ),
        (
            "rows.jsonl",
            '{"question": NaN, "answer": "#### 1"}',
            ["line 1", "nan in column 'question'", "text is needed"],
        ),
        ("rows.jsonl", json.dumps(GOOD | {"answer": {"a": [1]}}), ["line 1", "{'a': [1]} in column 'answer'"]),
        (
            "rows.jsonl",
            '{"question": ' + "[" * 400 + "]" * 400 + "}",
            ["line 1", "in column 'question' where text is needed"],
        ),
        ("rows.jsonl", json.dumps(GOOD) + "\r\r" + "{", ["line 3 is malformed"]),
        (
            "rows.json",
            json.dumps(GOOD, indent=1),
            ["line 1 is malformed", "an array of JSON objects or one JSON object a line"],
        ),
        ("rows.json", json.dumps([GOOD, "x" * 10**6]), ["row 2 is not an object", "'xxx"]),
        ("rows.json", json.dumps({"data": [GOOD]}), ["line 1", "no column 'question'", "found: data"]),
        ("rows.jsonl", "\ufeff", ["no rows"]),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str | bytes, words: list[str]) -> None:
    message = refusal(written(tmp_path, name, text))
    for word in words:
        assert word in message


def test_what_is_none_of_the_tasks_business_does_not_matter(tmp_path: Path) -> None:
    """Other columns may hold anything; an escaped NUL and a whole pair of surrogates are text."""
    text = '{"question": "a\\u0000b \\ud83d\\ude00", "answer": "#### 1", "more": NaN, "half": "\\ud83d"}'
    (row,) = task_of(written(tmp_path, "rows.jsonl", text)).rows("train")
    assert row["question"] == "a\0b \U0001f600"
    exported = written(
        tmp_path, "rows.csv", ",question,answer,,\n0,x,#### 1,,\n"
    )  # the index without a name, empty columns
    assert task_of(exported).rows("train")[0]["question"] == "x"


def test_cells_and_lines_of_any_length(tmp_path: Path) -> None:
    long = "word " * 30_000 + "."
    limit = csv.field_size_limit()
    for name, text in (
        ("rows.csv", f'question,answer\n"{long}",#### 1\n'),
        ("rows.jsonl", json.dumps({"question": long, "answer": "#### 1"})),
    ):
        assert task_of(written(tmp_path, name, text)).rows("train")[0]["question"] == long
    assert csv.field_size_limit() == limit
    with pytest.raises(UserError, match="line 2 is malformed"):
        task_of(written(tmp_path, "bad.csv", f'question,answer\n"{long}')).rows("train")
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system_make_the_same_rows(tmp_path: Path, end: str) -> None:
    """Between rows and within texts alike."""
    row = {"question": f"How{end}many?", "answer": f"Two.{end}#### 2"}
    expected = [{"question": "How\nmany?", "answer": "Two.\n#### 2"}] * 2
    csv_text = end.join(["question,answer", *(f'"{row["question"]}","{row["answer"]}"' for _ in range(2)), ""])
    for name, text in (
        ("rows.jsonl", (json.dumps(row) + end) * 2),
        ("rows.json", json.dumps([row, row], indent=1).replace("\n", end)),
        ("rows.csv", csv_text),
    ):
        assert task_of(written(tmp_path, name, text)).rows("train") == expected


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "absent.jsonl")
    (tmp_path / "folder.json").mkdir()
    assert "this is a folder" in refusal(tmp_path / "folder.json")


def test_the_eval_file_is_named_as_such(tmp_path: Path) -> None:
    task = load_task(task_settings(kind="gsm8k", eval_file=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match=r"^task\.eval_file=.*absent"):
        task.rows("eval")


def test_no_source_at_all() -> None:
    with pytest.raises(UserError, match=r"^task\.train_file=null: .* give task\.train_file=FILE .* or task\.dataset="):
        load_task(task_settings(kind="gsm8k")).rows("train")


HUB = task_settings(kind="gsm8k", dataset="openai/gsm8k", dataset_config="main")


def test_reads_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((*args, kwargs))
        return datasets.Dataset.from_list([GOOD] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task(HUB).rows("eval") == [GOOD] * 3
    assert asked == [("openai/gsm8k", "main", {"split": "test", "revision": None})]
    assert load_task(HUB).digest("train").startswith("fingerprint:")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the Hub (OfflineModeIsEnabled)"), ["cannot be reached", "HF_HUB_OFFLINE"]),
        (ValueError("BuilderConfig 'main' not found.\nAvailable: ['x']"), ["cannot be loaded", "Available: ['x']"]),
        (datasets.exceptions.DatasetNotFoundError("Dataset is gated"), ["cannot be loaded", "gated"]),
    ],
)
def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load_task(HUB).rows("train")
    message = str(caught.value)
    assert message.startswith("task.dataset=openai/gsm8k, task.dataset_config=main, task.train_split=train: ")
    for word in [*words, "give task.train_file=FILE"]:
        assert word in message
    assert "\n" not in message


def test_a_bad_row_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([GOOD, GOOD | {"answer": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(UserError, match=r"^task\.dataset=openai/gsm8k.*row 2 holds nothing in column 'answer'"):
        load_task(HUB).rows("train")


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl", json.dumps(GOOD))
    expected = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert task_of(file).digest("train") == expected
    assert data_digest(DataSource("eval", str(file), None, None, "test")) == expected
    with pytest.raises(UserError, match="no such file"):
        task_of(tmp_path / "absent.jsonl").digest("train")


def test_real_gsm8k_is_complete(shared_data: Path) -> None:
    config = task_settings(
        kind="gsm8k", train_file=str(shared_data / "gsm8k/train.jsonl"), eval_file=str(shared_data / "gsm8k/test.jsonl")
    )
    assert len(load_task(config).rows("train")) == 7473
    assert len(load_task(config).rows("eval")) == 1319


def test_a_row_is_read_whatever_its_other_columns(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl", json.dumps(GOOD | {"id": None}))
    source = DataSource("train", str(file), None, None, "train")
    assert read_rows(source, lambda row: None) == [GOOD | {"id": None}]


# Several splits or files ------------------------------------------------------------------------------------------------


def test_joined_files_keep_their_order_and_names(tmp_path: Path) -> None:
    files = [written(tmp_path, f"rows_{name}.jsonl", f"{json.dumps(GOOD | {'id': name})}\n" * 3) for name in "ab"]
    task = task_of(tmp_path / "rows_a.jsonl", eval_file="+".join(map(str, files)), max_eval_samples=2)
    assert [(row["id"], row["part"]) for row in task.rows("eval")] == [("a", "a"), ("a", "a"), ("b", "b"), ("b", "b")]
    assert "part" not in task.rows("train")[0]
    assert task.digest("eval") == "+".join(data_digest(part) for part in task.source("eval").parts())


def test_a_file_whose_name_holds_a_plus_is_one(tmp_path: Path) -> None:
    file = written(tmp_path, "a+b.jsonl", json.dumps(GOOD))
    assert task_of(file).rows("train") == [GOOD]


def test_parts_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    for joined in ("x/rows.jsonl+y/rows.jsonl", "a.jsonl+"):
        with pytest.raises(UserError, match=r"^task.train_file=.*the last words of its parts' names must differ"):
            task_of(Path(joined)).rows("train")


def test_a_flaw_names_its_own_file(tmp_path: Path) -> None:
    good, bad = written(tmp_path, "x_a.jsonl", json.dumps(GOOD)), written(tmp_path, "x_b.jsonl", "{}")
    with pytest.raises(UserError, match=f"^task.train_file={bad}: line 1 has no column"):
        task_of(Path(f"{good}+{bad}")).rows("train")


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl", f"{json.dumps(GOOD)}\n{{}}")
    assert task_of(file, max_train_samples=1).rows("train") == [GOOD]


def test_an_unknown_split_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of files is a data set to `datasets`, as a hub id is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    written(folder, "train.jsonl", json.dumps(GOOD))
    task = load_task(task_settings(kind="gsm8k", dataset=str(folder), eval_split="tset"))
    assert task.rows("train") == [GOOD]
    with pytest.raises(UserError, match=r"task.eval_split=tset: the data set cannot be loaded \(Unknown split"):
        task.rows("eval")
