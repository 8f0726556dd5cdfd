"""A real BERT of 22M parameters (MiniLM) fine-tuned on QNLI and MNLI: 16-bit LoRA, QLoRA and LoftQ, several seeds a row.

    python benchmarks/minilm.py ../shared/data/glue [--task qnli mnli] [--quant lora16 nf4 nf2 uniform2] [--rank 16 32]
        [--seed 1 2 3] [--epochs 1] [--packed] [--output-dir outputs]

The folder holds TASK/train.jsonl and TASK/validation.jsonl. Each run is one that `python -m loftq_exp` would make, with the
overrides that it prints; finished ones are found and not run again, so that a stopped table goes on, and several processes
may each make a part of it. Prints Markdown for docs/results.md: accuracy in percent, mean and sample standard deviation.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import loftq_exp
from loftq_exp.report.table import cells, markdown

RECIPE = (
    "model=minilm", "task=glue", "task.max_train_samples=4000", "quant.dropout=0", "train=demo", "train.learning_rate=5e-4",
    "train.weight_decay=0", "train.lr_scheduler_type=linear", "train.warmup_ratio=0.1", "train.logging_steps=10",
    "train.per_device_train_batch_size=16", "train.train_sampling_strategy=group_by_length",
)  # fmt: skip
"""One for all rows."""
PACKED = ("save_format=packed", "train.backbone=auto")
STEPS = 5
BEFORE = ("run", "bits", "rank", "weight error")


def methods(quantization: str) -> list[tuple[str, ...]]:
    """The overrides of each row that a name such as nf2, uniform2, nf2.5 (mixed precision) or lora16 stands for."""
    if quantization == "lora16":
        return [("quant=lora",)]
    named = re.fullmatch(r"([a-z-]+)([\d.]+)", quantization)
    if named is None:
        raise SystemExit(f"--quant {quantization}: name a type and its bits, such as nf2 or uniform2, or lora16")
    quantizer = (f"quant.type={named[1]}", f"quant.bits={named[2]}")
    return [("quant=qlora", *quantizer), ("quant=loftq", *quantizer, f"quant.iter={STEPS}")]


def run(args: argparse.Namespace, task: str, method: tuple[str, ...], rank: int, seed: int) -> dict[str, Any]:
    """The metrics of one run."""
    folder = args.data / task
    overrides = [
        *RECIPE, f"task.name={task}", f"task.train_file={folder / 'train.jsonl'}",
        f"task.eval_file={folder / 'validation.jsonl'}", *method, f"quant.rank={rank}", f"seed={seed}",
        f"train.num_train_epochs={args.epochs}", f"output_dir={args.output_dir}", *(PACKED if args.packed else ()),
    ]  # fmt: skip
    print(" ".join(overrides), flush=True)
    return loftq_exp.run(loftq_exp.compose(overrides)).metrics


def row(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One row of the table from the runs of each task, which differ in their seed."""
    scores = [[100 * metrics["scores"]["accuracy"] for metrics in of_task] for of_task in runs.values()]
    spread = [f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "" for values in scores]
    shown = [f"{statistics.mean(values):.1f}{more}" for values, more in zip(scores, spread, strict=True)]
    return [*cells(next(iter(runs.values()))[0], BEFORE), *shown]


def main() -> None:
    """Runs what is not there yet, the first seed of everything first, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", nargs="+", default=["qnli", "mnli"])
    parser.add_argument("--quant", nargs="+", default=["lora16", "nf4", "nf2", "uniform2"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--packed", action="store_true", help="train on packed backbones instead of their dense values")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("loftq_exp").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows = [(method, rank) for name in args.quant for method in methods(name) for rank in args.rank]
    found: dict[Any, dict[str, list[dict[str, Any]]]] = {key: {task: [] for task in args.task} for key in rows}
    for seed in args.seed:
        for task in args.task:
            for key in rows:
                found[key][task].append(run(args, task, *key, seed))
    print(markdown((*BEFORE, *args.task), [row(found[key]) for key in rows]))


if __name__ == "__main__":
    main()
