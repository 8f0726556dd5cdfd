"""Own data: the tokens that are trained, against texts cut by hand; packing, the held-out share and the scores."""

from __future__ import annotations

import copy
import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.arithmetic import generate
from loftq_exp.tasks.base import Generated, Nll
from loftq_exp.tasks.chat import conversation
from loftq_exp.tasks.instruct import Instruct
from loftq_exp.training.isolation import check_isolation

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '</s>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
LAST_ONLY = CHATML.replace("m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else '') +")
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "It is 5."},
        {"role": "user", "content": "And times 4?"},
        {"role": "assistant", "content": "That is 20."},
    ]
}
PAIR = {"prompt": "What is 2 + 3?", "completion": "It is 5."}
ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def task(**settings: Any) -> Instruct:
    found = load_task(task_settings("instruct", **settings))
    assert isinstance(found, Instruct)
    return found


def trained_texts(feature: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(feature["input_ids"], feature["labels"], strict=True):
        if label == -100:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation marks"])
def test_only_the_assistants_tokens_are_trained_in_every_turn(
    template: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    (feature,) = task().encode([CHAT], tokenizer)
    assert trained_texts(feature, tokenizer) == ["It is 5.</s>", "That is 20.</s>"]
    assert tokenizer.decode(feature["input_ids"]) == (
        "<s>system\nBe short.</s>\n<s>user\nWhat is 2 + 3?</s>\n<s>assistant\nIt is 5.</s>\n"
        "<s>user\nAnd times 4?</s>\n<s>assistant\nThat is 20.</s>\n"
    )


def test_each_token_is_trained_exactly_if_its_characters_are_the_assistants(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_template(tiny_tokenizer, CHATML)
    rows = [{"messages": [
        {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]},
        {"role": "user", "content": "Again."}, {"role": "assistant", "content": row["answer"] + " "},
    ]} for row in islice(generate("train", 0), 20)]  # fmt: skip
    for row, feature in zip(rows, task().encode(rows, tokenizer), strict=True):
        text, own = "", []
        for message in row["messages"]:
            text += f"<s>{message['role']}\n"
            start = len(text)
            text += f"{message['content']}</s>"
            own += [range(start, len(text))] if message["role"] == "assistant" else []
            text += "\n"
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert feature["input_ids"] == found["input_ids"]
        inside = [any(a in span for span in own) for a, _ in found["offset_mapping"]]
        assert [label != -100 for label in feature["labels"]] == inside


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, LAST_ONLY)
    (feature,) = task().encode([{"messages": CHAT["messages"][:3]}], tokenizer)
    assert trained_texts(feature, tokenizer) == ["It is 5.</s>"]
    with pytest.raises(UserError, match=r"train row 2: the chat template .* renders the start .*\{% generation %\}"):
        task(train_file="a.jsonl").encode([PAIR, CHAT], tokenizer)


def test_without_a_template_prompts_are_plain_and_messages_are_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pair, alpaca = task().encode([PAIR, ALPACA], tiny_tokenizer)
    assert tiny_tokenizer.decode(pair["input_ids"]) == "<s>What is 2 + 3?It is 5.</s>"
    assert trained_texts(pair, tiny_tokenizer) == ["It is 5.</s>"]
    assert tiny_tokenizer.decode(alpaca["input_ids"]) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### "
        "Response:\n5</s>"
    )
    with pytest.raises(UserError, match=r"its tokenizer has no chat template, which rows of messages need; put a"):
        task().encode([CHAT], tiny_tokenizer)


