"""Calibrated starts and their baselines on the same model: perplexity straight after initialisation, scores after training.

    python benchmarks/calibration.py perplexity ../shared/data [--bits 2 3 4] [--text wikitext gsm8k arithmetic]
        [--method LoftQ calibrated ...] [--seed 0 1 2] [--jobs 1] [--output-dir outputs]
    python benchmarks/calibration.py gsm8k ../shared/data [--bits 2 2.5 3 4] [--method ...] [--seed 1 2 3]
    python benchmarks/calibration.py qnli ../shared/data ...      # or mnli: MiniLM

Every run is one that `python -m loftq_exp` would make, with the overrides that are printed. As each ends, a line of its scores
is added to docs/results/calibrated-PART.jsonl. Runs with a line there are not made again, so that a measurement can be made in
parts; take a line out to measure it again. docs/results/calibrated-PART.json is made of all lines: mean, sample standard
deviation and number over seeds.

perplexity: SmolLM2-135M, on 12 blocks of 512 tokens of the WikiText-2 test split, and on the first test problems of GSM8K as
text. A seed draws the calibration samples. gsm8k: 500 training and 200 test problems; qnli, mnli: 4,000 training rows of the
task and 2,000 of its validation file. There a seed draws the calibration samples, the order of rows, and a new head.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import loftq_exp
from loftq_exp.report.summary import score

RESULTS = Path(__file__).parents[1] / "docs" / "results"
GRID = ("quant.scale=search", "quant.levels=optimal")
METHODS: dict[str, tuple[str, ...]] = {
    "LoRA": ("quant=lora",),
    "QLoRA": ("quant=qlora",),
    "LoftQ": ("quant=loftq",),
    "QLoRA, same grid": ("quant=qlora", *GRID),
    "LoftQ, same grid": ("quant=loftq", *GRID),
    "PiSSA": ("quant=pissa", *GRID),
    "QERA approx": ("quant=loftq", *GRID, "quant.calibration=diagonal", "quant.iter=1"),
    "QERA exact": ("quant=loftq", *GRID, "quant.calibration=full", "quant.iter=1"),
    "CLoQ": ("quant=loftq", *GRID, "quant.calibration=full", "quant.iter=1", "quant.rounding=gptq"),
    "RILQ": ("quant=qlora", *GRID, "quant.polish_steps=200"),
    "diagonal": ("quant=loftq", *GRID, "quant.calibration=diagonal"),
    "gptq": ("quant=loftq", *GRID, "quant.calibration=full", "quant.rounding=gptq"),
    "sequential": ("quant=loftq", *GRID, "quant.calibration=full", "quant.order=sequential"),
    "10 steps": ("quant=loftq", *GRID, "quant.calibration=full", "quant.iter=10"),
    "calibrated": ("quant=loftq", *GRID, "quant.calibration=full"),
    "polished": ("quant=loftq", *GRID, "quant.calibration=full", "quant.rounding=gptq", "quant.polish_steps=200"),
}
"""The overrides of each row. PiSSA, QERA, CLoQ and RILQ are these methods' recipes on this project's best levels and scales."""
COMPARED = [
    "QLoRA", "LoftQ", "PiSSA", "QERA approx", "QERA exact", "CLoQ", "calibrated"
]  # fmt: skip
TEXTS = ("wikitext", "gsm8k", "arithmetic")
TEXT_PROBLEMS = 40
SMOLLM2 = ("model=smollm2", "quant.rank=64", "quant.dropout=0", "train.backbone=dense")
MINILM = (
    "model=minilm", "task=glue", "task.max_train_samples=4000", "quant.dropout=0", "quant.rank=32", "train=demo",
    "train.learning_rate=2.5e-4", "train.weight_decay=0", "train.lr_scheduler_type=linear", "train.warmup_ratio=0.1",
    "train.per_device_train_batch_size=16", "train.train_sampling_strategy=group_by_length", "task.max_eval_samples=2000",
    "calibration.samples=1024",
)  # fmt: skip


def is_random(method: str) -> bool:
    """Whether an initialisation depends on the seed of the calibration samples."""
    return any("calibration" in override or "polish" in override for override in METHODS[method])


def of_text(text: str, data: Path, seed: int) -> tuple[str, ...]:
    """The overrides that choose a calibration text."""
    chosen = {
        "wikitext": (f"calibration.file={data / 'wikitext-2' / 'calibration.txt'}", "calibration.samples=47"),
        "gsm8k": ("calibration.task=gsm8k", f"calibration.file={data / 'gsm8k' / 'train.jsonl'}"),
        "arithmetic": ("calibration.task=arithmetic",),
    }
    return (*chosen[text], f"calibration.seed={seed}")


def of_bits(method: str, bits: str) -> tuple[str, ...]:
    """The overrides that choose bits: a fraction is shared out by error."""
    if method == "LoRA":
        return ()
    rule = ("quant.allocation=error",) if "." in bits and METHODS[method][0] == "quant=loftq" else ()
    return (f"quant.bits={bits}", *rule)


def perplexity_runs(args: argparse.Namespace) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """For each row (bits, method, calibration text, scored text) the overrides of its runs."""
    problems = args.output_dir / "gsm8k-test.txt"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (args.data / "gsm8k" / "test.jsonl").read_text().splitlines()[:TEXT_PROBLEMS]]
    problems.write_text("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))
    scored = {"WikiText-2": args.data / "wikitext-2" / "test.raw.txt", "GSM8K text": problems}
    runs: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    # One scored text after the other: two jobs at once that need the same initialisation would wait for each other.
    for (name, file), bits, method in itertools.product(scored.items(), args.bits, args.method or COMPARED):
        texts = args.text if is_random(method) else ["none"]
        for text in texts:
            runs[bits, method, text, name] = [
                (*SMOLLM2, "task=wikitext", f"task.eval_file={file}", "task.block_size=512",
                 "task.max_eval_samples=12", "stages=[quantize,evaluate]", *METHODS[method], *of_bits(method, bits),
                 *(of_text(text, args.data, seed) if text != "none" else ()))
                for seed in (args.seed if text != "none" else args.seed[:1])
            ]  # fmt: skip
    return runs


def training_runs(args: argparse.Namespace) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """For each row (bits, method, calibration text, task) the overrides of its runs."""
    folder = args.data / ("gsm8k" if args.part == "gsm8k" else f"glue/{args.part}")
    if args.part == "gsm8k":
        recipe: tuple[str, ...] = (
            *SMOLLM2, "task=gsm8k", "task.max_train_samples=500", "task.max_eval_samples=200", "train=demo",
            f"task.eval_file={folder / 'test.jsonl'}", "train.train_sampling_strategy=group_by_length",
            "train.per_device_eval_batch_size=50",
        )  # fmt: skip
    else:
        recipe = (*MINILM, f"task.name={args.part}", f"task.eval_file={folder / 'validation.jsonl'}")
    recipe += (f"task.train_file={folder / 'train.jsonl'}",)
    runs: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for bits in args.bits:
        for method in args.method or ["LoRA", *COMPARED]:
            key = ("16" if method == "LoRA" else bits, method, "task" if is_random(method) else "none", args.part)
            runs[key] = [
                (*recipe, *METHODS[method], *of_bits(method, bits), f"seed={seed}",
                 *((f"calibration.seed={seed}",) if is_random(method) else ()))
                for seed in args.seed
            ]  # fmt: skip
    return runs


def run(overrides: tuple[str, ...]) -> dict[str, Any] | None:
    """The metrics of one run; None if it failed, with the reason printed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(" ".join(overrides), flush=True)
    try:
        return loftq_exp.run(loftq_exp.compose(list(overrides))).metrics
    except Exception as error:  # one run out of memory must not cost the others their rows
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        return None


