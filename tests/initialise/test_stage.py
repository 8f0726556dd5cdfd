"""From a checkpoint to an initialised one: what is written, what users load, and what happens on failure."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import zoo
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from zoo import sized

from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.writer import SafetensorsWriter, tensor_bytes
from loftq_exp.config import RunConfig
from loftq_exp.config.quant import BITS_OF_TYPE
from loftq_exp.errors import UserError
from loftq_exp.initialise import decomposer
from loftq_exp.initialise import stage as convert
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.source.locate import locate
from loftq_exp.source.tensors import open_tensors
from loftq_exp.storage.specs import TensorSpec

RANK = 8
LOFTQ = {"method": "loftq", "type": "nf", "bits": 4, "rank": RANK, "iter": 2}
QLORA = {"quant.method": "qlora", "quant.iter": 0}
LORA = {"quant.method": "lora", "quant.type": "none", "quant.bits": 16, "quant.iter": 0}


def settings(model: Path, root: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """LoftQ NF4 of `model` into {root}/saved with the cache {root}/cache, but for the dotted `changes`."""
    values: dict[str, Any] = {
        "model": {"path": str(model), "kind": "causal"}, "quant": dict(LOFTQ), "task": {"kind": "gsm8k"}, "train": {},
        "stages": ["quantize"], "save_dir": str(root / "saved"), "cache_dir": str(root / "cache"), "device": "cpu",
    }  # fmt: skip
    for name, value in (changes or {}).items():
        group, _, key = name.rpartition(".")
        (values[group] if group else values)[key] = value
    return RunConfig.from_mapping(values)


def made(model: Path, root: Path, changes: dict[str, Any] | None = None) -> Initialised:
    config = settings(model, root, changes)
    return initialise(locate(config.model, config.cache_path), config)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors as stored in the files."""
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def products(init: Initialised) -> dict[str, torch.Tensor]:
    """s B A of each target as PEFT computes it from the files."""
    adapter = json.loads((init.folder / "loftq_init" / "adapter_config.json").read_text())
    factors = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    scaling = adapter["lora_alpha"] / adapter["r"]
    names = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    assert len(factors) == 2 * len(names)
    return {
        name.removeprefix("base_model.model."): scaling
        * (factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double())
        for name in names
    }


def error_of(init: Initialised, weights: dict[str, torch.Tensor], module: str) -> float:
    """||W - Q - s B A|| / ||W|| from the stored files, in float64."""
    weight = weights[f"{module}.weight"].double()
    residual = weight - stored(init.folder)[f"{module}.weight"].double() - products(init)[module]
    return float(residual.norm() / weight.norm())


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor_bytes(tensor))


def contents(folder: Path) -> dict[str, bytes]:
    """The files by name, without the manifest: it has the digest of the report, and so of its times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert files.pop("manifest.json")
    return files


def copied(model: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model in another folder, its weights in another type."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: weight.to(dtype) for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


class Shelf:
    """Initialised checkpoints of the tiny Llama, each made once; one cache for all."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root = model, root
        self.weights = load_file(model / "model.safetensors")
        self._made: dict[str, Initialised] = {}

    def get(self, changes: dict[str, Any] | None = None) -> Initialised:
        text = json.dumps(changes or {}, sort_keys=True)
        if text not in self._made:
            place = self.root / hashlib.sha256(text.encode()).hexdigest()[:8]
            self._made[text] = made(self.model, self.root, {**(changes or {}), "save_dir": str(place)})
        return self._made[text]


@pytest.fixture(scope="module")
def shelf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tiny_llama_dir, tmp_path_factory.mktemp("shelf"))


ALPHAS = (None, 16, 2 * RANK, 5.5)
PLAIN = [
    *({"quant.bits": bits, "quant.alpha": alpha} for bits in (4, 2) for alpha in ALPHAS[:3]),
    *({"quant.bits": bits, "save_format": "bnb4"} for bits in (4, 2)),
]


# What users get


@pytest.fixture(scope="module")
def load_plain() -> Path:
    path = Path(__file__).parents[3] / "shared" / "checks" / "load_plain.py"
    if not path.is_file():
        pytest.skip(f"the check is not there ({path})")
    return path


