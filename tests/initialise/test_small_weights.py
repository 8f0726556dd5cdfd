"""A weight too small for the rank gets its largest, and a gate stays dense."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from zoo import quantize_config

from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate


def test_narrow_projections_get_their_largest_rank_and_gates_stay_dense(tmp_path: Path) -> None:
    """Grouped-query keys of 16 rows beside 64 x 64 weights: rank 16 of 24, at the same s, and PEFT reads them."""
    model = tmp_path / "model"
    hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1,
    )).save_pretrained(model)  # fmt: skip
    config = quantize_config(model, tmp_path, "causal", "dense", quant__rank=24, quant__alpha=48)
    init = initialise(locate(config.model, config.cache_path), config)
    ranks = {weight["name"].rpartition(".")[2]: weight["rank"] for weight in init.report["weights"]}
    assert ranks == dict.fromkeys(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 24) | {
        "k_proj": 16,
        "v_proj": 16,
    }
    adapter = json.loads((init.folder / "loftq_init" / "adapter_config.json").read_text())
    assert set(adapter["rank_pattern"].values()) == {16}
    assert set(adapter["alpha_pattern"].values()) == {32}  # s = 48 / 24 = 32 / 16


def test_a_gate_stays_dense(tmp_path: Path) -> None:
    from loftq_exp.source.layout import find_layout

    hf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=4, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    with torch.device("meta"):
        built = hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(tmp_path))
    layout = find_layout(tmp_path, "causal", {name: tuple(p.shape) for name, p in built.named_parameters()})
    assert {target.kind for target in layout.targets} == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert {name for name in layout.other_linears if "mlp" in name} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert [weight.values for weight in layout.not_quantized] == [256] * 3
