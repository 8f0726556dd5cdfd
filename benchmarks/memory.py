"""Memory of a fine-tune: computed for the shapes of large models, by a formula that is checked on a small one on a CPU.

    python benchmarks/memory.py            (a minute; writes docs/results/packed-computed.json, gpu-memory.json, gpu-memory-check.json)

Computed is not measured: nothing here runs on a GPU, and no large model is loaded. Shapes come from models on the meta device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_stage import write_model
from peft.helpers import disable_input_dtype_casting
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config

import loftq_exp
from loftq_exp.artifact.folder import read_artifact
from loftq_exp.loftq import make_quantizer
from loftq_exp.provenance import provenance
from loftq_exp.source.layout import find_layout
from loftq_exp.storage.packed import part_specs
from loftq_exp.training.load import load_model

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RANK, TOKENS = 64, 1024
CARDS = (8, 12, 16, 24, 40, 48, 80)
RESERVED = 1e9
"""Bytes of a card that are left for CUDA's own memory and for fragments. An assumption."""
OF_LOGITS, OF_STREAM, OF_INNER = 12, 52, 11
"""Bytes for each token and value: of the vocabulary at the loss; of the hidden size and of the feed-forward's inner size in the block
that is computed again. Fitted to torch's allocations on a CPU (`check`)."""
ADAPTER_BYTES = 16
"""For each parameter: float32, its gradient, and AdamW's two moments."""


def llama(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int = 32000, tied: bool = False
) -> LlamaConfig:
    """A Llama's config."""
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied)  # fmt: skip


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    """A dense Qwen3's config."""
    return Qwen3Config(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied)  # fmt: skip


MODELS: dict[str, PretrainedConfig] = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8),
}
FORMS: dict[str, tuple[int, bool] | None] = {
    "packed NF2": (2, False), "packed NF2, double": (2, True), "packed NF3, double": (3, True), "packed NF4, double": (4, True),
    "bitsandbytes NF4": None,
}  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """What memory depends on."""

    targets: list[tuple[int, int]]
    """(out, in) of each quantized weight."""
    others: int
    """Values of all other parameters, in 16 bits."""
    hidden: int
    inner: int
    layers: int
    vocab: int

    @property
    def values(self) -> int:
        """Quantized values."""
        return sum(rows * columns for rows, columns in self.targets)

    def backbone(self, form: tuple[int, bool] | None) -> int:
        """Bytes of the backbone: packed in (bits, double scales), or bitsandbytes' NF4 with float32 scales."""
        if form is None:
            return self.values // 2 + self.values // 64 * 4 + 2 * self.others
        quantizer = make_quantizer("nf", form[0], 64, torch.bfloat16, form[1])
        parts = (part_specs(quantizer, shape).values() for shape in self.targets)
        return 2 * self.others + sum(
            dtype.itemsize * torch.Size(size).numel() for specs in parts for dtype, size in specs
        )

    def adapter(self, rank: int) -> int:
        """Bytes of an adapter in training."""
        return ADAPTER_BYTES * rank * sum(map(sum, self.targets))

    def activations(self, tokens: int) -> int:
        """Bytes of activations and temporary values of a training step, with gradient checkpointing, at their peak.

        Each block's input is kept. On top come the logits at the loss, or one block that is computed again with its
        largest weight unpacked, whichever is larger.
        """
        kept = 2 * tokens * self.hidden * (self.layers + 2)
        logits = OF_LOGITS * tokens * self.vocab
        block = tokens * (OF_STREAM * self.hidden + OF_INNER * self.inner) + 2 * max(
            out * into for out, into in self.targets
        )
        return kept + max(logits, block)


def shapes_of(config: Any, folder: Path) -> Shapes:
    """The shapes of a model, which is created without memory."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    targets = [target.shape for target in find_layout(folder, "causal", shapes).targets]
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(rows * columns for rows, columns in targets)
    return Shapes(targets, total - quantized, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                  config.vocab_size)  # fmt: skip


def peak_of_a_step(config: LlamaConfig, tokens: int, folder: Path) -> int:
    """Measure the peak of torch's allocations in one training step on a CPU beyond what stays: 2-bit packed, bfloat16."""
    device = torch.device("cpu")
    write_model(folder / "model", config.num_hidden_layers, config.hidden_size, config.intermediate_size, device)
    made = LlamaConfig.from_pretrained(folder / "model")
    made.vocab_size = config.vocab_size
    LlamaForCausalLM(made).to(torch.bfloat16).save_pretrained(folder / "model")
    settings = loftq_exp.compose([
        "model=llama-2-7b", f"model.path={folder / 'model'}", "model.revision=null", "quant.rank=16", "quant.iter=1",
        "quant.bits=2", "stages=[quantize]", "device=cpu", f"output_dir={folder / 'out'}", "save_format=packed", "train.bf16=true",
    ])  # fmt: skip
    init = read_artifact(loftq_exp.run(settings).init_dir)
    assert init is not None
    model = load_model(init, None, settings, device, torch.bfloat16).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with disable_input_dtype_casting(model):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()

    step()  # the gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    assert trace.profiler is not None
    found = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CHECKS = ((256, 704, 4, 4000, 256), (512, 1408, 4, 4000, 512), (512, 1408, 8, 300, 512), (256, 2112, 4, 300, 512),
          (768, 2048, 6, 2000, 384))  # fmt: skip
