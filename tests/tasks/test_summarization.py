from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.base import Generated, Generation, Nll
from loftq_exp.tasks.encode import IGNORED

ROW = {
    "article": "Mr. Red came. He saw two cups. He left.\nThen it rained all day.",
    "highlights": "He saw cups.\nIt rained.",
}


def task(**settings: Any) -> Any:
    return load_task(task_settings(**{"kind": "summarization", "name": "cnn_dailymail", **settings}))


def test_sources_on_the_hub() -> None:
    source = task().source("eval")
    assert (source.dataset, source.dataset_config, source.dataset_split) == ("abisee/cnn_dailymail", "3.0.0", "test")
    xsum = task(name="xsum").source("train")
    assert (xsum.dataset, xsum.dataset_revision, xsum.dataset_split) == (
        "EdinburghNLP/xsum",
        "refs/convert/parquet",
        "train",
    )
    own = task(dataset="me/news", dataset_config="en", eval_split="dev").source("eval")
    assert (own.dataset, own.dataset_config, own.dataset_revision, own.dataset_split) == ("me/news", "en", None, "dev")


def test_documents_and_summaries_are_cut_at_their_ends(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (feature,) = task(source_prefix="sum: ", max_source_length=10).encode([ROW], tiny_tokenizer)
    assert len(feature["input_ids"]) == 10
    assert ("sum: " + ROW["article"]).startswith(tiny_tokenizer.decode(feature["input_ids"][1:]))
    assert feature["labels"][-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(feature["labels"], skip_special_tokens=True) == ROW["highlights"]
    (short,) = task(max_target_length=4).encode([ROW], tiny_tokenizer)
    assert short["labels"] == feature["labels"][:4]


def test_a_batch_pads_documents_and_summaries_apart(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ROW, {"article": "Rain.", "highlights": "It rained all the day long, and more and more and more."}]
    batch = task().collator(tiny_tokenizer)(task().encode(rows, tiny_tokenizer))
    assert batch["input_ids"].shape == batch["attention_mask"].shape != batch["labels"].shape
    assert batch["labels"][0, -1] == IGNORED
    fixed = task(pad_to_max_length=True, max_source_length=90, max_target_length=40)
    shapes = {
        name: tuple(t.shape) for name, t in fixed.collator(tiny_tokenizer)(fixed.encode(rows, tiny_tokenizer)).items()
    }
    assert shapes == {"input_ids": (2, 90), "attention_mask": (2, 90), "labels": (2, 40)}


def test_the_search_is_what_the_settings_say(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=3, max_target_length=9)
    (search,) = (request for request in made.requests([ROW], tiny_tokenizer) if isinstance(request, Generation))
    assert (search.num_beams, search.length_penalty, search.no_repeat_ngram_size, search.max_new_tokens) == (
        4,
        2.0,
        3,
        9,
    )


def test_scores_of_the_model_and_of_lead_3() -> None:
    answers = [[Nll(4.0, 2)], [Generated("It rained.", 4)]]
    scored = task().score([ROW], [], answers)
    assert scored.scores["nll"] == 2.0
    # Predicted 2 words, both among the gold 5; of the gold sentences (3 and 2 words) the second is there whole.
    assert scored.scores["rouge1"] == scored.scores["rougeLsum"] == pytest.approx(2 * 2 / (2 + 5))
    # Lead-3 is "Mr. Red came. He saw two cups. He left.": 9 words, of which he, saw, cups are in the gold summary.
    assert scored.scores["lead3_rouge1"] == pytest.approx(2 * 3 / (9 + 5))
    assert scored.samples == [
        {"document": ROW["article"], "predicted": "It rained.", "gold": ROW["highlights"], "nll": 2.0}
    ]


@pytest.mark.parametrize("summary", ["…", "🙂 !", "---"])
def test_a_summary_without_words_is_refused(summary: str) -> None:
    flaw = task().flaw({"article": "x", "highlights": summary})
    assert flaw == f"holds {summary!r} in column 'highlights', without a word that ROUGE could compare"
    assert task().flaw({"article": "x", "highlights": "मेरा"}) is None


def test_a_summary_that_makes_no_token_ends_at_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.backend_tokenizer.post_processor = None
    (feature,) = task().encode([{"article": "y", "highlights": "x"}], tokenizer)
    assert feature["labels"] == [tokenizer.eos_token_id]
