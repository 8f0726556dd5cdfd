"""Compare our LoftQ initialisation of one weight with others' in one run; write docs/performance.md and its two plots.

    make bench                                                       (about a quarter of an hour on two cores)
    python benchmarks/initialisation.py --only "1024 x 1024" scaling  (some parts; the others keep their measurements)

Measurements are kept in docs/performance.json, from which the page and the plots are made.
The others run unchanged. PEFT's `loftq_init` is its own source with the compute device, which it has no option for, set to
the CPU. It has no 2- or 3-bit and no uniform quantizer; there its loop and its `_low_rank_decomposition` run with our
quantizer. `torch.svd_lowrank` runs in the same loop. bitsandbytes' `quantize_4bit` is a single quantization. Runs
alternate, so that a slow moment affects all of them; compare ratios within one row.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import bitsandbytes.functional as bnb
import matplotlib
import torch
from peft.utils import loftq_utils

from loftq_exp import loftq_init
from loftq_exp.loftq import make_quantizer
from loftq_exp.loftq.quantizer import Quantizer
from loftq_exp.provenance import provenance
from loftq_exp.report.console import print_table
from loftq_exp.report.table import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T = TypeVar("T")
DOCS = Path(__file__).parents[1] / "docs"
KEPT = DOCS / "performance.json"
MARK = "<!-- what follows is not made by make bench -->\n"
STEPS = 5
AROUND = 3
"""Runs of ours before and after each run of PEFT's, which takes a hundred times as long."""
COLUMNS = ("out x in", "quantizer", "rank", "PEFT s", "ours s", "faster by", "spread", "error / PEFT's", "quantize_4bit s",
           "ours / quantize_4bit", "the same, with errors", "steps to PEFT's error", "then faster by")  # fmt: skip

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Backbone, A and B."""


class Case(NamedTuple):
    """One row of the table."""

    rows: int
    columns: int
    type: str = "nf"
    bits: int = 4
    rank: int = 64

    @property
    def label(self) -> str:
        """What the row is called in `--only`."""
        return f"{self.rows} x {self.columns} {self.type} {self.bits} rank {self.rank}"


SMALL = [
    Case(1024, 1024),
    Case(768, 3072),
    Case(3072, 768),
    *(Case(1024, 1024, rank=rank) for rank in (8, 16, 32, 128)),
]
LARGE = [Case(4096, 4096), *(Case(4096, 4096, *kind) for kind in (("nf", 2), ("nf", 3), ("uniform", 2), ("uniform", 3),
         ("uniform", 4))), Case(4096, 11008), Case(11008, 4096)]  # fmt: skip
SIZES = [1024, 2048, 4096, 8192]
MOST_FOR_PEFT = 4096
CURVES_AT = 2048


def pefts_own() -> Callable[..., Found]:
    """Return PEFT's `loftq_init` with its compute device set to the CPU, and nothing else changed."""
    source = inspect.getsource(loftq_utils.loftq_init)
    chosen = 'compute_device = "xpu" if is_xpu_available() else "cuda"'
    if chosen not in source:
        sys.exit("this version of PEFT chooses its compute device in another way; look at benchmarks/initialisation.py")
    names = dict(vars(loftq_utils))
    exec(source.replace(chosen, 'compute_device = "cpu"'), names)
    return names["loftq_init"]


PEFT = pefts_own()


def peft(weight: torch.Tensor, case: Case) -> Found:
    """What PEFT's five steps find."""
    if (case.type, case.bits) == ("nf", 4):
        return PEFT(weight, 4, case.rank, STEPS)
    return looped(weight, case, full)


def ours(weight: torch.Tensor, case: Case, steps: int = STEPS) -> Found:
    """What our function of that name finds."""
    return loftq_init(weight, case.bits, case.rank, steps, quant_type=case.type)


