from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.base import Outputs, Scored
from loftq_exp.tasks.glue import COLUMNS, LABELS, METRICS, GlueConfig

MNLI = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}


def glue(name: str, **settings: Any) -> Any:
    return load_task(task_settings(kind="glue", name=name, **settings))


def test_the_tables_hold_every_name() -> None:
    assert tuple(COLUMNS) == tuple(LABELS) == GlueConfig.names
    assert set(METRICS) <= set(COLUMNS)


@pytest.mark.parametrize(("name", "outputs"), [("mnli", 3), ("rte", 2), ("stsb", 1)])
def test_outputs_of_the_head(name: str, outputs: int) -> None:
    assert glue(name).num_labels == outputs


def test_sources_on_the_hub() -> None:
    hub = {"dataset": "nyu-mll/glue", "eval_split": "validation"}
    assert [part.dataset_split for part in glue("rte", **hub).source("eval").parts()] == ["validation"]
    mnli = glue("mnli", **hub)
    assert [part.dataset_split for part in mnli.source("eval").parts()] == [
        "validation_matched",
        "validation_mismatched",
    ]
    assert [part.dataset_split for part in mnli.source("train").parts()] == ["train"]
    assert [part.dataset_split for part in glue("mnli", eval_split="validation_matched").source("eval").parts()] == [
        "validation_matched"
    ]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("mnli", {"premise": "x", "label": 0}, "has no column 'hypothesis' (found: premise, label)"),
        ("mnli", {"premise": "x", "hypothesis": "y"}, "has no column 'label' (found: premise, hypothesis)"),
        ("mnli", MNLI | {"label": 3}, "holds 3 in column 'label' where one of these is needed: 0 (entailment), 1 (neutral), 2 (contr"),
        ("mnli", MNLI | {"label": -1}, "holds -1 in column 'label' (-1 stands for a hidden label) where one of these"),
        ("mnli", MNLI | {"label": "entailment"}, "holds 'entailment' in column 'label' where one of these is needed: 0 (entail"),
        ("mnli", MNLI | {"label": None}, "holds None in column 'label' where"),
        ("mnli", MNLI | {"label": True}, "holds True in column 'label' where"),
        ("mnli", MNLI | {"label": 1.5}, "holds 1.5 in column 'label' where"),
        ("mnli", MNLI | {"premise": " "}, "holds an empty text in column 'premise'"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": 5.1}, "holds 5.1 in column 'label' where one of these is needed: a number from 0 to 5"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": "nan"}, "holds 'nan' in column 'label'"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": 10**400}, "holds 1000000000"),
        ("rte", {"sentence1": "x", "sentence2": "y", "label": 10**400}, "holds 1000000000"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": "alike"}, "holds 'alike' in column 'label'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path: Path, name: str, row: dict[str, Any], words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        glue(name, train_file=str(file)).rows("train")
    message = str(caught.value)
    assert message.startswith(f"task.train_file={file}: line 1 {words}")
    assert "\n" not in message


def test_labels_of_a_csv_file_are_numbers(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("sentence1,sentence2,label\nx,y,3.8\nx,y,5\n")
    task = glue("stsb", train_file=str(file))
    assert [feature["labels"] for feature in task.encode(task.rows("train"), tiny_tokenizer)] == [3.8, 5.0]
    file.write_text("sentence1,sentence2,label\nx,y,1\n")
    task = glue("rte", train_file=str(file))
    (feature,) = task.encode(task.rows("train"), tiny_tokenizer)
    assert feature["labels"] == 1
    assert isinstance(feature["labels"], int)


@pytest.mark.parametrize("label", [" 1", "1.0", "1.", 1.0, "+1", 1])
def test_a_whole_label_in_any_form(label: object) -> None:
    row = {"sentence1": "x", "sentence2": "y", "label": label}
    assert glue("rte").flaw(row) is None
    assert glue("rte")._gold(row) == 1


@pytest.mark.parametrize("label", ["1,0", "1.5", "0_1", "", "1e0", float("nan"), "inf", [1]])
def test_a_label_that_is_no_whole_number(label: object) -> None:
    assert "in column 'label'" in glue("rte").flaw({"sentence1": "x", "sentence2": "y", "label": label})


@pytest.mark.parametrize(
    ("label", "value"), [("3.8", 3.8), (" .5 ", 0.5), ("5e-1", 0.5), ("3,8", None), ("3_8", None), ("nan", None)]
)
def test_a_label_between_bounds_as_text(label: str, value: float | None) -> None:
    row = {"sentence1": "x", "sentence2": "y", "label": label}
    if value is None:
        assert "a number from 0 to 5" in glue("stsb").flaw(row)
    else:
        assert glue("stsb")._gold(row) == value


def test_the_longer_text_is_cut_first(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"premise": "one two three four five six " * 9, "hypothesis": "red", "label": 2}
    (feature,) = glue("mnli", max_source_length=20).encode([row], tiny_tokenizer)
    assert len(feature["input_ids"]) == 20
    assert tiny_tokenizer.decode(feature["input_ids"]).endswith("red")


def test_a_batch_has_whole_or_real_labels(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [MNLI, MNLI | {"premise": "It rains and rains.", "label": 2}]
    task = glue("mnli", max_source_length=32)
    batch = task.collator(tiny_tokenizer)(task.encode(rows, tiny_tokenizer))
    assert batch["labels"].tolist() == [0, 2]
    assert str(batch["labels"].dtype) == "torch.int64"
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    padded = glue("mnli", max_source_length=32, pad_to_max_length=True)
    assert padded.collator(tiny_tokenizer)(task.encode(rows, tiny_tokenizer))["input_ids"].shape == (2, 32)
    stsb = glue("stsb")
    real = stsb.collator(tiny_tokenizer)(
        stsb.encode([{"sentence1": "x", "sentence2": "y", "label": 3}], tiny_tokenizer)
    )
    assert str(real["labels"].dtype) == "torch.float32"


def scored(task: Any, rows: list[dict[str, Any]], outputs: list[list[float]]) -> Scored:
    answers = [(np.array(row, dtype=np.float32),) for row in outputs]
    return task.score(rows, [Outputs("labels", [])], [answers])


def test_scores_and_samples_of_labels() -> None:
    rows = [{"sentence1": "x", "sentence2": "y", "label": label} for label in (1, 1, 0, 0)]
    result = scored(glue("mrpc"), rows, [[0, 1], [1, 0], [0, 1], [1, 0]])
    assert result.scores == {"accuracy": 0.5, "f1": 0.5}
    assert result.samples[1] == {
        "sentence1": "x", "sentence2": "y", "predicted": "not_equivalent", "gold": "equivalent", "correct": False,
    }  # fmt: skip


def test_scores_of_numbers() -> None:
    rows = [{"sentence1": "x", "sentence2": "y", "label": label} for label in (0, 2.5, 5)]
    result = scored(glue("stsb"), rows, [[0.0], [1.0], [2.0]])
    assert result.scores == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    assert result.samples[1]["predicted"] == 1.0


def test_parts_are_scored_together_and_apart() -> None:
    task = load_task(task_settings(kind="anli", eval_split="test_r1+test_r2", dataset="facebook/anli"))
    rows = [MNLI | {"part": part, "label": label} for part, label in (("r1", 0), ("r1", 1), ("r1", 0), ("r2", 2))]
    result = scored(task, rows, [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    assert result.scores == {"accuracy": 0.5, "accuracy_r1": pytest.approx(2 / 3), "accuracy_r2": 0}
    assert [(column.title, column.scores) for column in task.table] == [
        ("accuracy", ("accuracy",)),
        ("accuracy r1/r2", ("accuracy_r1", "accuracy_r2")),
    ]
