"""A whole checkpoint of Llama-2-7B's shape from files to an initialised checkpoint: time, memory, and where the time goes.

    python benchmarks/checkpoint.py [--layers 32] [--folder /tmp/llama-2-7b-shaped] [--keep]

Makes a synthetic checkpoint with Llama-2-7B's names and shapes (bfloat16, Gaussian, in shards: 13.5 GB with 32 layers), and
runs the command on it at rank 64 and 5 steps in a control group of 3 GiB, the page cache included, where one can be made (it
takes root). Then runs it once more, which finds all in the cache. Says first how much disk it needs. Prints Markdown for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from loftq_exp.artifact.writer import SafetensorsWriter
from loftq_exp.storage.specs import TensorSpec

HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 11008, 32000
LIMIT = 3 * 2**30


def specs(layers: int) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by its name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (FEED_FORWARD, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, FEED_FORWARD)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}


def make(folder: Path, layers: int) -> None:
    """Writes the synthetic checkpoint where it is not there yet."""
    if (folder / "config.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**24 + 1009, generator=generator).mul_(0.02).to(torch.bfloat16)
    wanted = specs(layers)
    with SafetensorsWriter(folder, wanted) as out:
        for number, (name, spec) in enumerate(wanted.items()):
            # Slices of one draw from changing places: no two weights are alike, and making them takes no time.
            copies = -(-torch.Size(spec.shape).numel() // len(noise)) + 1
            start = number * 7919 % len(noise)
            out.write(name, noise.repeat(copies)[start : start + torch.Size(spec.shape).numel()].view(spec.shape))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=layers, vocab_size=VOCABULARY
    )
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def anonymous(pid: int) -> int:
    """Anonymous memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def confined() -> bool:
    """Puts this process into a control group of 3 GiB of memory; False where that is not to be had."""
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / "loftq_exp-benchmark"
        try:
            group.mkdir(exist_ok=True)
            (group / file).write_text(str(LIMIT))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            continue
        return True
    return False


def run(folder: Path) -> tuple[float, int, dict[str, float]]:
    """Seconds and peak anonymous memory of one run of the command, and the totals of its report."""
    shutil.rmtree(folder / "saved", ignore_errors=True)
    command = [sys.executable, "-m", "loftq_exp", "model=llama-2", f"model.path={folder / 'source'}", "stages=[quantize]",
               "quant.rank=64", "quant.iter=5", f"output_dir={folder}", f"save_dir={folder / 'saved'}"]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, anonymous(process.pid))
            except OSError:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit(f"the command failed with exit code {process.returncode}")
    watcher.join()
    (report,) = (folder / "saved").glob("*/init_report.json")
    return time.perf_counter() - began, peak, json.loads(report.read_text())["totals"]


def main() -> None:
    """Makes, runs twice, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-2-7b-shaped"))
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    args = parser.parse_args()
    size = sum(spec.nbytes for spec in specs(args.layers).values())
    needed = int(size * 2.5)  # the source, the result, and the cache's codes and factors
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if free < needed:
        sys.exit(
            f"{args.folder} has {free / 1e9:.0f} GB free and {needed / 1e9:.0f} GB are needed; set --folder or fewer --layers"
        )
    print(f"{size / 1e9:.1f} GB of weights, {needed / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} GB free", flush=True)
    make(args.folder / "source", args.layers)
    print(f"memory limited to 3 GiB: {confined()}", flush=True)  # of the command, which inherits it
    for label in ("first run", "again, all from the cache"):
        seconds, peak, totals = run(args.folder)
        phases = ", ".join(f"{name} {spent:.0f} s" for name, spent in totals["phases"].items())
        print(
            f"| {label} | {size / 1e9:.1f} | {seconds:.0f} | {peak / 2**20:.0f} | {totals['computed']} | {phases} |",
            flush=True,
        )
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
