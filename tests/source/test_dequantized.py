"""Checkpoints that are quantized already: their values are those that transformers computes from them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from zoo import ENCODER, quantize_config

from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.dequantized import open_values
from loftq_exp.source.locate import locate

LLAMA: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 64, "dtype": "bfloat16"}
BLOCK = (48, 32)
"""Does not divide the weights' rows, as 128 does not divide some of DeepSeek's."""


def drawn(model: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model().to(torch.bfloat16).save_pretrained(folder)
    return folder


def set_config(folder: Path, settings: dict[str, Any]) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"quantization_config": settings}))


def fp8(folder: Path, block: tuple[int, int] | None = BLOCK, **changes: Any) -> dict[str, torch.Tensor]:
    """Quantize a llama in `folder` to fp8 by hand, and return the values of its weights in float32."""
    drawn(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | changes)), folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        expected[name] = weight.float()
        if ".layers." not in name or weight.dim() < 2:
            continue
        rows, columns = weight.shape
        height, width = block or (rows, columns)
        scales = torch.empty(-(-rows // height), -(-columns // width))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scales[i, j] = weight[place].float().abs().max() / 448
                codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
                expected[name][place] = codes[place].float() * scales[i, j]
        tensors |= {name: codes, f"{name}_scale_inv": scales if block else scales.reshape(())}
        tensors[name.removesuffix("weight") + "activation_scale"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(
        folder,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block) if block else None},
    )
    return expected


def mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A gpt-oss with mxfp4 experts drawn by hand, and the values of its weights in float32."""
    sizes = {**ENCODER, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
             "hidden_size": 64, "intermediate_size": 32, "dtype": "bfloat16"}  # fmt: skip
    drawn(lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**sizes)), folder)
    tensors = load_file(folder / "model.safetensors")
    expected = {name: value.float() for name, value in tensors.items()}
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outside, inside // 32, 32), generator=draw)
        scales = torch.randint(118, 126, (experts, outside, inside // 32), generator=draw)
        values = levels[codes] * 2.0 ** (scales[..., None] - 127)
        expected[name] = values.reshape(experts, outside, inside).transpose(1, 2)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return expected


def bitsandbytes(folder: Path, **settings: Any) -> None:
    """A llama that transformers saved with bitsandbytes' layers."""
    drawn(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), folder / "dense")
    config = hf.BitsAndBytesConfig(**settings)
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.rmtree(folder / "dense")


def values(folder: Path) -> dict[str, torch.Tensor]:
    with open_values(folder) as tensors:
        for name in tensors.names:
            assert tensors.shape(name) == tuple(tensors.read(name).shape)
            assert tensors.dtype(name) is tensors.read(name).dtype
        return {name: tensors.read(name).clone() for name in tensors.names}


def made(folder: Path, root: Path, **changes: Any) -> Initialised:
    config = quantize_config(folder, root, "causal", "dense", **changes)
    return initialise(locate(config.model, config.cache_path), config)


def as_plain(quantized: Path, folder: Path) -> Path:
    """A checkpoint with the same values that is not quantized."""
    shutil.copytree(quantized, folder)
    save_file(values(folder), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("block", [BLOCK, (64, 32), None])
def test_fp8_blocks_become_values(block: tuple[int, int] | None, tmp_path: Path) -> None:
    expected = fp8(tmp_path, block)
    found = values(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.bfloat16()), name


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_the_values_are_those_that_transformers_loads(make: Any, tmp_path: Path) -> None:
    make(tmp_path, (64, 32)) if make is fp8 else make(tmp_path)
    kind = hf.FineGrainedFP8Config if make is fp8 else hf.Mxfp4Config
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=kind(dequantize=True), dtype=torch.bfloat16
    )
    loaded, found = model.state_dict(), values(tmp_path)
    for name, value in found.items():
        assert torch.equal(loaded[name], value), name


def test_mxfp4_experts_become_values(tmp_path: Path) -> None:
    expected = mxfp4(tmp_path)
    found = values(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].float(), value.bfloat16().float()), name


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)  # fmt: skip
def test_bitsandbytes_layers_become_values(settings: dict[str, Any], tmp_path: Path) -> None:
    bitsandbytes(tmp_path, **settings)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected, found = model.dequantize().state_dict(), values(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(expected[name].bfloat16(), value), name


@pytest.mark.parametrize("make", [fp8, mxfp4, lambda folder: bitsandbytes(folder, load_in_4bit=True)])
def test_an_initialisation_starts_from_the_values_and_says_so(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of a plain checkpoint with the same values."""
    make(tmp_path / "quantized")
    with caplog.at_level(logging.WARNING):
        init = made(tmp_path / "quantized", tmp_path / "one", quant__dropout=0)
    said = init.report["model"]["dequantized"]
    assert said["dtype"] == "bfloat16"
    assert (
        f"already quantized by {said['method']}; its {said['weights']} weights are read as values in bfloat16"
        in caplog.text
    )
    assert "quantization_config" not in json.loads((init.folder / "config.json").read_text())
    other = made(as_plain(tmp_path / "quantized", tmp_path / "plain"), tmp_path / "two", quant__dropout=0)
    assert "dequantized" not in other.report["model"]
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        one, two = load_file(init.folder / file), load_file(other.folder / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_calibration_observes_the_values(tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    (tmp_path / "text.txt").write_text("one and two are three.\n" * 100)
    calibrated = {"quant__calibration": "full",
                  "calibration": {"file": str(tmp_path / "text.txt"), "samples": 2, "length": 16}}  # fmt: skip
    fp8(tmp_path / "quantized", (64, 32), vocab_size=len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(tmp_path / "quantized")
    init = made(tmp_path / "quantized", tmp_path / "one", **calibrated)
    other = made(as_plain(tmp_path / "quantized", tmp_path / "plain"), tmp_path / "two", **calibrated)
    errors = [[weight["output_errors"] for weight in each.report["weights"]] for each in (init, other)]
    assert errors[0] == errors[1]
    assert all(0 < error < 1 for weight in errors[0] for error in weight)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fp8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {f"{name}_scale_inv": torch.ones(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight_scale_inv has shape \(2, 2\)"):
        made(tmp_path, tmp_path / "out")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"already quantized by fp8, as tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        made(tmp_path, tmp_path / "out")
