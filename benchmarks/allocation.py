"""The paper's mixed precisions beside budgets spent where the error is, at equal bits: weight error, and perplexity.

    python benchmarks/allocation.py [--text /work/shared/data/wikitext-2/test.raw.txt] [--blocks 8] [--output-dir /tmp/allocation]

LoftQ on SmolLM2-135M, 5 steps, rank 64; perplexity straight after initialisation, on the first blocks of 1024 tokens. Prints
Markdown for docs/low-bit.md. What is finished is found again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import loftq_exp

RULES = {"paper": "the paper's rule", "error": "`allocation=error`", "error+rank": "`allocation=error+rank`"}
SETTINGS = [(bits, rule, f"{bits:g}", text) for bits in (2.25, 2.5, 3.0) for rule, text in RULES.items()]
"""Bits, quant.allocation, and how the table shows them."""
BOUNDS = [
    (16.0, None, "16", "not quantized"),
    (2.0, None, "2", "NF2"),
    (3.0, None, "3", "NF3"),
    (4.0, None, "4", "NF4"),
]


def measure(args: argparse.Namespace, bits: float, rule: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a run, and what its report says of each weight."""
    how = ["quant=lora"] if bits == 16 else [f"quant.bits={bits:g}", f"quant.allocation={rule or 'null'}"]
    config = loftq_exp.compose(["stages=[quantize,evaluate]", "model=smollm2", *how, "task=wikitext",
                                f"task.eval_file={args.text}", f"task.max_eval_samples={args.blocks}",
                                "train.backbone=dense", "train.per_device_eval_batch_size=1", f"output_dir={args.output_dir}"])  # fmt: skip
    result = loftq_exp.run(config)
    return result.metrics, json.loads((result.init_dir / "init_report.json").read_text())["weights"]


def row(shown: str, text: str, metrics: dict[str, Any], weights: list[dict[str, Any]]) -> str:
    """A line of the table; errors are relative, squared ones summed over the weights and, by values, over the model's."""
    errors = [weight["errors"][-1] for weight in weights]
    values = [math.prod(weight["shape"]) for weight in weights]
    widths = ", ".join(f"{sum(w['bits'] == b for w in weights)} x {b}" for b in sorted({w["bits"] for w in weights}))
    by_value = math.sqrt(sum(v * e**2 for v, e in zip(values, errors, strict=True)) / sum(values))
    cells = [shown, text, f"{metrics['bits_plan']['code_bits']:.4f}", widths, f"{metrics['adapter_bytes'] / 1e6:.1f}",
             f"{sum(errors) / len(errors):.4f}", f"{sum(e**2 for e in errors):.2f}", f"{by_value:.4f}",
             f"{metrics['scores']['nll']:.4f}", f"{metrics['scores']['perplexity']:.1f}"]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("/work/shared/data/wikitext-2/test.raw.txt"))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=Path("/tmp/allocation"))
    args = parser.parse_args()
    rows = []
    for bits, rule, shown, text in [*SETTINGS, *BOUNDS]:
        rows.append(row(shown, text, *measure(args, bits, rule)))
        print(rows[-1], flush=True)
    headings = ("bits", "rule", "code bits", "weights x bits", "adapter MB", "mean error", "total squared error",
                "root mean squared error by value", "NLL", "perplexity")  # fmt: skip
    print("\n| " + " | ".join(headings) + " |\n|" + " --- |" * len(headings))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
