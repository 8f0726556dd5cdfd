"""The quantize stage on a model of Llama-2-7B's shapes, in this process, beside its parts alone: files, copies, computing.

    python benchmarks/gpu.py --part stage                       (needs CUDA)
    python benchmarks/gpu_stage.py --width 512 --inner 1408     (also on a CPU, to try this file)

The model has as many layers as are asked for, and every number is that of these layers. A run on a small model warms up:
libraries are loaded and kernels compiled before anything is timed. Rows are yielded as soon as they are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loftq_exp
from loftq_exp.initialise.transfer import read_ahead, to_device, to_host
from loftq_exp.loftq import Workspace, decompose, make_quantizer
from loftq_exp.source.tensors import open_tensors

WIDTH, INNER = 4096, 11008
RANK, STEPS = 64, 5
PIECE = 1 << 24
VARIANTS = {
    "NF4, bnb4": ("quant.bits=4", "save_format=bnb4"),
    "2 bits, searched, packed": ("quant.bits=2", "quant.scale=search", "quant.levels=optimal", "save_format=packed"),
}
PHASES = ("digest", "copy", "cache", "decompose", "decode", "write")
COLUMNS = [
    {"key": "what", "name": "what"},
    {"key": "s", "name": "s", "format": "{:.2f}"},
    {"key": "read_gb", "name": "read, GB", "format": "{:.2f}"},
    {"key": "written_gb", "name": "written, GB", "format": "{:.2f}"},
    {"key": "card_gb", "name": "peak card memory, GB", "format": "{:.2f}"},
    *({"key": phase, "name": f"{phase}, s", "format": "{:.2f}"} for phase in PHASES),
]
"""The seconds of phases are summed over the threads, which work at the same time."""

Row = dict[str, Any]


def write_model(folder: Path, layers: int, width: int, inner: int, device: torch.device) -> None:
    """Write a random bfloat16 Llama of these shapes, with a small vocabulary and a tokenizer."""
    heads = max(width // 128, 1)
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads,
                         num_hidden_layers=layers, vocab_size=4000, dtype="bfloat16")  # fmt: skip
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(kind)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(["a few words"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def quantized(source: Path, root: Path, cache: Path, device: torch.device, overrides: tuple[str, ...]) -> Row:
    """Run the quantize stage in this process. Return its seconds, bytes, card memory, and the seconds of its phases."""
    run = loftq_exp.run(loftq_exp.compose([
        "model=llama-2-7b", f"model.path={source}", "model.revision=null", f"quant.rank={RANK}", f"quant.iter={STEPS}",
        "stages=[quantize]", f"device={device}", f"output_dir={root}", f"cache_dir={cache}", *overrides,
    ]))  # fmt: skip
    report = json.loads((run.init_dir / "init_report.json").read_text())
    totals, memory = report["totals"], run.metrics["peak_memory"]["quantize"]
    row: Row = {"s": run.metrics["seconds"]["quantize"], "read_gb": gigabytes(source), "computed": totals["computed"],
                "written_gb": gigabytes(run.init_dir) + (gigabytes(cache) if totals["computed"] else 0.0)}  # fmt: skip
    if "cuda_bytes" in memory:
        row["card_gb"] = memory["cuda_bytes"] / 1e9
    return row | totals["phases"]


def gigabytes(folder: Path) -> float:
    """The size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def files_alone(source: Path, written_gb: float, place: Path) -> Row:
    """Read the source's weights, then write and sync as many bytes as the stage wrote, without any other work."""
    weights, buffer = source / "model.safetensors", memoryview(bytearray(PIECE))
    began = time.perf_counter()
    with weights.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with (place / "written").open("wb", buffering=0) as file:
        left = int(written_gb * 1e9)
        while left > 0:
            left -= file.write(buffer[: min(left, PIECE)])
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    (place / "written").unlink()
    return {"s": taken, "read_gb": weights.stat().st_size / 1e9, "written_gb": written_gb}


def settle(device: torch.device) -> None:
    """Wait until the card is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def copies_alone(source: Path, device: torch.device) -> Row:
    """Copy every weight to the card and half a byte for each of its values back, as the stage does."""
    with open_tensors(source) as tensors:
        names = [name for name in tensors.names if name.endswith("_proj.weight")]
        back = [torch.zeros(tensors.read(name).numel() // 2, dtype=torch.uint8, device=device) for name in names]
        settle(device)
        began = time.perf_counter()
        for copied, codes in zip(
            read_ahead(lambda name: to_device(tensors.read(name), device), names), back, strict=True
        ):
            copied.take()
            to_host([codes])
        settle(device)
        return {"s": time.perf_counter() - began}


def computing_alone(source: Path, device: torch.device) -> Row:
    """Decompose every weight, one after the other, from memory of the card."""
    quantizer, workspace = make_quantizer("nf", 4, 64, torch.bfloat16), Workspace()
    with open_tensors(source) as tensors:
        weights = [tensors.read(name).to(device) for name in tensors.names if name.endswith("_proj.weight")]
    settle(device)
    began = time.perf_counter()
    for weight in weights:
        decompose(weight, quantizer, RANK, STEPS, workspace=workspace)
    settle(device)
    return {"s": time.perf_counter() - began}


def measure(layers: int, device: torch.device, width: int = WIDTH, inner: int = INNER) -> Iterator[Row]:
    """Yield the rows of COLUMNS, each once it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_model(place / "small", 1, 512, 1408, device)
        for number, overrides in enumerate(VARIANTS.values()):
            quantized(place / "small", place / f"warm-{number}", place / f"warm-{number}-cache", device, overrides)
        source = place / "model"
        write_model(source, layers, width, inner, device)
        written = 0.0
        for number, (name, overrides) in enumerate(VARIANTS.items()):
            cache = place / f"cache-{number}"
            row = quantized(source, place / str(number), cache, device, overrides)
            yield {"what": f"the stage: {name}", **row}
            if not number:
                written = row["written_gb"]
                yield {"what": f"the stage again, from the cache: {name}",
                       **quantized(source, place / "again", cache, device, overrides)}  # fmt: skip
                yield {"what": "its files alone: read, write, sync", **files_alone(source, written, place)}
                yield {"what": "its copies alone: to the card and back", **copies_alone(source, device)}
                yield {"what": "its computing alone: NF4, one weight at a time", **computing_alone(source, device)}
            shutil.rmtree(cache)


def main() -> None:
    """Print the rows. On a CPU, with small shapes, this tries the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--inner", type=int, default=INNER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for row in measure(args.layers, torch.device(args.device), args.width, args.inner):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
