"""A checkpoint is checked before it is renamed into place: names, shapes, parts of packed weights, unquantized tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import quantize_config

from loftq_exp.errors import UserError
from loftq_exp.initialise import stage as convert
from loftq_exp.initialise.stage import initialise
from loftq_exp.initialise.verify import check_written
from loftq_exp.source.locate import locate

Weights = dict[str, torch.Tensor]


def spoilt(
    model: Path, root: Path, save_format: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Weights], Any]
) -> str:
    """The refusal where the written weights were changed before they are looked at."""

    def check(folder: Path, *arguments: Any) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        check_written(folder, *arguments)

    monkeypatch.setattr(convert, "check_written", check)
    config = quantize_config(model, root, "causal", save_format)
    with pytest.raises(UserError) as caught:
        initialise(locate(config.model, config.cache_path), config)
    assert not (config.inits_path / config.init_name).exists(), "nothing takes its place"
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMS = ["dense", "packed", "bnb4"]


@pytest.mark.parametrize("save_format", FORMS)
def test_a_tensor_that_was_not_written_is_named(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, save_format: str
) -> None:
    lost = lambda weights: weights.pop("model.norm.weight")  # noqa: E731
    assert "model.norm.weight is missing" in spoilt(tiny_llama_dir, tmp_path, save_format, monkeypatch, lost)


@pytest.mark.parametrize("save_format", FORMS)
def test_a_part_of_a_target_that_was_not_written_is_named(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, save_format: str
) -> None:
    part = {"dense": "weight", "packed": "scales", "bnb4": "weight.absmax"}[save_format]
    name = f"model.layers.1.mlp.up_proj.{part}"
    message = spoilt(tiny_llama_dir, tmp_path, save_format, monkeypatch, lambda weights: weights.pop(name))
    assert f"{name} was not written to" in message


@pytest.mark.parametrize("save_format", FORMS)
def test_a_tensor_that_a_load_would_ignore_is_named(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, save_format: str
) -> None:
    more = lambda weights: weights.update({"model.extra.weight": torch.ones(2)})  # noqa: E731
    message = spoilt(tiny_llama_dir, tmp_path, save_format, monkeypatch, more)
    assert "model.extra.weight would be ignored by LlamaForCausalLM" in message


@pytest.mark.parametrize("save_format", FORMS)
def test_one_bit_of_what_passes_through_is_noticed(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, save_format: str
) -> None:
    def flip(weights: Weights) -> None:
        weights["model.embed_tokens.weight"].view(torch.int32)[-1, -1] ^= 1

    message = spoilt(tiny_llama_dir, tmp_path, save_format, monkeypatch, flip)
    assert "model.embed_tokens.weight differs from the source after writing" in message


def test_packed_parts_of_another_shape_are_refused(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.self_attn.q_proj.qweight"
    cut = lambda weights: weights.update({name: weights[name][:-1].contiguous()})  # noqa: E731
    assert "model.layers.0.self_attn.q_proj" in spoilt(tiny_llama_dir, tmp_path, "packed", monkeypatch, cut)