def test_pairs_and_alpaca_rows_use_the_chat_template_if_there_is_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, CHATML)
    pair, alpaca = task().encode([PAIR, ALPACA], tokenizer)
    assert tokenizer.decode(pair["input_ids"]) == "<s>user\nWhat is 2 + 3?</s>\n<s>assistant\nIt is 5.</s>\n"
    assert tokenizer.decode(alpaca["input_ids"]) == "<s>user\nAdd.\n\n2 and 3</s>\n<s>assistant\n5</s>\n"
    assert trained_texts(alpaca, tokenizer) == ["5</s>"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, r"has not the columns of exactly one known shape \(found: text; allowed: messages; prompt and"),
        (CHAT | PAIR, "has not the columns of exactly one known shape"),
        ({"messages": "hello"}, "holds 'hello' in column 'messages' where a list"),
        ({"messages": [{"role": "human", "content": "a"}]}, "its role must be one of: system, user, assistant, tool"),
        ({"messages": CHAT["messages"][:2]}, "ends with a message of the user; the last must be the assistant's"),
        ({"messages": CHAT["messages"][2:3]}, "holds no message before the assistant's first"),
        ({"messages": [{"role": "user", "content": None}]}, "holds None in message 1 where text is needed"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "holds 'tool_calls' in message 1"),
        ({"prompt": "a", "completion": " "}, "holds an empty text in column 'completion'"),
        (PAIR | {"tools": [1]}, "holds tools, which are not supported"),
    ],
)
def test_an_unusable_row_is_named_in_one_line(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=f"^task.train_file=.*: line 2 .*{problem}") as caught:
        task(train_file=str(file), eval_file=str(file)).rows("train")
    assert "\n" not in str(caught.value)


def test_rows_cut_before_the_assistant_are_counted_and_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(tiny_tokenizer, CHATML)
    long = PAIR | {"prompt": "eggs " * 200}
    assert len(task(max_length=100).encode([PAIR, long, PAIR], tokenizer)) == 2
    assert caplog.messages == [
        "task.max_length=100: cuts 1 of 3 train rows; 1 of them keep no token of the assistant and do not count"
    ]
    with pytest.raises(UserError, match=r"^task.max_length=100: no row of .* keeps a token of the assistant"):
        task(max_length=100).encode([long], tokenizer)


# Packing --------------------------------------------------------------------------------------------------------------


def test_packed_rows_have_the_loss_of_single_rows(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama_dir: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, CHATML)
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in islice(generate("train", 0), 7)]
    single, packed = task(max_length=300), task(max_length=300, packing=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, use_cache=False).eval()
    sums, counts = [], []
    for each in (single, packed):
        features = each.encode(rows, tokenizer)
        assert (len(features) == 7) == (each is single)
        batch = each.collator(tokenizer)(features)
        assert ("attention_mask" in batch) == (each is single)
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        sums.append(losses.item())
        counts.append((batch["labels"][:, 1:] != -100).sum().item())
    assert counts[0] == counts[1]
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
    check_isolation(model, features, packed.collator(tokenizer))


def test_a_model_that_attends_across_packed_rows_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama_dir: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, CHATML)
    packed = task(max_length=300, packing=True)
    features = packed.encode([PAIR, PAIR | {"prompt": "How many?"}], tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, use_cache=False).eval()
    seen = packed.collator(tokenizer)

    def masked(found: Any) -> Any:
        batch = seen(found)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    with pytest.raises(
        UserError, match=r"^task.packing=true: LlamaForCausalLM lets a packed row see the row before it"
    ):
        check_isolation(model, features, masked)  # type: ignore[arg-type]


# The held-out share ---------------------------------------------------------------------------------------------------


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def test_the_held_out_share_is_disjoint_seeded_and_independent_of_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(40)]
    file = written(tmp_path, rows + rows[:5])
    train, scored = (task(train_file=file, eval_share=0.25).rows(split) for split in ("train", "eval"))
    asked = [{row["prompt"] for row in part} for part in (train, scored)]
    assert (len(asked[0]), len(asked[1])) == (30, 10)
    assert not asked[0] & asked[1]
    assert len(train) + len(scored) == 45
    turned = task(train_file=written(tmp_path, rows[::-1], "turned.jsonl"), eval_share=0.25).rows("eval")
    assert {row["prompt"] for row in turned} == asked[1]
    other = task(train_file=file, eval_share=0.25, data_seed=1).rows("eval")
    assert {row["prompt"] for row in other} != asked[1]
    usual = task(train_file=file, max_train_samples=3, max_eval_samples=2)
    assert [len(usual.rows(split)) for split in ("train", "eval")] == [3, 2]
    assert usual.digest("train") == usual.digest("eval")


