"""Packed experts: each matrix stays codes on disk and in memory, and everything computed is what dense experts give, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import MODELS, quantize_config, seeded

import loftq_exp  # noqa: F401  # registers packed parameters
from loftq_exp.artifact.exported import export
from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.integrations.parameter import PackedParameter
from loftq_exp.source.locate import locate
from loftq_exp.training.load import load_model

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe", "deepseek-v3", "qwen3.5-moe")
IDS = torch.arange(3, 43).reshape(2, 20)
CPU = torch.device("cpu")
ADAPTER = "loftq_init/adapter_model.safetensors"

Made = Callable[..., tuple[Initialised, RunConfig]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """f(class, format, settings) -> its initialised checkpoint, made once."""
    root = tmp_path_factory.mktemp("packed")

    @functools.cache
    def source(name: str) -> Path:
        seeded(MODELS[name]).save_pretrained(root / name)
        return root / name

    @functools.cache
    def make(name: str, save_format: str, **changes: Any) -> tuple[Initialised, RunConfig]:
        place = root / f"{name}-{len(list(root.iterdir()))}"
        fit = {
            "quant__bits": 4,
            "quant__rank": 4,
            "quant__alpha": 6,
            "quant__dropout": 0,
            "save_dtype": "float32",
        } | changes
        config = quantize_config(source(name), place, "causal", save_format, **fit)
        return initialise(locate(config.model, config.cache_path), config), config

    return make


def plain(init: Initialised, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    model: hf.PreTrainedModel = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=dtype)
    return model


def by_the_documented_lines(init: Initialised) -> PeftModel:
    return PeftModel.from_pretrained(plain(init), str(init.folder), subfolder="loftq_init", is_trainable=True)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_is_dense_bit_for_bit(made: Made, name: str) -> None:
    """Values, outputs and gradients of the model that the documented lines load, and the adapter's file."""
    dense, packed = made(name, "dense")[0], made(name, "packed")[0]
    assert (packed.folder / ADAPTER).read_bytes() == (dense.folder / ADAPTER).read_bytes()
    stored = load_file(packed.folder / "model.safetensors")
    assert not any(name.endswith(("gate_up_proj", "gate_proj.weight", "down_proj")) for name in stored)
    one, other = by_the_documented_lines(dense), by_the_documented_lines(packed)
    values = dict(other.named_parameters())
    for key, value in one.named_parameters():
        if key in values:
            assert torch.equal(value, values[key].clone()), key
    codes = {key for key, module in other.named_modules() if isinstance(module, PackedLinear)}
    assert len(codes) == len(packed.report["weights"])
    wrappers = sum(isinstance(module, ParamWrapper) for module in other.modules())
    assert sum(isinstance(value, PackedParameter) for value in values.values()) == wrappers > 1
    assert get_peft_model_state_dict(other).keys() == load_file(dense.folder / ADAPTER).keys()
    with torch.no_grad():
        assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
        with one.disable_adapter(), other.disable_adapter():
            assert torch.equal(one(input_ids=IDS).logits, other(input_ids=IDS).logits)
    found, wanted = gradients(other), gradients(one)
    assert found.keys() == wanted.keys() == {key for key, value in values.items() if value.requires_grad}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts(made: Made, name: str, implementation: str) -> None:
    models = [plain(made(name, form)[0]) for form in ("dense", "packed")]
    for model in models:
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        one, other = (model(input_ids=IDS).logits for model in models)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_what_a_run_loads(made: Made, name: str, tmp_path: Path) -> None:
    """In bfloat16, through gradient checkpointing, and what a model saves again."""
    packed, config = made(name, "packed")
    dense, its = made(name, "dense")
    found, wanted = [], []
    for gradient, (init, settings) in ((found, (packed, config)), (wanted, (dense, its))):
        model = load_model(init, None, settings, CPU, torch.bfloat16)
        model.gradient_checkpointing_enable()
        model.train()
        gradient.append(gradients(model))
    assert found[0].keys() == wanted[0].keys()
    assert found[0]
    assert all(torch.equal(found[0][key], value) for key, value in wanted[0].items())
    model = plain(packed)
    model.save_pretrained(tmp_path / "again")
    assert {value.dtype for value in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, plain(packed)(input_ids=IDS).logits)


