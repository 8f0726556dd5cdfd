from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.data import Row
from loftq_exp.tasks.encode import IGNORED, Collator, encode, encode_prompt, pad_token_id

CONFIG = task_settings(kind="gsm8k")
TASK = load_task(CONFIG)
ROW = {"question": "Mia has 3 pens and buys 4. How many pens?", "answer": "3 + 4 = 7 pens.\n#### 7"}
ROWS = st.fixed_dictionaries({"question": st.text(min_size=1), "answer": st.text().map(lambda text: f"{text}#### 7")})


def without_special_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing to a text and knows only the unknown token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "pens": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def with_ids(tokenizer: PreTrainedTokenizerFast, row: Row, **settings: int) -> tuple[list[int], list[int]]:
    """The prompt's and the target's ids of an encoded row, separated by its labels."""
    encoded = encode(TASK, row, tokenizer, dataclasses.replace(CONFIG, **settings))
    split = encoded["labels"].count(IGNORED)
    assert encoded["labels"] == [IGNORED] * split + encoded["input_ids"][split:]
    return encoded["input_ids"][:split], encoded["input_ids"][split:]


def test_prompt_and_target_read_back(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, target = with_ids(tiny_tokenizer, ROW)
    assert prompt[0] == tiny_tokenizer.bos_token_id
    assert tiny_tokenizer.decode(prompt[1:]) == TASK.prompt(ROW, tiny_tokenizer)
    assert tiny_tokenizer.decode(target[:-1]) == TASK.target(ROW)


def test_slip_target_without_end_of_sequence(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    _, target = with_ids(tiny_tokenizer, ROW)
    assert target[-1] == tiny_tokenizer.eos_token_id
    assert target.count(tiny_tokenizer.eos_token_id) == 1


@given(ROWS)
def test_slip_prompt_length_taken_from_another_string(tiny_tokenizer: PreTrainedTokenizerFast, row: Row) -> None:
    """Exactly the target's own tokens bear loss, wherever the tokenizer would merge across the seam."""
    _, target = with_ids(tiny_tokenizer, row, max_source_length=4096, max_target_length=4096)
    own = tiny_tokenizer(TASK.target(row), add_special_tokens=False)["input_ids"]
    assert target == [*own, tiny_tokenizer.eos_token_id]


def test_slip_nothing_masked_without_padding_to_the_maximum(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for pad_to_max_length in (False, True):
        config = dataclasses.replace(CONFIG, pad_to_max_length=pad_to_max_length)
        encoded = encode(TASK, ROW, tiny_tokenizer, config)
        batch = load_task(config).collator(tiny_tokenizer)([encoded])
        prompt = encode_prompt(TASK, ROW, tiny_tokenizer, config)
        assert (batch["labels"][0, : len(prompt)] == IGNORED).all()
        assert int((batch["labels"] != IGNORED).sum()) == len(encoded["input_ids"]) - len(prompt)


def test_slip_added_pad_token_resizes_embeddings(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = len(tiny_tokenizer)
    assert pad_token_id(tiny_tokenizer) == tiny_tokenizer.eos_token_id
    TASK.collator(tiny_tokenizer)([encode(TASK, ROW, tiny_tokenizer, CONFIG)])
    assert len(tiny_tokenizer) == tokens
    assert tiny_tokenizer.pad_token is None


def test_pad_token_prefers_the_tokenizers_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = "<s>"
    assert pad_token_id(tokenizer) == tokenizer.bos_token_id
    assert pad_token_id(without_special_tokens()) == 0


def test_tokenizers_without_the_needed_tokens_are_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"pens": 0}, unk_token="pens")))
    bare.name_or_path = "some/model"
    with pytest.raises(UserError, match=r"^model\.path=some/model: .* no pad, end-of-sequence or unknown token"):
        pad_token_id(bare)
    with pytest.raises(UserError, match=r"^model\.path=some/model: .* no end-of-sequence token"):
        encode(TASK, ROW, bare, CONFIG)


def test_no_start_token_where_the_tokenizer_adds_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    assert encode_prompt(TASK, ROW, tokenizer, CONFIG) == encode_prompt(TASK, ROW, tiny_tokenizer, CONFIG)[1:]


@given(source=st.integers(1, 60), target=st.integers(1, 60))
def test_truncation_keeps_the_prompts_end_and_the_targets_start(
    tiny_tokenizer: PreTrainedTokenizerFast, source: int, target: int
) -> None:
    whole_prompt, whole_target = with_ids(tiny_tokenizer, ROW, max_source_length=4096, max_target_length=4096)
    prompt_ids, target_ids = with_ids(tiny_tokenizer, ROW, max_source_length=source, max_target_length=target)
    assert len(prompt_ids) == min(source, len(whole_prompt))
    assert prompt_ids[0] == tiny_tokenizer.bos_token_id
    assert prompt_ids[1:] == whole_prompt[len(whole_prompt) - len(prompt_ids) + 1 :]
    assert target_ids == whole_target[:target]


def test_a_batch_is_padded_to_its_longest_row() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=7)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # The 7 that ends the first target stays although 7 also pads.
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_left_padding_and_rows_without_labels() -> None:
    batch = Collator(pad_token_id=0, side="left")([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert "labels" not in batch


def test_padding_to_the_maximum(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = dataclasses.replace(CONFIG, max_source_length=40, max_target_length=30, pad_to_max_length=True)
    batch = load_task(config).collator(tiny_tokenizer)([encode(TASK, ROW, tiny_tokenizer, config)])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, 70)}