def full(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's decomposition of one residual."""
    found = loftq_utils._low_rank_decomposition(residual, rank)
    return found["L"], found["R"]


def lowrank(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.svd_lowrank with its defaults and a little oversampling."""
    U, S, V = torch.svd_lowrank(residual, q=rank + 8)
    return U[:, :rank] * S[:rank], V[:, :rank].T


def looped(
    weight: torch.Tensor,
    case: Case,
    solve: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    steps: int = STEPS,
) -> Found:
    """The alternation on our quantizer with another's decomposition."""
    quantizer, residual = quantizer_of(case), weight
    for _ in range(steps):
        backbone = quantizer.quantize(residual)
        B, A = solve(weight - backbone, case.rank)
        residual = weight - B @ A
    return backbone, A, B


def error(weight: torch.Tensor, found: Found) -> float:
    """||W - Q - B A|| / ||W||."""
    backbone, A, B = found
    return float((weight - backbone - B @ A).norm() / weight.norm())


def quantizer_of(case: Case) -> Quantizer:
    return make_quantizer(case.type, case.bits)


def weight_of(case: Case) -> torch.Tensor:
    return torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(0)) * 0.02


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what the work returned."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def row(case: Case, repeat: int) -> list[str]:
    """One row of the table: PEFT once a repetition, with ours and quantize_4bit AROUND times before it and after it."""
    weight = weight_of(case)
    mine: list[float] = []
    told: list[float] = []
    others: list[float] = []
    peers: list[float] = []

    def measure_ours() -> Found:
        seconds, found = timed(lambda: ours(weight, case))
        others.append(timed(lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))[0])
        told.append(timed(lambda: loftq_init(weight, case.bits, case.rank, STEPS, quant_type=case.type,
                                             return_errors=True))[0])  # fmt: skip
        mine.append(seconds)
        return found

    measure_ours()  # what is compiled or loaded once is not part of any side
    for times in (mine, told, others):
        times.clear()
    for _ in range(repeat):
        for _ in range(AROUND):
            own = measure_ours()
        seconds, theirs = timed(lambda: peft(weight, case))
        peers.append(seconds)
        for _ in range(AROUND):
            measure_ours()
    peer, our, other = map(statistics.median, (peers, mine, others))
    ratios, least = [peer / seconds for seconds in mine], error(weight, theirs)
    reached = next((steps for steps in range(1, 9) if error(weight, ours(weight, case, steps)) <= least), None)
    then = f"{peer / timed(lambda: ours(weight, case, reached or STEPS))[0]:.0f}" if reached else "not reached in 8"
    return [f"{case.rows} x {case.columns}", f"{case.type} {case.bits}", str(case.rank), f"{peer:.2f}", f"{our:.3f}",
            f"{peer / our:.0f}", f"{min(ratios):.0f} to {max(ratios):.0f}", f"{error(weight, own) / least:.4f}",
            f"{other:.3f}", f"{our / other:.2f}", f"{statistics.median(told) / other:.2f}", str(reached or "-"), then]  # fmt: skip


def scaling(size: int) -> tuple[int, float, float | None]:
    """The size of a square weight, our seconds, and PEFT's where it is not too large for them."""
    case = Case(size, size)
    weight = weight_of(case)
    ours(weight, case)
    mine = statistics.median(timed(lambda: ours(weight, case))[0] for _ in range(3))
    return size, mine, timed(lambda: peft(weight, case))[0] if size <= MOST_FOR_PEFT else None


def curves(size: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and error after 1 to 6 steps: exact, torch.svd_lowrank and ours."""
    case = Case(size, size)
    weight = weight_of(case)
    ours(weight, case)
    ways: dict[str, Callable[[int], Found]] = {
        "exact (full SVD)": lambda steps: looped(weight, case, full, steps),
        "torch.svd_lowrank": lambda steps: looped(weight, case, lowrank, steps),
        "loftq_exp": lambda steps: ours(weight, case, steps),
    }

    def point(way: Callable[[int], Found], steps: int) -> tuple[float, float]:
        times, found = zip(*(timed(functools.partial(way, steps)) for _ in range(AROUND)), strict=True)
        return statistics.median(times), error(weight, found[0])

    return {label: [point(way, steps) for steps in range(1, 7)] for label, way in ways.items()}


def parts() -> dict[str, Callable[[], Any]]:
    """All that is measured, by name."""
    return {
        **{case.label: functools.partial(row, case, 3) for case in SMALL},
        **{case.label: functools.partial(row, case, 1) for case in LARGE},
        **{f"scaling {size}": functools.partial(scaling, size) for size in SIZES},
        "error against time": functools.partial(curves, CURVES_AT),
    }


def plot_scaling(found: list[tuple[int, float, float | None]]) -> None:
    """Seconds against parameters for square weights, ours and PEFT's."""
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.loglog([s * s for s, *_ in found], [m for _, m, _ in found], "o-", label="loftq_exp")
    peers = [(s * s, p) for s, _, p in found if p is not None]
    axes.loglog(*zip(*peers, strict=True), "s-", label="PEFT's loftq_init, on the CPU")
    axes.set(xlabel="parameters of one square weight", ylabel="seconds, rank 64, 5 steps, NF4")
    axes.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "scaling.png", dpi=120)


