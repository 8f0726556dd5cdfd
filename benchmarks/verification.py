"""What the digests cost: the time to check a checkpoint's files, as a share of the time to load it.

    python benchmarks/verification.py

A random llama with the sizes of a small model is initialised once. Checking and loading it take turns in one process, with
its files in the page cache, where loading is fastest. The share is that of the smallest times.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from loftq_exp import manifest
from loftq_exp.artifact.folder import ADAPTER, Initialised, check_artifact
from loftq_exp.config import RunConfig
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate
from loftq_exp.training.load import load_model

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
         "vocab_size": 16000}  # fmt: skip
ROUNDS = 5


def settings(root: Path, backbone: str) -> RunConfig:
    """LoRA on bfloat16, which needs no decomposition: the backbone's values are of no concern here."""
    return RunConfig.from_mapping({
        "model": {"path": str(root / "model"), "kind": "causal"},
        "quant": {"method": "lora", "type": "none", "bits": 16, "rank": 16, "iter": 0},
        "task": {"kind": "gsm8k"}, "train": {"backbone": backbone}, "stages": ["quantize"], "device": "cpu",
        "save_dir": str(root / "saved"), "cache_dir": str(root / "cache"),
    })  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def check(init: Initialised) -> None:
    """Check all files, as the first load of a process does."""
    manifest._checked.clear()
    check_artifact(init, "")
    manifest.check(init.folder / ADAPTER, "")


def main() -> None:
    """Print the size, the times and the share as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))  # type: ignore[arg-type]
        model.to(torch.bfloat16).save_pretrained(root / "model")
        del model
        config = settings(root, "dense")
        init = initialise(locate(config.model, config.cache_path), config)
        checks, loads = [], []
        for _ in range(ROUNDS):
            checks.append(seconds(lambda: check(init)))
            loads.append(
                seconds(lambda: load_model(init, None, config, torch.device("cpu"), torch.bfloat16, written=False))
            )
        size = init.backbone_bytes + init.adapter_bytes
    found = {
        "megabytes": round(size / 1e6),
        "check": min(checks),
        "load": min(loads),
        "share": min(checks) / min(loads),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
