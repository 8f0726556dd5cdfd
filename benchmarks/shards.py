"""How much faster several one-thread processes make one initialisation: seconds of the quantize stage, by number of processes.

    OMP_NUM_THREADS=1 python benchmarks/shards.py [--layers 2] [--processes 1 2] [--folder /tmp/llama-2-7b-shaped-small]

A few layers of Llama-2-7B's shape, each time on an empty cache. The processes are forked once all is imported and compiled. The
machine must be idle, and have as many cores as processes.
Writes docs/results/shards.json, the table of docs/sweeps.md: the seconds of the whole stage, with writing the checkpoint; of the
shared work alone; and of the CPU on that, in the process that needed most. The last does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import make

import loftq_exp
from loftq_exp.initialise import share

TABLE = Path(__file__).parents[1] / "docs" / "results" / "shards.json"
COLUMNS = [
    ("processes", "processes", "{}"), ("whole stage, s", "seconds", "{:.1f}"), ("ratio", "seconds_ratio", "{:.2f}"),
    ("shared work, s", "shared", "{:.1f}"), ("ratio", "shared_ratio", "{:.2f}"),
    ("CPU of it, s", "cpu", "{:.1f}"), ("ratio", "cpu_ratio", "{:.2f}"),
]  # fmt: skip


def config(folder: Path, steps: int, *settings: str) -> loftq_exp.RunConfig:
    """The settings of the initialisation."""
    return loftq_exp.compose(["model=llama-2", f"model.path={folder / 'source'}", "stages=[quantize]", f"quant.iter={steps}",
                              "quant.rank=64", f"output_dir={folder / 'out'}", "save_format=bnb4", *settings])  # fmt: skip


def timed(folder: Path, shards: int, steps: int) -> tuple[float, float, float]:
    """The seconds of the slowest of `shards` processes: of the whole stage, of the shared work, and of the CPU on that."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    for path in folder.glob("shared-*"):
        path.unlink()
    began = time.perf_counter()
    children = [_start(folder, shard, shards, steps) for shard in range(shards)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit("a process failed")
    whole = time.perf_counter() - began
    shared = [json.loads(path.read_text()) for path in folder.glob("shared-*")]
    return whole, max(seconds for seconds, _ in shared), max(cpu for _, cpu in shared)


def _start(folder: Path, shard: int, shards: int, steps: int) -> int:
    child = os.fork()
    if child:
        return child
    # One process of two shards computes all the weights alone, by the same way.
    settings = [f"initialise.shards={max(shards, 2)}", f"initialise.shard={shard}"]
    compute = share._compute

    def clocked(*arguments: object) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        compute(*arguments)  # type: ignore[arg-type]
        spent = (time.perf_counter() - began, time.process_time() - cpu)
        (folder / f"shared-{shard}").write_text(json.dumps(spent))

    share._compute = clocked  # type: ignore[assignment]
    try:
        loftq_exp.run(config(folder, steps, *settings))
    finally:
        os._exit(int(not (folder / f"shared-{shard}").exists()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-2-7b-shaped-small"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.folder / "source").exists():
        make(options.folder / "source", options.layers)
    shutil.rmtree(options.folder / "out", ignore_errors=True)
    loftq_exp.run(config(options.folder, options.steps))  # compiles the kernels
    rows: list[dict[str, Any]] = []
    for processes in options.processes:
        found = dict(zip(("seconds", "shared", "cpu"), timed(options.folder, processes, options.steps), strict=True))
        ratios = {f"{name}_ratio": (rows[0][name] if rows else value) / value for name, value in found.items()}
        rows.append({"processes": processes} | found | ratios)
    facts = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/shards.py",
        "steps": options.steps,
        "layers": options.layers,
    }
    columns = [{"name": name, "key": key, "format": form} for name, key, form in COLUMNS]
    TABLE.write_text(json.dumps({"facts": facts, "columns": columns, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