@pytest.fixture(scope="module")
def loaded_plain(shelf: Shelf, load_plain: Path) -> list[dict[str, Any]]:
    """What the check says of each checkpoint in PLAIN: it runs in a process of its own, once for each, one import for all."""
    command = "import runpy, sys\nfor sys.argv[1:] in [[x] for x in sys.argv[2:]]:\n  try: runpy.run_path(sys.argv[0], run_name='__main__')\n  except SystemExit as end: assert end.code == 0, (sys.argv, end.code)"  # fmt: skip
    command = command.replace("sys.argv[0]", repr(str(load_plain)))
    folders = [str(shelf.get(changes).folder) for changes in PLAIN]
    call = [sys.executable, "-c", command, "-", *folders]
    result = subprocess.run(
        call, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_others_load_it_without_loftq_exp_and_get_every_value(shelf: Shelf, loaded_plain: list[dict[str, Any]]) -> None:
    assert len(loaded_plain) == len(PLAIN)
    for changes, seen in zip(PLAIN, loaded_plain, strict=True):
        dense = stored(shelf.get({key: value for key, value in changes.items() if key != "save_format"}).folder)
        expected = {
            name.removesuffix(".weight"): hashlib.sha256(tensor_bytes(weight)).hexdigest()
            for name, weight in dense.items()
            if name.endswith("_proj.weight")
        }
        assert {weight.dtype for name, weight in dense.items() if name.endswith("_proj.weight")} == {torch.bfloat16}
        assert seen["digests"] == expected
        assert seen["lora_layers"] == seen["four_bit_layers"] == len(expected) == 14
        shapes = [shelf.weights[f"{name}.weight"].shape for name in expected]
        assert seen["trainable"] == RANK * sum(rows + columns for rows, columns in shapes)


@pytest.mark.parametrize("bits", [4, 2])
def test_any_alpha_starts_at_the_same_function_for_others(loaded_plain: list[dict[str, Any]], bits: int) -> None:
    seen = [seen for changes, seen in zip(PLAIN, loaded_plain, strict=True) if changes["quant.bits"] == bits]
    assert len(seen) == 4
    assert all(one["mean_ratio"] == pytest.approx(seen[0]["mean_ratio"], rel=1e-5) for one in seen)
    assert all(one["loss"] == pytest.approx(seen[0]["loss"], rel=2e-2) for one in seen)


@pytest.mark.parametrize("alpha", ALPHAS[1:])
@pytest.mark.parametrize("bits", [4, 2])
def test_alpha_changes_neither_the_backbone_nor_the_product(shelf: Shelf, bits: int, alpha: float) -> None:
    one, other = (
        shelf.get({"quant.bits": bits, "quant.alpha": None}),
        shelf.get({"quant.bits": bits, "quant.alpha": alpha}),
    )
    assert (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()
    for module, product in products(one).items():
        torch.testing.assert_close(products(other)[module], product, rtol=1e-5, atol=1e-7)
    assert other.report["totals"]["computed"] == 0, "alpha is not in the cache's keys"
    adapter = json.loads((other.folder / "loftq_init" / "adapter_config.json").read_text())
    assert adapter["lora_alpha"] == alpha


def test_the_adapter_says_what_peft_needs(shelf: Shelf) -> None:
    init = shelf.get({"quant.dropout": 0.25})
    config = peft.PeftConfig.from_pretrained(str(init.folder), subfolder="loftq_init")
    assert isinstance(config, peft.LoraConfig)
    assert config.init_lora_weights is True
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, RANK, 0.25)
    assert config.task_type == peft.TaskType.CAUSAL_LM
    assert config.base_model_name_or_path == str(init.folder.resolve())
    assert config.target_modules == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert init.folder.name == f"{shelf.model.name}-4bit-{RANK}rank"


def test_the_tokenizer_and_the_config_come_along(shelf: Shelf) -> None:
    folder = shelf.get().folder
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (shelf.model / name).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (shelf.model, folder))
    assert after["dtype"] == "bfloat16"
    assert {**after, "dtype": before["dtype"]} == before


# What is written


FORMATS: list[dict[str, Any]] = [{}, {"quant.bits": 2}, {"save_dtype": "float32"}, {"save_format": "bnb4"}, LORA, QLORA]


@pytest.mark.parametrize("changes", FORMATS, ids=str)
def test_embeddings_norms_and_head_are_the_same_bytes(shelf: Shelf, changes: dict[str, Any]) -> None:
    tensors = stored(shelf.get(changes).folder)
    others = [name for name in shelf.weights if not name.endswith("_proj.weight")]
    assert len(others) == 7
    for name in others:
        assert raw(tensors[name]) == raw(shelf.weights[name])


