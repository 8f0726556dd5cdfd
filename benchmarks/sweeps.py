"""What a sweep costs beside its dearest run: steps 1 to 5 at rank 64, and ranks 8 to 64 at one step, on one cache.

    python benchmarks/sweeps.py [--layers 1] [--folder /tmp/llama-2-7b-shaped-small]

Runs the quantize stage on a few layers of Llama-2-7B's shape, each job as `python -m loftq_exp -m` would run it, and once the
dearest job alone on an empty cache. Prints Markdown for docs/performance.md: all seconds, and those of decomposing alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from checkpoint import make

import loftq_exp


def job(folder: Path, rank: int, steps: int) -> tuple[float, float]:
    """Seconds of one job's initialisation, all of them and those of decomposing (of the threads together)."""
    config = loftq_exp.compose(["model=llama-2", f"model.path={folder / 'source'}", "stages=[quantize]", f"quant.rank={rank}",
                                f"quant.iter={steps}", f"output_dir={folder / 'out'}", "save_format=bnb4"])  # fmt: skip
    metrics = loftq_exp.run(config).metrics
    return metrics["seconds"]["quantize"], metrics["init"]["phases"].get("decompose", 0.0)


def sweep(folder: Path, jobs: list[tuple[int, int]]) -> tuple[float, float]:
    """The same of several jobs, one after the other, from an empty cache."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    times = [job(folder, *settings) for settings in jobs]
    return sum(seconds for seconds, _ in times), sum(spent for _, spent in times)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-2-7b-shaped-small"))
    args = parser.parse_args()
    make(args.folder / "source", args.layers)
    sweep(args.folder, [(64, 1)])  # what is loaded or compiled once is not part of any
    print(
        "| sweep | seconds | dearest job alone | ratio | ratio of decomposing alone |\n| --- | --- | --- | --- | --- |"
    )
    for label, jobs in (
        ("steps 1, 2, 3, 4, 5 at rank 64", [(64, steps) for steps in range(1, 6)]),
        ("ranks 8, 16, 32, 64 at 1 step", [(rank, 1) for rank in (8, 16, 32, 64)]),
    ):
        alone, whole = sweep(args.folder, jobs[-1:]), sweep(args.folder, jobs)
        print(f"| {label} | {whole[0]:.1f} | {alone[0]:.1f} | {whole[0] / alone[0]:.2f} | {whole[1] / alone[1]:.2f} |")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
