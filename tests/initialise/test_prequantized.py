"""Sources whose weights are not pre-trained ones: already quantized, already initialised, or only an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import quantize_config

from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.off_the_shelf import take
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import Source, locate


def made(folder: Path, root: Path, save_format: str = "dense") -> Initialised:
    config = quantize_config(folder, root, "causal", save_format)
    return initialise(locate(config.model, config.cache_path), config)


def copy(model: Path, root: Path) -> Path:
    return Path(shutil.copytree(model, root / "source"))


def refused(folder: Path, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        made(folder, root)
    message = str(caught.value)
    assert message.startswith(f"model.path={folder}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"), ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "quark"}, "quark"),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": None}, "NVFP4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_config_json_says_is_quantized_is_refused(
    tmp_path: Path, tiny_llama_dir: Path, settings: dict[str, Any], method: str, nested: bool
) -> None:
    folder = copy(tiny_llama_dir, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    said = {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config | ({"text_config": said} if nested else said)))
    message = refused(folder, tmp_path)
    assert f"already quantized by {method}" in message
    assert (
        "give the 16-bit checkpoint that it was made from (only fp8, mxfp4 and bitsandbytes are read as values)"
        in message
    )


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "bitsandbytes"])
def test_a_format_that_is_read_is_refused_if_no_weight_has_it(
    tmp_path: Path, tiny_llama_dir: Path, method: str
) -> None:
    folder = copy(tiny_llama_dir, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    assert f"already quantized by {method}, as quantization_config in config.json says, but no weight" in refused(
        folder, tmp_path
    )


@pytest.mark.parametrize(
    ("name", "value", "method"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64).to(torch.float8_e4m3fn), "fp8"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8), "a method of int8 weights"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1), "fp8"),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 128, dtype=torch.int32), "gptq or awq"),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.zeros(128, 8, dtype=torch.int32), "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(128), "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", torch.ones(128), "bitsandbytes int8"),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(4, 8, dtype=torch.uint8), "mxfp4"),
    ],
)
def test_tensors_of_a_quantized_base_are_refused_whatever_the_config_says(
    tmp_path: Path, tiny_llama_dir: Path, name: str, value: torch.Tensor, method: str
) -> None:
    folder = copy(tiny_llama_dir, tmp_path)
    weights = load_file(folder / "model.safetensors") | {name: value}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refused(folder, tmp_path)
    assert f"already quantized by {method}" in message
    assert name in message


@pytest.mark.parametrize("save_format", ["dense", "packed", "bnb4"])
def test_an_initialised_checkpoint_is_no_source(tmp_path: Path, tiny_llama_dir: Path, save_format: str) -> None:
    init = made(tiny_llama_dir, tmp_path, save_format)
    message = refused(init.folder, tmp_path / "again")
    assert "it has init_report.json" in message
    assert f"give the model that it was made from ({tiny_llama_dir})" in message
    assert ("quant=off-the-shelf" in message) == (save_format == "dense")
    # Without what makes it an initialised checkpoint, a packed backbone is still quantized.
    shutil.rmtree(init.folder / "loftq_init")
    (init.folder / "init_report.json").unlink()
    if save_format == "packed":
        assert "packed by loftq_exp" in refused(init.folder, tmp_path)


def test_the_advice_for_an_initialised_checkpoint_works(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """off-the-shelf uses backbone and factors unchanged."""
    init = made(tiny_llama_dir, tmp_path)
    assert f"quant=off-the-shelf quant.path={init.folder} quant.rank=8" in refused(init.folder, tmp_path / "again")
    shelf = quantize_config(tiny_llama_dir, tmp_path / "shelf", "causal", "dense",
                            quant={"method": "off-the-shelf", "path": str(init.folder), "bits": 2, "rank": 8, "iter": 0})  # fmt: skip
    taken = take(Source(init.folder, "source", str(init.folder), None), shelf)
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        before, after = load_file(init.folder / file), load_file(taken.folder / file)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_is_no_source(tmp_path: Path, tiny_llama_dir: Path) -> None:
    init = made(tiny_llama_dir, tmp_path)
    assert "is an adapter without its model" in refused(init.folder / "loftq_init", tmp_path / "again")
    folder = copy(tiny_llama_dir, tmp_path)
    shutil.copy(init.folder / "loftq_init" / "adapter_config.json", folder)  # transformers would load the adapter too
    assert "it has adapter_config.json" in refused(folder, tmp_path / "again")