@pytest.mark.parametrize("row", [PAIR, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                                 {"instruction": "a", "input": "b", "output": "c"}])  # fmt: skip
def test_a_column_that_is_ignored_does_not_put_one_conversation_on_both_sides(
    row: dict[str, Any], tmp_path: Path
) -> None:
    other = {"prompt": "other", "completion": "other"}
    file = written(tmp_path, [{"id": number, **(row if number % 2 else other)} for number in range(40)])
    sides = [
        {str(conversation(found)) for found in task(train_file=file, eval_share=0.25).rows(split)}
        for split in ("train", "eval")
    ]
    assert [len(side) for side in sides] == [1, 1]
    assert not sides[0] & sides[1]


def test_a_share_that_leaves_a_side_empty_or_has_a_file_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.eval_share=0.1: 1 distinct rows cannot be split"):
        task(train_file=written(tmp_path, [PAIR, PAIR])).rows("eval")
    with pytest.raises(UserError, match=r"^task.eval_share=0.1: task.eval_file=b is given too; leave one out"):
        task(train_file="a", eval_file="b", eval_share=0.1)


# The scores -----------------------------------------------------------------------------------------------------------


def answered(settings: dict[str, Any], rows: list[dict[str, Any]], texts: list[str], tokenizer: Any) -> Any:
    own = task(**settings)
    requests = own.requests(rows, tokenizer)
    answers: list[list[Any]] = [[Nll(6.0, 3), Nll(2.0, 1)]]
    if len(requests) > 1:
        answers.append([Generated(text, 2) for text in texts])
    return requests, own.score(rows, requests, answers)


def test_exact_match_and_rouge_compare_the_generated_answer(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = with_template(tiny_tokenizer, CHATML)
    rows = [CHAT | {"gold": "twenty"}, CHAT | {"gold": "That is 20."}]
    requests, scored = answered({"score": "exact"}, rows, ["That is 20.\n", "20"], tokenizer)
    prompt = "<s>system\nBe short.</s>\n<s>user\nWhat is 2 + 3?</s>\n<s>assistant\nIt is 5.</s>\n<s>user\nAnd times 4?</s>\n<s>assistant\n"
    assert tokenizer.decode(requests[1].features[0]["input_ids"]) == prompt
    assert scored.scores == {"nll": 2.0, "exact": 0.5}
    assert scored.samples[0] == {
        "prompt": prompt, "gold": "That is 20.", "nll": 2.0, "generated": "That is 20.\n", "correct": True,
    }  # fmt: skip
    _, scored = answered({"score": "exact", "reference": "gold"}, rows, ["twenty", "twenty"], tokenizer)
    assert scored.scores["exact"] == 0.5
    _, scored = answered({"score": "rouge", "reference": "gold"}, rows, ["twenty", "that is 20"], tokenizer)
    assert scored.scores["rouge1"] == 1.0
    _, scored = answered({}, rows, [], tokenizer)
    assert scored.scores == {"nll": 2.0}
    with pytest.raises(UserError, match=r"^task.reference=gold: compared with nothing by task.score=nll"):
        task(reference="gold")


def test_a_parquet_file_of_messages(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([CHAT, CHAT]), tmp_path / "rows.parquet")
    own = task(train_file=str(tmp_path / "rows.parquet"), eval_file=str(tmp_path / "rows.parquet"))
    assert own.rows("train") == [CHAT, CHAT]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match=r"not a Parquet file \(.*; give a .json"):
        task(train_file=str(tmp_path / "bad.parquet"), eval_file="x").rows("train")
