"""LoftQ's initialisation of one weight, ours beside others', in one run: writes docs/performance.md and its two plots.

    make bench          (about a quarter of an hour on two cores; --quick: small weights only)

The others run as they are. PEFT's `loftq_init` is its own source with the compute device, which cannot be chosen there, set
to the processor; it has no 2- or 3-bit and no uniform quantizer, so that there its loop and its `_low_rank_decomposition`
run on our quantizer. `torch.svd_lowrank` stands in the same loop. bitsandbytes' `quantize_4bit` is one quantization, nothing
else. Runs alternate, so that a slow moment hits all of them; what counts is a ratio within one row.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import bitsandbytes.functional as bnb
import matplotlib
import torch
from peft.utils import loftq_utils

from loftq_exp.loftq import decompose, make_quantizer
from loftq_exp.loftq.quantizers import Quantizer
from loftq_exp.provenance import provenance
from loftq_exp.report.table import markdown, print_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T = TypeVar("T")
DOCS = Path(__file__).parents[1] / "docs"
STEPS = 5
COLUMNS = ("out x in", "quantizer", "rank", "PEFT s", "ours s", "faster by", "spread", "error / PEFT's", "quantize_4bit s",
           "ours / quantize_4bit", "steps to PEFT's error", "then faster by")  # fmt: skip


class Case(NamedTuple):
    """One row of the table."""

    rows: int
    columns: int
    type: str = "nf"
    bits: int = 4
    rank: int = 64


SMALL = [
    Case(1024, 1024),
    Case(768, 3072),
    Case(3072, 768),
    *(Case(1024, 1024, rank=rank) for rank in (8, 16, 32, 128)),
]
LARGE = [Case(4096, 4096), *(Case(4096, 4096, *kind) for kind in (("nf", 2), ("nf", 3), ("uniform", 2), ("uniform", 3),
         ("uniform", 4))), Case(4096, 11008), Case(11008, 4096)]  # fmt: skip


def pefts_own() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """PEFT's `loftq_init` with its compute device set to the processor, and not a word else changed."""
    source = inspect.getsource(loftq_utils.loftq_init)
    chosen = 'compute_device = "xpu" if is_xpu_available() else "cuda"'
    if chosen not in source:
        sys.exit("this version of PEFT chooses its compute device in another way; look at benchmarks/initialisation.py")
    names = dict(vars(loftq_utils))
    exec(source.replace(chosen, 'compute_device = "cpu"'), names)
    return names["loftq_init"]


PEFT = pefts_own()


def peft(weight: torch.Tensor, case: Case) -> float:
    """Relative error after PEFT's five steps."""
    if (case.type, case.bits) == ("nf", 4):
        backbone, lora_A, lora_B = PEFT(weight, 4, case.rank, STEPS)
        return relative(weight - backbone - lora_B @ lora_A, weight)
    return looped(weight, case, lambda residual: full(residual, case.rank))


