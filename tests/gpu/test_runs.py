"""Whole runs on CUDA: every family from the command to its score, files that a CPU reads, and resume after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from zoo import FAMILIES

from loftq_exp.initialise.transfer import AHEAD
from loftq_exp.initialise.workers import WORKERS
from loftq_exp.storage.bnb4 import bnb4_config
from loftq_exp.tasks.arithmetic import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

QUICK = ("quant.rank=4", "quant.iter=2", "device=cuda", "train.per_device_train_batch_size=4", "train.logging_steps=1",
         "task.max_train_samples=8", "task.max_eval_samples=8")  # fmt: skip
STORED = {"dense": ("save_format=dense", "train.backbone=dense"), "bnb4": ("save_format=bnb4", "train.backbone=bnb4"),
          "packed": ("save_format=packed", "quant.bits=3")}  # fmt: skip


def rows(kind: str) -> list[dict[str, Any]]:
    """A few rows for a task of this kind of model."""
    problems = list(islice(generate("train", 0), 8))
    if kind == "classification":
        return [
            {"question": row["question"], "sentence": row["answer"], "label": at % 2} for at, row in enumerate(problems)
        ]
    if kind == "seq2seq":
        return [{"document": row["question"], "summary": row["answer"]} for row in problems]
    return [{"question": row["question"], "answer": f"{row['answer']}\n#### 7"} for row in problems]


TASKS = {
    "causal": ("task=gsm8k", "task.max_source_length=64", "task.max_target_length=16"),
    "seq2seq": ("task=summarization", "task.name=xsum", "task.max_source_length=64", "task.max_target_length=16"),
    "classification": ("task=glue", "task.name=qnli"),
}  # fmt: skip


PRECISIONS = {
    "bf16": ("train.bf16=true",), "fp16": ("train.fp16=true",), "float32": ("train.bf16=false",),
}  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}
RUNS = [
    *((name, storage, precision) for name in FAMILIES for storage in STORED for precision in ("bf16", "fp16")),
    ("llama-2", "dense", "float32"),
    ("t5", "packed", "float32"),
]


@pytest.mark.parametrize(("name", "storage", "precision"), RUNS)
def test_every_family(cli: Any, checkpoint: Callable[[str], Any], name: str, storage: str, precision: str) -> None:
    file = Path("rows.jsonl")
    kind = FAMILIES[name].kind
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    outcome = cli(
        *checkpoint(name), *TASKS[kind], *QUICK, *STORED[storage], *PRECISIONS[precision],
        f"task.train_file={file}", f"task.eval_file={file}", "output_dir=out",
    )  # fmt: skip
    if storage == "bnb4" and FAMILIES[name].left_dense:
        assert outcome.code == 0 or "bnb4" in outcome.err, outcome
        return
    assert outcome.code == 0, outcome
    (record,) = Path("out/runs").glob("*/metrics.json")
    metrics = json.loads(record.read_text())
    assert metrics["finetune"]["dtype"] == DTYPES[precision]
    assert metrics["peak_memory"]["finetune"]["cuda_bytes"] > 0
    assert len(metrics["losses"]) == 2
    assert all(0 <= loss < 1000 for _, loss in metrics["losses"])  # t5 v1.1's untied head starts above 20


@pytest.mark.parametrize("storage", list(STORED))
def test_a_checkpoint_of_one_device_is_the_others(cli: Any, storage: str) -> None:
    made = {}
    for device in ("cpu", "cuda"):
        assert cli(*cli.tiny, f"device={device}", "stages=[quantize]", f"save_format={storage}", "save_dtype=float32",
                   "quant.iter=1", f"save_dir=on-{device}", "cache_dir=cache-" + device).code == 0  # fmt: skip
        (made[device],) = Path(f"on-{device}").glob("*/config.json")
    values = {device: load_file(made[device].parent / "model.safetensors") for device in made}
    assert values["cpu"].keys() == values["cuda"].keys()
    weights = [name for name in values["cpu"] if "proj." in name]
    assert len(weights) >= 14
    for name in weights:  # the first quantization has no product in it, so its codes are equal
        assert torch.equal(values["cpu"][name], values["cuda"][name]), name
    loaded = {}
    for made_on, other in (("cpu", "cuda"), ("cuda", "cpu")):
        extra = {} if storage != "bnb4" else {"quantization_config": bnb4_config([], torch.float32)}
        model = AutoModelForCausalLM.from_pretrained(
            made[made_on].parent, dtype=torch.float32, device_map={"": other}, **extra
        )
        loaded[made_on] = model(torch.arange(3, 40)[None].to(other)).logits.detach().cpu()
    torch.testing.assert_close(loaded["cpu"], loaded["cuda"], atol=2e-3, rtol=2e-3)


def test_the_quantize_stage_needs_little_of_the_card(cli: Any) -> None:
    """Those weights that are in work or read ahead, whatever the model's size."""
    width, inner = 1024, 4096
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=6, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=512)  # fmt: skip
    model = cli.tiny[1].removeprefix("model.path=")
    large = Path("large")
    AutoTokenizer.from_pretrained(model).save_pretrained(large)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(large)
    outcome = cli(*cli.tiny, f"model.path={large}", "device=cuda", "stages=[quantize]", "quant.rank=16", "quant.iter=5",
                  "output_dir=out")  # fmt: skip
    assert outcome.code == 0, outcome
    (record,) = Path("out/runs").glob("*/metrics.json")
    peak = json.loads(record.read_text())["peak_memory"]["quantize"]["cuda_bytes"]
    assert 0 < peak < (WORKERS + AHEAD) * 24 * width * inner + 128 * 2**20


@pytest.mark.parametrize(("stage", "precision"), [("quantize", "bf16"), ("finetune", "bf16"), ("finetune", "fp16")])
def test_a_killed_run_goes_on(cli: Any, tmp_path: Path, stage: str, precision: str) -> None:
    settings = [*cli.tiny, *PRECISIONS[precision], "device=cuda", "quant.iter=2", "train.save_steps=1", "train.max_steps=6",
                "train.logging_steps=1"]  # fmt: skip
    whole = cli(*settings, "output_dir=whole")
    assert whole.code == 0, whole
    process = subprocess.Popen([sys.executable, "-m", "loftq_exp", *settings, "output_dir=killed"], cwd=Path.cwd(),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    pattern = "cache/decompositions/*/*" if stage == "quantize" else "runs/*/checkpoints/checkpoint-*"
    limit = time.time() + 90
    while not list(Path("killed").glob(pattern)) and process.poll() is None and time.time() < limit:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(Path("killed").glob(pattern)), "it was killed before the stage that this is about"
    again = cli(*settings, "output_dir=killed")
    assert again.code == 0, again
    results = [next(Path(folder).glob("runs/*/adapter/adapter_model.safetensors")) for folder in ("whole", "killed")]
    one, two = (load_file(file) for file in results)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-2)
