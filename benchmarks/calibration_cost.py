"""What a calibrated start costs, beside a data-free one in the same run; write docs/calibration-cost.json and a plot.

    python benchmarks/calibration_cost.py [weights] [curves] [model] [budget]     (default: all; a quarter of an hour)

weights: seconds and both errors of one weight, for each method. curves: both errors against seconds, step by step. model: the
quantize stage of SmolLM2-135M on 128 x 512 tokens of GSM8K's training problems, against the collection of H alone. budget:
seconds of the weights of a Llama-2-7B block and the process's peak anonymous memory. A weight is Gaussian; H is the second
moment of inputs with a spectrum that falls as 1/k, as those of a language model do roughly.

scripts/result_tables.py writes the tables into docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch

import loftq_exp
from loftq_exp.loftq import decompose, make_quantizer, metric_of
from loftq_exp.loftq.metric import Metric
from loftq_exp.provenance import provenance

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
RANK, STEPS, BITS, REPEATS = 64, 5, 2, 3
SIZE = 2048
BLOCK = {"q, k, v, o": (4, (4096, 4096)), "gate, up": (2, (11008, 4096)), "down": (1, (4096, 11008))}
"""The weights of a block of Llama-2-7B: how many, and (out, in)."""
LAYERS = 32
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
    began = time.perf_counter()
    found = decompose(weight, quantizer, RANK, steps, metric=metrics.get(settings.get("kind", "")),
                      rounding=settings.get("rounding", "nearest"))  # fmt: skip
    return time.perf_counter() - began, (found, quantizer)


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
    began = time.perf_counter()
    full = metric_of(hessian)
    seconds = time.perf_counter() - began
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


def curves() -> dict[str, list[list[float]]]:
    """(seconds, weight error, output error) after 1, 2, 3, 5, 7 and 10 steps of each method."""
    metrics, _ = measured_metrics(SIZE)
    weight = weight_of((SIZE, SIZE))
    lines = {}
    for method in METHODS:
        points = []
        for steps in (1, 2, 3, 5, 7, 10):
            seconds, found = min((solved(weight, metrics, method, steps) for _ in range(2)), key=lambda pair: pair[0])
            points.append([seconds, *errors(weight, found, metrics["full"])])
        lines[method] = points
    figure, both = plt.subplots(1, 2, figsize=(9, 4), sharex=True)
    for (method, points), marker in zip(lines.items(), "osv^D", strict=True):
        seconds, *values = zip(*points, strict=True)
        for axes, column in zip(both, values, strict=True):
            axes.semilogx(seconds, column, f"{marker}-", label=method)
    for axes, label in zip(both, ("relative error of the weight", "relative error of the outputs"), strict=True):
        axes.set(xlabel=f"seconds, {SIZE} x {SIZE}, rank {RANK}, {BITS} bits, after 1 to 10 steps", ylabel=label)
        axes.grid(alpha=0.3)
    both[0].legend(loc="lower center", bbox_to_anchor=(1.1, 1), ncols=5, frameon=False)
    figure.tight_layout()
    figure.savefig(DOCS / "calibration-time.png", dpi=120, bbox_inches="tight")
    return lines


def model(data: Path) -> list[dict[str, Any]]:
    """The whole quantize stage of SmolLM2, and the collection in it."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "problems.txt"
        rows = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
        text.write_text("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))
        overrides = [
            "model=smollm2", "task=wikitext", f"calibration.file={text}", "quant.calibration=full", "quant.scale=search",
            "quant.levels=optimal", f"quant.bits={BITS}", f"quant.rank={RANK}", "stages=[quantize]", f"output_dir={folder}/out",
            f"task.train_file={text}", f"task.eval_file={text}",
        ]  # fmt: skip
        result = loftq_exp.run(loftq_exp.compose(overrides))
        report = json.loads((result.init_dir / "init_report.json").read_text())
    collecting, whole = report["calibration"]["seconds"], report["totals"]["seconds"]
    return [{"model": "SmolLM2-135M", "tokens": report["calibration"]["tokens"], "collecting": collecting, "whole": whole,
             "ratio": whole / collecting}]  # fmt: skip


def budget() -> list[dict[str, Any]]:
    """Seconds and peak anonymous memory for each shape of a Llama-2-7B block, each in a process of its own."""
    rows = []
    for name, (count, shape) in BLOCK.items():
        done = subprocess.run(
            [sys.executable, __file__, "--one", *map(str, shape)], check=True, capture_output=True, text=True
        )
        one = json.loads(done.stdout.splitlines()[-1])
        rows.append({"weights": name, "shape": f"{shape[0]} x {shape[1]}", "count": count * LAYERS, **one,
                     "all": count * LAYERS * one["seconds"]})  # fmt: skip
    return rows


@contextmanager
def peak_anonymous() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the process's peak anonymous memory so far, sampled every 20 ms, in bytes."""
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            status = Path(f"/proc/{os.getpid()}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        thread.join()


def one(rows: int, columns: int) -> None:
    """Print the cost of one weight as JSON: the Cholesky factor, the decomposition, and the memory of both."""
    width = min(columns, 2048)  # of a low-rank part only, since only the seconds of what follows count
    few = inputs_moment(width)
    hessian = torch.zeros(columns, columns)
    hessian.diagonal().fill_(float(few.diagonal().mean()))
    hessian[:width, :width] = few
    weight = weight_of((rows, columns))
    with peak_anonymous() as peak:
        began = time.perf_counter()
        metric = metric_of(hessian)
        cholesky = time.perf_counter() - began
        del hessian
        seconds = solved(weight, {"full": metric}, "calibrated")[0]
    print(json.dumps({"cholesky": cholesky, "seconds": seconds, "memory": peak()}))


def columns(*pairs: tuple[str, str, str]) -> list[dict[str, str]]:
    """Columns of a result table from (key, name, format)."""
    return [{"key": key, "name": name} | ({"format": form} if form else {}) for key, name, form in pairs]


TABLES = {
    "weights": columns(("start", "start", ""), ("seconds", "seconds", "{:.2f}"), ("per_published", "/ published", "{:.1f}"),
                       ("per_grid", "/ data-free on the same grid", "{:.1f}"), ("weight_error", "weight error", "{:.4f}"),
                       ("output_error", "output error", "{:.4f}")),
    "model": columns(("model", "model", ""), ("tokens", "tokens", "{:,}"), ("collecting", "collecting H, s", "{:.0f}"),
                     ("whole", "whole quantize stage, s", "{:.0f}"), ("ratio", "ratio", "{:.2f}")),
    "budget": columns(("weights", "weights", ""), ("shape", "out x in", ""), ("count", "in the model", "{}"),
                      ("cholesky", "Cholesky factor, s", "{:.1f}"), ("seconds", "decomposition, s", "{:.1f}"),
                      ("all", "all decompositions, s", "{:.0f}"), ("memory", "peak anonymous memory, bytes", "{:.3g}")),
}  # fmt: skip


def main() -> None:
    """Measure the chosen parts and write their result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="weights, curves, model, budget")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    parts: dict[str, Callable[[], Any]] = {
        "weights": weights,
        "curves": curves,
        "model": lambda: model(args.data),
        "budget": budget,
    }
    for part in args.parts or parts:
        print(part, flush=True)
        found = parts[part]()
        print(json.dumps(found, indent=1))
        if part in TABLES:
            facts = {"command": f"python benchmarks/calibration_cost.py {part}", "provenance": provenance()}
            file = DOCS / "results" / f"calibration-cost-{part}.json"
            file.write_text(json.dumps({"facts": facts, "columns": TABLES[part], "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
