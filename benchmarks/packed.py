"""Packed backbones beside bitsandbytes' 4-bit layers and dense ones: time of a training step, of generation, and memory.

    python benchmarks/packed.py time      (ratios in one process, runs alternating; some minutes on two cores)
    python benchmarks/packed.py memory    (peak memory of a run of each form, each in a process of its own)

The model is SmolLM2-135M with adapters of rank 16, so that the backbone is not small beside them. Prints Markdown for
docs/low-bit.md.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loftq_exp
from loftq_exp.report.table import markdown

RANK = 16
SETTINGS = ["model=smollm2", f"quant.rank={RANK}", "quant.iter=1", "quant.dropout=0"]
REPETITIONS = 5


class Form(NamedTuple):
    """A way to hold the backbone."""

    label: str
    overrides: list[str]


FORMS = (
    Form("dense, 16 bits", ["quant=lora", f"quant.rank={RANK}", "quant.iter=0"]),
    Form("bitsandbytes NF4", ["save_format=bnb4"]),
    Form("packed NF4", ["save_format=packed"]),
    Form("packed NF3", ["save_format=packed", "quant.bits=3"]),
    Form("packed NF2", ["save_format=packed", "quant.bits=2"]),
    Form("packed NF2, double", ["save_format=packed", "quant.bits=2", "quant.double=true"]),
)


def overrides(form: Form, folder: Path) -> list[str]:
    saved = folder / "saved" / form.label.replace(", ", "-").replace(" ", "-")
    return [*SETTINGS, *form.overrides, f"output_dir={folder}", f"save_dir={saved}"]


def initialised(form: Form, folder: Path) -> Path:
    return loftq_exp.run(loftq_exp.compose([*overrides(form, folder), "stages=[quantize]"])).init_dir


def load(form: Form, folder: Path) -> Any:
    place = initialised(form, folder)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(model, str(place), subfolder="loftq_init", is_trainable=True)


def measure_time(folder: Path) -> None:
    """Seconds of each form, alternating, and their ratio to bitsandbytes'."""
    transformers.utils.logging.disable_progress_bar()
    models = {form.label: load(form, folder) for form in FORMS}
    ids = torch.arange(4 * 128).remainder(1000).add(3).reshape(4, 128)

    def step(model: Any) -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    def generate(rows: int) -> Callable[[Any], None]:
        def work(model: Any) -> None:
            model.eval()
            prompt = ids[:rows, :64]
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, min_new_tokens=16,
                           do_sample=False, pad_token_id=0)  # fmt: skip

        return work

    works = {
        "training step, 4 x 128 tokens": step,
        "16 tokens for 1 prompt": generate(1),
        "16 tokens for 4": generate(4),
    }
    rows = []
    for what, work in works.items():
        seconds: dict[str, list[float]] = {label: [] for label in models}
        for _ in range(REPETITIONS + 1):
            for label, model in models.items():
                began = time.perf_counter()
                work(model)
                seconds[label].append(time.perf_counter() - began)
        medians = {label: statistics.median(times[1:]) for label, times in seconds.items()}  # the first one warms up
        base = medians["bitsandbytes NF4"]
        for label, times in seconds.items():
            ratios = [own / other for own, other in zip(times[1:], seconds["bitsandbytes NF4"][1:], strict=True)]
            rows.append([what, label, f"{medians[label]:.3f}", f"{medians[label] / base:.2f}",
                         f"{min(ratios):.2f} to {max(ratios):.2f}"])  # fmt: skip
    print(markdown(("what", "backbone", "s (median)", "/ bitsandbytes", "spread"), rows))


def measure_memory(folder: Path) -> None:
    """Peak memory of the finetune stage of each form, as the system counts it."""
    rows = []
    shutil.rmtree(folder / "memory", ignore_errors=True)
    for form in FORMS:
        command = [*overrides(form, folder), "stages=[finetune]", "train=demo", "train.max_steps=2",
                   "train.backbone=auto", "train.per_device_train_batch_size=1", "task.max_train_samples=8"]  # fmt: skip
        # From the same start, in a folder where nothing was trained before.
        initialised(form, folder)
        process = subprocess.Popen([sys.executable, "-m", "loftq_exp", *command, f"output_dir={folder}/memory"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        anonymous = mapped = 0
        while process.poll() is None:
            now = status(process.pid)
            anonymous, mapped = max(anonymous, now.get("RssAnon", 0)), max(mapped, now.get("RssFile", 0))
            time.sleep(0.01)
        output = process.communicate()[0]
        if process.returncode:
            sys.exit(output)
        stored = sum(path.stat().st_size for path in initialised(form, folder).glob("model*.safetensors"))
        rows.append([form.label, f"{stored / 2**20:.0f}", f"{anonymous / 1024:.0f}", f"{mapped / 1024:.0f}"])
    print(markdown(("backbone", "its file, MiB", "peak anonymous MiB", "peak file-backed MiB"), rows))


def status(pid: int) -> dict[str, int]:
    """The process's memory in KiB by the kernel's names; empty where it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {
            name: int(value.split()[0])
            for name, _, value in (line.partition(":") for line in lines)
            if name.startswith("Rss")
        }
    return {}


def main() -> None:
    """Measures what is named, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench-packed"))
    options = parser.parse_args()
    {"time": measure_time, "memory": measure_memory}[options.what](options.folder)


if __name__ == "__main__":
    main()
