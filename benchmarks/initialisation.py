"""LoftQ's initialisation of one weight: ours beside PEFT's algorithm and beside quantizing alone, in one run.

    make bench          (or: python benchmarks/initialisation.py --repeat 3 --shapes 4096x4096)

PEFT's side is the algorithm of `peft.utils.loftq_utils.loftq_init`, whose compute device cannot be a processor: bitsandbytes
quantizes, torch.linalg.svd decomposes, both in float32. The sides alternate, so that a slow moment hits all of them; what
counts is the ratio. Writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from loftq_exp.loftq import decompose, make_quantizer
from loftq_exp.provenance import provenance
from loftq_exp.report.table import markdown, print_table

RANK, STEPS = 64, 5
COLUMNS = (
    "out x in",
    "PEFT's algorithm s",
    "ours s",
    "ratio",
    "spread of the ratio",
    "quantize_4bit alone s",
    "error / PEFT's",
)


def peft_algorithm(weight: torch.Tensor) -> float:
    """PEFT's alternation on the processor; its relative error after the last step."""
    low_rank = torch.zeros_like(weight)
    for _ in range(STEPS):
        codes, state = bnb.quantize_4bit(weight - low_rank, blocksize=64, quant_type="nf4")
        residual = weight - bnb.dequantize_4bit(codes, state)
        U, S, V = torch.linalg.svd(residual, full_matrices=False)
        low_rank = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    return float((residual - low_rank).norm() / weight.norm())


def ours(weight: torch.Tensor) -> float:
    """The same number of steps with our quantizer and solver; its relative error after the last step."""
    return decompose(weight, make_quantizer("nf", 4, 64), RANK, STEPS).errors[-1]


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and what the work returned."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(rows: int, columns: int, repeat: int) -> list[str]:
    """One row of the table: medians over `repeat` alternating runs on a Gaussian weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    ours(weight)  # what is loaded or compiled once is not part of either side
    peers, own, alone, ratios = [], [], [], []
    for _ in range(repeat):
        peer_seconds, peer_error = timed(lambda: peft_algorithm(weight))
        own_seconds, own_error = timed(lambda: ours(weight))
        began = time.perf_counter()
        bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        alone.append(time.perf_counter() - began)
        peers.append(peer_seconds)
        own.append(own_seconds)
        ratios.append(peer_seconds / own_seconds)
    return [f"{rows} x {columns}", f"{statistics.median(peers):.2f}", f"{statistics.median(own):.2f}",
            f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f} to {max(ratios):.1f}",
            f"{statistics.median(alone):.2f}", f"{own_error / peer_error:.4f}"]  # fmt: skip


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1024x1024", "768x3072", "2048x2048"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "performance.md")
    args = parser.parse_args()
    rows = [measure(*map(int, shape.split("x")), args.repeat) for shape in args.shapes]
    print_table(f"one weight, rank {RANK}, {STEPS} steps, NF4", COLUMNS, rows)
    facts = provenance()
    command = " ".join(["python benchmarks/initialisation.py", *sys.argv[1:]])
    machine, versions = facts["hardware"], facts["versions"]
    args.out.write_text(
        "# Performance\n\n"
        f"LoftQ's initialisation of one Gaussian weight (rank {RANK}, {STEPS} steps, NF4, float32), PEFT's algorithm on the "
        f"processor beside ours, medians of {args.repeat} alternating runs. Made by\n`{command}`.\n\n"
        + markdown(COLUMNS, rows)
        + f"\nMachine: {machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}. "
        f"torch {versions['torch']}, bitsandbytes {versions['bitsandbytes']}, commit {facts['commit']}, {facts['created']}.\n"
        "No figure here is from a GPU: the CUDA path was not run.\n"
    )


if __name__ == "__main__":
    main()
