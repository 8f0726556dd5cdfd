"""The eight sets in their published form and in that of the Hub, and their mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loftq_exp.errors import UserError
from loftq_exp.tasks import load_task, task_settings
from loftq_exp.tasks.base import Generated, Generation, Nll
from loftq_exp.tasks.commonsense import SETS, Commonsense

CHOICES = {"text": ["wet", "dry", "red"], "label": ["A", "B", "C"]}
HUB: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": ({"question": "is ice cold", "passage": "x", "answer": True}, "true",
              "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false"),
    "piqa": ({"goal": "Cut bread.", "sol1": "Use a knife.", "sol2": "Use a cup.", "label": 0}, "solution1",
             "Please choose the correct solution to the question: Cut bread.\n\nSolution1: Use a knife.\n\nSolution2: Use a cup."
             "\n\nAnswer format: solution1/solution2"),
    "social_i_qa": ({"context": "Ada sang.", "question": "Why?", "answerA": "joy", "answerB": "rain", "answerC": "tea", "label": "3"},
                    "answer3", "Please choose the correct answer to the question: Ada sang. Why?\n\nAnswer1: joy Answer2: rain "
                    "Answer3: tea\n\nAnswer format: answer1/answer2/answer3"),
    "hellaswag": ({"activity_label": "Travel", "ctx": "A man", "endings": ["a.", "b.", "c.", "d."], "label": "1"}, "ending2",
                  "Please choose the correct ending to complete the given sentence: Travel: A man\n\nEnding1: a. Ending2: b. "
                  "Ending3: c. Ending4: d.\n\nAnswer format: ending1/ending2/ending3/ending4"),
    "winogrande": ({"sentence": "The _ fit.", "option1": "jeans", "option2": "shirt", "answer": "2"}, "option2",
                   "Please choose the correct answer to fill in the blank to complete the given sentence: The _ fit.\n\n"
                   "Option1: jeans Option2: shirt Answer format: option1/option2"),
    "ARC-Easy": ({"question": "Water is", "choices": CHOICES, "answerKey": "A"}, "answer1",
                 "Please choose the correct answer to the question: Water is\n\nAnswer1: wet Answer2: dry Answer3: red\n\n"
                 "Answer format: answer1/answer2/answer3"),
    "ARC-Challenge": ({"question": "Sand is", "choices": CHOICES | {"label": ["1", "2", "3"]}, "answerKey": "2"}, "answer2",
                      "Please choose the correct answer to the question: Sand is\n\nAnswer1: wet Answer2: dry Answer3: red\n\n"
                      "Answer format: answer1/answer2/answer3"),
    "openbookqa": ({"question_stem": "Roses are", "choices": CHOICES, "answerKey": "C"}, "answer3",
                   "Please choose the correct answer to the question: Roses are\n\nAnswer1: wet Answer2: dry Answer3: red\n\n"
                   "Answer format: answer1/answer2/answer3"),
}  # fmt: skip
"""Of each set a row of the Hub, its answer, and the published instruction."""


def write_sets(folder: Path, published: bool, count: int = 1) -> str:
    """Write `count` rows of each set, and one more of boolq, and return the folder's name."""
    for name, (row, answer, instruction) in HUB.items():
        rows = [{"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer} if published
                else row] * (count + (name == "boolq"))  # fmt: skip
        (folder / name).mkdir(parents=True)
        (folder / name / "test.json").write_text(json.dumps(rows))
    return str(folder)


def task_of(folder: str, **settings: Any) -> Commonsense:
    task = load_task(task_settings("commonsense", eval_folder=folder, **settings))
    assert isinstance(task, Commonsense)
    return task


def test_rows_of_the_hub_become_the_published_rows(tmp_path: Path) -> None:
    published = task_of(write_sets(tmp_path / "a", True)).rows("eval")
    assert task_of(write_sets(tmp_path / "b", False)).rows("eval") == published
    assert [row["part"] for row in published] == ["boolq", "boolq", *list(SETS)[1:]]
    assert [row["answer"] for row in published[1:]] == [answer for _, answer, _ in HUB.values()]


def test_the_prompts_are_the_published_ones(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(task_settings("commonsense"))
    assert isinstance(task, Commonsense)
    row = {"instruction": "Q?", "output": "the correct answer is true"}
    blank = " " * 16
    assert task.prompt(row, tiny_tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
        f"{blank}### Instruction:\n{blank}Q?\n{blank}\n{blank}### Response:\n{blank}"
    )
    assert task.prompt(row | {"part": "boolq"}, tiny_tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        f"{blank}### Instruction:\n{blank}Q?\n\n{blank}### Response:\n{blank}"
    )
    assert (task.target(row), task.source("train").dataset) == ("the correct answer is true", "zwhe99/commonsense_170k")


@pytest.mark.parametrize(("name", "generated", "predicted"), [
    ("boolq", "the correct answer is false, not true", "false"), ("piqa", "solution2", "solution2"), ("piqa", "answer1", None),
    ("social_i_qa", "Answer1 answer3 answer1", "answer3"), ("hellaswag", "ending4.", "ending4"), ("winogrande", "option3 option1", "option1"),
    ("ARC-Easy", "answer5", "answer5"), ("openbookqa", "", None),
])  # fmt: skip
def test_the_first_answer_counts(name: str, generated: str, predicted: str | None) -> None:
    task = load_task(task_settings("commonsense"))
    assert isinstance(task, Commonsense)
    judgement = task.judge({"part": name, "answer": "answer5"}, generated)
    assert (judgement.predicted, judgement.correct) == (predicted, predicted == "answer5")


def test_each_set_has_its_share_and_the_score_is_their_mean(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = task_of(write_sets(tmp_path, True, 2), max_source_length=256, max_target_length=32)
    rows = task.rows("eval")
    requests = task.requests(rows, tiny_tokenizer)
    assert isinstance(requests[1], Generation)
    assert (requests[1].num_beams, requests[1].max_new_tokens) == (4, 32)
    right = {"boolq": 1, "piqa": 2, "hellaswag": 1}  # of 3, 2 and 2
    texts, seen = [], dict.fromkeys(SETS, 0)
    for row in rows:
        seen[row["part"]] += 1
        texts.append(Generated(row["output"] if seen[row["part"]] <= right.get(row["part"], 0) else "no idea", 3))
    scored = task.score(rows, requests, [[Nll(2.0, 4)] * len(rows), texts])
    assert seen == dict.fromkeys(SETS, 2) | {"boolq": 3}
    shares = dict.fromkeys(SETS, 0.0) | {"boolq": 1 / 3, "piqa": 1.0, "hellaswag": 0.5}
    expected = {"nll": 0.5, "accuracy": (1 / 3 + 1 + 0.5) / 8} | {
        f"accuracy_{name}": share for name, share in shares.items()
    }
    assert scored.scores == pytest.approx(expected)
    assert [sample["part"] for sample in scored.samples] == [row["part"] for row in rows]
    assert {name for column in task.table for name in column.scores} == set(expected)


def test_the_limit_holds_for_each_set_and_sets_can_be_chosen(tmp_path: Path) -> None:
    folder = write_sets(tmp_path, True, 3)
    assert len(task_of(folder, max_eval_samples=2).rows("eval")) == 16
    assert [row["part"] for row in task_of(folder, sets=["piqa", "boolq"], max_eval_samples=1).rows("eval")] == [
        "piqa",
        "boolq",
    ]
    assert task_of(folder).digest("eval").count("sha256:") == 8


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.sets=copa: not a choice"):
        task_settings("commonsense", sets=["copa"])
    with pytest.raises(UserError, match=r"^task.sets=\[\]: name each set once"):
        task_settings("commonsense", sets=[])
    with pytest.raises(UserError, match=r"^task.eval_file=x: commonsense scores several sets; give task.eval_folder"):
        task_settings("commonsense", eval_file="x")
    folder = write_sets(tmp_path, True)
    (tmp_path / "piqa/test.json").write_text(json.dumps([{"instruction": "Q", "answer": "answer1"}]))
    with pytest.raises(
        UserError, match=r"row 1 holds 'answer1' in column 'answer' where one of these is needed: solution1, solution2"
    ):
        task_of(folder).rows("eval")
    (tmp_path / "piqa/test.json").write_text(json.dumps([{"goal": "Q"}]))
    with pytest.raises(UserError, match=r"row 1 has neither 'instruction' and 'answer' nor the columns of ybisk/piqa"):
        task_of(folder).rows("eval")
    (tmp_path / "piqa/test.json").unlink()
    with pytest.raises(UserError, match=r"there is no piqa/test.json in it; add it, or leave piqa out of task.sets"):
        task_of(folder).rows("eval")


def test_from_the_command_to_the_scores(cli: Any, tmp_path: Path) -> None:
    train = Path("train.json")
    train.write_text(json.dumps([{"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
                                 for _, answer, text in HUB.values()]))  # fmt: skip
    tiny = [given for given in cli.tiny if not given.startswith("task")]
    outcome = cli(*tiny, "task=commonsense", f"task.train_file={train}", f"task.eval_folder={write_sets(tmp_path / 'sets', False)}",
                  "task.max_target_length=8", "task.num_beams=2", "train.max_steps=1", "quant.iter=1", "output_dir=out")  # fmt: skip
    assert outcome.code == 0, outcome
    (record,) = Path("out/runs").glob("*/metrics.json")
    scores = json.loads(record.read_text())["scores"]
    sets = [scores[f"accuracy_{name}"] for name in SETS]
    assert scores["accuracy"] == pytest.approx(sum(sets) / 8)
    samples = [json.loads(line) for line in (record.parent / "samples.jsonl").read_text().splitlines()]
    assert scores["accuracy_boolq"] == sum(sample["correct"] for sample in samples[:2]) / 2
    assert "BoolQ/PIQA/SIQA" in outcome.out
