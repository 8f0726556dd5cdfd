"""The calibration samples: which text is read, which rows are drawn, how long they are, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo import ENCODER, FAMILIES, with_tokenizer

from loftq_exp.calibration.samples import BATCH_TOKENS, batches_of, calibration_origin, calibration_samples, tokens_of
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.source.locate import Source
from loftq_exp.tasks import load_task

Samples = list[dict[str, list[int]]]
TEXT = "\n".join(f"Line {n} says that {n} and {n} are {2 * n}." for n in range(60))
MARKED = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(1, 31)]


class Place:
    """A folder with a model and files of text; settings that calibrate on them."""

    def __init__(self, folder: Path, model: Path, kind: str, task: dict[str, Any]) -> None:
        self.folder, self.model, self.kind, self.task = folder, model, kind, task

    def written(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def rows(self, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        return self.written(name, "".join(json.dumps(row) + "\n" for row in rows))

    def config(self, own: dict[str, Any] | None = None, **calibration: Any) -> RunConfig:
        return RunConfig.from_mapping({
            "model": {"path": str(self.model), "kind": self.kind}, "quant": {"method": "loftq", "calibration": "full"},
            "task": self.task if own is None else own, "train": {}, "calibration": calibration,
        })  # fmt: skip

    def samples(self, own: dict[str, Any] | None = None, **calibration: Any) -> Samples:
        source = Source(self.model, "tiny", str(self.model), None)
        return calibration_samples(source, self.config(own, **calibration))

    def refused(self, own: dict[str, Any] | None = None, **calibration: Any) -> str:
        with pytest.raises(UserError) as caught:
            self.samples(own, **calibration)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path, tiny_llama_dir: Path) -> Place:
    return Place(tmp_path, tiny_llama_dir, "causal", {"kind": "arithmetic", "max_train_samples": 20})


@pytest.fixture(scope="session")
def encoding(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` that puts a text between <s> and </s>, as encoders' tokenizers do."""
    copy = PreTrainedTokenizerFast(tokenizer_object=type(tiny_tokenizer._tokenizer).from_str(tiny_tokenizer._tokenizer.to_str()),
                                   bos_token="<s>", eos_token="</s>", pad_token="</s>")  # fmt: skip
    copy._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return copy


@pytest.fixture
def encoder(tmp_path: Path, encoding: PreTrainedTokenizerFast) -> Callable[[str, dict[str, Any]], Place]:
    """A place with a model of a family with 64 positions, and `encoding`."""

    def make(family: str, task: dict[str, Any]) -> Place:
        def model() -> PreTrainedModel:
            config = FAMILIES[family].make().config
            config.vocab_size = 512
            return (
                hf.AutoModelForMaskedLM.from_config(config)
                if family != "bart"
                else hf.AutoModelForSeq2SeqLM.from_config(config)
            )

        folder = with_tokenizer(model, encoding, tmp_path / family)
        return Place(tmp_path, folder, FAMILIES[family].kind, task)

    return make


def ids(samples: Samples) -> list[tuple[int, ...]]:
    return [tuple(sample["input_ids"]) for sample in samples]


# Which text -----------------------------------------------------------------------------------------------------------


