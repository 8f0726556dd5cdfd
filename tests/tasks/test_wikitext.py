from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.evaluation.evaluate import evaluate
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.base import Likelihood, Nll
from loftq_exp.tasks.encode import IGNORED

TEXT = " = Title = \n \n The first line . \n It is longer than a block of tokens , as most lines are . \n\n The end ."


def task(**settings: Any) -> Any:
    return load_task(task_settings(kind="wikitext", **{"block_size": 8, **settings}))


def test_hub_rows_and_a_text_file_make_the_same_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The hub's rows have line ends, and nothing at all for a blank line."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    hub = [{"text": line + "\n" if line.strip() else ""} for line in TEXT.split("\n")]
    local = task(train_file=str(file))
    assert local.encode(local.rows("train"), tiny_tokenizer) == local.encode(hub, tiny_tokenizer)


def test_line_ends_of_any_system_make_the_same_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = []
    for end in ("\n", "\r\n", "\r"):
        file = tmp_path / "text.txt"
        file.write_bytes(TEXT.replace("\n", end).encode())
        local = task(train_file=str(file))
        blocks.append(local.encode(local.rows("train"), tiny_tokenizer))
    assert blocks[0] == blocks[1] == blocks[2]
    file.write_text('{"text": "A\\ud83d"}')
    file = file.rename(tmp_path / "text.jsonl")
    with pytest.raises(UserError, match=r"line 1 holds '\\ud83d', half of a character"):
        task(train_file=str(file)).rows("train")


def test_blocks(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": line} for line in TEXT.split("\n")]
    ids = tiny_tokenizer(TEXT.replace("\n \n", "\n\n"))["input_ids"]
    blocks = task().encode(rows, tiny_tokenizer)
    assert len(blocks) == len(ids) // 8 > 3
    assert [token for block in blocks for token in block["input_ids"]] == ids[: len(blocks) * 8]
    assert all(block["labels"] == [IGNORED, *block["input_ids"][1:]] for block in blocks)
    assert task(max_train_samples=2).encode(rows, tiny_tokenizer) == blocks[:2]
    (request,) = task(max_eval_samples=1).requests(rows, tiny_tokenizer)
    assert request.features == blocks[:1]
    (short,) = task(block_size=1000).encode(rows, tiny_tokenizer)
    assert short["input_ids"] == ids


def test_each_block_may_start_with_the_start_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": TEXT}]
    ids = tiny_tokenizer(TEXT)["input_ids"][1:]
    blocks = task(start_token=True).encode(rows, tiny_tokenizer)
    assert [block["input_ids"] for block in blocks] == [[0, *ids[n * 7 : n * 7 + 7]] for n in range(len(ids) // 7)]
    assert all(block["labels"] == [IGNORED, *block["input_ids"][1:]] for block in blocks)
    without = copy.deepcopy(tiny_tokenizer)
    without.bos_token = None
    with pytest.raises(UserError, match=r"task\.start_token=true: the tokenizer has no beginning-of-sequence token"):
        task(start_token=True).encode(rows, without)


def test_perplexity_by_hand() -> None:
    requests = [Likelihood("", [])]
    scored = task().score([], requests, [[Nll(6.0, 3), Nll(2.0, 1)]])
    assert scored.scores == {"nll": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert scored.samples[0] == {"block": 0, "tokens": 3, "nll": 2.0}
    assert math.isfinite(task().score([], requests, [[Nll(1e6, 1)]]).scores["perplexity"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_that_of_the_models_own_loss(
    tiny_llama_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    rows = [{"text": TEXT}]
    losses = []
    for block in task().encode(rows, tiny_tokenizer):
        ids = torch.tensor([block["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    scores = evaluate(model, tiny_tokenizer, task(), rows, batch_size).scores
    assert scores["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]))


def test_nothing_to_predict(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the text has 1 tokens; give one with two or more"):
        task(train_file="x.txt").encode([{"text": ""}], tiny_tokenizer)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UserError, match="the file is empty"):
        task(train_file=str(empty)).rows("train")
    with pytest.raises(
        UserError, match=r"the extension '.md' is not known; give a .json, .jsonl, .csv, .parquet or .txt file"
    ):
        task(train_file="text.md").rows("train")
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text('{"line": "x"}')
    with pytest.raises(UserError, match="line 1 has no column 'text'"):
        task(train_file=str(wrong)).rows("train")
