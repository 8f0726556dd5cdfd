"""What a sweep costs beside its dearest run: steps 1 to 5 at rank 64, and ranks 8 to 64 at one step, on one cache.

    python benchmarks/sweeps.py [--layers 2] [--folder /tmp/llama-2-7b-shaped-small]

Runs the quantize stage on a few layers of Llama-2-7B's shape, each job as `python -m loftq_exp -m` would run it, and once the
dearest job alone on an empty cache. Prints Markdown for docs/performance.md: all seconds, those of decomposing alone (of both
workers together), and how long the disk takes to write as many bytes as the jobs' checkpoints have, zeros, synced. Then the
same of decomposing where nothing is read or written beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoint import make

import loftq_exp
from loftq_exp.loftq import Workspace, decompose, make_quantizer


class Cost(NamedTuple):
    """What one or more jobs took."""

    seconds: float
    decomposing: float
    """Seconds of decomposing, of the workers together."""
    written: int
    """Bytes of the checkpoints."""


def job(folder: Path, rank: int, steps: int) -> Cost:
    """One job's initialisation."""
    config = loftq_exp.compose(["model=llama-2", f"model.path={folder / 'source'}", "stages=[quantize]", f"quant.rank={rank}",
                                f"quant.iter={steps}", f"output_dir={folder / 'out'}", "save_format=bnb4"])  # fmt: skip
    result = loftq_exp.run(config)
    files = result.init_dir.rglob("*.safetensors")
    decomposing = result.metrics["init"]["phases"].get("decompose", 0.0)
    return Cost(result.metrics["seconds"]["quantize"], decomposing, sum(file.stat().st_size for file in files))


def sweep(folder: Path, jobs: list[tuple[int, int]]) -> Cost:
    """Several jobs, one after the other, from an empty cache."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()  # what was written before is not part of it
    return Cost(*map(sum, zip(*(job(folder, *settings) for settings in jobs), strict=True)))


def writing(folder: Path, size: int) -> float:
    """Seconds that the disk takes to write so many bytes."""
    os.sync()
    began = time.perf_counter()
    with (folder / "zeros").open("wb") as file:
        for start in range(0, size, 2**22):
            file.write(bytes(min(2**22, size - start)))
        file.flush()
        os.fsync(file.fileno())
    (folder / "zeros").unlink()
    return time.perf_counter() - began


def computing(rows: int, columns: int, repeat: int = 5) -> float:
    """What 1 to 5 steps cost, each continued from the one before, over what 5 steps cost: medians, on all threads."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    quantizer, workspace = make_quantizer("nf", 4, scale_dtype=torch.bfloat16), Workspace()

    def seconds(jobs: Sequence[int], continued: bool) -> float:
        began, start = time.perf_counter(), None
        for steps in jobs:
            start = decompose(weight, quantizer, 64, steps, start=start if continued else None, workspace=workspace)
        return time.perf_counter() - began

    seconds([5], continued=False)  # what is loaded or compiled once is not part of it
    times = [(seconds(range(1, 6), continued=True), seconds([5], continued=False)) for _ in range(repeat)]
    whole, alone = map(statistics.median, zip(*times, strict=True))
    return whole / alone


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-2-7b-shaped-small"))
    args = parser.parse_args()
    make(args.folder / "source", args.layers)
    sweep(args.folder, [(64, 1)])  # what is loaded or compiled once is not part of any
    print("| sweep | seconds | dearest job alone | ratio | ratio of decomposing alone | GB written | seconds for as many zeros |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for label, jobs in (
        ("steps 1, 2, 3, 4, 5 at rank 64", [(64, steps) for steps in range(1, 6)]),
        ("ranks 8, 16, 32, 64 at 1 step", [(rank, 1) for rank in (8, 16, 32, 64)]),
    ):
        alone, whole = sweep(args.folder, jobs[-1:]), sweep(args.folder, jobs)
        print(f"| {label} | {whole.seconds:.1f} | {alone.seconds:.1f} | {whole.seconds / alone.seconds:.2f} | "
              f"{whole.decomposing / alone.decomposing:.2f} | {whole.written / 1e9:.1f} | "
              f"{writing(args.folder, whole.written):.1f} |", flush=True)  # fmt: skip
    shutil.rmtree(args.folder)
    print("\n| 1 to 5 steps, decomposing and nothing beside it | / 5 steps |\n| --- | --- |")
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
        print(f"| {rows} x {columns} | {computing(rows, columns):.2f} |", flush=True)


if __name__ == "__main__":
    main()
