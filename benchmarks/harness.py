"""lm-evaluation-harness beside our own GSM8K: the same model, the same rows, and both graders on both generated texts.

    python benchmarks/harness.py ../shared/data/gsm8k/test.jsonl [--output-dir outputs]        # needs the extra [lm-eval]

So that there are right answers to disagree about, 16-bit LoRA of SmolLM2-135M is trained on the 24 shortest rows of the test file,
and scored on these and the next 16. Its accuracy therefore says nothing about the model. The harness scores it twice: with its
own gsm8k.yaml, without examples, and with a copy of that file that has our prompt and one filter more. Writes
docs/results/lm-eval-gsm8k.json.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import loftq_exp
from loftq_exp.provenance import provenance
from loftq_exp.tasks.gsm8k import ANSWER_MARK, INSTRUCTION, final_number

RESULT = Path(__file__).parents[1] / "docs" / "results" / "lm-eval-gsm8k.json"
TRAINED, SCORED = 24, 40
MODEL = ("quant=lora", "quant.rank=64", "quant.dropout=0")
RECIPE = ("train=demo", "train.num_train_epochs=8", "train.per_device_train_batch_size=4", "train.learning_rate=1e-3")
COLUMNS = [
    {"name": "prompt", "key": "prompt"},
    {"name": "graded by", "key": "grader"},
    {"name": "right, of 40", "key": "right"},
    {"name": "our grader on the same texts", "key": "ours"},
    {"name": "rows that both graders judge alike", "key": "alike"},
    {"name": "texts equal to those of `task=gsm8k`", "key": "equal"},
]
OWN_TASK, OUR_PROMPT = "gsm8k_local", "gsm8k_our_prompt"
PROMPTS = {OWN_TASK: "the harness's", OUR_PROMPT: "ours"}
FILTER = f"""  - name: "final-answer"
    filter:
      - function: "regex"
        regex_pattern: "{ANSWER_MARK} *(-?[0-9.,]+)"
      - function: "take_first"
"""


def changed(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each of these replaced. ValueError where one is not there once, so that another release is not misread."""
    for old, new in pairs:
        if text.count(old) != 1:
            raise ValueError(f"the harness's gsm8k.yaml has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


def write_tasks(folder: Path, rows: Path) -> None:
    """The harness's task file over local rows, and the same with our prompt and a filter for our form of an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    data = f"dataset_path: json\ndataset_kwargs: {{ data_files: {{ train: {rows}, test: {rows} }} }}\n"
    own = changed(
        (files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(),
        ("dataset_path: openai/gsm8k\ndataset_name: main\n", data),
        ("tag:\n  - math_word_problems\n", ""),
        ("task: gsm8k\n", f"task: {OWN_TASK}\n"),
    )
    ours = changed(
        own,
        (f"task: {OWN_TASK}\n", f"task: {OUR_PROMPT}\n"),
        ('"Question: {{question}}\\nAnswer:"', f'"{{{{question}}}}\\n{INSTRUCTION}\\n"'),
        ("filter_list:\n", f"filter_list:\n{FILTER}"),
    )
    (folder / f"{OWN_TASK}.yaml").write_text(own)
    (folder / f"{OUR_PROMPT}.yaml").write_text(ours)


def run(*overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run, and its samples."""
    folder = loftq_exp.run(loftq_exp.compose(list(overrides))).run_dir
    return folder, [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def rows_of(own: list[dict[str, Any]], harness: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of the table for each task file and filter, beside our own samples of the same problems."""
    ours = {sample["prompt"].removesuffix(f"\n{INSTRUCTION}\n"): sample for sample in own}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in harness:
        groups.setdefault((sample["task"], sample["filter"]), []).append(sample)
    rows = [{"prompt": "ours", "grader": "`task=gsm8k`", "right": sum(sample["correct"] for sample in own)}]
    for (task, name), samples in groups.items():
        texts = [sample["resps"][0][0] for sample in samples]
        beside = [ours[sample["doc"]["question"]] for sample in samples]
        right = [bool(sample["exact_match"]) for sample in samples]
        regraded = [final_number(text) == other["gold"] for text, other in zip(texts, beside, strict=True)]
        rows.append({
            "prompt": PROMPTS[task], "grader": name, "right": sum(right), "ours": sum(regraded),
            "alike": sum(a == b for a, b in zip(right, regraded, strict=True)),
            "equal": sum(text.strip() == other["generated"].strip() for text, other in zip(texts, beside, strict=True)),
        })  # fmt: skip
    return rows


def main() -> None:
    """Train once, score three times, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GSM8K's test.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args()
    output = args.output_dir.resolve()
    place = output / "harness-gsm8k"
    place.mkdir(parents=True, exist_ok=True)
    shortest = sorted(args.file.read_text().splitlines(keepends=True), key=len)
    for name, count in (("trained.jsonl", TRAINED), ("scored.jsonl", SCORED)):
        (place / name).write_text("".join(shortest[:count]))
    write_tasks(place / "tasks", place / "scored.jsonl")
    common = (f"output_dir={output}", "task.max_target_length=128")
    trained = (f"task.train_file={place / 'trained.jsonl'}", f"task.eval_file={place / 'trained.jsonl'}")
    folder, _ = run("task=gsm8k", *MODEL, *RECIPE, *trained, *common)
    again = (f"score_run={folder}", "stages=[evaluate]")
    _, own = run("task=gsm8k", f"task.eval_file={place / 'scored.jsonl'}", *again, *common)
    _, harness = run("task=lm_eval", f"task.name=[{OWN_TASK},{OUR_PROMPT}]", f"task.include_path={place / 'tasks'}",
                     "task.num_fewshot=0", *again, common[0])  # fmt: skip
    facts = {"command": "python benchmarks/harness.py ../shared/data/gsm8k/test.jsonl", "provenance": provenance()}
    RESULT.write_text(json.dumps({"facts": facts, "columns": COLUMNS, "rows": rows_of(own, harness)}, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