SCORES = {"perplexity": ("perplexity", 1.0, "{:.2f}"), "gsm8k": ("nll", 1.0, "{:.4f}"), "qnli": ("accuracy", 100.0, "{:.1f}"),
          "mnli": ("accuracy", 100.0, "{:.1f}")}  # fmt: skip
"""The score of each part, its factor and its format."""
ERRORS = {"bits_per_weight": ("bits a weight", "{:.2f}"), "mean_error": ("weight error", "{:.4f}"),
          "mean_output_error": ("output error", "{:.4f}")}  # fmt: skip
NAMES = ("bits", "start", "calibrated_on", "scored")
"""What a line and a row of the table are of."""
DELTA = "{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """The lines of the runs that were made, in any session."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def line(part: str, key: tuple[str, ...], overrides: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one run."""
    name, factor, _ = SCORES[part]
    made = metrics["provenance"]
    return {
        **dict(zip(NAMES, key, strict=True)),
        "score": metrics["scores"][name] * factor,
        **{name: metrics["init"].get(name) for name in ERRORS},
        "overrides": overrides,
        "commit": made["commit"],
        "created": made["created"],
        "processor": made["hardware"]["processor"],
        "cpu_capability": made["hardware"]["cpu_capability"],
    }


def shown(values: Sequence[float], form: str) -> dict[str, Any]:
    """Mean, and the sample standard deviation and number if there are several; as numbers and as text."""
    found = score(values)
    spread = "" if found.std is None else f" ± {form.format(found.std)} (n={found.n})"
    return {"value": found.mean, "std": found.std, "n": found.n, "shown": form.format(found.mean) + spread}


