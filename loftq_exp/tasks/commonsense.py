"""Commonsense reasoning as in LLM-Adapters (Hu et al., 2023) and DoRA (Liu et al., 2024): trained on 170k rows, scored on eight sets.

Prompts, answers and the reading of an answer are those of AGI-Edgerunners/LLM-Adapters: `finetune.py` for training rows (as fixed in
NVlabs/DoRA, commonsense_reasoning/finetune.py), `commonsense_evaluate.py` for scored rows. The two differ in blanks, and are kept so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_exp.config import local_path
from loftq_exp.config.schema import SCORES, setting
from loftq_exp.errors import UserError
from loftq_exp.tasks.base import PART, Column, Generation, Request, Scored, missing_column
from loftq_exp.tasks.data import DataSource, Row, Split, data_digest, read_rows, shown, with_line_feeds
from loftq_exp.tasks.generation import Judgement, PromptConfig, PromptTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDENT = " " * 16
TRAINING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{INDENT}### Instruction:\n{INDENT}{{instruction}}\n{INDENT}\n{INDENT}### Response:\n{INDENT}"
)
SCORED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n{INDENT}### Response:\n{INDENT}"
)
TRAINING_ROWS = "zwhe99/commonsense_170k"
"""The published training rows on the Hub: `instruction`, `input` (empty), `output`, `answer`."""
OUTPUT = "the correct answer is {answer}"
FILE = "test.json"
"""The file of each set in `task.eval_folder`, as in the folder dataset/ of LLM-Adapters."""


@dataclass(frozen=True)
class ChoiceSet:
    """One of the eight sets: its rows on the Hub, and how the published instruction and answer are made of them."""

    short: str
    dataset: str
    config: str | None
    split: str
    word: str
    """The answers are this word with a number; empty: true and false."""
    most: int
    """The largest number of an answer that is read."""
    instruction: Callable[[Row], str]
    answer: Callable[[Row], str]
    revision: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that are read as an answer."""
        return tuple(f"{self.word}{number}" for number in range(1, self.most + 1)) if self.word else ("true", "false")


