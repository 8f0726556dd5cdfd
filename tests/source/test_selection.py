"""`quant.target_modules` and `quant.exclude`: which layers are quantized and adapted, and what the others keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from weights import in_float32
from zoo import DECODER, llama, quantize_config, seeded

import loftq_exp
from loftq_exp.artifact.exported import export
from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.report.table import quantized_share
from loftq_exp.source.locate import locate
from loftq_exp.source.selection import Selection
from loftq_exp.training.load import load_model

KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in KINDS]
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.mark.parametrize(
    ("target_modules", "exclude", "expected"),
    [
        (None, None, NAMES),
        (["q_proj"], None, [name for name in NAMES if name.endswith(".q_proj")]),
        (["self_attn.*", "up_proj"], ["k_proj"], [name for name in NAMES if ("self_attn" in name and ".k_" not in name) or ".up_" in name]),
        (["layers.1.*"], None, NAMES[7:14]),
        (["layers.1-10.mlp.?p_proj"], None, [f"model.layers.{layer}.mlp.up_proj" for layer in range(1, 11)]),
        (["model.layers.0.self_attn.q_proj"], None, NAMES[:1]),
        (None, ["layers.0-10.*", "model.layers.11.mlp*"], NAMES[77:81]),
    ],
)  # fmt: skip
def test_what_patterns_match(target_modules: Any, exclude: Any, expected: list[str]) -> None:
    assert Selection(target_modules, exclude).chosen(NAMES) == set(expected)


@pytest.mark.parametrize(
    ("target_modules", "exclude", "message"),
    [
        (["qproj"], None, r"quant.target_modules=\[qproj\]: qproj matches no layer .+; did you mean q_proj"),
        (["mlp"], None, r"mlp matches no layer that can be quantized; for the layers in it give mlp\.\*"),
        (None, ["q_proj", "layers.30-31.*"], r"quant.exclude=\[q_proj,layers.30-31.\*\]: layers.30-31.\* matches no layer"),
        (None, ["nothing"], r"choose from: q_proj, k_proj, "),
        (["q_proj"], ["self_attn.*"], r"quant.exclude=\[self_attn.\*\]: leaves no layer to quantize"),
    ],
)  # fmt: skip
def test_patterns_that_match_nothing_are_refused(target_modules: Any, exclude: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Selection(target_modules, exclude).chosen(NAMES)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection") / "source"
    seeded(llama).save_pretrained(folder)
    return folder


def made(source: Path, root: Path, save_format: str = "dense", **changes: Any) -> tuple[Initialised, Any]:
    config = quantize_config(source, root, "causal", save_format, quant__bits=4, **changes)
    return initialise(locate(config.model, config.cache_path), config), config


@pytest.mark.parametrize("save_format", ["dense", "bnb4", "packed"])
def test_excluded_layers_stay_dense_without_an_adapter(source: Path, tmp_path: Path, save_format: str) -> None:
    init, config = made(
        source, tmp_path, save_format, save_dtype="float32", quant__exclude=["mlp.down_proj", "layers.0.*.q_proj"]
    )
    excluded = {"model.layers.0.self_attn.q_proj", *(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))}
    before, after = load_file(source / "model.safetensors"), load_file(init.folder / "model.safetensors")
    assert set(init.report["excluded"]) == excluded
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in excluded)
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0]
               for name in load_file(init.folder / "loftq_init/adapter_model.safetensors")}  # fmt: skip
    assert adapted == {weight["name"] for weight in init.report["weights"]}
    assert len(adapted) == 14 - 3
    assert adapted.isdisjoint(excluded)
    left, linear = 64 * 64 + 2 * 64 * 128, 2 * (4 * 64 * 64 + 3 * 64 * 128)
    totals = init.report["totals"]
    assert (totals["quantized_values"], totals["linear_values"]) == (linear - left, linear)
    assert quantized_share({"init": totals}) == (linear - left) / linear
    model = load_model(init, None, config, torch.device("cpu"), torch.float32)
    kind = PackedLinear if save_format == "packed" else Linear4bit
    held = {name.removeprefix("base_model.model.").removesuffix(".base_layer")
            for name, module in model.named_modules() if isinstance(module, kind)}  # fmt: skip
    assert held == adapted
    loaded = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(loaded, str(init.folder), subfolder="loftq_init")
    if save_format == "dense":
        export(init.folder, tmp_path / "pair", to="adapter")
        pair = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "pair/base", dtype=torch.float32)
        plain = PeftModel.from_pretrained(pair, str(tmp_path / "pair/adapter"))
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(in_float32(plain).eval()(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_part_and_the_whole_have_folders_and_keys_of_their_own(source: Path, tmp_path: Path) -> None:
    whole, _ = made(source, tmp_path)
    part, _ = made(source, tmp_path, quant__target_modules=["q_proj", "v_proj"])
    other, _ = made(source, tmp_path, quant__exclude=["q_proj"])
    assert len({init.folder for init in (whole, part, other)}) == 3
    assert len({init.report["key"] for init in (whole, part, other)}) == 3
    assert len(part.report["weights"]) == 4
    assert part.report["totals"]["computed"] == 0, "the same weights come from the cache"


def test_a_budget_is_for_the_chosen_layers_alone(source: Path, tmp_path: Path) -> None:
    init, _ = made(source, tmp_path, quant__target_modules=["mlp.*"], quant__allocation="error+rank")
    assert init.report["bits_plan"]["code_bits"] <= 4
    assert set(init.report["bits_plan"]["kinds"]) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def test_apply_leaves_excluded_layers_as_they_are(source: Path) -> None:
    model = hf.LlamaForCausalLM.from_pretrained(source)
    kept = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    adapted = loftq_exp.apply(model, bits=2, rank=4, iter=1, exclude=["up_proj"], target_modules=["mlp.*"])
    layer: Any = adapted.get_submodule("base_model.model.model.layers.1")
    assert torch.equal(layer.mlp.up_proj.weight, kept)
    assert not hasattr(layer.mlp.up_proj, "lora_A")
    assert not hasattr(layer.self_attn.q_proj, "lora_A")
    assert hasattr(layer.mlp.down_proj, "lora_A")
    with pytest.raises(UserError, match=r"quant.exclude=\[upproj\]"):
        loftq_exp.apply(seeded(llama), rank=4, exclude=["upproj"])


def test_settings(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"quant.exclude=\[\]: a pattern is empty or none is given"):
        quantize_config(source, tmp_path, "causal", "dense", quant__exclude=[])
    with pytest.raises(UserError, match=r"quant.exclude=q_proj: a list is needed; give quant.exclude=\[A,B\]"):
        quantize_config(source, tmp_path, "causal", "dense", quant__exclude="q_proj")
    assert json.loads((source / "config.json").read_text())["num_hidden_layers"] == DECODER["num_hidden_layers"]
