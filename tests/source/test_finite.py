"""NaN and Inf in a source: reported by name before any work, wherever they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import quantize_config

from loftq_exp.errors import UserError
from loftq_exp.initialise import decomposer
from loftq_exp.initialise.off_the_shelf import take
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.finite import is_finite
from loftq_exp.source.locate import Source, locate

LORA = {"quant__method": "lora", "quant__type": "none", "quant__bits": 16, "quant__iter": 0}


def poked(model: Path, root: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """The model with one value of one tensor replaced."""
    folder = Path(shutil.copytree(model, root / "source"))
    weights = {key: weight.to(dtype) for key, weight in load_file(folder / "model.safetensors").items()}
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["loftq", "lora"])
def test_any_tensor_with_a_value_that_is_none_is_named_before_the_work(
    tmp_path: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(decomposer, "decompose", None)
    config = quantize_config(poked(tiny_llama_dir, tmp_path, name, value), tmp_path, "causal", "dense", **changes)
    with pytest.raises(UserError, match=rf"model\.path: tensor {name}: 1 of \d+ values are NaN or infinite; "):
        initialise(locate(config.model, config.cache_path), config)


@pytest.mark.parametrize("in_adapter", [False, True])
def test_a_published_checkpoint_is_looked_at_too(tmp_path: Path, tiny_llama_dir: Path, in_adapter: bool) -> None:
    config = quantize_config(tiny_llama_dir, tmp_path, "causal", "dense")
    folder = initialise(locate(config.model, config.cache_path), config).folder
    place = folder / ("loftq_init/adapter_model.safetensors" if in_adapter else "model.safetensors")
    weights = load_file(place)
    name = next(name for name in weights if in_adapter or name == "model.norm.weight")
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, place, {"format": "pt"})
    shelf = quantize_config(tiny_llama_dir, tmp_path / "shelf", "causal", "dense",
                            quant={"method": "off-the-shelf", "path": str(folder), "bits": 2, "rank": 8, "iter": 0})  # fmt: skip
    with pytest.raises(UserError, match=r"^quant\.path.+(NaN or infinite|NaN or Inf)") as caught:
        take(Source(folder, "source", str(folder), None), shelf)
    assert name in str(caught.value)


def test_values_beyond_the_stored_type_are_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """1e300 is finite in a float64 source, and would be Inf in float32."""
    folder = poked(tiny_llama_dir, tmp_path, "model.layers.0.mlp.up_proj.weight", 1e300, torch.float64)
    config = quantize_config(folder, tmp_path, "causal", "dense", save_dtype="float32", **LORA)
    with pytest.raises(
        UserError, match=r"save_dtype=float32: model\.layers\.0\.mlp\.up_proj\.weight has values that are too"
    ):
        initialise(locate(config.model, config.cache_path), config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_of_many_is_found_in_every_type(dtype: torch.dtype) -> None:
    values = torch.zeros((1 << 22) + 3, dtype=dtype)  # more than is looked at together
    assert is_finite(values)
    for position in (0, 1 << 21, -1):
        for bad in (float("nan"), float("inf"), float("-inf")):
            values[position] = bad
            assert not is_finite(values)
        values[position] = 0
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.tensor([1, 2]))
