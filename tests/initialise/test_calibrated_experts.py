"""Calibrated mixtures: each expert's matrix is decomposed in the norm of its own inputs, in the stage and in place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from zoo import CONFIGS, quantize_config, seeded, with_tokenizer

import loftq_exp
from loftq_exp.artifact.folder import Initialised
from loftq_exp.calibration import Statistics, collect_statistics
from loftq_exp.calibration.samples import batches_of, calibration_samples
from loftq_exp.calibration.streaming import BlockRunner
from loftq_exp.initialise import calibrate
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate

FIT: dict[str, Any] = {"quant__bits": 2, "quant__rank": 4, "quant__alpha": 8, "quant__dropout": 0, "quant__calibration": "full",
                       "save_dtype": "float32"}  # fmt: skip


class Place:
    """A mixture with a tokenizer and some text, and the settings for it."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, root: Path) -> None:
        config = CONFIGS[name]()
        config.update({"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None})

        def make() -> hf.PreTrainedModel:
            model = hf.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim > 1 and (not bool(parameter.any()) or parameter.std() < 0.05):
                    parameter.data = torch.randn(parameter.shape) * 0.1  # routers that tell tokens apart
            return model

        self.folder, self.root = with_tokenizer(lambda: seeded(make), tokenizer, root / "source"), root
        self.text = root / "text.txt"
        self.text.write_text("".join(f"{n} apples and {n} plums are {2 * n} fruits.\n" for n in range(200)))

    def settings(self, folder: str, **changes: Any) -> Any:
        text = {"file": str(self.text), "samples": 8, "length": 32}
        return quantize_config(self.folder, self.root / folder, "causal", "dense", calibration=text, **FIT | changes)

    def make(self, folder: str, **changes: Any) -> Initialised:
        config = self.settings(folder, **changes)
        return initialise(locate(config.model, config.cache_path), config)

    def model(self) -> hf.PreTrainedModel:
        return hf.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        config = self.settings("x")
        return batches_of(calibration_samples(locate(config.model, config.cache_path), config))


def outputs_differ(init: Initialised, model: hf.PreTrainedModel, found: dict[str, Statistics]) -> dict[str, float]:
    """The relative error of each expert matrix in its damped norm, in float64, from a plain load of the checkpoint."""
    plain = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, str(init.folder), subfolder="loftq_init").merge_and_unload()
    errors = {}
    for name, one in found.items():
        path, _, expert = name.rpartition(".")
        weight, fitted = (each.get_parameter(path)[int(expert)].detach().double() for each in (model, merged))
        if model.get_submodule(path.rpartition(".")[0]).is_transposed:
            weight, fitted = weight.T, fitted.T
        h = one.hessian.double() if one.hessian.ndim == 2 else one.hessian.double().diag()
        h = h / h.diagonal().mean() + 0.01 * torch.eye(len(h), dtype=torch.float64)
        error = weight - fitted
        errors[name] = float((torch.trace(error @ h @ error.T) / torch.trace(weight @ h @ weight.T)).sqrt())
    return errors


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3"])
def test_reported_errors_are_those_on_each_expert_s_own_inputs(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(name, tiny_tokenizer, tmp_path)
    with caplog.at_level(logging.INFO):
        init = place.make("full")
    model = place.model()
    names = [entry["name"] for entry in init.report["weights"] if ".experts." in entry["name"]]
    found = collect_statistics(model, place.batches(), modules=names)
    errors = outputs_differ(init, model, found)
    assert len(names) >= 8
    for entry in init.report["weights"]:
        assert len(entry["output_errors"]) == 2
        if entry["name"] in errors:
            assert errors[entry["name"]] == pytest.approx(entry["output_errors"][entry["kept_step"]], rel=1e-3)
    filled = [one for one in found.values() if one.tokens < one.hessian.shape[0]]
    counts = {"matrices": len(names), "filled": len(filled), "unread": sum(not one.tokens for one in filled)}
    assert init.report["calibration"]["experts"] == counts
    said = f"{len(filled)} of the {len(names)} matrices of experts read fewer tokens than they have inputs"
    assert (said in caplog.text) == bool(filled)
    uncalibrated = outputs_differ(place.make("none", quant__calibration="none"), model, found)
    diagonal = outputs_differ(place.make("diagonal", quant__calibration="diagonal"), model, found)
    assert sum(errors.values()) < sum(diagonal.values()) < sum(uncalibrated.values())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_parts_of_a_block_give_the_same_and_are_cached(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, collected = Place(name, tiny_tokenizer, tmp_path), []
    collect = BlockRunner.collect

    def counted(self: BlockRunner, *args: Any, **options: Any) -> dict[str, Statistics]:
        found = collect(self, *args, **options)
        collected.append(found)
        return found

    monkeypatch.setattr(BlockRunner, "collect", counted)
    whole = place.make("whole")
    assert len(collected) == 2
    again = place.make("again", cache_dir=str(tmp_path / "whole/cache"), quant__rank=8)
    assert len(collected) == 2
    assert again.report["calibration"]["experts"] == whole.report["calibration"]["experts"]
    monkeypatch.setattr(calibrate, "EXPERTS_BYTES", 3 * 8 * 64 * 64)
    parts = place.make("parts", cache_dir=str(tmp_path / "parts/cache"))
    experts = [sum("experts" in key for key in found) for found in collected[2:]]
    assert max(experts) == 3
    assert sum(experts) == 2 * 8
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        one, other = load_file(whole.folder / file), load_file(parts.folder / file)
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_targets_that_were_left_out_are_collected_when_they_are_chosen(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    place = Place("mixtral", tiny_tokenizer, tmp_path)
    few = place.make("few", quant__exclude=["experts.*"], cache_dir=str(tmp_path / "cache"))
    assert "experts" not in few.report["calibration"]
    alone = place.make("alone", quant__target_modules=["experts.down_proj"], cache_dir=str(tmp_path / "cache"))
    assert alone.report["calibration"]["experts"]["matrices"] == 8
    assert "experts" in place.make("all", cache_dir=str(tmp_path / "cache")).report["calibration"]


def test_sequential_calibration_reads_initialised_experts(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The second block's reported errors are those on inputs that pass through the initialised first block."""
    for name in ("mixtral", "gpt-oss"):
        place = Place(name, tiny_tokenizer, tmp_path / name)
        init = place.make("ordered", quant__order="sequential")
        model = place.model()
        plain = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(plain, str(init.folder), subfolder="loftq_init").merge_and_unload()
        merged.model.layers[1].load_state_dict(model.model.layers[1].state_dict())
        names = [entry["name"] for entry in init.report["weights"] if ".layers.1.mlp.experts." in entry["name"]]
        found = collect_statistics(merged, place.batches(), modules=names)
        errors = outputs_differ(init, model, found)
        for entry in init.report["weights"]:
            if entry["name"] in errors:
                assert errors[entry["name"]] == pytest.approx(entry["output_errors"][entry["kept_step"]], rel=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_apply_gives_the_bytes_of_the_stage(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    place = Place(name, tiny_tokenizer, tmp_path)
    init, model = place.make("full"), place.model()
    adapted = loftq_exp.apply(
        model, {"bits": 2, "rank": 4, "alpha": 8, "dropout": 0, "iter": 1, "calibration": "full"}, place.batches()
    )
    held = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    taken = get_peft_model_state_dict(adapted)
    assert taken.keys() == held.keys()
    for key, value in taken.items():  # the inputs of one pass and of blocks one by one differ by their rounding
        torch.testing.assert_close(value, held[key], rtol=1e-2, atol=1e-3)
