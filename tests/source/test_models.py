"""Decoders of today: every linear value of a class is quantized or counted as left dense, or the class is refused."""

from __future__ import annotations

from pathlib import Path

import model_table
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from zoo import CONFIGS, MODELS, quantize_config, seeded

from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate
from loftq_exp.training.load import load_model

REFUSED = {"mamba", "mamba2", "jamba", "rwkv", "xlnet"}
PARTIAL = {
    "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe", "deepseek-v3", "qwen3.5", "qwen3.5-moe"
}  # fmt: skip
"""Classes whose routers, small gates or convolutions stay dense."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_class_is_whole_or_refused(name: str, tmp_path: Path) -> None:
    row = model_table.row_of(name)
    model = seeded(MODELS[name])
    model.save_pretrained(tmp_path / "source")
    config = quantize_config(
        tmp_path / "source", tmp_path, "causal", "dense", quant__rank=2, quant__bits=4, quant__dropout=0
    )
    if name in REFUSED:
        with pytest.raises(UserError) as caught:
            initialise(locate(config.model, config.cache_path), config)
        assert str(caught.value).endswith(row.refused)
        assert row.refused
        assert "\n" not in row.refused
        return
    assert not row.refused
    init = initialise(locate(config.model, config.cache_path), config)
    totals = init.report["totals"]
    assert (row.quantized, row.linear) == (totals["quantized_values"], totals["linear_values"])
    assert (row.quantized < row.linear) == (name in PARTIAL)
    assert row.quantized > 0.97 * row.linear
    # Every matrix of a block is adapted or listed, counted without the layout: all that is no embedding, norm or bias.
    blocks = [
        key
        for key, value in model.state_dict().items()
        if value.ndim > 1 and any(part.isdigit() for part in key.split("."))
    ]
    matrices = {
        key: model.state_dict()[key].numel() for key in blocks if "norm" not in key and not key.endswith("bias")
    }
    assert sum(matrices.values()) == row.linear
    adapted = load_model(init, None, config, torch.device("cpu"), torch.float32)
    held = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    layers = {f"base_model.model.{weight['name']}" for weight in init.report["weights"]}
    assert len(held) == 2 * sum(isinstance(module, LoraLayer) for module in adapted.modules())
    assert len(layers) == len(init.report["weights"])
    with torch.no_grad():
        logits = adapted.eval()(input_ids=torch.arange(3, 43).reshape(2, 20)).logits
    assert bool(torch.isfinite(logits).all())