"""Hidden size, inner size, layers, vocabulary, tokens of the small models: some peak at the loss, some in a block."""


def check(folder: Path) -> list[dict[str, Any]]:
    """Activations of small models: computed beside measured."""
    rows = []
    for hidden, inner, layers, vocab, tokens in CHECKS:
        place = folder / f"{hidden}-{inner}-{layers}-{vocab}-{tokens}"
        config = llama(hidden, inner, layers, max(hidden // 128, 1), max(hidden // 128, 1), vocab)
        computed = shapes_of(config, place).activations(tokens)
        measured = peak_of_a_step(config, tokens, place)
        shutil.rmtree(place)
        rows.append({"model": f"{hidden} x {inner}, {layers} layers, vocabulary {vocab}, {tokens} tokens",
                     "computed": computed / 1e6, "measured": measured / 1e6, "ratio": computed / measured})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def write(name: str, columns: list[dict[str, str]], rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write a table of docs/results."""
    facts = {"command": "python benchmarks/memory.py", "provenance": provenance(), **facts}
    table = {"facts": facts, "columns": columns, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")


def number(key: str, name: str, form: str = "{:.2f}") -> dict[str, str]:
    """A column of numbers."""
    return {"key": key, "name": name, "format": form}


def forms_table(shapes: dict[str, Shapes]) -> None:
    """Bytes of Llama-2's backbones and adapters."""
    rows = []
    for name in ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B"):
        each = shapes[name]
        row: dict[str, Any] = {"gb": name, "dense, 16 bits": 2 * (each.values + each.others) / 1e9}
        row |= {form: each.backbone(packing) / 1e9 for form, packing in FORMS.items()}
        rows.append(row | {"adapter": each.adapter(RANK) / 1e9})
    order = (
        "dense, 16 bits",
        "bitsandbytes NF4",
        "packed NF4, double",
        "packed NF3, double",
        "packed NF2",
        "packed NF2, double",
    )
    columns = [{"key": "gb", "name": "GB"}, *(number(form, form) for form in order),
               number("adapter", f"adapter, rank {RANK}, training")]  # fmt: skip
    write("packed-computed", columns, rows, computed=True)


def cards_table(shapes: dict[str, Shapes]) -> None:
    """The smallest card for each model and form, and the bytes that it is computed from."""
    rows = []
    for name, each in shapes.items():
        row: dict[str, Any] = {
            "model": name,
            "activations": each.activations(TOKENS) / 1e9,
            "adapter": each.adapter(RANK) / 1e9,
        }
        for form in ("packed NF2", "packed NF3, double", "packed NF4, double", "bitsandbytes NF4"):
            total = each.backbone(FORMS[form]) + each.adapter(RANK) + each.activations(TOKENS)
            card = next((f"{card} GB" for card in CARDS if total + RESERVED <= card * 1e9), "none")
            row[form] = {"value": total / 1e9, "shown": f"{total / 1e9:.1f}: {card}"}
        rows.append(row)
    columns = [{"key": "model", "name": "computed GB: smallest card"}, number("adapter", f"adapter, rank {RANK}"),
               number("activations", f"activations, {TOKENS} tokens a batch")]  # fmt: skip
    columns += [
        {"key": form, "name": form}
        for form in ("packed NF2", "packed NF3, double", "packed NF4, double", "bitsandbytes NF4")
    ]
    write("gpu-memory", columns, rows, computed=True, rank=RANK, tokens=TOKENS, reserved=RESERVED, cards=CARDS)


def main() -> None:
    """Compute the tables and check the formula."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as place:
        shapes = {name: shapes_of(config, Path(place) / name) for name, config in MODELS.items()}
        forms_table(shapes)
        cards_table(shapes)
        columns = [{"key": "model", "name": "small Llama, 2-bit packed"}, number("computed", "computed, MB"),
                   number("measured", "measured on a CPU, MB"), number("ratio", "computed / measured")]  # fmt: skip
        write("gpu-memory-check", columns, check(Path(place) / "check"))


if __name__ == "__main__":
    main()
