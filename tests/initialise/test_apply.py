"""`loftq_exp.apply`: the values of the quantize stage, in a model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from zoo import FAMILIES, seeded

import loftq_exp
from loftq_exp.config import QuantConfig, RunConfig
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.source.locate import locate

SETTINGS: dict[str, dict[str, Any]] = {
    "one step": {"method": "loftq", "bits": 2, "rank": 4, "iter": 1, "alpha": 6},
    "three steps": {"method": "loftq", "bits": 4, "rank": 8, "iter": 3},
    "uniform": {"method": "loftq", "type": "uniform", "bits": 3, "rank": 4, "iter": 2, "solver": "exact"},
    "mixed": {"method": "loftq", "bits": 3, "rank": 4, "iter": 1, "allocation": "error+rank"},
    "qlora": {"method": "qlora", "iter": 0, "rank": 4, "double": True},
    "lora": {"method": "lora", "type": "none", "bits": 16, "iter": 0, "rank": 4},
    "pissa": {"method": "pissa", "iter": 1, "rank": 4},
}
IDS = torch.arange(3, 43).reshape(2, 20)


def staged(
    folder: Path, root: Path, kind: str, quant: dict[str, Any], dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the backbone and of the adapter that the quantize stage writes."""
    config = RunConfig.from_mapping({
        "model": {"path": str(folder), "kind": kind}, "quant": quant, "task": {"kind": "gsm8k"}, "train": {}, "stages": ["quantize"],
        "device": "cpu", "save_dtype": dtype, "save_dir": str(root / "inits"), "cache_dir": str(root / "cache"),
    })  # fmt: skip
    init = initialise(locate(config.model, config.cache_path), config)
    return load_file(init.folder / "model.safetensors"), load_file(init.folder / "loftq_init/adapter_model.safetensors")


def saved(folder: Path, family: str, dtype: torch.dtype) -> str:
    seeded(FAMILIES[family].make).to(dtype).save_pretrained(folder)
    return FAMILIES[family].kind


@pytest.mark.parametrize(
    ("family", "dtype", "name"),
    [("llama-2", "float32", name) for name in SETTINGS]
    + [("llama-2", "bfloat16", "three steps"), ("t5", "float32", "one step"), ("roberta", "float32", "one step")],
)
def test_equal_bytes(tmp_path: Path, family: str, dtype: str, name: str) -> None:
    kind = saved(tmp_path / "source", family, getattr(torch, dtype))
    backbone, factors = staged(tmp_path / "source", tmp_path, kind, SETTINGS[name], dtype)
    model = AUTO_CLASSES[kind].from_pretrained(tmp_path / "source", dtype=getattr(torch, dtype))
    adapted = loftq_exp.apply(model, SETTINGS[name])
    assert isinstance(adapted, PeftModel)
    compared = 0
    for module, layer in adapted.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for factor, found in (("A", layer.lora_A), ("B", layer.lora_B)):
            expected = factors[f"base_model.model.{module}.lora_{factor}.weight"]
            assert torch.equal(found["default"].weight, expected)
            assert found["default"].weight.dtype == torch.float32
        stored = f"{module}.weight"
        expected = (
            backbone[stored] if stored in backbone else backbone[stored.removeprefix(f"{model.base_model_prefix}.")]
        )
        assert torch.equal(layer.base_layer.weight, expected)
        assert layer.base_layer.weight.dtype == expected.dtype
        compared += 1
    assert compared == FAMILIES[family].linears


def test_trains_and_saves_an_adapter_without_the_pretrained_path(tmp_path: Path) -> None:
    saved(tmp_path / "source", "llama-2", torch.float32)
    model = loftq_exp.apply(hf.LlamaForCausalLM.from_pretrained(tmp_path / "source"), bits=2, rank=4, iter=1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    backbone = model.unload()
    backbone.save_pretrained(tmp_path / "Q")
    again = PeftModel.from_pretrained(hf.LlamaForCausalLM.from_pretrained(tmp_path / "Q"), tmp_path / "adapter").eval()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == ""
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_calibrated_as_loftq_init_on_the_same_statistics(tmp_path: Path) -> None:
    saved(tmp_path / "source", "llama-2", torch.float32)
    dense = hf.LlamaForCausalLM.from_pretrained(tmp_path / "source")
    name = "model.layers.1.mlp.down_proj"
    hessian = loftq_exp.collect_statistics(dense, [{"input_ids": IDS}], modules=[name])[name].hessian
    values, lora_A, lora_B = loftq_exp.loftq_init(dense.get_submodule(name).weight.detach(), 2, 4, 3, hessian=hessian)
    quant = QuantConfig("loftq", bits=2, rank=4, iter=3, calibration="full")
    layer = loftq_exp.apply(dense, quant, [{"input_ids": IDS}]).base_model.model.get_submodule(name)
    for found, expected in ((layer.base_layer, values), (layer.lora_A.default, lora_A), (layer.lora_B.default, lora_B)):
        torch.testing.assert_close(found.weight.detach(), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 65}, "quant.rank=65: no weight has such a rank"),
        ({"bit": 4}, "quant.bit: there is no such setting"),
        ({"calibration": "full"}, "there is no text"),
        ({"polish_steps": 3}, "apply does not polish"),
        ({"calibration": "full", "order": "sequential"}, "apply calibrates all layers at once"),
        ({"method": "off-the-shelf", "iter": 0}, "a published checkpoint is loaded"),
    ],
)
def test_bad_settings_leave_the_model_unchanged(settings: dict[str, Any], message: str) -> None:
    model = seeded(FAMILIES["llama-2"].make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(loftq_exp.UserError, match=message):
        loftq_exp.apply(model, {"rank": 4} | settings)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_models() -> None:
    model = seeded(FAMILIES["llama-2"].make)
    with pytest.raises(loftq_exp.UserError, match="LlamaModel is of no kind"):
        loftq_exp.apply(model.model, rank=4)
    with pytest.raises(loftq_exp.UserError, match="calibration=none: the batches"):
        loftq_exp.apply(model, {"rank": 4}, [{"input_ids": IDS}])
    with pytest.raises(loftq_exp.UserError, match="calibration=full: not batches"):
        loftq_exp.apply(model, rank=4, calibration="full")  # type: ignore[arg-type]
    broken = seeded(FAMILIES["llama-2"].make)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(loftq_exp.UserError, match=r"up_proj.weight has NaN"):
        loftq_exp.apply(broken, rank=4)
    adapted = loftq_exp.apply(model, rank=4, iter=1)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    for given in (adapted, model):  # PEFT puts its layers into the model itself
        with pytest.raises(loftq_exp.UserError, match="has adapters already"):
            loftq_exp.apply(given, rank=4)
    assert before.keys() == adapted.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_settings_and_batches_of_another_type_are_refused() -> None:
    model = seeded(FAMILIES["llama-2"].make)
    for config in ("loftq", LoraConfig()):
        with pytest.raises(loftq_exp.UserError, match=f"^config: a {type(config).__name__} holds no settings"):
            loftq_exp.apply(model, config)  # type: ignore[arg-type]
    for batches in ([IDS], {"input_ids": IDS}):
        with pytest.raises(loftq_exp.UserError, match=r"^data: a (Tensor|str) is no batch; give a list of mappings"):
            loftq_exp.apply(model, {"rank": 4, "calibration": "full"}, batches)  # type: ignore[arg-type]
