from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.squad import Squad, Window, spans, token_span

CONTEXT = (
    "  The naïve café 咖啡 in Zürich opened in 1998, and “Emma Blue” sold 31 cups of coffee there on its first day. "
    * 3
)
CONFIG = task_settings(kind="squad", max_source_length=64, doc_stride=20)


def row(answer: str, context: str = CONTEXT, question: str = "What was it?") -> dict[str, Any]:
    return {"id": "q", "context": context, "question": question,
            "answers": {"text": [answer], "answer_start": [context.rindex(answer)]}}  # fmt: skip


def task(**settings: Any) -> Squad:
    made = load_task(dataclasses.replace(CONFIG, **settings))
    assert isinstance(made, Squad)
    return made


@pytest.mark.parametrize("answer", ["naïve café", "咖啡", "“Emma Blue”", "31", "1998", "day."])
def test_the_answers_tokens_read_back(tiny_tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    """Characters, not bytes, and each window in its own tokens; some window holds the answer, others do not."""
    squad = task()
    found = 0
    features = squad.encode([row(answer)], tiny_tokenizer)
    assert len(features) > 2
    for feature, window in zip(features, windows_of(squad, [row(answer)], tiny_tokenizer), strict=True):
        assert len(feature["input_ids"]) <= CONFIG.max_source_length
        first, last = feature["start_positions"], feature["end_positions"]
        if (first, last) != (0, 0):
            start, end = window.offsets[first], window.offsets[last]
            assert start
            assert end
            assert CONTEXT[start[0] : end[1]].strip(" ,") == answer
            found += 1
    assert 0 < found < len(features)


def test_windows_overlap_by_the_stride_and_cover_the_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    windows = windows_of(task(), [row("31"), row("31", "Only 31 here.")], tiny_tokenizer)
    assert [window.row for window in windows] == [0] * (len(windows) - 1) + [1]
    whole = tiny_tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    covered: list[int] = []
    for window in windows[:-1]:
        inside = [index for index, place in enumerate(window.offsets) if place is not None]
        ids = [window.features["input_ids"][index] for index in inside]
        shared = CONFIG.doc_stride if covered else 0
        assert ids[:shared] == covered[len(covered) - shared :]
        covered += ids[shared:]
        for index in inside:
            start, end = window.offsets[index] or (0, 0)
            assert CONTEXT[start:end].strip() in tiny_tokenizer.decode(ids) or "�" in tiny_tokenizer.decode(ids)
    assert covered == whole


def windows_of(squad: Squad, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[Window]:
    (request,) = squad.requests(rows, tokenizer)
    assert [window.features for window in request.notes] == request.features
    return request.notes


def test_a_model_that_points_at_the_gold_tokens_is_right(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Training positions turned into logits come back as the answers: both ways through characters agree."""
    squad = task()
    rows = [row(answer) for answer in ("naïve café", "咖啡", "“Emma Blue”", "31")]
    requests = squad.requests(rows, tiny_tokenizer)
    answers = []
    for feature in squad.encode(rows, tiny_tokenizer):
        start, end = (np.zeros(len(feature["input_ids"]) + 3, dtype=np.float32) for _ in range(2))  # some of it padding
        start[feature["start_positions"]] = end[feature["end_positions"]] = 9
        start[-1] = end[-1] = 99  # padding, which must not count
        answers.append((start, end))
    scored = squad.score(rows, requests, [answers])
    assert scored.scores == {"exact_match": 1.0, "f1": 1.0}
    assert [sample["predicted"] for sample in scored.samples] == ["naïve café", "咖啡", "“Emma Blue”", "31"]
    assert scored.samples[0]["n_best"][0] == "naïve café"


OFFSETS: list[tuple[int, int] | None] = [None, None, (10, 14), (14, 20), (21, 25), None]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (10, 14, (2, 2)),
        (12, 20, (2, 3)),
        (14, 25, (3, 4)),
        (21, 22, (4, 4)),
        (9, 14, None),
        (21, 26, None),
        (0, 5, None),
        (30, 35, None),
    ],
)
def test_token_span(start: int, end: int, expected: tuple[int, int] | None) -> None:
    assert token_span(OFFSETS, start, end) == expected


def test_spans_by_hand() -> None:
    start = np.array([99, 9, 1, 5, 2, 9], dtype=np.float32)
    end = np.array([99, 9, 6, 1, 4, 9], dtype=np.float32)
    # Pairs within the context, end not before start: (2,2) 7, (2,3) 2, (2,4) 5, (3,3) 6, (3,4) 9, (4,4) 6.
    found = spans(start, end, OFFSETS, n_best=20, max_tokens=30)
    assert [(span.logit, span.start, span.end) for span in found] == [
        (9, 14, 25), (7, 10, 14), (6, 14, 20), (6, 21, 25), (5, 10, 25), (2, 10, 20),
    ]  # fmt: skip
    assert [span.logit for span in spans(start, end, OFFSETS, n_best=20, max_tokens=1)] == [7, 6, 6]
    # The likeliest start is token 3, the likeliest end token 2, which lies before it.
    assert spans(start, end, OFFSETS, n_best=1, max_tokens=30) == []


def test_a_question_without_a_possible_answer_is_wrong_and_does_not_fail(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    squad = task(n_best_size=1)
    requests = squad.requests([row("31", "Only 31 here.")], tiny_tokenizer)
    length = len(requests[0].features[0]["input_ids"])
    rising = np.arange(length, dtype=np.float32)
    scored = squad.score([row("31", "Only 31 here.")], requests, [[(rising, -rising)]])
    assert scored.samples[0]["predicted"] == ""
    assert scored.scores == {"exact_match": 0, "f1": 0}


def test_a_long_question_is_cut_and_the_context_stays(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for feature in task().encode([row("31", question="  How many cups " * 40)], tiny_tokenizer):
        assert len(feature["input_ids"]) <= CONFIG.max_source_length
    with pytest.raises(UserError, match=r"^task.doc_stride=63: with task.max_source_length=64 .* no tokens"):
        task(doc_stride=63).requests([row("31")], tiny_tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": None}, "holds no object with the lists 'text' and 'answer_start'"),
        ({"answers": {"text": ["31"], "answer_start": []}}, "holds no object with the lists"),
        ({"answers": {"text": "31", "answer_start": 5}}, "holds no object with the lists"),
        ({"answers": {"text": [], "answer_start": []}}, "holds no answer in column 'answers'"),
        ({"answers": {"text": ["31"], "answer_start": [0]}}, "holds the answer '31', which does not stand at character 0"),
        ({"answers": {"text": ["31"], "answer_start": [9999]}}, "holds the answer '31', which does not stand"),
        ({"answers": {"text": [" "], "answer_start": [-1]}}, "holds no object with the lists"),
        ({"answers": {"text": [" 3"], "answer_start": [-1]}, "context": "3 cups"}, "does not stand at character -1"),
        ({"context": 7}, "holds 7 in column 'context' where text is needed"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("31") | change))
    with pytest.raises(UserError, match="line 1") as caught:
        task(train_file=str(file)).rows("train")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_stay_where_they_are_when_line_ends_change(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Positions count the characters of the context as the file holds it."""
    context = "One line.\n\nIn 1998 it\nopened, and 31 cups\nwere sold."
    features = []
    for end in ("\n", "\r\n", "\r"):
        own = context.replace("\n", end)
        texts = [f"cups{end}were", "31"]
        rows = [row("31", own) | {"answers": {"text": [text], "answer_start": [own.index(text)]}} for text in texts]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        squad = task(train_file=str(file))
        read = squad.rows("train")
        assert [one["context"] for one in read] == [context] * 2
        assert [one["answers"]["answer_start"] for one in read] == [[context.index("cups\n")], [context.index("31")]]
        features.append(squad.encode(read, tiny_tokenizer))
    assert features[0] == features[1] == features[2]


def test_a_csv_file_holds_answers_as_json(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        'id,context,question,answers\n1,Only 31 here.,How many?,"{""text"": [""31""], ""answer_start"": [5]}"\n'
    )
    squad = task(train_file=str(file))
    (feature,) = squad.encode(squad.rows("train"), tiny_tokenizer)
    assert feature["start_positions"] > 0


def test_real_squad_is_read_whole(shared_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = shared_data / "squad" / "xquad_en.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    squad = task(train_file=str(file), max_source_length=384, doc_stride=128)
    rows = squad.rows("train")
    assert len(rows) == 1190
    held = {}
    for window, feature in zip(
        windows_of(squad, rows[:60], tiny_tokenizer), squad.encode(rows[:60], tiny_tokenizer), strict=True
    ):
        first, last = feature["start_positions"], feature["end_positions"]
        if (first, last) != (0, 0):
            start, end = window.offsets[first], window.offsets[last]
            assert start
            assert end
            held[window.row] = rows[window.row]["context"][start[0] : end[1]]
    assert sorted(held) == list(range(60))  # each answer lies whole in some window
    assert all(rows[index]["answers"]["text"][0] in text for index, text in held.items())
