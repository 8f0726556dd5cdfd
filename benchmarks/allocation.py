"""The paper's mixed precisions beside budgets spent where the error is, at equal bits: weight error, and perplexity.

    python benchmarks/allocation.py [--text /work/shared/data/wikitext-2/test.raw.txt] [--blocks 8] [--output-dir /tmp/allocation]
    python benchmarks/allocation.py --sums --text /work/shared/data/wikitext-2/valid.tokens.txt --blocks 4
    python benchmarks/allocation.py --calibrated /work/shared/data/wikitext-2/calibration.txt --blocks 6

LoftQ on SmolLM2-135M, 5 steps, rank 64; perplexity straight after initialisation, on the first blocks of 1024 tokens. With
--sums, budgets that sum the errors in other ways, as explicit plans. With --calibrated, calibrated starts whose bits are shared out
by the errors of the weights and by those of their outputs, which also writes docs/results/allocation-calibrated.json. Prints
Markdown. What is finished is found again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loftq_exp
from loftq_exp.loftq.allocation import Option, allocate
from loftq_exp.source.locate import locate
from loftq_exp.source.tensors import open_tensors

NOMINAL = (2.5, 2.25, 3.0)
"""The paper's bits. Of 30 layers its rule comes to a little less, and the budgets get no more than that."""
BUDGETS = {"error": "`allocation=error`", "error+rank": "`allocation=error+rank`"}

SHARED = ("2.25", "2.5", "2.75")
"""The budgets of --calibrated. At 3 bits every weight gets 3."""
GRID = ("quant.scale=search", "quant.levels=optimal")
RESULT = Path(__file__).parents[1] / "docs" / "results" / "allocation-calibrated.json"

SUMS: list[tuple[str, Callable[[int, float], float], tuple[int, ...]]] = [
    ("squared, relative", lambda values, norm: 1.0, (2, 3, 4)),
    ("squared, relative, times values", lambda values, norm: values, (2, 3, 4)),
    ("squared, absolute", lambda values, norm: norm**2, (2, 3, 4)),
    ("squared, relative, 2 and 4 bits only", lambda values, norm: 1.0, (2, 4)),
]
"""Ways to sum errors: what a squared relative error is multiplied with, given a weight's values and norm, and the choices."""
Measured = tuple[str, dict[str, Any], list[dict[str, Any]]]
"""A row's name, the metrics, and the report's weights."""


