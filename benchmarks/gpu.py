"""The CUDA path measured on one card: the decomposition beside PEFT's, the quantize stage on Llama-2-7B's shapes, packed layers.

    python benchmarks/gpu.py [--layers 4] [--part solver stage packed]      (make gpu runs it; some minutes)

Needs no network: weights are drawn. A part that fails ends with its reason, after the others. Writes docs/results/gpu-PART.json, which
scripts/result_tables.py puts into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loftq_exp.loftq import loftq_init
from loftq_exp.provenance import provenance

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LAYERS_7B = 32


def card() -> dict[str, Any]:
    """The card, its driver and the versions that made a result."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return {"command": "make gpu", "card": shown[0] if shown else torch.cuda.get_device_name(),
            "cuda": torch.version.cuda, "provenance": provenance()}  # fmt: skip


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median time of `work` in seconds after one run that warms up, with the card idle before and after."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def error(weight: torch.Tensor, result: tuple[torch.Tensor, ...]) -> float:
    """The relative error of Q + B A, in float64."""
    backbone, lora_A, lora_B = (part.to(weight.device).double() for part in result[:3])
    return float(torch.linalg.norm(weight.double() - backbone - lora_B @ lora_A) / torch.linalg.norm(weight.double()))


def solver() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Seconds and error of one weight, rank 64, 5 steps: PEFT's function (NF4 alone exists there) and ours."""
    from peft.utils.loftq_utils import loftq_init as pefts

    rows = []
    generator = torch.Generator("cuda").manual_seed(0)
    for shape in ((4096, 4096), (11008, 4096)):
        weight = torch.randn(shape, generator=generator, device="cuda") * 0.02
        inputs = torch.randn(2 * shape[1], shape[1], generator=generator, device="cuda")
        hessian = inputs.T @ inputs / len(inputs)
        began = time.perf_counter()
        theirs = pefts(weight, 4, 64, num_iter=5)
        torch.cuda.synchronize()
        base = time.perf_counter() - began
        known = {"out x in": f"{shape[0]} x {shape[1]}"}
        rows.append({**known, "what": "PEFT, NF4", "ms": base * 1e3, "error": error(weight, theirs)})
        grid: dict[str, Any] = {"scale": "search", "levels": "optimal"}
        for what, bits, settings in (
            ("NF4", 4, {}), ("NF2", 2, {}), ("2 bits, searched", 2, grid), ("2 bits, calibrated", 2, grid | {"hessian": hessian}),
        ):  # fmt: skip

            def work(weight: torch.Tensor = weight, bits: int = bits, settings: dict[str, Any] = settings) -> Any:
                return loftq_init(weight, bits, 64, 5, **settings)

            taken = seconds(work, 5)
            row = {**known, "what": what, "ms": taken * 1e3, "error": error(weight, work())}
            if what == "NF4":
                row |= {"faster": base / taken, "error_ratio": row["error"] / rows[-1]["error"]}
            rows.append(row)
    columns = [{"key": "out x in", "name": "out x in"}, {"key": "what", "name": "what"},
               {"key": "ms", "name": "ms", "format": "{:.1f}"}, {"key": "error", "name": "weight error", "format": "{:.4f}"},
               {"key": "faster", "name": "faster than PEFT by", "format": "{:.0f}"},
               {"key": "error_ratio", "name": "error / PEFT's", "format": "{:.4f}"}]  # fmt: skip
    return columns, rows


def write_model(folder: Path, layers: int) -> int:
    """Write a random bfloat16 Llama of 7B's shapes with so many layers, and a small vocabulary; return its values in blocks."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(
                LlamaConfig(**LLAMA_7B, num_hidden_layers=layers, vocab_size=4000, dtype="bfloat16")
            )
    finally:
        torch.set_default_dtype(kind)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(["a few words"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear))


def quantized(source: Path, root: Path, *overrides: str) -> tuple[float, dict[str, Any]]:
    """Seconds of the quantize command without its start, and the report of the initialised checkpoint."""
    command = [sys.executable, "-m", "loftq_exp", "model=llama-2-7b", f"model.path={source}", "model.revision=null",
               "quant.rank=64", "stages=[quantize]", "device=cuda", f"output_dir={root}", *overrides]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-1500:])
    (report,) = root.glob("inits/*/init_report.json")
    (metrics,) = root.glob("runs/*/metrics.json")
    record = json.loads(metrics.read_text())
    return record["seconds"]["quantize"], json.loads(report.read_text()) | {"memory": record["peak_memory"]["quantize"]}


def phases(weights: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds of each phase of the quantize stage, summed over the weights of a report."""
    total: Counter[str] = Counter()
    for weight in weights:
        total.update(weight["phases"])
    return dict(total)


