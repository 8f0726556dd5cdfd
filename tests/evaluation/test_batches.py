"""The size of a batch changes no prediction and no score, for every family, its tasks and its ways to pad."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from zoo import DECODER, FAMILIES, seeded

from loftq_exp.errors import UserError
from loftq_exp.evaluation.evaluate import Evaluation, evaluate
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.tasks import Task, load_task, task_settings
from loftq_exp.tasks.encode import IGNORED, pad_token_id
from loftq_exp.training.padding import settle_padding

ROUNDING = 1e-5
"""Relative difference of float32 sums that are added in another order."""
WORDS = "Mia has 3 red pens and buys 14 more of them in the shop , then she gives half away .".split()
TEXTS = [" ".join(WORDS[:length]) for length in (2, 19, 5, 11, 1)]

CONFIGS: dict[str, Callable[[], Any]] = {
    name: lambda family=family: family.make().config for name, family in FAMILIES.items()
}
CONFIGS |= {
    "opt": lambda: hf.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, init_std=0.1
    ),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8, initializer_range=0.1,
    ),
    "gpt-2": lambda: hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, initializer_range=0.1),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**DECODER),
}  # fmt: skip
KINDS = {name: family.kind for name, family in FAMILIES.items()}
CAUSAL = [name for name in CONFIGS if KINDS.get(name, "causal") == "causal"]
SEQ2SEQ = [name for name, kind in KINDS.items() if kind == "seq2seq"]
ENCODERS = [name for name, kind in KINDS.items() if kind == "classification"]

CASES = [(name, "causal", task) for name in CAUSAL for task in ("gsm8k", "wikitext")]
CASES += [(name, "seq2seq", task) for name in SEQ2SEQ for task in ("beams", "greedy")]
CASES += [(name, "classification", "mrpc") for name in ENCODERS]
CASES += [(name, "question-answering", "squad") for name in ENCODERS]
CASES += [
    (name, "classification", "stsb")
    for name in ("llama-2", "mistral", "falcon", "phi", "opt", "gpt-neo", "gpt-2", "bert")
]


def task_and_rows(name: str) -> tuple[Task, list[dict[str, Any]]]:
    if name == "gsm8k":
        config = task_settings(kind="gsm8k", max_source_length=90, max_target_length=6)
        return load_task(config), [{"question": text, "answer": f"{text}\n#### 4"} for text in TEXTS]
    if name == "wikitext":
        return load_task(task_settings(kind="wikitext", block_size=17)), [{"text": text} for text in TEXTS * 2]
    if name in ("beams", "greedy"):
        config = task_settings(kind="summarization", name="xsum", max_source_length=90, max_target_length=6,
                            num_beams=3 if name == "beams" else 1)  # fmt: skip
        return load_task(config), [{"document": text, "summary": text[::2]} for text in TEXTS]
    if name == "squad":
        config = task_settings(kind="squad", max_source_length=24, doc_stride=6)
        rows = [
            {"id": str(row), "question": "Who?" * (row + 1), "context": text, "answers": {"text": [text[:3]], "answer_start": [0]}}
            for row, text in enumerate(TEXTS)
        ]  # fmt: skip
        return load_task(config), rows
    config = task_settings(kind="glue", name=name, max_source_length=60)
    return load_task(config), [
        {"sentence1": text, "sentence2": text[::-1], "label": row % 2} for row, text in enumerate(TEXTS)
    ]


@cache
def model_of(name: str, kind: str, vocabulary: int, pad: int | None) -> Any:
    def make() -> Any:
        config = CONFIGS[name]()
        config.update({"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 640})
        if pad is not None or (kind in ("causal", "classification") and name not in ENCODERS):
            config.pad_token_id = pad
        if kind == "seq2seq":
            config.decoder_start_token_id = 1
        if config.model_type == "t5":
            config.num_decoder_layers = config.num_layers  # transformers 5.23 generates with no deeper decoder
        config.num_labels = 1 if kind == "classification" and name not in ENCODERS else 2
        return AUTO_CLASSES[kind].from_config(config, dtype=torch.float32)

    return seeded(make)


@pytest.fixture(scope="session")
def padded_tokenizer(tiny_tokenizer: hf.PreTrainedTokenizerFast) -> hf.PreTrainedTokenizerFast:
    """`tiny_tokenizer` with a pad token of its own, the last of the vocabulary."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def assert_same(first: Evaluation, second: Evaluation) -> None:
    assert len(first.samples) == len(second.samples)
    for one, other in zip(first.samples, second.samples, strict=True):
        for key, value in one.items():
            expected = pytest.approx(value, rel=ROUNDING, abs=1e-6) if isinstance(value, float) else value
            assert other[key] == expected, key
    assert first.scores == pytest.approx(second.scores, rel=ROUNDING, abs=1e-5)
    assert first.tokens_generated == second.tokens_generated