def measure(
    args: argparse.Namespace, *quant: str, plan: dict[str, int] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a run with these overrides and the plan given, and what its report says of each weight."""
    config = loftq_exp.compose(["stages=[quantize,evaluate]", "model=smollm2", *quant, "task=wikitext",
                                f"task.eval_file={args.text}", f"task.max_eval_samples={args.blocks}",
                                "train.backbone=dense", "train.per_device_eval_batch_size=4", f"output_dir={args.output_dir}"])  # fmt: skip
    if plan:
        config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, bits_per_layer=plan))
    result = loftq_exp.run(config)
    return result.metrics, json.loads((result.init_dir / "init_report.json").read_text())["weights"]


def row(text: str, metrics: dict[str, Any], weights: list[dict[str, Any]]) -> str:
    """A line of the table; errors are relative, squared ones summed over the weights and, by values, over the model's."""
    errors = [weight["errors"][-1] for weight in weights]
    values = [math.prod(weight["shape"]) for weight in weights]
    by_value = math.sqrt(sum(v * e**2 for v, e in zip(values, errors, strict=True)) / sum(values))
    cells = [text, f"{metrics['bits_plan']['code_bits']:.4f}", widths_of(weights), f"{metrics['adapter_bytes'] / 1e6:.1f}",
             f"{sum(errors) / len(errors):.4f}", f"{sum(e**2 for e in errors):.2f}", f"{by_value:.4f}",
             f"{metrics['scores']['nll']:.4f}", f"{metrics['scores']['perplexity']:.1f}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def widths_of(weights: list[dict[str, Any]]) -> str:
    """How many weights have each width."""
    counts = Counter(weight["bits"] for weight in weights)
    return ", ".join(f"{counts[bits]} x {bits}" for bits in sorted(counts))


def rules(args: argparse.Namespace) -> Iterator[Measured]:
    """The paper's rule and the budgets at its bits, and what bounds them."""
    for bits in NOMINAL:
        metrics, weights = measure(args, f"quant.bits={bits:g}", "quant.allocation=paper")
        yield f"{bits:g}: the paper's rule", metrics, weights
        budget = math.floor(metrics["bits_plan"]["code_bits"] * 1e4) / 1e4
        for rule, text in BUDGETS.items():
            yield f"{bits:g}: {text}", *measure(args, f"quant.bits={budget:g}", f"quant.allocation={rule}")
    for text, override in (("NF3 in all weights", "quant.bits=3"), ("NF2 in all weights", "quant.bits=2"),
                           ("not quantized", "quant=lora")):  # fmt: skip
        yield text, *measure(args, override)


def sums(args: argparse.Namespace) -> Iterator[Measured]:
    """Plans of the least sum of errors, summed in several ways and over several choices, at the paper's 2.5 bits."""
    norms = weight_norms(args)
    alone = {bits: measure(args, f"quant.bits={bits}", "stages=[quantize]")[1] for bits in (2, 3, 4)}
    metrics, found = measure(args, f"quant.bits={NOMINAL[0]:g}", "quant.allocation=paper")
    yield "the paper's rule", metrics, found
    budget = sum(math.prod(weight["shape"]) * weight["bits"] for weight in found)
    for text, factor, widths in SUMS:
        items = [
            [Option(weight["errors"][-1] ** 2 * factor(math.prod(weight["shape"]), norms[weight["name"]]),
                    (math.prod(weight["shape"]) * weight["bits"],)) for weight in same]
            for same in zip(*(alone[bits] for bits in widths), strict=True)
        ]  # fmt: skip
        plan = {weight["name"]: widths[option] for weight, option in zip(found, allocate(items, [budget]), strict=True)}
        yield text, *measure(args, plan=plan)


def calibrated(args: argparse.Namespace) -> Iterator[Measured]:
    """Calibrated starts at equal bits, which the errors of the weights alone share out, or those of the outputs."""
    start = (*GRID, "quant.calibration=full", f"calibration.file={args.calibrated}", "calibration.samples=47")
    for bits in SHARED:
        budget = (f"quant.bits={bits}", "quant.allocation=error")
        _, weights = measure(args, *budget, *GRID, "stages=[quantize]")
        plan = {weight["name"]: weight["bits"] for weight in weights}
        yield f"{bits}: by the errors of the weights", *measure(args, *start, plan=plan)
        yield f"{bits}: by the errors of the outputs", *measure(args, *start, *budget)


def written(measured: Measured) -> dict[str, Any]:
    """A row of the result file."""
    rule, metrics, weights = measured
    return {
        "rule": rule,
        "code_bits": metrics["bits_plan"]["code_bits"],
        "widths": widths_of(weights),
        "weight_error": metrics["init"]["mean_error"],
        "output_error": metrics["init"]["mean_output_error"],
        "perplexity": metrics["scores"]["perplexity"],
    }


COLUMNS = [
    {"name": "bits: rule", "key": "rule"},
    {"name": "bits of the codes", "key": "code_bits", "format": "{:.4f}"},
    {"name": "weights x bits", "key": "widths"},
    {"name": "weight error", "key": "weight_error", "format": "{:.4f}"},
    {"name": "output error", "key": "output_error", "format": "{:.4f}"},
    {"name": "perplexity", "key": "perplexity", "format": "{:.2f}"},
]
"""Of the result file of --calibrated."""


def weight_norms(args: argparse.Namespace) -> dict[str, float]:
    """||W|| of every matrix of the model by its module."""
    source = locate(loftq_exp.compose(["model=smollm2"]).model, args.output_dir / "cache")
    with open_tensors(source.folder) as tensors:
        return {name.removesuffix(".weight"): float(tensors.read(name).double().norm()) for name in tensors.names}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("/work/shared/data/wikitext-2/test.raw.txt"))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=Path("/tmp/allocation"))
    parser.add_argument("--sums", action="store_true")
    parser.add_argument("--calibrated", type=Path, metavar="TEXT")
    args = parser.parse_args()
    rows, results = [], []
    for measured in (calibrated if args.calibrated else sums if args.sums else rules)(args):
        rows.append(row(*measured))
        print(rows[-1], flush=True)
        if args.calibrated:
            results.append(written(measured))
            facts = {
                "command": f"python benchmarks/allocation.py {shlex.join(sys.argv[1:])}",
                "provenance": measured[1]["provenance"],
            }
            RESULT.write_text(json.dumps({"facts": facts, "columns": COLUMNS, "rows": results}, indent=1) + "\n")
    headings = ("", "code bits", "weights x bits", "adapter MB", "mean error", "total squared error",
                "root mean squared error by value", "NLL", "perplexity")  # fmt: skip
    print("\n| " + " | ".join(headings) + " |\n|" + " --- |" * len(headings))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