def test_no_dense_expert_is_held(made: Made) -> None:
    """The tensors with storage are small, and a parameter's operations say what they cannot do."""
    model = plain(made("mixtral", "packed")[0])
    experts = model.model.layers[0].mlp.experts
    held = sum(buffer.numel() * buffer.element_size() for buffer in experts.buffers())
    assert held < 0.2 * 4 * experts.down_proj.numel() + 0.2 * 4 * experts.gate_up_proj.numel()
    with pytest.raises(RuntimeError, match="invalid python storage"):
        experts.down_proj.untyped_storage().data_ptr()
    assert torch.equal(experts.down_proj[2], experts.down_proj.clone()[2])
    assert "PackedParameter(shape=(4, 64, 128)" in repr(experts.down_proj)
    adapted = by_the_documented_lines(made("mixtral", "packed")[0])
    with pytest.raises(UserError, match="merge: an adapter cannot be merged into a packed backbone"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_a_copy_of_a_model_holds_packed_matrices_of_its_own(made: Made, name: str) -> None:
    model = by_the_documented_lines(made(name, "packed")[0])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        copied = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.qweight.zero_()
        assert torch.equal(copied(input_ids=IDS).logits, expected)
        assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert [key for key, _ in copied.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_each_expert_has_its_own_bits(made: Made) -> None:
    patterns = {"*.experts.down_proj.1": 2, "*.experts.*": 3, "*": 4}
    dense, packed = (
        made("qwen3-moe", form, quant__bits_per_layer=Patterns(patterns))[0] for form in ("dense", "packed")
    )
    assert {weight["bits"] for weight in packed.report["weights"]} == {2, 3, 4}
    one, other = plain(dense), plain(packed)
    for key, value in one.named_parameters():
        if ".experts." in key:
            assert torch.equal(value, other.get_parameter(key).clone())


class Patterns(dict[str, int]):
    """A mapping that can be an argument of a cached function."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_exports_are_those_of_dense(made: Made, name: str, tmp_path: Path) -> None:
    for to in ("dense", "adapter"):
        for form in ("dense", "packed"):
            export(made(name, form)[0].folder, tmp_path / f"{form}-{to}", to=to)
    for place in ("dense", "adapter/base"):
        one, other = (
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / f"{form}-{place}", dtype=torch.float32)
            for form in ("dense", "packed")
        )
        for key, value in one.named_parameters():
            assert torch.equal(value, other.get_parameter(key)), key
    export(made(name, "packed")[0].folder, tmp_path / "kept", to="packed")
    kept = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(kept(input_ids=IDS).logits, plain(made(name, "packed")[0])(input_ids=IDS).logits)


def test_a_damaged_checkpoint_is_refused(made: Made, tmp_path: Path) -> None:
    init, _ = made("mixtral", "packed")
    shutil.copytree(init.folder, tmp_path / "cut")
    tensors = load_file(init.folder / "model.safetensors")
    gone = "model.layers.0.mlp.experts.packed_down_proj.3.qweight"
    save_file(
        {key: value for key, value in tensors.items() if key != gone},
        tmp_path / "cut/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"packed_down_proj.3.qweight: missing"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    shutil.copytree(init.folder, tmp_path / "few")
    settings = json.loads((init.folder / "config.json").read_text())
    del settings["quantization_config"]["bits"]["model.layers.0.mlp.experts.down_proj.3"]
    (tmp_path / "few/config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"experts.down_proj has 4 matrices, and 3 are packed"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "few")