PADDINGS = ("its own", "none", "not the config's", "beyond the embeddings")
POOLED = [case for case in CASES if case[2] == "stsb"]
"""Their classes look for padding among the ids."""


@pytest.mark.parametrize(
    ("name", "kind", "task_name", "padding"),
    [(*case, padding) for case in CASES for padding in (PADDINGS if case in POOLED else PADDINGS[1:3])],
)
def test_the_size_of_a_batch_changes_nothing(
    tiny_tokenizer: hf.PreTrainedTokenizerFast, padded_tokenizer: hf.PreTrainedTokenizerFast,
    name: str, kind: str, task_name: str, padding: str,
) -> None:  # fmt: skip
    tokenizer = copy.deepcopy(tiny_tokenizer if padding == "none" else padded_tokenizer)
    vocabulary = len(padded_tokenizer) - (padding in ("none", "beyond the embeddings"))
    pad = {"its own": padded_tokenizer.pad_token_id, "not the config's": 3}.get(padding)
    model = copy.deepcopy(model_of(name, kind, vocabulary, pad))
    task, rows = task_and_rows(task_name)
    alone = evaluate(model, tokenizer, task, rows, 1)
    for size in (2, 3, len(rows) * 4):
        assert_same(alone, evaluate(model, tokenizer, task, rows, size))
    assert model.config.pad_token_id == pad_token_id(tokenizer) < vocabulary


@pytest.mark.parametrize(("name", "kind", "task_name"), [
    ("llama-2", "causal", "gsm8k"), ("gpt-neo", "causal", "gsm8k"), ("opt", "causal", "gsm8k"), ("bart", "seq2seq", "beams"),
    ("t5", "seq2seq", "beams"), ("llama-2", "classification", "stsb"), ("bert", "classification", "mrpc"),
    ("roberta", "question-answering", "squad"),
])  # fmt: skip
def test_the_loss_of_a_training_batch_is_the_mean_over_its_tokens_or_rows(
    tiny_tokenizer: hf.PreTrainedTokenizerFast, name: str, kind: str, task_name: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    model = copy.deepcopy(model_of(name, kind, len(tokenizer), None))
    settle_padding(model, tokenizer)
    task, rows = task_and_rows(task_name)
    if task_name == "squad":  # the classes for spans take padding for places where an answer may begin
        task = load_task(dataclasses.replace(task.config, pad_to_max_length=True))
    features, collator = task.encode(rows, tokenizer), task.collator(tokenizer)
    total = weights = 0.0
    with torch.no_grad():
        whole = model(**collator(features)).loss
        for feature in features:
            labels = feature.get("labels")
            weight = sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1
            total += weight * model(**collator([feature])).loss.item()
            weights += weight
    assert whole.item() == pytest.approx(total / weights, rel=ROUNDING)


def test_a_model_without_an_embedding_for_any_padding_is_refused(tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.name_or_path = "some/model"
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
    model = model_of("llama-2", "causal", len(tiny_tokenizer), None)
    with pytest.raises(
        UserError, match=r"^model\.path=some/model: .* pads with token 512 and the model has embeddings for 512"
    ):
        settle_padding(model, tokenizer)