def stage(layers: int) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The quantize stage, from safetensors to a bnb4 checkpoint, beside copying the same bytes; 7B's time by its layers."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model"
        values = write_model(source, layers)
        size = (source / "model.safetensors").stat().st_size
        began = time.perf_counter()
        shutil.copyfile(source / "model.safetensors", Path(place) / "copy")
        copied = time.perf_counter() - began
        known = {"what": f"copy of the source's file, {size / 1e9:.2f} GB", "s": copied}
        rows.append({**known, "at_7b": copied * LAYERS_7B / layers})
        for number, (what, overrides) in enumerate((
            ("NF4, 5 steps, bnb4", ("quant.bits=4", "save_format=bnb4")),
            ("the same again, from the cache", ("quant.bits=4", "save_format=bnb4")),
            ("2 bits, searched, 5 steps, packed", ("quant.bits=2", "quant.scale=search", "quant.levels=optimal", "save_format=packed")),
        )):  # fmt: skip
            taken, report = quantized(
                source, Path(place) / str(number), *overrides, f"cache_dir={place}/cache", "quant.iter=5"
            )
            rows.append({"what": what, "s": taken, "at_7b": taken * LAYERS_7B / layers,
                         "gb": report["memory"]["cuda_bytes"] / 1e9, "values": values, "phases": phases(report["weights"])})  # fmt: skip
    columns = [{"key": "what", "name": f"{layers} of {LAYERS_7B} layers"}, {"key": "s", "name": "s", "format": "{:.1f}"},
               {"key": "at_7b", "name": f"s, times {LAYERS_7B}/{layers} (computed)", "format": "{:.0f}"},
               {"key": "gb", "name": "peak card memory, GB", "format": "{:.2f}"}]  # fmt: skip
    return columns, rows


def packed() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Packed layers beside bitsandbytes' NF4 layer, by benchmarks/gpu_packed.py: microseconds, and ratios to bitsandbytes'."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_packed import BITS, measure

    found, rows = measure(), []
    for part, how in (("training", None), ("generation", "eager"), ("generation", "graph")):
        for case, taken in found[part].items():
            each = taken if how is None or "error" in taken else taken.get(how, {"error": "not measured"})
            row = {"what": f"{part}{f', {how}' if how else ''}", "case": case, "reason": each.get("error")}
            for name in ("dense", "bitsandbytes NF4", *(f"packed NF{bits}" for bits in BITS)):
                if name in each:
                    row[name] = 1e3 * each[name]
                if (ratio := each.get(f"{name} / bitsandbytes")) is not None:
                    row[f"{name} / bitsandbytes"] = ratio
            rows.append(row)
    for case, taken in found["unpacking"].items():
        row = {"what": "unpacking alone", "case": case, "reason": taken.get("error")}
        rows.append(row | {name: each["us"] for name, each in taken.items() if name != "error"})
    columns = [{"key": "what", "name": "what"}, {"key": "case", "name": "out x in, rows"}]
    columns += [{"key": name, "name": f"{name}, us", "format": "{:.0f}"}
                for name in ("dense", "bitsandbytes NF4", *(f"packed NF{bits}" for bits in BITS))]  # fmt: skip
    columns += [
        {"key": f"packed NF{bits} / bitsandbytes", "name": f"NF{bits} / bitsandbytes", "format": "{:.2f}"}
        for bits in BITS
    ]
    return [*columns, {"key": "reason", "name": "not measured because"}], rows


def main() -> None:
    """Measure the parts and write their result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=["solver", "stage", "packed"], default=["solver", "packed", "stage"]
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    parts = {"solver": solver, "stage": lambda: stage(args.layers), "packed": packed}
    failed = []
    for part in args.part:
        began = time.perf_counter()
        facts = card()
        try:
            columns, rows = parts[part]()
        except Exception as problem:  # a part that fails must not cost the others their results
            failed.append(f"{part}: {type(problem).__name__}: {problem}")
            continue
        facts["seconds"] = round(time.perf_counter() - began, 1)
        (args.results / f"gpu-{part}.json").write_text(
            json.dumps({"facts": facts, "columns": columns, "rows": rows}, indent=1) + "\n"
        )
        for row in rows:
            print(part, json.dumps(row), flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
