"""What a calibrated quantize stage costs: of SmolLM2-135M, and of one block of Llama-2-7B's shape.

    python benchmarks/calibration_stage.py model [--samples N] [--data DIR]     (minutes)
    python benchmarks/calibration_stage.py block [--samples N]                  (minutes; 2 GiB of disk in the temporary folder)

model: the whole stage on 128 x 512 tokens of GSM8K's training problems, against the forward passes in it that collect H. With
fewer tokens the ratio is larger, since only collecting grows with them.
block: one block of random weights with its embeddings and a tokenizer of words, from which all 32 blocks are computed.

Seconds are CPU seconds of the process, of all threads, so that other processes of the machine do not count. Memory is the
process's peak anonymous memory (RssAnon), sampled every 50 ms. Writes docs/results/calibration-cost-{model,block}.json;
scripts/result_tables.py writes the tables into docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import loftq_exp
from loftq_exp.calibration import spill
from loftq_exp.provenance import provenance

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LAYERS, WIDTH, WORDS = 32, 4096, 32000
"""Of Llama-2-7B."""
LENGTH, SAMPLES = 512, 128
"""Of the calibration text."""
CORES = 2
GIB = 2**30


class Watch(logging.Handler):
    """The CPU seconds and the peak anonymous memory of collecting, and of what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.collecting = self.rest = 0.0
        self.peak_collecting = self.peak = 0
        self._began = 0.0
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the block."""
        thread, logger = threading.Thread(target=self._sample), logging.getLogger("loftq_exp.initialise.calibrate")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        thread.start()
        self._began = time.process_time()
        try:
            yield
        finally:
            self.rest = time.process_time() - self._began
            logger.removeHandler(self)
            self._ended.set()
            thread.join()

    def emit(self, record: logging.LogRecord) -> None:
        """The last line that the calibration logs is its end."""
        if "samples, " in record.getMessage():
            now = time.process_time()
            self.collecting, self._began = now - self._began, now
            self.peak_collecting, self.peak = self.peak, 0

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            status = Path(f"/proc/{os.getpid()}/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)


def run_stage(folder: Path, text: str, samples: int, *overrides: str) -> tuple[Watch, dict[str, Any]]:
    """What the stage cost on `samples` windows of the text, and its report."""
    file, watch = folder / "text.txt", Watch()
    file.write_text(text)
    config = loftq_exp.compose([
        *overrides, "task=wikitext", f"task.train_file={file}", f"task.eval_file={file}", "quant=calibrated", "quant.bits=2",
        "quant.rank=64", "quant.iter=5", f"calibration.file={file}", f"calibration.samples={samples}",
        f"calibration.length={LENGTH}", "stages=[quantize]", f"output_dir={folder / 'out'}",
    ])  # fmt: skip
    with watch.running():
        result = loftq_exp.run(config)
    return watch, json.loads((result.init_dir / "init_report.json").read_text())


def model(samples: int, data: Path) -> list[dict[str, Any]]:
    """The stage of SmolLM2-135M."""
    problems = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in problems)
    with tempfile.TemporaryDirectory() as folder:
        watch, report = run_stage(Path(folder), text, samples, "model=smollm2")
    whole = watch.collecting + watch.rest
    return [{"model": "SmolLM2-135M", "tokens": report["calibration"]["tokens"], "collecting": watch.collecting,
             "whole": whole, "ratio": whole / watch.collecting, "wall_collecting": report["calibration"]["seconds"],
             "wall_whole": report["totals"]["seconds"], "memory": max(watch.peak_collecting, watch.peak) / GIB}]  # fmt: skip


def write_checkpoint(folder: Path) -> None:
    """One block of Llama-2-7B with random bfloat16 weights, and a tokenizer of WORDS words."""
    config = LlamaConfig(num_hidden_layers=1, vocab_size=WORDS, tie_word_embeddings=True, dtype="bfloat16")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def block(samples: int) -> list[dict[str, Any]]:
    """The parts of the stage on one block, and on 32 with SAMPLES windows: hours of CORES cores that do nothing else."""
    draw = random.Random(0)
    text = " ".join(f"w{draw.randrange(3, WORDS)}" for _ in range((samples + 1) * LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model")
        place = f"model.path={Path(folder) / 'model'}"
        watch, report = run_stage(Path(folder), text, samples, "model=llama-2-7b", place)
    phases = report["totals"]["phases"]
    share = watch.rest / sum(phases.values())  # CPU seconds of a second of a phase: two weights are at work at a time
    parts = {"Cholesky factors of H": ["metric"], "decompositions": ["decompose"]}
    others = [name for name in phases if name not in ("metric", "decompose")]
    rows = [{"part": "collecting H", "seconds": watch.collecting, "times": LAYERS * SAMPLES / samples}]
    rows += [{"part": part, "seconds": share * sum(phases[name] for name in names), "times": LAYERS}
             for part, names in (parts | {"digests, cache, files": others}).items()]  # fmt: skip
    rows = [row | {"hours": row["seconds"] * row.pop("times") / CORES / 3600} for row in rows]
    held = [min(spill.HELD, number * LENGTH * WIDTH * 4) for number in (samples, SAMPLES)]
    memory = [(watch.peak_collecting + held[1] - held[0]) / GIB, watch.peak / GIB]
    rows[0]["memory"], rows[2]["memory"] = memory
    whole = {name: sum(row[name] for row in rows) for name in ("seconds", "hours")}
    return [*rows, {"part": "all", **whole, "memory": max(memory)}]


def columns(*pairs: tuple[str, str, str]) -> list[dict[str, str]]:
    """Columns of a result table from (key, name, format)."""
    return [{"key": key, "name": name} | ({"format": form} if form else {}) for key, name, form in pairs]


def main() -> None:
    """Measure one part and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["model", "block"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, help="of 512 tokens; default: 128 for the model, 8 for the block")
    args = parser.parse_args()
    samples = args.samples or {"model": SAMPLES, "block": 8}[args.part]
    of_block = f"one block, {samples} x {LENGTH} tokens: CPU seconds"
    parts: dict[str, tuple[Callable[[], list[dict[str, Any]]], list[dict[str, str]]]] = {
        "model": (lambda: model(samples, args.data), columns(
            ("model", "model", ""), ("tokens", "tokens", "{:,}"), ("collecting", "collecting H, CPU s", "{:.0f}"),
            ("whole", "whole quantize stage, CPU s", "{:.0f}"), ("ratio", "ratio", "{:.2f}"))),
        "block": (lambda: block(samples), columns(
            ("part", "part", ""), ("seconds", of_block, "{:.0f}"),
            ("hours", f"{LAYERS} blocks, {SAMPLES} x {LENGTH} tokens: hours of {CORES} cores", "{:.2f}"),
            ("memory", "peak anonymous memory, GiB", "{:.2f}"))),
    }  # fmt: skip
    measure, shown = parts[args.part]
    rows = measure()
    facts = {
        "command": f"python benchmarks/calibration_stage.py {args.part} --samples {samples}",
        "provenance": provenance(),
    }
    file = RESULTS / f"calibration-cost-{args.part}.json"
    file.write_text(json.dumps({"facts": facts, "columns": shown, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