def _listed(word: str, texts: Sequence[str], between: str = " ") -> str:
    return between.join(f"{word.capitalize()}{number}: {text}" for number, text in enumerate(texts, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def _question(question: str, texts: Sequence[str]) -> str:
    listed = _listed("answer", texts)
    return (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n{_format('answer', len(texts))}"
    )


def _piqa(row: Row) -> str:
    listed = _listed("solution", (row["sol1"], row["sol2"]), "\n\n")
    return f"Please choose the correct solution to the question: {row['goal']}\n\n{listed}\n\n{_format('solution', 2)}"


def _hellaswag(row: Row) -> str:
    start = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return f"{start}\n\n{_listed('ending', row['endings'])}\n\n{_format('ending', 4)}"


def _winogrande(row: Row) -> str:
    start = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return f"{start}\n\n{_listed('option', (row['option1'], row['option2']))} {_format('option', 2)}"


def _key(row: Row) -> str:
    return f"answer{row['choices']['label'].index(row['answerKey']) + 1}"


def _arc(config: str, short: str) -> ChoiceSet:
    return ChoiceSet(short, "allenai/ai2_arc", config, "test", "answer", 5,
                     lambda row: _question(row["question"], row["choices"]["text"]), _key)  # fmt: skip


PARQUET = "refs/convert/parquet"
"""The Hub's conversion of a set whose default branch holds a loading script, which `datasets` no longer runs."""
SETS = {
    "boolq": ChoiceSet(
        "BoolQ", "google/boolq", None, "validation", "", 2,
        lambda row: f"Please answer the following question with true or false, question: {row['question']}?\n\nAnswer format: true/false",
        lambda row: str(bool(row["answer"])).lower(),
    ),
    "piqa": ChoiceSet(
        "PIQA", "ybisk/piqa", None, "validation", "solution", 2, _piqa, lambda row: f"solution{int(row['label']) + 1}", PARQUET,
    ),
    "social_i_qa": ChoiceSet(
        "SIQA", "allenai/social_i_qa", None, "validation", "answer", 5,
        lambda row: _question(f"{row['context']} {row['question']}", [row[f"answer{letter}"] for letter in "ABC"]),
        lambda row: f"answer{int(row['label'])}", PARQUET,
    ),
    "hellaswag": ChoiceSet(
        "HellaS.", "Rowan/hellaswag", None, "validation", "ending", 4, _hellaswag, lambda row: f"ending{int(row['label']) + 1}",
    ),
    "winogrande": ChoiceSet(
        "WinoG.", "allenai/winogrande", "winogrande_debiased", "validation", "option", 2, _winogrande,
        lambda row: f"option{row['answer']}",
    ),
    "ARC-Easy": _arc("ARC-Easy", "ARC-e"),
    "ARC-Challenge": _arc("ARC-Challenge", "ARC-c"),
    "openbookqa": ChoiceSet(
        "OBQA", "allenai/openbookqa", "main", "test", "answer", 5,
        lambda row: _question(row["question_stem"], row["choices"]["text"]), _key,
    ),
}  # fmt: skip
"""The sets by their names in LLM-Adapters, in the order of the papers' tables."""


@dataclass(frozen=True)
class CommonsenseConfig(PromptConfig):
    """Which of the eight sets are scored, where they are, and how answers are generated."""

    sets: tuple[str, ...] = setting("sets that are scored", tuple(SETS), choices=tuple(SETS), shapes=(SCORES,))
    eval_folder: str | None = setting(
        "folder with a file SET/test.json for each set, as dataset/ of LLM-Adapters; null: the sets on the Hub",
        None,
        shapes=(),
        locates=(SCORES,),
    )
    num_beams: int = setting("number of beams for generation; 4 as published, 1 is greedy", 4, ge=1, shapes=(SCORES,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_file:
            raise UserError(f"task.eval_file={self.eval_file}: commonsense scores several sets; give task.eval_folder=FOLDER with "
                            f"SET/{FILE} for each of task.sets")  # fmt: skip
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise UserError(f"task.sets=[{','.join(self.sets)}]: name each set once; choose from: {', '.join(SETS)}")


class Commonsense(PromptTask):
    """Training rows of `instruction` and `output`, and rows of each set with `instruction` and `answer`, as published.

    Scores: `accuracy`, the mean of the sets' accuracies, each set counting the same; `accuracy_SET`; `nll` of the gold answers. An
    answer is right if the first of the set's answers (`answer1`, `true`, ...) in the generated text is the row's.
    """

    kind = "commonsense"
    config: CommonsenseConfig
    columns = ("instruction", "output")

    def source(self, split: Split) -> DataSource:
        """As `Task.source`. The scored sets have sources of their own, see `part`."""
        own = super().source(split)
        if split == "eval":
            return dataclasses.replace(own, file=None, dataset=None)
        return own if own.dataset else dataclasses.replace(own, dataset=TRAINING_ROWS)

    def part(self, name: str) -> DataSource:
        """Return the source of one set. Raises UserError if `task.eval_folder` has no such file."""
        own, one = super().source("eval"), SETS[name]
        if self.config.eval_folder is None:
            return dataclasses.replace(own, dataset=one.dataset, dataset_config=one.config, dataset_split=one.split,
                                       dataset_revision=one.revision)  # fmt: skip
        file = local_path(self.config.eval_folder) / name / FILE
        if not file.is_file():
            raise UserError(f"task.eval_folder={self.config.eval_folder}: there is no {Path(name) / FILE} in it; add it, or leave "
                            f"{name} out of task.sets")  # fmt: skip
        return dataclasses.replace(own, file=str(file))

    def rows(self, split: Split) -> list[Row]:
        """As `Task.rows`. Scored rows have their set's name under `PART`; the limit applies to each set."""
        if split == "train":
            return super().rows(split)
        rows = []
        for name in self.config.sets:
            found = read_rows(self.part(name), lambda row, name=name: _flaw(SETS[name], row), self.limit(split))  # type: ignore[misc]
            rows += [_published(SETS[name], row) | {PART: name} for row in found]
        return rows

    def flaw(self, row: Row) -> str | None:
        """As `Task.flaw`. The published rows have no `input`."""
        return super().flaw(row) or _input_flaw(row)

    def digest(self, split: Split) -> str:
        """As `Task.digest`, joined over the sets."""
        return (
            super().digest(split)
            if split == "train"
            else "+".join(data_digest(self.part(name)) for name in self.config.sets)
        )

    def prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the instruction in the published prompt: that of training, or that of evaluation."""
        return (SCORED if PART in row else TRAINING).format(instruction=row["instruction"])

    def target(self, row: Row) -> str:
        """Return the published output, such as "the correct answer is true"."""
        return str(row["output"])

    def judge(self, row: Row, generated: str) -> Judgement:
        """Compare the first answer in the generated text with the row's."""
        found = re.search("|".join(SETS[row[PART]].answers), generated)
        predicted = found[0] if found else None
        return Judgement(predicted, row["answer"], correct=predicted == row["answer"])

    def requests(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """As `PromptTask.requests`, with `task.num_beams` beams."""
        known, written = super().requests(rows, tokenizer)
        assert isinstance(written, Generation)
        return [known, dataclasses.replace(written, what="generation", num_beams=self.config.num_beams)]

    def score(self, rows: Sequence[Row], requests: Sequence[Request], answers: Sequence[list[Any]]) -> Scored:
        """Return `nll`, `accuracy_SET` of each set, and their mean `accuracy`. A sample names its set."""
        whole = super().score(rows, requests, answers)
        samples = [{PART: row[PART]} | sample for row, sample in zip(rows, whole.samples, strict=True)]
        own = {}
        for name in self.config.sets:
            correct = [sample["correct"] for sample in samples if sample[PART] == name]
            own[f"accuracy_{name}"] = sum(correct) / len(correct)
        return Scored({"nll": whole.scores["nll"], "accuracy": sum(own.values()) / len(own)} | own, samples)

    @property
    def table(self) -> tuple[Column, ...]:
        """NLL, the mean, and the sets in one column."""
        sets = self.config.sets
        title = "/".join(SETS[name].short for name in sets)
        return (
            Column("NLL", ("nll",), "{:.4f}"),
            Column("average", ("accuracy",), "{:.1f}", 100),
            Column(title, tuple(f"accuracy_{name}" for name in sets), "{:.1f}", 100),
        )


def _published(one: ChoiceSet, row: Row) -> Row:
    """Return a row with the published columns `instruction`, `output` and `answer`, made of the Hub's columns if it has others."""
    if "instruction" in row:
        answer = row["answer"]
        return {
            "instruction": with_line_feeds(row["instruction"]),
            "output": OUTPUT.format(answer=answer),
            "answer": answer,
        }
    answer = one.answer(row)
    return {
        "instruction": with_line_feeds(one.instruction(row)),
        "output": OUTPUT.format(answer=answer),
        "answer": answer,
    }


def _flaw(one: ChoiceSet, row: Row) -> str | None:
    """Return why a row of a set is unusable. It holds the published columns, or those of the set on the Hub."""
    if "instruction" in row:
        if "answer" not in row:
            return missing_column(row, "answer")
        if not isinstance(row["instruction"], str) or not row["instruction"].strip():
            return f"holds {shown(row['instruction'])} in column 'instruction' where text is needed"
        if problem := _input_flaw(row):
            return problem
        if row["answer"] not in one.answers:
            return f"holds {shown(row['answer'])} in column 'answer' where one of these is needed: {', '.join(one.answers)}"
        return None
    try:
        known = _published(one, row)["answer"] in one.answers
    except (KeyError, TypeError, ValueError, IndexError):
        known = False
    return None if known else f"has neither 'instruction' and 'answer' nor the columns of {one.dataset} with an answer"


def _input_flaw(row: Row) -> str | None:
    """Return the flaw of a row with an `input`, for which the prompt has no place. None if it is empty."""
    return (
        f"holds {shown(row['input'])} in column 'input', which the published rows leave empty"
        if row.get("input")
        else None
    )