def full(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's decomposition of one residual."""
    found = loftq_utils._low_rank_decomposition(residual, rank)
    return found["L"], found["R"]


def lowrank(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.svd_lowrank with its defaults and a little oversampling."""
    U, S, V = torch.svd_lowrank(residual, q=rank + 8)
    return U[:, :rank] * S[:rank], V[:, :rank].T


def looped(
    weight: torch.Tensor, case: Case, solve: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The alternation on our quantizer with another's decomposition; its relative error."""
    quantizer, residual = quantizer_of(case), weight
    for _ in range(STEPS):
        left = weight - quantizer.quantize(residual)
        B, A = solve(left)
        residual = weight - B @ A
    return relative(left - B @ A, weight)


def relative(residual: torch.Tensor, weight: torch.Tensor) -> float:
    return float(residual.norm() / weight.norm())


def quantizer_of(case: Case) -> Quantizer:
    return make_quantizer(case.type, case.bits)


def weight_of(case: Case) -> torch.Tensor:
    return torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(0)) * 0.02


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what the work returned."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(case: Case, repeat: int) -> list[str]:
    """One row of the table: PEFT once a repetition, with ours and quantize_4bit twice around it."""
    weight, quantizer = weight_of(case), quantizer_of(case)

    def ours(steps: int) -> float:
        return decompose(weight, quantizer, case.rank, steps).errors[-1]

    def alone() -> float:
        return float(bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")[0].shape[0])

    ours(2), alone()  # what is compiled or loaded once is not part of any side
    peers, own, others = [], [], []
    for _ in range(repeat):
        own.append(timed(lambda: ours(STEPS)))
        others.append(timed(alone)[0])
        peers.append(timed(lambda: peft(weight, case)))
        own.append(timed(lambda: ours(STEPS)))
        others.append(timed(alone)[0])
    seconds, error = statistics.median(s for s, _ in peers), peers[0][1]
    mine, other = statistics.median(s for s, _ in own), statistics.median(others)
    ratios = [seconds / s for s, _ in own]
    reached = next((steps for steps in range(1, 9) if ours(steps) <= error), None)
    then = f"{seconds / timed(lambda: ours(reached))[0]:.0f}" if reached else "not reached in 8"
    return [f"{case.rows} x {case.columns}", f"{case.type} {case.bits}", str(case.rank), f"{seconds:.2f}", f"{mine:.3f}",
            f"{seconds / mine:.0f}", f"{min(ratios):.0f} to {max(ratios):.0f}", f"{own[0][1] / error:.4f}",
            f"{other:.3f}", f"{mine / other:.2f}", str(reached or "-"), then]  # fmt: skip


def plot_scaling(sizes: list[int], most_for_peft: int) -> list[tuple[int, float, float | None]]:
    """Seconds against parameters for square weights, ours and PEFT's."""
    found = []
    for case in (Case(size, size) for size in sizes):
        weight = weight_of(case)
        own = functools.partial(decompose, weight, quantizer_of(case), case.rank, STEPS)
        mine = statistics.median(timed(own)[0] for _ in range(3))
        peers = timed(functools.partial(peft, weight, case))[0] if case.rows <= most_for_peft else None
        found.append((case.rows, mine, peers))
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.loglog([s * s for s, *_ in found], [m for _, m, _ in found], "o-", label="loftq_exp")
    peers = [(s * s, p) for s, _, p in found if p is not None]
    axes.loglog(*zip(*peers, strict=True), "s-", label="PEFT's loftq_init, on the processor")
    axes.set(xlabel="parameters of one square weight", ylabel="seconds, rank 64, 5 steps, NF4")
    axes.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "scaling.png", dpi=120)
    return found


def plot_error_against_time(size: int) -> None:
    """Error against seconds after 1 to 6 steps: exact, torch.svd_lowrank and ours."""
    global STEPS
    case = Case(size, size)
    weight, quantizer = weight_of(case), quantizer_of(case)
    decompose(weight, quantizer, 64, 2)
    figure, axes = plt.subplots(figsize=(6, 4))
    curves: dict[str, list[tuple[float, float]]] = {"exact (full SVD)": [], "torch.svd_lowrank": [], "loftq_exp": []}
    usual = STEPS
    for steps in range(1, 7):
        STEPS = steps
        curves["exact (full SVD)"].append(timed(lambda: looped(weight, case, lambda left: full(left, 64))))
        curves["torch.svd_lowrank"].append(timed(lambda: looped(weight, case, lambda left: lowrank(left, 64))))
        curves["loftq_exp"].append(timed(lambda steps=steps: decompose(weight, quantizer, 64, steps).errors[-1]))
    STEPS = usual
    for (label, points), marker in zip(curves.items(), "s^o", strict=True):
        axes.semilogx(*zip(*points, strict=True), f"{marker}-", label=label)
    axes.set(xlabel=f"seconds, {size} x {size}, rank 64, NF4, after 1 to 6 steps", ylabel="relative error")
    axes.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "error-time.png", dpi=120)


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small weights only, and nothing written")
    args = parser.parse_args()
    rows = [measure(case, 3) for case in SMALL]
    if args.quick:
        return print_table(f"one weight, {STEPS} steps", COLUMNS, rows)
    rows += [measure(case, 1) for case in LARGE]
    print_table(f"one weight, {STEPS} steps", COLUMNS, rows)
    scaling = plot_scaling([1024, 2048, 4096, 8192], most_for_peft=4096)
    plot_error_against_time(2048)
    per_value = [seconds / size**2 * 1e9 for size, seconds, _ in scaling]
    facts = provenance()
    machine, versions = facts["hardware"], facts["versions"]
    page = DOCS / "performance.md"
    _, mark, kept = (page.read_text() if page.exists() else "").partition(
        "<!-- what follows is not made by make bench -->\n"
    )
    page.write_text(
        "# Performance\n\n"
        f"LoftQ's initialisation of one Gaussian weight in float32, {STEPS} steps, made by `make bench`. PEFT's side is its own "
        "`loftq_init` with the compute device set to the processor (for quantizers that it lacks, its loop on ours).\n"
        "A ratio of seconds is that of medians; weights of 4096 and more were run once by PEFT and twice by ours.\n\n"
        + markdown(COLUMNS, rows)
        + "\nNanoseconds a value for square weights: "
        + ", ".join(f"{size}: {value:.1f}" for (size, *_), value in zip(scaling, per_value, strict=True))
        + f"; the largest over that of 1024: {per_value[-1] / per_value[0]:.2f}.\n\n"
        "![Seconds against parameters, ours and PEFT's](scaling.png)\n\n"
        "![Error against seconds for exact, torch.svd_lowrank and ours](error-time.png)\n\n"
        f"Machine: {machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}. torch {versions['torch']}, "
        f"PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}, commit {facts['commit']}, {facts['created']}.\n"
        f"No figure here is from a GPU: the CUDA path was not run.\n\n{mark}{kept}"
    )


if __name__ == "__main__":
    main()
