"""What a calibrated start of one weight costs, beside a data-free one in the same run.

    python benchmarks/calibration_cost.py [weights] [curves] [--draw]     (default: both; minutes)

weights: seconds and both errors, for each method. curves: both errors against seconds after 1 to 10 steps, and their plot
docs/calibration-time.svg; --draw: only the plot, from the result. The weight is Gaussian. H is the second moment of inputs with
a spectrum that falls as 1/k, as those of a language model do roughly. Seconds are CPU seconds of all threads.

Writes docs/results/calibration-cost-{weights,curves}.json; scripts/result_tables.py writes the table into docs/calibration.md.
The quantize stage of whole models is in calibration_stage.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from loftq_exp.loftq import decompose, make_quantizer, metric_of
from loftq_exp.loftq.metric import Metric
from loftq_exp.provenance import provenance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
RANK, STEPS, BITS, REPEATS, MOST_STEPS = 64, 5, 2, 3, 10
SIZE, CURVES_SIZE = 2048, 1024
METHODS: dict[str, dict[str, Any]] = {
    "published": {"levels": "nf", "scale": "absmax"},
    "same grid": {},
    "diagonal": {"kind": "diagonal"},
    "calibrated": {"kind": "full"},
    "calibrated, GPTQ": {"kind": "full", "rounding": "gptq"},
}
"""The first two are data-free. All but the published one have optimal levels and searched scales."""


def inputs_moment(width: int) -> torch.Tensor:
    """H (in, in) of 2 x in inputs whose spectrum falls as 1/k."""
    generator = torch.Generator().manual_seed(0)
    shape = 1 / torch.arange(1, width + 1).sqrt()
    inputs = torch.randn(2 * width, width, generator=generator) * shape
    mixed = inputs @ torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return mixed.T @ mixed / len(mixed)


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    """A Gaussian weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02


def solved(weight: torch.Tensor, metrics: dict[str, Metric], method: str, steps: int = STEPS) -> tuple[float, Any]:
    """Seconds and the factors of one decomposition."""
    settings = METHODS[method]
    quantizer = make_quantizer(
        "nf", BITS, levels=settings.get("levels", "optimal"), scale=settings.get("scale", "search")
    )
    began = time.process_time()
    found = decompose(weight, quantizer, RANK, steps, metric=metrics.get(settings.get("kind", "")),
                      rounding=settings.get("rounding", "nearest"))  # fmt: skip
    return time.process_time() - began, (found, quantizer)


def errors(weight: torch.Tensor, found: Any, metric: Metric) -> tuple[float, float]:
    """The relative errors of the weight and of its outputs, from the result's values."""
    factors, quantizer = found
    values = quantizer.decode_stored(factors.quantized)
    left = weight - torch.addmm(values, factors.lora_B, factors.lora_A)
    return (float(left.norm() / weight.norm()),
            float(metric.times_root(left).norm() / metric.times_root(weight).norm()))  # fmt: skip


def measured_metrics(width: int) -> tuple[dict[str, Metric], float]:
    """The norms of an H, and the seconds that the full one's Cholesky factor took."""
    hessian = inputs_moment(width)
    began = time.process_time()
    full = metric_of(hessian)
    seconds = time.process_time() - began
    return {"full": full, "diagonal": metric_of(hessian.diagonal().clone())}, seconds


def weights() -> list[dict[str, Any]]:
    """One row a method: the median seconds of alternating runs, their ratios, and both errors."""
    metrics, cholesky = measured_metrics(SIZE)
    weight = weight_of((SIZE, SIZE))
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    found = {method: solved(weight, metrics, method)[1] for method in METHODS}  # what is compiled once is not measured
    for _ in range(REPEATS):
        for method in METHODS:
            times[method].append(solved(weight, metrics, method)[0])
    median = {method: statistics.median(each) for method, each in times.items()}
    rows = []
    for method, seconds in median.items():
        error, output_error = errors(weight, found[method], metrics["full"])
        rows.append({"start": method, "seconds": seconds, "per_published": seconds / median["published"],
                     "per_grid": seconds / median["same grid"], "weight_error": error,
                     "output_error": output_error})  # fmt: skip
    return [*rows, {"start": "Cholesky factor of H", "seconds": cholesky, "per_published": cholesky / median["published"],
                    "per_grid": cholesky / median["same grid"]}]  # fmt: skip


def curves() -> list[dict[str, Any]]:
    """Seconds and both errors after each number of steps, of each method."""
    metrics, _ = measured_metrics(CURVES_SIZE)
    weight = weight_of((CURVES_SIZE, CURVES_SIZE))
    rows = []
    for method in METHODS:
        solved(weight, metrics, method)  # what is compiled once is not measured
    for steps in range(1, MOST_STEPS + 1):
        for method in METHODS:  # alternating
            seconds, found = solved(weight, metrics, method, steps)
            error, output_error = errors(weight, found, metrics["full"])
            rows.append({"start": method, "steps": steps, "seconds": seconds, "weight_error": error,
                         "output_error": output_error})  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Plot both errors against seconds."""
    plt.rcParams["svg.hashsalt"] = "calibration"  # the same bytes from the same rows
    figure, both = plt.subplots(1, 2, figsize=(9, 4), sharex=True)
    for method, marker in zip(METHODS, "osv^D", strict=True):
        mine = [row for row in rows if row["start"] == method]
        for axes, error in zip(both, ("weight_error", "output_error"), strict=True):
            axes.semilogx([row["seconds"] for row in mine], [row[error] for row in mine], f"{marker}-", label=method)
    for axes, label in zip(both, ("relative error of the weight", "relative error of the outputs"), strict=True):
        axes.set(xlabel=f"CPU seconds, {CURVES_SIZE} x {CURVES_SIZE}, after 1 to {MOST_STEPS} steps", ylabel=label)
        axes.grid(alpha=0.3)
    both[0].legend(loc="lower center", bbox_to_anchor=(1.1, 1), ncols=5, frameon=False)
    figure.tight_layout()
    figure.savefig(DOCS / "calibration-time.svg", bbox_inches="tight", metadata={"Date": None})


def columns(*pairs: tuple[str, str, str]) -> list[dict[str, str]]:
    """Columns of a result table from (key, name, format)."""
    return [{"key": key, "name": name} | ({"format": form} if form else {}) for key, name, form in pairs]


TABLES = {
    "weights": columns(("start", "start", ""), ("seconds", "seconds", "{:.2f}"), ("per_published", "/ published", "{:.1f}"),
                       ("per_grid", "/ data-free on the same grid", "{:.1f}"), ("weight_error", "weight error", "{:.4f}"),
                       ("output_error", "output error", "{:.4f}")),
    "curves": columns(("start", "start", ""), ("steps", "steps", "{}"), ("seconds", "seconds", "{:.2f}"),
                      ("weight_error", "weight error", "{:.4f}"), ("output_error", "output error", "{:.4f}")),
}  # fmt: skip


def result(part: str) -> Path:
    """The file of a part's result."""
    return DOCS / "results" / f"calibration-cost-{part}.json"


def main() -> None:
    """Measure the chosen parts, write their results, and draw."""
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {"weights": weights, "curves": curves}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="weights, curves")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    for part in [] if args.draw else args.parts or parts:
        rows = parts[part]()
        print(json.dumps(rows, indent=1))
        facts = {"command": f"python benchmarks/calibration_cost.py {part}", "provenance": provenance()}
        result(part).write_text(json.dumps({"facts": facts, "columns": TABLES[part], "rows": rows}, indent=1) + "\n")
    draw(json.loads(result("curves").read_text())["rows"])


if __name__ == "__main__":
    main()
