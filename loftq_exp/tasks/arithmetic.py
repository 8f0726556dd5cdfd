"""Word problems of one to three steps in GSM8K's format, generated from a seed. Small enough for a demo on a laptop."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loftq_exp.config.schema import ADAPTER, LONGEST, SCORES, setting
from loftq_exp.errors import UserError
from loftq_exp.tasks.data import Row, Split
from loftq_exp.tasks.generation import PromptConfig
from loftq_exp.tasks.gsm8k import GSM8K

DEFAULT_ROWS: dict[Split, int] = {"train": 2000, "eval": 200}
_EVAL_SHARE = 10
"""About one problem in this many is an evaluation problem."""
_PATIENCE = 20_000
"""Number of draws without a new problem after which a seed is exhausted."""
_LARGEST = 200
"""Upper bound of all intermediate and final results, to keep the arithmetic within a small model's reach."""

# fmt: off
NAMES = (
    "Ada", "Amir", "Ben", "Carla", "Dana", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Ivan", "Jonas", "Kofi", "Lena",
    "Mia", "Nora", "Omar", "Paula", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Viktor", "Wen", "Yara",
)
ITEMS = (
    "apples", "books", "buttons", "candles", "cards", "coins", "cookies", "cups", "eggs", "flowers", "marbles",
    "pencils", "pens", "plums", "shells", "stamps", "stickers", "toys",
)
# fmt: on
_OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Template:
    """A family of problems.

    `question` is the text, with placeholders {name}, {friend}, {item} and the numbers' names. `ranges` maps each number to
    its smallest and largest value. `steps` are lines such as "d = a x b pens in all": a result's name, its operation, and
    the words that follow it in the solution. The last result is the answer.
    """

    question: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[str, ...]


TEMPLATES = (
    Template(
        "{name} buys {a} boxes with {b} {item} each and gives {c} {item} to {friend}. "
        "How many {item} does {name} have left?",
        {"a": (2, 12), "b": (3, 12), "c": (2, 20)},
        ("d = a x b {item} in the boxes", "e = d - c {item} left"),
    ),
    Template(
        "{name} has {a} {item}. {friend} has {b} times as many and then finds {c} more. "
        "How many {item} do both have together?",
        {"a": (2, 15), "b": (2, 6), "c": (2, 20)},
        ("d = a x b {item} at first", "e = d + c {item} for {friend}", "f = a + e {item} together"),
    ),
    Template(
        "{name} earns {a} dollars an hour and works for {b} hours. Then {name} spends {c} dollars on {item}. "
        "How many dollars are left?",
        {"a": (8, 20), "b": (2, 8), "c": (5, 40)},
        ("d = a x b dollars earned", "e = d - c dollars left"),
    ),
    Template(
        "{name} collects {a} {item} in the morning and {b} in the afternoon and shares them equally among {c} friends. "
        "How many {item} does each friend get?",
        {"a": (5, 40), "b": (5, 40), "c": (2, 9)},
        ("d = a + b {item} in all", "e = d / c {item} each"),
    ),
    Template(
        "A pack of {item} costs {a} dollars and a bag costs {b} dollars. {name} buys {c} packs and one bag. "
        "How many dollars does {name} pay?",
        {"a": (2, 12), "b": (3, 20), "c": (2, 9)},
        ("d = a x c dollars for the packs", "e = d + b dollars in all"),
    ),
    Template(
        "{name} has to sort {a} {item} and sorts {b} of them a day. How many {item} are left to sort after {c} days?",
        {"a": (30, 150), "b": (3, 15), "c": (2, 9)},
        ("d = b x c {item} sorted", "e = a - d {item} left"),
    ),
    Template(
        "{name} had {a} {item}, lost {b} of them and then bought {c} bags with {d} {item} each. "
        "How many {item} does {name} have now?",
        {"a": (10, 40), "b": (2, 15), "c": (2, 6), "d": (2, 9)},
        ("e = a - b {item} after the loss", "f = c x d {item} bought", "g = e + f {item} now"),
    ),
    Template(
        "{name} and {friend} find {a} {item} each, put them together and lay them in {b} equal rows. "
        "Then {c} {item} are taken from the first row. How many {item} are left in that row?",
        {"a": (6, 40), "b": (2, 8), "c": (1, 9)},
        ("d = a + a {item} together", "e = d / b {item} a row", "f = e - c {item} left"),
    ),
)
ONE_STEP = (
    Template(
        "{name} has {a} {item}. {friend} gives {name} {b} more. How many {item} does {name} have now?",
        {"a": (1, 12), "b": (1, 12)},
        ("c = a + b {item} now",),
    ),
    Template(
        "There are {a} {item} in a box and {b} {item} in a bag. How many {item} are there in all?",
        {"a": (1, 12), "b": (1, 12)},
        ("c = a + b {item} in all",),
    ),
    Template(
        "{name} buys {a} {item} and {friend} buys {b}. How many {item} do they buy together?",
        {"a": (1, 12), "b": (1, 12)},
        ("c = a + b {item} together",),
    ),
    Template(
        "{name} has {a} {item} and gives {b} of them to {friend}. How many {item} does {name} have left?",
        {"a": (3, 20), "b": (1, 12)},
        ("c = a - b {item} left",),
    ),
    Template(
        "{name} had {a} {item} and lost {b}. How many {item} are left?",
        {"a": (3, 20), "b": (1, 12)},
        ("c = a - b {item} left",),
    ),
    Template(
        "{name} needs {a} {item} and has {b}. How many more {item} does {name} need?",
        {"a": (3, 20), "b": (1, 12)},
        ("c = a - b {item} more",),
    ),
    Template(
        "{name} buys {a} boxes with {b} {item} each. How many {item} does {name} buy?",
        {"a": (2, 9), "b": (2, 9)},
        ("c = a x b {item} in all",),
    ),
    Template(
        "{name} finds {a} {item} a day for {b} days. How many {item} does {name} find?",
        {"a": (2, 9), "b": (2, 9)},
        ("c = a x b {item} in all",),
    ),
)
PROBLEMS = {"several-steps": TEMPLATES, "one-step": ONE_STEP}