def ordered(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines by width, 16 bits first, then as METHODS and the parser's texts are."""
    texts = ["none", "task", *TEXTS]

    def place(line: dict[str, Any]) -> tuple[float, int, int]:
        return -float(line["bits"]), list(METHODS).index(line["start"]), texts.index(line["calibrated_on"])

    return sorted(lines, key=place)


def table(part: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns and rows of the result file: one row a start, one column a scored text, means over the lines of each.

    After training, also the difference to the calibrated start of the same width, paired by seed, with its 95 % interval.
    """
    form = SCORES[part][2]
    scored = list(dict.fromkeys(line["scored"] for line in lines))
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in ordered(lines):
        key = tuple(one[name] for name in NAMES)
        row = rows.setdefault(key[:3], {name: one[name] for name in NAMES[:3]} | {name: one[name] for name in ERRORS})
        cells.setdefault(key, {})[seed_of(one["overrides"])] = one["score"]
        row[key[3]] = shown(list(cells[key].values()), form)
    for (bits, method, text), row in rows.items() if part != "perplexity" else ():
        ours = cells.get((bits, "calibrated", "task", part), {})
        theirs = cells[bits, method, text, part]
        both = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        if method != "calibrated" and len(both) > 1:
            change, digits = score(both), 1 if form == "{:.1f}" else 4
            row["ahead"] = DELTA.format(mean=change.mean, low=change.low, high=change.high, digits=digits)
    ahead = [] if part == "perplexity" else [{"key": "ahead", "name": "calibrated - this, paired, 95 %"}]
    columns = [*({"key": name, "name": name.replace("_", " ")} for name in NAMES[:3]),
               *({"key": key, "name": title, "format": layout} for key, (title, layout) in ERRORS.items()),
               *({"key": key, "name": key} for key in scored), *ahead]  # fmt: skip
    return {"columns": columns, "rows": list(rows.values())}


def seed_of(overrides: str) -> str:
    """The seed of a run: of training, or of the calibration samples; that of a run without either is 0."""
    settings = dict(override.split("=", 1) for override in overrides.split(" "))
    return settings.get("seed") or settings.get("calibration.seed", "0")


def write(part: str, lines: Sequence[dict[str, Any]], results: Path) -> None:
    """Write the result file anew from all lines."""
    facts = {"command": f"python benchmarks/calibration.py {part} ../shared/data", "runs": f"calibrated-{part}.jsonl"}
    beside = results / f"calibrated-{part}.json.part"
    beside.write_text(json.dumps({"facts": facts, **table(part, lines)}, indent=1) + "\n")
    beside.replace(results / f"calibrated-{part}.json")


def main() -> None:
    """Run what is not there yet, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(SCORES))
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4"])
    parser.add_argument("--method", nargs="+", choices=list(METHODS))
    parser.add_argument("--text", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides of every run, such as device=cuda")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = perplexity_runs(args) if args.part == "perplexity" else training_runs(args)
    # The first seed of everything first, so that a stopped benchmark has whole rows.
    order = sorted(((at, key) for key, each in runs.items() for at in range(len(each))), key=lambda pair: pair[0])
    journal = args.results / f"calibrated-{args.part}.jsonl"
    finished = {line["overrides"] for line in lines_of(journal)}
    running: dict[Future[dict[str, Any] | None], tuple[tuple[str, ...], str]] = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for at, key in order:
            overrides = (*runs[key][at], *args.extra)
            text = " ".join(overrides).replace(str(args.data), "DATA").replace(str(args.output_dir), "OUTPUT")
            if text not in finished:
                running[pool.submit(run, (*overrides, f"output_dir={args.output_dir}"))] = key, text
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key, text = running.pop(future)
                if metrics := future.result():
                    with journal.open("a") as file:
                        file.write(json.dumps(line(args.part, key, text, metrics)) + "\n")
                    write(args.part, lines_of(journal), args.results)
    print(json.dumps(json.loads((args.results / f"calibrated-{args.part}.json").read_text())["rows"], indent=1))


if __name__ == "__main__":
    main()
