"""Matrices in a model's blocks that are not linear layers: refused if there are many, counted otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from zoo import DECODER, ENCODER, quantize_config, seeded

from loftq_exp.artifact.card import model_card
from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.off_the_shelf import take
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.layout import AUTO_CLASSES, find_layout
from loftq_exp.source.locate import Source, locate

REFUSED: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "llama-4": (  # its experts do not say how they are oriented
        hf.Llama4TextConfig(**DECODER, num_key_value_heads=2, head_dim=16, num_local_experts=4, intermediate_size_mlp=64), "experts"
    ),
    "mamba": (hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2), "state-space"),
    "mamba2": (
        hf.Mamba2Config(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, n_groups=1), "state-space"
    ),
    "jamba": (hf.JambaConfig(**{**DECODER, "num_hidden_layers": 4}), "state-space"),
    "rwkv": (hf.RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=128), "RWKV"),
    "xlnet": (hf.XLNetConfig(vocab_size=96, d_model=64, n_layer=2, n_head=4, d_inner=128), "weights in"),
}  # fmt: skip


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_which_much_would_be_left_out_are_refused(tmp_path: Path, name: str) -> None:
    config, what = REFUSED[name]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AUTO_CLASSES["causal"].from_config(config)
    with pytest.raises(UserError) as caught:
        find_layout(tmp_path, "causal", shapes(model))
    message = str(caught.value)
    assert what in message
    assert "\n" not in message
    assert message.startswith(f"model.path={tmp_path}: ")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Initialised:
    """A recurrent model in float32: convolutions and gates in its blocks are no linear layers."""
    root = tmp_path_factory.mktemp("partial")
    config = hf.RecurrentGemmaConfig(**{**DECODER, "num_hidden_layers": 3}, lru_width=64, attention_window_size=16)
    seeded(lambda: hf.RecurrentGemmaForCausalLM(config)).save_pretrained(root / "source")
    run = quantize_config(root / "source", root, "causal", "dense", quant__bits=4)
    return initialise(locate(run.model, run.cache_path), run)


def test_what_is_left_out_is_named_and_counted(partial: Initialised) -> None:
    """Two recurrent layers: a convolution of 64 x 1 x 4, and two gates of 4 x 16 x 16 with biases of 4 x 16."""
    left = {weight["name"].split("temporal_block.")[1]: weight for weight in partial.report["not_quantized"]}
    gates = {f"rg_lru.{gate}_gate_{part}" for gate in ("input", "recurrent") for part in ("weight", "bias")}
    assert set(left) == gates | {"conv_1d.weight"}
    assert len(partial.report["not_quantized"]) == 2 * 5
    assert left["conv_1d.weight"] == {"name": "model.layers.1.temporal_block.conv_1d.weight", "shape": [64, 1, 4], "values": 256,
                                      "bits": 32}  # fmt: skip
    values = 2 * (256 + 2 * (4 * 16 * 16 + 4 * 16))
    totals = partial.report["totals"]
    assert totals["quantized_values"] == totals["values"]
    assert totals["linear_values"] == totals["values"] + values
    bits = (totals["values"] * (4 + 16 / 64) + values * 32) / totals["linear_values"]
    assert totals["bits_per_weight"] == pytest.approx(bits)


def test_the_card_says_what_is_left_out(partial: Initialised, tmp_path: Path) -> None:
    run = quantize_config(tmp_path, tmp_path, "causal", "dense", hub={"push": True, "repo_id": "somebody/partial"})
    card, totals = model_card(partial, run, None), partial.report["totals"]
    share = 1 - totals["quantized_values"] / totals["linear_values"]
    assert f"| left out | {share:.2%} of the values in blocks " in card
    assert f"({totals['bits_per_weight']:.2f} per weight, scales included)" in card


def test_lora_quantizes_nothing(tmp_path: Path) -> None:
    seeded(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))).save_pretrained(tmp_path / "source")
    lora = {"quant__method": "lora", "quant__type": "none", "quant__bits": 16, "quant__iter": 0}
    run = quantize_config(tmp_path / "source", tmp_path, "causal", "dense", **lora)
    totals = initialise(locate(run.model, run.cache_path), run).report["totals"]
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert (totals["linear_values"], totals["quantized_values"], totals["bits_per_weight"]) == (linear, 0, 16)


def test_a_published_adapter_of_a_subset_is_counted_over_all(tmp_path: Path) -> None:
    """Its other weights stay in the float32 in which they are stored."""
    seeded(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))).save_pretrained(tmp_path / "source")
    run = quantize_config(tmp_path / "source", tmp_path, "causal", "dense", quant__bits=4, save_dtype="float32")
    init = initialise(locate(run.model, run.cache_path), run)
    place = init.folder / "loftq_init" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(place).items() if "q_proj" in name}, place)
    shelf = quantize_config(tmp_path / "source", tmp_path / "shelf", "causal", "dense", save_dtype="float32",
                            quant={"method": "off-the-shelf", "path": str(init.folder), "bits": 4, "rank": 8, "iter": 0})  # fmt: skip
    report = take(Source(init.folder, "source", str(init.folder), None), shelf).report
    linear, quantized = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2 * 64 * 64
    totals = report["totals"]
    assert (totals["linear_values"], totals["quantized_values"]) == (linear, quantized)
    assert totals["bits_per_weight"] == pytest.approx((quantized * (4 + 32 / 64) + (linear - quantized) * 32) / linear)
    assert len(report["not_quantized"]) == 2 * 6
    assert json.dumps(report)


def test_an_encoder_with_a_few_convolutions_is_taken(tmp_path: Path) -> None:
    config = hf.NystromformerConfig(**ENCODER, num_landmarks=4, segment_means_seq_len=16)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = hf.NystromformerForMaskedLM(config)
    layout = find_layout(tmp_path, "classification", shapes(model))
    assert [weight.name.rpartition("layer.")[2] for weight in layout.not_quantized] == [
        f"{i}.attention.self.conv.weight" for i in (0, 1)
    ]
