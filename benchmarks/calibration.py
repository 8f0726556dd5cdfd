"""Calibrated starts and their baselines on the same model: perplexity straight after initialisation, scores after training.

    python benchmarks/calibration.py perplexity ../shared/data [--bits 2 3 4] [--text wikitext gsm8k arithmetic]
        [--method LoftQ calibrated ...] [--seed 0 1 2] [--jobs 1] [--output-dir outputs]
    python benchmarks/calibration.py gsm8k ../shared/data [--bits 2 2.5 3 4] [--method ...] [--seed 1 2 3]
    python benchmarks/calibration.py qnli ../shared/data ...      # or mnli: MiniLM

Every run is one that `python -m loftq_exp` would make, with the overrides that are printed; finished ones are found and not
run again. Writes docs/results/calibrated-PART.json: mean, sample standard deviation and number over seeds.

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
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import loftq_exp
from loftq_exp.provenance import provenance

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


def shown(values: list[float], form: str) -> dict[str, Any] | None:
    """Mean, and the sample standard deviation and number if there are several; as a number and as text."""
    if not values:
        return None
    mean = statistics.mean(values)
    if len(values) == 1:
        return {"value": mean, "n": 1, "shown": form.format(mean)}
    spread = statistics.stdev(values)
    return {
        "value": mean,
        "std": spread,
        "n": len(values),
        "shown": f"{form.format(mean)} ± {form.format(spread)} (n={len(values)})",
    }


SCORES = {"perplexity": ("perplexity", 1.0, "{:.2f}"), "gsm8k": ("nll", 1.0, "{:.4f}"), "qnli": ("accuracy", 100.0, "{:.1f}"),
          "mnli": ("accuracy", 100.0, "{:.1f}")}  # fmt: skip
"""The score of each part, its factor and its format."""
ERRORS = {"bits_per_weight": ("bits a weight", "{:.2f}"), "mean_error": ("weight error", "{:.4f}"),
          "mean_output_error": ("output error", "{:.4f}")}  # fmt: skip


def table(part: str, runs: dict[tuple[str, ...], list[dict[str, Any]]]) -> dict[str, Any]:
    """Columns and rows of the result file: one row a start, one column a scored text, from the metrics of its runs."""
    name, factor, form = SCORES[part]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for (bits, method, text, scored), found in runs.items():
        row = rows.setdefault((bits, method, text), {"bits": bits, "start": method, "calibrated_on": text})
        row |= {key: found[0]["init"].get(key) for key in ERRORS}
        row[scored] = shown([metrics["scores"][name] * factor for metrics in found], form)
    scored = dict.fromkeys(key[3] for key in runs)
    columns = [("bits", "bits", ""), ("start", "start", ""), ("calibrated_on", "calibrated on", ""),
               *((key, title, layout) for key, (title, layout) in ERRORS.items()), *((key, key, "") for key in scored)]  # fmt: skip
    return {"columns": [{"key": key, "name": title} | ({"format": layout} if layout else {}) for key, title, layout in columns],
            "rows": list(rows.values())}  # fmt: skip


def main() -> None:
    """Run what is not there yet, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["perplexity", "gsm8k", "qnli", "mnli"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4"])
    parser.add_argument("--method", nargs="+", choices=list(METHODS))
    parser.add_argument("--text", nargs="+", default=["wikitext", "gsm8k", "arithmetic"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="write what is finished after so many seconds; default: all")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides of every run, such as device=cuda")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.data, args.output_dir = args.data.resolve(), args.output_dir.resolve()
    runs = perplexity_runs(args) if args.part == "perplexity" else training_runs(args)
    extra = (*args.extra, f"output_dir={args.output_dir}")
    # The first seed of everything first, so that a stopped benchmark has whole rows.
    most = max(map(len, runs.values()))
    work = [(*each[at], *extra) for at in range(most) for each in runs.values() if at < len(each)]
    work = list(dict.fromkeys(work))
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    running = {overrides: pool.submit(run, overrides) for overrides in work}
    wait(running.values(), timeout=args.seconds)
    done = {overrides: future.result() for overrides, future in running.items() if future.done()}
    found = {key: [metrics for one in each if (metrics := done.get((*one, *extra)))] for key, each in runs.items()}
    made = table(args.part, {key: each for key, each in found.items() if each})
    facts = {"command": f"python benchmarks/calibration.py {args.part} ../shared/data", "provenance": provenance()}
    place = args.results / f"calibrated-{args.part}.json"
    place.write_text(json.dumps({"facts": facts, **made}, indent=1) + "\n")
    for row in made["rows"]:
        print(json.dumps(row))
    pool.shutdown(wait=len(done) == len(work), cancel_futures=True)
    if len(done) < len(work):
        print(f"{len(work) - len(done)} of {len(work)} runs are not finished", flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