@pytest.mark.parametrize("changes", [{}, {"save_dtype": "float32"}, LORA], ids=str)
def test_a_dense_backbone_has_the_names_it_had(shelf: Shelf, changes: dict[str, Any]) -> None:
    tensors = stored(shelf.get(changes).folder)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: weight.shape for name, weight in shelf.weights.items()
    }


OPTIMAL = {"quant.levels": "optimal", "quant.scale": "search"}
IN_NF4 = [{"quant.bits": 4}, {"quant.bits": 2}, *({"quant.bits": bits} | OPTIMAL for bits in (2, 3, 4))]
"""Settings whose values bitsandbytes' NF4 holds."""


@pytest.mark.parametrize("quant", IN_NF4, ids=str)
def test_float32_reloads_in_float32_without_changing_a_value(shelf: Shelf, quant: dict[str, Any]) -> None:
    init = shelf.get({"save_dtype": "float32"} | quant)
    tensors = stored(init.folder)
    names = [name for name in tensors if name.endswith("_proj.weight")]
    assert {tensors[name].dtype for name in names} == {torch.float32}
    four_bit = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32, quantization_config=four_bit)
    for name in names:
        weight = model.get_parameter(name)
        assert raw(dequantize_4bit(weight.data, weight.quant_state)) == raw(tensors[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quant", IN_NF4, ids=str)
def test_bnb4_loads_plainly_with_the_same_values_in_a_quarter_of_the_space(
    shelf: Shelf, quant: dict[str, Any], dtype: str
) -> None:
    changes = quant | {"save_dtype": dtype}
    dense, packed = shelf.get(changes), shelf.get({**changes, "save_format": "bnb4"})
    model, info = hf.AutoModelForCausalLM.from_pretrained(packed.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    values = stored(dense.folder)
    names = [f"{weight['name']}.weight" for weight in dense.report["weights"]]
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear4bit)
        assert layer.compute_dtype == getattr(torch, dtype)
        assert raw(dequantize_4bit(layer.weight.data, layer.weight.quant_state)) == raw(values[name])
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert not isinstance(model.lm_head, Linear4bit)
    parts = stored(packed.folder)
    taken = sum(tensor.nbytes for name, tensor in parts.items() if "_proj.weight" in name)
    bits_each = 8 * taken / sum(values[name].numel() for name in names)
    assert 4.5 < bits_each < 4.9, "4 bits, 32 / 64 for the scale, and some 200 bytes a layer"
    assert packed.backbone_bytes < dense.backbone_bytes
    assert products(packed).keys() == products(dense).keys()
    assert (packed.folder / "loftq_init/adapter_model.safetensors").read_bytes() == (
        dense.folder / "loftq_init/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sources_of_any_type(shelf: Shelf, tmp_path: Path, dtype: torch.dtype) -> None:
    model = copied(shelf.model, tmp_path / "model", dtype)
    weights = load_file(model / "model.safetensors")
    init = made(model, tmp_path)
    tensors = stored(init.folder)
    for name, weight in weights.items():
        assert weight.dtype == dtype
        if not name.endswith("_proj.weight"):
            assert raw(tensors[name]) == raw(weight)
    for weight in init.report["weights"]:
        assert tensors[f"{weight['name']}.weight"].dtype == torch.bfloat16
        assert error_of(init, weights, weight["name"]) == pytest.approx(weight["errors"][-1], rel=1e-4)


@pytest.mark.parametrize(
    ("type", "bits"), [(type, bits) for type, widths in BITS_OF_TYPE.items() if type != "none" for bits in widths]
)
def test_every_quantizer_goes_through(shelf: Shelf, type: str, bits: int) -> None:
    init = shelf.get({"quant.type": type, "quant.bits": bits, "quant.iter": 1})
    quantized, fitted = init.report["totals"]["mean_error_quantized"], init.report["totals"]["mean_error"]
    assert 0 < fitted < quantized < 1
    name = init.report["weights"][0]["name"]
    assert error_of(init, shelf.weights, name) == pytest.approx(init.report["weights"][0]["errors"][-1], rel=1e-4)


# QLoRA and LoRA


def test_qlora_starts_with_a_zero_b_and_a_random_a(shelf: Shelf) -> None:
    init = shelf.get(QLORA)
    factors = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    seen = set()
    for name, factor in factors.items():
        if ".lora_B." in name:
            assert not factor.any()
            continue
        bound = 1 / math.sqrt(factor.shape[1])
        assert factor.abs().max() <= bound
        assert factor.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        seen.add(bytes(tensor_bytes(factor)))
    assert len(seen) == 14, "each layer has its own"
    for weight in init.report["weights"]:
        (error,) = weight["errors"]
        assert error_of(init, shelf.weights, weight["name"]) == pytest.approx(error, rel=1e-6)
        assert error == weight_of(shelf.get(), weight["name"])["errors"][0], "LoftQ starts from QLoRA's backbone"


@pytest.mark.parametrize("method", [QLORA, LORA], ids=["qlora", "lora"])
def test_the_seed_fixes_a_and_nothing_else(shelf: Shelf, method: dict[str, Any]) -> None:
    folders = [shelf.get({**method, "seed": seed}).folder for seed in (1, 2)]
    again = made(
        shelf.model, shelf.root, {**method, "seed": 1, "save_dir": str(shelf.root / f"again-{method['quant.method']}")}
    )
    one, two, same = (load_file(folder / "loftq_init/adapter_model.safetensors") for folder in (*folders, again.folder))
    for name in one:
        assert raw(one[name]) == raw(same[name])
        assert (raw(one[name]) == raw(two[name])) == (".lora_B." in name)
    assert contents(folders[0])["model.safetensors"] == contents(folders[1])["model.safetensors"]


def test_the_seed_does_not_matter_to_loftq(shelf: Shelf) -> None:
    one, other = (shelf.get({"seed": seed}) for seed in (1, 2))
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes()
    assert other.report["totals"]["computed"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lora_keeps_the_weights(shelf: Shelf, dtype: str) -> None:
    init = shelf.get({**LORA, "save_dtype": dtype})
    tensors = stored(init.folder)
    for weight in init.report["weights"]:
        name = f"{weight['name']}.weight"
        assert raw(tensors[name]) == raw(shelf.weights[name].to(getattr(torch, dtype)))
        lost = (shelf.weights[name].double() - tensors[name].double()).norm() / shelf.weights[name].double().norm()
        assert weight["errors"] == [pytest.approx(float(lost), rel=1e-6)]
        assert not weight["cache_hit"]
    assert not any(product.any() for product in products(init).values())
    totals = init.report["totals"]
    assert (totals["computed"], totals["cache_hits"], totals["bits_per_weight"]) == (0, 0, 16)


# The report


def weight_of(init: Initialised, module: str) -> dict[str, Any]:
    return next(weight for weight in init.report["weights"] if weight["name"] == module)


@pytest.mark.parametrize("bits", [4, 2])
def test_the_report_tells_the_error_after_each_step_as_the_files_show_it(shelf: Shelf, bits: int) -> None:
    steps = {step: shelf.get({"quant.bits": bits, "quant.iter": step}) for step in (1, 2, 3, 4)}
    steps[0] = shelf.get({**QLORA, "quant.bits": bits})
    told = steps[4].report
    assert len(told["weights"]) == 14
    for weight in told["weights"]:
        assert len(weight["errors"]) == 5
        for step, init in steps.items():
            expected = error_of(init, shelf.weights, weight["name"])
            assert weight["errors"][step] == pytest.approx(expected, rel=1e-5)
    firsts, lasts = ([weight["errors"][i] for weight in told["weights"]] for i in (0, -1))
    assert told["totals"]["mean_error_quantized"] == pytest.approx(sum(firsts) / 14)
    assert told["totals"]["mean_error"] == pytest.approx(sum(lasts) / 14)


def test_the_report_tells_what_was_done(shelf: Shelf, tmp_path: Path) -> None:
    init = made(shelf.model, tmp_path, {"quant.alpha": 16})
    report = json.loads((init.folder / "init_report.json").read_text())
    assert report == init.report
    assert report["model"] == {"requested": str(shelf.model), "commit": None, "kind": "causal"}
    assert report["quant"]["scaling"] == 16 / RANK
    assert {key: report["quant"][key] for key in LOFTQ} == LOFTQ
    assert (report["quant"]["save_dtype"], report["quant"]["save_format"]) == ("bfloat16", "dense")
    assert report["other_linears"] == ["lm_head"]
    totals = report["totals"]
    assert (totals["weights"], totals["computed"], totals["cache_hits"]) == (14, 14, 0)
    assert totals["values"] == sum(w.numel() for name, w in shelf.weights.items() if name.endswith("_proj.weight"))
    assert totals["bits_per_weight"] == 4 + 16 / 64
    assert totals["seconds"] >= max(weight["seconds"] for weight in report["weights"])
    assert totals["values"] < totals["peak_memory"]["resident_bytes"]
    assert report["provenance"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for weight in report["weights"]:
        assert weight["shape"] == list(shelf.weights[f"{weight['name']}.weight"].shape)
        assert (weight["bits"], weight["rank"], weight["steps_computed"], weight["cache_hit"]) == (4, RANK, 2, False)
        assert list(weight["phases"]) == ["digest", "cache", "decompose", "decode", "write"]
        assert weight["seconds"] == pytest.approx(sum(weight["phases"].values()))
        assert weight["digest"] == convert.weight_digest(shelf.weights[f"{weight['name']}.weight"])


def test_two_threads_write_the_bytes_that_one_does(shelf: Shelf, tmp_path: Path) -> None:
    one = made(shelf.model, tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = made(shelf.model, tmp_path / "two")
    finally:
        torch.set_num_threads(threads)
    for file in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()
    assert [w["name"] for w in two.report["weights"]] == [w["name"] for w in one.report["weights"]]
    assert [w["errors"] for w in two.report["weights"]] == [w["errors"] for w in one.report["weights"]]


# The cache


def test_a_second_identical_run_computes_nothing_and_says_so(
    shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = made(shelf.model, tmp_path)
    before = contents(first.folder)
    with caplog.at_level(logging.INFO):
        second = made(shelf.model, tmp_path)
    assert f"{first.folder} exists: 14 weights, 0 computed" in caplog.text
    assert second.report == first.report
    assert contents(first.folder) == before
    shutil.rmtree(first.folder)
    with caplog.at_level(logging.INFO):
        third = made(shelf.model, tmp_path)
    assert "14 weights, 0 computed, 14 from the cache" in caplog.text
    assert (third.report["totals"]["computed"], third.report["totals"]["cache_hits"]) == (0, 14)
    assert all(weight["cache_hit"] and weight["steps_computed"] == 0 for weight in third.report["weights"])
    assert {name: raw for name, raw in contents(third.folder).items() if name != "init_report.json"} == {
        name: raw for name, raw in before.items() if name != "init_report.json"
    }


def test_the_same_weights_under_another_name_hit(shelf: Shelf, tmp_path: Path) -> None:
    shelf.get()
    other = copied(shelf.model, tmp_path / "another-name")
    init = made(other, tmp_path, {"cache_dir": str(shelf.root / "cache")})
    assert init.folder.name.startswith("another-name-")
    assert (init.report["totals"]["computed"], init.report["totals"]["cache_hits"]) == (0, 14)


def test_one_changed_weight_is_computed_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.get()
    weights = {name: weight.clone() for name, weight in shelf.weights.items()}
    changed = "model.layers.1.mlp.up_proj"
    weights[f"{changed}.weight"].view(torch.int32).view(-1)[77] ^= 1
    other = copied(shelf.model, tmp_path / shelf.model.name)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    init = made(other, tmp_path, {"cache_dir": str(shelf.root / "cache")})
    assert [weight["name"] for weight in init.report["weights"] if not weight["cache_hit"]] == [changed]


def test_more_steps_continue_from_fewer_with_the_bytes_of_a_run_from_scratch(shelf: Shelf, tmp_path: Path) -> None:
    made(shelf.model, tmp_path, {"quant.iter": 1, "save_dir": str(tmp_path / "one step")})
    continued = made(shelf.model, tmp_path, {"quant.iter": 4})
    assert {weight["steps_computed"] for weight in continued.report["weights"]} == {3}
    assert not any(weight["cache_hit"] for weight in continued.report["weights"])
    kept = contents(continued.folder)
    shutil.rmtree(tmp_path / "saved")
    scratch = made(shelf.model, tmp_path, {"quant.iter": 4, "cache_dir": str(tmp_path / "fresh")})
    assert {weight["steps_computed"] for weight in scratch.report["weights"]} == {4}
    for name, content in contents(scratch.folder).items():
        assert content == kept[name] or name == "init_report.json"


def test_a_damaged_entry_is_told_and_computed_again(
    shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(made(shelf.model, tmp_path).folder)
    entry = sorted((tmp_path / "cache" / "decompositions").rglob("*.safetensors"))[3]
    entry.write_bytes(entry.read_bytes()[:-5])
    shutil.rmtree(tmp_path / "saved")
    init = made(shelf.model, tmp_path)
    assert f"{entry} is damaged" in caplog.text
    assert (init.report["totals"]["computed"], init.report["totals"]["cache_hits"]) == (1, 13)
    assert contents(init.folder)["model.safetensors"] == before["model.safetensors"]


def without_times(report: bytes) -> dict[str, Any]:
    content = json.loads(report)
    for cost in ("seconds", "compile_seconds", "phases", "peak_memory"):
        del content["totals"][cost]
    del content["provenance"]["created"]
    for weight in content["weights"]:
        del weight["seconds"], weight["phases"]
    return content


@pytest.mark.parametrize("changes", [{}, {"quant.bits": 2, "save_format": "bnb4"}, QLORA, LORA], ids=str)
def test_the_same_seed_gives_the_same_bytes(shelf: Shelf, tmp_path: Path, changes: dict[str, Any]) -> None:
    first = contents(made(shelf.model, tmp_path, {**changes, "cache_dir": str(tmp_path / "one")}).folder)
    shutil.rmtree(tmp_path / "saved")
    second = contents(made(shelf.model, tmp_path, {**changes, "cache_dir": str(tmp_path / "two")}).folder)
    assert without_times(first.pop("init_report.json")) == without_times(second.pop("init_report.json"))
    assert first == second


# Tied weights and heads


LLAMA, ENCODER, T5, BART = (sized(config, 1) for config in (zoo.DECODER, zoo.ENCODER, zoo.T5, zoo.BART))


def write_bin(model: hf.PreTrainedModel, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_bin_head_first(model: hf.PreTrainedModel, folder: Path) -> None:
    torch.save(dict(reversed(model.state_dict().items())), folder / "pytorch_model.bin")


def write_safetensors(model: hf.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def write_shards(model: hf.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


Write = Callable[[hf.PreTrainedModel, Path], None]
WRITES = [write_bin, write_bin_head_first, write_safetensors, write_shards]


def a_checkpoint(model: hf.PreTrainedModel, folder: Path, write: Write) -> Path:
    folder.mkdir()
    model.config.save_pretrained(folder)
    write(model, folder)
    return folder


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("model", "kind", "dropped"),
    [
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), "causal", 1),
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "seq2seq", 3),
        (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "seq2seq", 3),
        (lambda: hf.FalconForCausalLM(hf.FalconConfig(**LLAMA)), "causal", 1),
    ],
    ids=["llama", "t5", "bart", "falcon"],
)
def test_tied_weights_are_stored_once_and_stay_tied(
    tmp_path: Path, write: Write, model: Callable[[], hf.PreTrainedModel], kind: str, dropped: int
) -> None:
    source = model()
    folder = a_checkpoint(source, tmp_path / "tied", write)
    init = made(folder, tmp_path, {"model.kind": kind, **LORA, "save_dtype": "float32"})
    tensors = stored(init.folder)
    assert len(source.state_dict()) - len(tensors) == dropped
    assert all(raw(tensor) == raw(source.state_dict()[name]) for name, tensor in tensors.items())
    loaded, info = AUTO_CLASSES[kind].from_pretrained(init.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    for name, tensor in source.state_dict().items():
        assert raw(loaded.state_dict()[name]) == raw(tensor)


@pytest.mark.parametrize("write", WRITES)
def test_untied_weights_are_stored_apart(tmp_path: Path, write: Write) -> None:
    source = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=False))
    init = made(a_checkpoint(source, tmp_path / "untied", write), tmp_path, {**LORA, "save_dtype": "float32"})
    tensors = stored(init.folder)
    assert {name: raw(tensor) for name, tensor in tensors.items()} == {
        name: raw(tensor) for name, tensor in source.state_dict().items()
    }


def test_what_a_bin_ties_and_the_model_does_not_stays_apart(tmp_path: Path) -> None:
    source = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=False))
    source.lm_head.weight = source.model.embed_tokens.weight
    folder = a_checkpoint(source, tmp_path / "model", write_bin)
    with open_tensors(folder) as opened:
        assert opened.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = stored(made(folder, tmp_path).folder)
    assert raw(tensors["lm_head.weight"]) == raw(tensors["model.embed_tokens.weight"])
    assert set(tensors) == set(source.state_dict())


def test_targets_that_a_bin_ties_are_all_stored(tmp_path: Path) -> None:
    source = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    attention = source.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    init = made(a_checkpoint(source, tmp_path / "model", write_bin), tmp_path)
    tensors = stored(init.folder)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"]
    assert raw(tensors[names[0]]) == raw(tensors[names[1]])
    assert (init.report["totals"]["computed"], init.report["totals"]["cache_hits"]) == (6, 1), "the second one hits"


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.BertForPreTraining(hf.BertConfig(**ENCODER)),
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)),
        lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    ],
    ids=["bert", "roberta", "bert without head"],
)
def test_a_backbone_for_classification_carries_no_stray_keys(
    tmp_path: Path, write: Write, model: Callable[[], hf.PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    source = model()
    folder = a_checkpoint(source, tmp_path / "pretrained", write)
    with caplog.at_level(logging.INFO):
        init = made(folder, tmp_path, {"model.kind": "classification"})
    loaded, info = hf.AutoModelForSequenceClassification.from_pretrained(init.folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    assert ("left out, because the model has no such head" in caplog.text) == hasattr(source, source.base_model_prefix)
    before, after = source.base_model.state_dict(), loaded.base_model.state_dict()
    embeddings = "embeddings.word_embeddings.weight"
    assert raw(after[embeddings].float()) == raw(before[embeddings].bfloat16().float())
    assert raw(next(t for name, t in stored(init.folder).items() if name.endswith(embeddings))) == raw(
        before[embeddings]
    )


# What does not fit


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant.rank": 65}, r"quant\.rank=65: no weight has such a rank, .* is \d+ x \d+; choose a rank of at most 64"),
        ({"quant.rank": 100000}, r"quant\.rank=100000: .* choose a rank of at most 64"),
        ({"quant.block_size": 4096}, r"quant\.block_size=4096: does not divide the 2048 values of model\.layers\.0\.self_attn\.k_proj"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    shelf: Shelf, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        made(shelf.model, tmp_path, changes)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == {"saved"}
    assert visible(tmp_path / "saved") == set()


def visible(folder: Path) -> set[str]:
    """Everything in a folder but lock files."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize(
    ("model", "kind", "layer"),
    [
        (lambda: hf.FalconForCausalLM(hf.FalconConfig(**LLAMA)), "causal", "transformer.h.0.self_attention"),
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "seq2seq", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ],
    ids=["falcon", "t5"],
)  # fmt: skip
def test_bnb4_is_refused_where_transformers_would_load_a_layer_dense(
    tmp_path: Path, model: Callable[[], hf.PreTrainedModel], kind: str, layer: str
) -> None:
    folder = a_checkpoint(model(), tmp_path / "model", write_safetensors)
    with pytest.raises(UserError, match=f"save_format=bnb4: .*{layer}.* use save_format=dense"):
        made(folder, tmp_path, {"model.kind": kind, "save_format": "bnb4"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(shelf: Shelf, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    weights = {name: weight.clone() for name, weight in shelf.weights.items()}
    weights[name][3, 4] = value
    model = copied(shelf.model, tmp_path / "model")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.path: tensor {name}: 1 of 2048 values are NaN or infinite"):
        made(model, tmp_path)
    assert visible(tmp_path / "saved") == set()


# Failures in the middle


def failing_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `count` weights be decomposed and then raises."""
    original, calls = decomposer.decompose, iter(range(10**6))

    def decompose(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= count:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(decomposer, "decompose", decompose)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError(28, "No space left on device")], ids=repr
)
def test_an_interrupted_run_leaves_no_folder_and_goes_on_from_what_it_had(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing_after(5, error, monkeypatch)
    with pytest.raises((type(error), UserError)) as caught:
        made(shelf.model, tmp_path)
    assert isinstance(caught.value, UserError) == isinstance(error, OSError)
    assert visible(tmp_path / "saved") == set()
    monkeypatch.undo()
    init = made(shelf.model, tmp_path)
    assert (init.report["totals"]["computed"], init.report["totals"]["cache_hits"]) == (9, 5)
    assert (init.folder / "model.safetensors").read_bytes() == (shelf.get().folder / "model.safetensors").read_bytes()


def test_after_a_kill_the_next_run_starts_from_the_weights_already_done(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = decomposer.decompose, iter(range(100))

    def decompose(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    monkeypatch.setattr(decomposer, "decompose", decompose)
    killed = multiprocessing.get_context("fork").Process(target=made, args=(shelf.model, tmp_path))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    init = made(shelf.model, tmp_path)
    assert (init.report["totals"]["computed"], init.report["totals"]["cache_hits"]) == (9, 5)
    assert visible(tmp_path / "saved") == {init.folder.name}
    assert (init.folder / "model.safetensors").read_bytes() == (shelf.get().folder / "model.safetensors").read_bytes()


def test_what_a_killed_process_left_is_cleared(shelf: Shelf, tmp_path: Path) -> None:
    config = settings(shelf.model, tmp_path)
    final = config.inits_path / config.init_name
    partial = final.parent / f".{final.name}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    init = made(shelf.model, tmp_path)
    assert visible(tmp_path / "saved") == {final.name}
    assert (init.folder / "model.safetensors").read_bytes() == (shelf.get().folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("change", "other"), [
    ({"quant.solver": "exact"}, "made with randomized"), ({"quant.iter": 1}, "made with 2"), ({"quant.alpha": 8.0}, "made with None"),
    ({"save_format": "bnb4"}, "made with dense"), ({"save_dtype": "float32"}, "made with bfloat16"),
    ({"quant.method": "qlora", "quant.iter": 0}, "made with loftq"), ({"quant.dropout": 0.0}, "made with 0.1"),
])  # fmt: skip
def test_another_initialisation_in_the_same_place_is_refused(shelf: Shelf, change: dict[str, Any], other: str) -> None:
    first = contents(shelf.get().folder)
    name, value = next(iter(change.items()))
    with pytest.raises(UserError) as refusal:
        made(shelf.model, shelf.root, {"save_dir": str(shelf.get().folder.parent), **change})
    assert str(refusal.value).startswith(
        f"{name}={value}: the checkpoint at {shelf.get().folder} was {other}; it is never replaced: "
    )
    assert contents(shelf.get().folder) == first


def test_a_changed_source_is_noticed_with_size_and_dates_kept(shelf: Shelf, tmp_path: Path) -> None:
    model = copied(shelf.model, tmp_path / "model")
    first = made(model, tmp_path)
    file = model / "model.safetensors"
    before = file.stat()
    save_file({name: weight * 2 for name, weight in shelf.weights.items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(
        UserError, match=rf"^model.path={model}: its weights differ from what the checkpoint at {first.folder} "
    ):
        made(model, tmp_path)
    other = made(model, tmp_path, {"save_dir": str(tmp_path / "other")})
    assert contents(other.folder)["model.safetensors"] != contents(first.folder)["model.safetensors"]


@pytest.mark.parametrize(
    ("option", "advice"), [("save_dir", "set another save_dir"), ("cache_dir", "set another cache_dir")]
)
def test_a_place_that_is_a_file(shelf: Shelf, tmp_path: Path, option: str, advice: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"{option}={tmp_path / 'file'}: .*{advice}"):
        made(shelf.model, tmp_path, {option: str(tmp_path / "file")})
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "saved").exists() or visible(tmp_path / "saved") == set()


def test_two_runs_at_once_make_it_once(shelf: Shelf, tmp_path: Path) -> None:
    results: list[Initialised] = []
    threads = [threading.Thread(target=lambda: results.append(made(shelf.model, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    assert results[0].report == results[1].report == results[2].report
    assert results[0].report["totals"]["computed"] == 14


# Memory


MEMORY = """
import sys, threading, time
import torch
from pathlib import Path
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate
from loftq_exp.config import RunConfig
import json

torch.set_num_threads(1)
peak, done = 0, False

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

config = RunConfig.from_mapping(json.loads(sys.argv[1]))
source = locate(config.model, config.cache_path)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
init = initialise(source, config)
done = True
watcher.join()
print(json.dumps({"before": before, "peak": peak, "weights": len(init.report["weights"])}))
"""


def synthetic(folder: Path, layers: int) -> Path:
    """A Llama checkpoint of equal layers, 14 MB each in bfloat16, that is never whole in memory."""
    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in hf.LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(
        folder, {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    ) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator).bfloat16())
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("save_format", ["dense", "bnb4"])
def test_the_peak_of_anonymous_memory_does_not_grow_with_the_model(tmp_path: Path, save_format: str) -> None:
    # malloc by itself keeps freed blocks of up to 32 MB, more or fewer of them as it happens. Fixed, this threshold lets
    # them go at once, and what is measured is what is held.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    seen = {}
    for layers in (4, 16):
        model = synthetic(tmp_path / f"model-{layers}", layers)
        changes = {"quant.iter": 1, "save_format": save_format}
        values = json.dumps(settings(model, tmp_path / f"run-{layers}", changes).to_dict())
        call = [sys.executable, "-c", MEMORY, values]
        result = subprocess.run(call, capture_output=True, text=True, check=True, timeout=600, env=environment)
        seen[layers] = json.loads(result.stdout.splitlines()[-1])
        assert seen[layers]["weights"] == 7 * layers
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    sys.stdout.write(f"\nkB of anonymous memory, {save_format}: {seen}\n")
    assert seen[16]["peak"] < 1.1 * seen[4]["peak"]
    grown = {layers: one["peak"] - one["before"] for layers, one in seen.items()}
    assert grown[16] - grown[4] < 7_000, "kB: twelve more layers must not take even half of one"