def plot_error_against_time(found: dict[str, list[tuple[float, float]]]) -> None:
    """Error against seconds after 1 to 6 steps."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for (label, points), marker in zip(found.items(), "s^o", strict=True):
        axes.semilogx(*zip(*points, strict=True), f"{marker}-", label=label)
    axes.set(xlabel=f"seconds, {CURVES_AT} x {CURVES_AT}, rank 64, NF4, after 1 to 6 steps", ylabel="relative error")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)  # beside the curves is no room
    figure.tight_layout()
    figure.savefig(DOCS / "error-time.png", dpi=120)


def write(kept: dict[str, dict[str, Any]]) -> None:
    """The page and its plots, from all parts."""
    rows = [kept[case.label]["found"] for case in SMALL + LARGE]
    print_table(f"one weight, {STEPS} steps", COLUMNS, rows)
    squares = [kept[f"scaling {size}"]["found"] for size in SIZES]
    plot_scaling(squares)
    plot_error_against_time(kept["error against time"]["found"])
    per_value = [seconds / size**2 * 1e9 for size, seconds, _ in squares]
    machines = sorted({part["machine"] for part in kept.values()})
    commits = {
        machine: sorted({part["commit"] for part in kept.values() if part["machine"] == machine})
        for machine in machines
    }
    made = "; ".join(f"{machine}, commits {', '.join(commits[machine])}" for machine in machines)
    days = sorted({part["created"][:10] for part in kept.values()})
    page = DOCS / "performance.md"
    _, mark, rest = (page.read_text() if page.exists() else "").partition(MARK)
    page.write_text(
        "# Performance\n\n"
        f"LoftQ's initialisation of one Gaussian weight in float32, {STEPS} steps, measured by `make bench`. PEFT runs its own "
        "`loftq_init` with the compute device set to the CPU. For quantizers that it lacks, its loop runs with ours.\n"
        f"A ratio of seconds is a ratio of medians. For weights of 4096 and more, PEFT ran once and ours {2 * AROUND} times. PEFT does not "
        "report the error after each step. Ours does with `return_errors=True`, and in every run of the command: see the column "
        '"the same, with errors".\n\n'
        + markdown(COLUMNS, rows)
        + "\nNanoseconds per value for square weights: "
        + ", ".join(f"{size}: {value:.1f}" for size, value in zip(SIZES, per_value, strict=True))
        + f"; ratio of the largest to {SIZES[0]}: {per_value[-1] / per_value[0]:.2f}.\n\n"
        "![Seconds against parameters, ours and PEFT's](scaling.png)\n\n"
        "![Error against seconds for exact, torch.svd_lowrank and ours](error-time.png)\n\n"
        f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}: {made}.\n"
        f"These figures are for a CPU only; [on a GPU](gpu.md) has those of a card.\n{about_dirty(kept)}\n{mark}{rest}"
    )


def about_dirty(kept: dict[str, dict[str, Any]]) -> str:
    """Return a note about parts that were measured in a checkout with changed files; empty if there are none."""
    if not any(part["commit"].endswith("-dirty") for part in kept.values()):
        return ""
    return (
        "\n`-dirty`: tracked files differed from that commit during the measurement. `docs/performance.json`, which the benchmark "
        "writes after each part, was one of them. Whether there were others was not recorded.\n"
    )


def main() -> None:
    """Measure the chosen parts, and write the page once all parts are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the parts with one of these in their name")
    args = parser.parse_args()
    chosen = {name: part for name, part in parts().items() if not args.only or any(text in name for text in args.only)}
    if not chosen:
        sys.exit(f"--only: no part has that in its name; choose of: {', '.join(parts())}")
    kept = json.loads(KEPT.read_text()) if args.only and KEPT.exists() else {}
    commit = provenance()["commit"]  # once, before this run's own results make the checkout differ from it
    for name, part in chosen.items():
        facts = provenance()
        machine, versions = facts["hardware"], facts["versions"]
        print(name, flush=True)
        kept[name] = {
            "found": part(),
            "machine": f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}, torch "
            f"{versions['torch']}, PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}",
            "commit": commit,
            "created": facts["created"],
        }
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    if missing := [name for name in parts() if name not in kept]:
        print(f"docs/performance.md is written once these are measured too: {', '.join(missing)}")
    else:
        write(kept)


if __name__ == "__main__":
    main()