def test_by_default_it_is_the_tasks_own_training_rows(place: Place, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(place.config().task)
    rows = task.rows("train")
    assert len(rows) == 20
    assert place.samples() == [{"input_ids": one["input_ids"]} for one in task.encode(rows, tiny_tokenizer)]


def test_a_text_file_is_cut_into_windows(place: Place, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = place.samples(file=place.written("some.TXT", TEXT), length=50, samples=1000)
    whole = tiny_tokenizer(TEXT)["input_ids"]
    assert [token for sample in samples for token in sample["input_ids"]] == whole[: len(whole) // 50 * 50]
    assert {len(sample["input_ids"]) for sample in samples} == {50}
    assert {*samples[0]} == {"input_ids"}


def test_the_tasks_settings_read_a_file_of_its_rows(place: Place, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    given = {"kind": "gsm8k", "max_source_length": 12, "max_train_samples": 5}
    samples = place.samples(given, file=place.rows(MARKED))
    assert len(samples) == len(MARKED), "the limit is of the task's own rows"
    expected = load_task(place.config(given).task).encode(MARKED, tiny_tokenizer)
    assert ids(samples) == [tuple(one["input_ids"]) for one in expected]


def test_another_task_reads_a_file_with_its_default_settings(place: Place) -> None:
    own = {"kind": "wikitext", "train_file": place.written("a.txt", TEXT)}
    assert len(place.samples(own, task="gsm8k", file=place.rows(MARKED))) == len(MARKED)
    assert len(place.samples(own, task="arithmetic", samples=7)) == 7
    assert ids(place.samples(own, task="gsm8k", file=place.rows(MARKED))) == ids(
        place.samples({"kind": "gsm8k"}, file=place.rows(MARKED))
    )


def test_running_text_of_the_run_itself_is_windows_of_calibrations_length(place: Place) -> None:
    task = {"kind": "wikitext", "train_file": place.written("a.txt", TEXT), "block_size": 200, "max_train_samples": 1}
    samples = place.samples(task, length=30, samples=1000)
    assert {len(sample["input_ids"]) for sample in samples} == {30}
    assert tokens_of(samples) > 200


def test_a_hub_data_set_goes_through_the_tasks_reader(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((*args, *sorted(options.items())))
        return datasets.Dataset.from_list([{"text": line} for line in TEXT.split("\n")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = place.samples(dataset="me/text", dataset_config="raw", split="validation", task="wikitext", length=40)
    assert asked == [("me/text", "raw", ("revision", None), ("split", "validation"))]
    assert ids(found) == ids(place.samples(file=place.written("same.txt", TEXT), length=40))


def test_the_origin_changes_with_all_that_shapes_the_samples(place: Place) -> None:
    file, other = place.written("a.txt", TEXT), place.written("b.txt", TEXT + "x")
    same = place.written("c.txt", TEXT)
    changes: list[dict[str, Any]] = [
        {}, {"file": file}, {"file": other}, {"file": file, "length": 9}, {"file": file, "samples": 9},
        {"file": file, "seed": 9}, {"task": "gsm8k", "file": place.rows(MARKED)},
    ]  # fmt: skip
    origins = [json.dumps(calibration_origin(place.config(**change)), sort_keys=True) for change in changes]
    assert len({*origins}) == len(changes)
    assert calibration_origin(place.config(file=same)) == calibration_origin(place.config(file=file))
    fewer = {"kind": "arithmetic", "max_train_samples": 10}
    assert calibration_origin(place.config(fewer)) != calibration_origin(place.config())


# Which rows -----------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_without_replacement_by_their_seed(place: Place) -> None:
    file = place.rows([*MARKED])
    whole, some = ids(place.samples(file=file)), ids(place.samples(file=file, samples=9))
    assert len({*some}) == 9
    assert {*some} < {*whole}
    assert some == ids(place.samples(file=file, samples=9)) != ids(place.samples(file=file, samples=9, seed=1))
    assert some != whole[:9]
    windows = {"file": place.written("a.txt", TEXT), "length": 20, "samples": 5}
    assert ids(place.samples(**windows)) == ids(place.samples(**windows)) != ids(place.samples(**windows, seed=1))


def test_a_longer_row_is_cut(place: Place) -> None:
    whole, cut = place.samples(), place.samples(length=11)
    assert [one["input_ids"][:11] for one in whole] == [one["input_ids"] for one in cut]


def test_a_text_shorter_than_a_window_is_one(place: Place, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = place.written("short.txt", "Five and two are seven.")
    assert ids(place.samples(file=file)) == [tuple(tiny_tokenizer("Five and two are seven.")["input_ids"])]


# Encoders and encoder-decoders ----------------------------------------------------------------------------------------

GLUE = {"kind": "glue", "name": "rte", "max_source_length": 128}
LONG = [{"sentence1": TEXT, "sentence2": "No.", "label": n % 2} for n in range(4)]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_models_positions_cut_rows_and_windows(
    family: str, encoder: Callable[[str, dict[str, Any]], Place], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    place = encoder(family, GLUE)
    positions = ENCODER["max_position_embeddings"] - (2 if family == "roberta" else 0)
    found = place.samples(file=place.rows(LONG))
    assert [len(sample["input_ids"]) for sample in found] == [positions] * 4
    assert (
        f"calibrate: samples of at most {positions} tokens, the model's positions, for calibration.length=512"
        in caplog.text
    )
    windows = place.samples(file=place.written("a.txt", TEXT))
    assert {len(sample["input_ids"]) for sample in windows[1:]} == {positions}
    assert len(windows[0]["input_ids"]) == positions - 1, "a text's own special token is not repeated"
    assert len(windows) > 5, "a text is cut to the model's positions, not to windows that would be cut again"
    model = hf.AutoModel.from_pretrained(place.model)
    for batch in batches_of(found + windows):
        model(**batch)


def test_an_encoder_reads_each_window_between_its_special_tokens(
    encoder: Callable[[str, dict[str, Any]], Place], encoding: PreTrainedTokenizerFast
) -> None:
    place = encoder("bert", GLUE)
    samples = place.samples(file=place.written("a.txt", TEXT), length=20, samples=1000)
    assert all((one["input_ids"][0], one["input_ids"][-1]) == (0, 1) for one in samples)
    inside = [token for one in samples for token in one["input_ids"][1:-1]]
    assert not {0, 1} & {*inside}
    bare = encoding(TEXT, add_special_tokens=False)["input_ids"]
    assert inside == bare[: len(inside)]
    assert len(bare) - len(inside) < 20
    assert place.samples(file=place.written("b.txt", "Yes"))[0]["input_ids"][0] == 0
    assert "calibration.length=2: leaves no token" in place.refused(file=place.written("a.txt", TEXT), length=2)


def test_an_encoder_decoders_rows_have_labels(encoder: Callable[[str, dict[str, Any]], Place]) -> None:
    place = encoder("bart", {"kind": "summarization", "name": "xsum", "max_target_length": 8})
    rows = [{"document": f"Document {n}. {TEXT}", "summary": f"It is about {n}."} for n in range(6)]
    found = place.samples(file=place.rows(rows), length=30)
    assert [{*sample} for sample in found] == [{"input_ids", "labels"}] * 6
    assert all(0 < len(sample["labels"]) <= 8 and -100 not in sample["labels"] for sample in found)
    windows = place.samples(file=place.written("a.txt", TEXT), length=30)
    assert all(sample["labels"] == sample["input_ids"] for sample in windows)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(place.model)
    for batch in batches_of(found + windows):
        model(**batch)


# Batches --------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 5)), min_size=1, max_size=60))
def test_batches_hold_every_token_once_and_no_padding(lengths: list[tuple[int, int]]) -> None:
    samples = [{"input_ids": [n * 100 + i for i in range(length)], "labels": [n] * width}
               for n, (length, width) in enumerate(lengths)]  # fmt: skip
    batches = batches_of(samples)
    rows = [
        (tuple(row), tuple(label))
        for batch in batches
        for row, label in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    assert sorted(rows) == sorted((tuple(one["input_ids"]), tuple(one["labels"])) for one in samples)
    for batch in batches:
        assert bool(batch["attention_mask"].all())
        assert batch["attention_mask"].shape == batch["input_ids"].shape


def test_a_batch_has_a_bounded_number_of_tokens() -> None:
    samples = [{"input_ids": [1] * length} for length in [512] * 40 + [BATCH_TOKENS + 1] * 2]
    assert [tuple(batch["input_ids"].shape) for batch in batches_of(samples)] == [
        *[(4, 512)] * 10, *[(1, BATCH_TOKENS + 1)] * 2
    ]  # fmt: skip
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches_of(samples))


# What is refused ------------------------------------------------------------------------------------------------------


def test_text_that_cannot_be_read_is_named_by_its_own_setting(place: Place) -> None:
    empty, one = place.written("empty.txt", " \n "), place.written("one.txt", "")
    assert place.refused(file=empty).startswith(f"calibration.file={empty}: the file is empty; ")
    assert place.refused(file=one).startswith(f"calibration.file={one}: the file is empty; ")
    assert place.refused(file="/no/where.txt").startswith("calibration.file=/no/where.txt: there is no such file ")
    bad = place.rows([{"question": "What?"}], "bad.jsonl")
    assert place.refused(file=bad).startswith(f"calibration.file={bad}: line 1 ")
    assert place.refused(file=place.written("a.pdf", "x")).startswith("calibration.file=")
    own = {"kind": "gsm8k", "train_file": "/no/where.jsonl"}
    assert place.refused(own).startswith("task.train_file=/no/where.jsonl: there is no such file ")
    config = place.config(file="/no/where.txt")
    with pytest.raises(UserError, match=r"^calibration\.file=/no/where\.txt: there is no such file "):
        calibration_origin(config)


def test_a_sample_of_one_token_is_none(encoder: Callable[[str, dict[str, Any]], Place], tmp_path: Path) -> None:
    """A row of one token has no context; <s> alone is no text."""
    place = encoder("bart", {"kind": "summarization", "name": "xsum"})
    tokenizer = json.loads((place.model / "tokenizer.json").read_text())
    (place.model / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    rows = [{"document": text, "summary": "b"} for text in ("a", "a b")]
    assert len(place.samples(file=place.rows(rows))) == 1
    message = "calibration.length=512: no sample has two tokens; raise it, or give other text"
    assert place.refused(file=place.rows(rows[:1])) == message


@pytest.mark.parametrize(
    ("calibration", "told"),
    [
        ({"task": "poetry"}, "calibration.task=poetry: there is no such task; choose from: "),
        ({"task": "squad", "file": "a.jsonl"}, "calibration.task=squad: its rows are for a question-answering model, and model.kind is causal; "),
        ({"task": "wikitext"}, "calibration.file=null: there is neither a local file nor a data set to read; give calibration.file=FILE "),
        ({"file": "a.txt", "dataset": "me/a"}, "calibration.file=a.txt: calibration.dataset=me/a is given too; leave one of them out"),
        ({"dataset_config": "raw"}, "calibration.dataset_config=raw: no data set is named; give calibration.dataset=HUB_ID"),
        ({"file": "a.txt", "task": "gsm8k"}, "calibration.file=a.txt: task gsm8k does not read running text; "),
        ({"samples": 0}, "calibration.samples=0: "),
        ({"length": 1}, "calibration.length=1: "),
        ({"seed": -1}, "calibration.seed=-1: "),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(place: Place, calibration: dict[str, Any], told: str) -> None:
    assert place.refused(**calibration).startswith(told)