@dataclass(frozen=True)
class ArithmeticConfig(PromptConfig):
    """The settings of generated problems."""

    data_seed: int = setting("random seed of the generated problems", 0, ge=0, shapes=(), locates=(ADAPTER, SCORES))
    problems: str = setting(
        "generated problems: several-steps (two or three, results up to 200), or one-step (numbers up to 20)",
        "several-steps",
        choices=tuple(PROBLEMS),
        shapes=(),
        locates=(ADAPTER, SCORES),
        before="several-steps",
    )


class Arithmetic(GSM8K):
    """GSM8K's prompt, target and score on generated problems, or on `task.train_file` and `task.eval_file`.

    The rows of a split depend only on `task.data_seed` and `task.problems`. A larger number of rows extends the same
    sequence. Training and evaluation problems never share a template with the same numbers, whatever the names and seeds.
    """

    kind = "arithmetic"
    config: ArithmeticConfig

    def rows(self, split: Split) -> list[Row]:
        """As `Task.rows`. By default 2000 training and 200 evaluation problems are generated."""
        if not self.generates(split):
            return super().rows(split)
        count = self.limit(split) or DEFAULT_ROWS[split]
        if count > LONGEST:
            raise UserError(
                f"task.max_{split}_samples={count}: at most {LONGEST} problems are generated; ask for no more"
            )
        rows = list(itertools.islice(generate(split, self.config.data_seed, PROBLEMS[self.config.problems]), count))
        if len(rows) < count:
            raise UserError(
                f"task.max_{split}_samples={count}: {len(rows)} different problems can be made with task.problems="
                f"{self.config.problems} task.data_seed={self.config.data_seed}; ask for no more than that"
            )
        return rows

    def digest(self, split: Split) -> str:
        """As `Task.digest`. For generated problems it is the digest of the rows."""
        if not self.generates(split):
            return super().digest(split)
        return "sha256:" + hashlib.sha256(json.dumps(self.rows(split)).encode()).hexdigest()

    def generates(self, split: Split) -> bool:
        """Return whether the problems of `split` are generated: no local file and no Hub data set is given."""
        source = self.source(split)
        return not (source.file or source.dataset)


def generate(split: Split, seed: int, templates: Sequence[Template] = TEMPLATES) -> Iterator[Row]:
    """Yield the problems of `split` for `seed`, each once, until no new one is found."""
    rng = random.Random(seed)
    seen: set[str] = set()
    misses = 0
    while misses < _PATIENCE:
        template = rng.choice(templates)
        row, numbers = _problem(template, rng)
        misses += 1
        if _split_of(template, numbers) == split and row["question"] not in seen:
            seen.add(row["question"])
            misses = 0
            yield row


def _problem(template: Template, rng: random.Random) -> tuple[Row, dict[str, int]]:
    """Draw a problem of `template`. Returns the row and its numbers."""
    results: dict[str, int] | None = None
    while results is None:
        numbers = {name: rng.randint(low, high) for name, (low, high) in template.ranges.items()}
        results = _solve(template, numbers)
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "item": rng.choice(ITEMS)}
    lines = []
    for step in template.steps:
        result, left, sign, right, label = _parts(step)
        lines.append(f"{results[left]} {sign} {results[right]} = {results[result]} {label.format(**words)}.")
    lines.append(f"#### {results[result]}")
    return {"question": template.question.format(**words, **numbers), "answer": "\n".join(lines)}, numbers


def _parts(step: str) -> tuple[str, str, str, str, str]:
    """Split a step such as "d = a x b pens in all" into result, left, sign, right and label."""
    result, _, left, sign, right, label = step.split(" ", 5)
    return result, left, sign, right, label


def _solve(template: Template, numbers: dict[str, int]) -> dict[str, int] | None:
    """Return `numbers` and the result of each step. None unless every result is a whole number from 1 to `_LARGEST`."""
    values = dict(numbers)
    for step in template.steps:
        result, left, sign, right, _ = _parts(step)
        value = _OPERATIONS[sign](values[left], values[right])
        if value != int(value) or not 1 <= value <= _LARGEST:
            return None
        values[result] = int(value)
    return values


def _split_of(template: Template, numbers: dict[str, int]) -> Split:
    """Return the split of a template with these numbers. It does not depend on seed or names."""
    problem = json.dumps([template.question, numbers], sort_keys=True)
    return "eval" if hashlib.sha256(problem.encode()).digest()[0] % _EVAL_SHARE == 0 else "train"
