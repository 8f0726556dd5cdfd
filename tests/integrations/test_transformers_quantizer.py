"""Packed checkpoints through transformers and PEFT: loading, outputs, saving, and errors."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from zoo import quantize_config

from loftq_exp.artifact.writer import SafetensorsWriter
from loftq_exp.errors import UserError
from loftq_exp.initialise import stage as convert
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.integrations.lora import PackedLoraLayer
from loftq_exp.integrations.transformers_quantizer import LoftQConfig
from loftq_exp.source.locate import locate


def made(model: Path, root: Path, save_format: str = "packed", **changes: Any) -> Path:
    """The folder of the initialised checkpoint of `model`, where __ in the changes stands for a dot."""
    config = quantize_config(model, root, "causal", save_format, **changes)
    return initialise(locate(config.model, config.cache_path), config).folder


def small_shards(folder: Path, specs: Any, stem: str = "model") -> SafetensorsWriter:
    return SafetensorsWriter(folder, specs, stem, 30_000 if stem == "model" else 5_000_000)


@pytest.fixture(scope="module")
def packed(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama at 2 and 4 bits, its scales quantized, packed into several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SafetensorsWriter", small_shards)
        root = tmp_path_factory.mktemp("packed")
        return made(tiny_llama_dir, root, quant__bits=3, quant__allocation="paper", quant__double=True)


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copied"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 43).reshape(2, 20)).logits
    return found


def layers(model: Any) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


CASES: dict[str, dict[str, Any]] = {
    "nf2": {},
    "nf3 double": {"quant__bits": 3, "quant__double": True},
    "2.5 bits": {"quant__bits": 2.5},
    "uniform": {"quant__type": "uniform", "save_dtype": "float32"},
    "int": {"quant__type": "int", "quant__bits": 8},
    "optimal": {"quant__bits": 3, "quant__levels": "optimal", "quant__scale": "search"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_it_is_the_dense_checkpoints_model(tiny_llama_dir: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    dense_dir, packed_dir = (made(tiny_llama_dir, tmp_path, form, **changes) for form in ("dense", "packed"))
    targets = {
        weight["name"]: weight["bits"]
        for weight in json.loads((packed_dir / "init_report.json").read_text())["weights"]
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=dtype)
        assert {name: layer.quantizer.bits for name, layer in layers(model).items()} == targets
        assert len(targets) == 14
        for name, layer in layers(model).items():
            assert torch.equal(layer.dequantize(dtype), dense.get_submodule(name).weight)
        assert torch.equal(logits(model), logits(dense))
        assert model.dtype == dtype
    ids = torch.arange(3, 11)[None]
    assert torch.equal(*(m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, dense)))


def test_shards_and_a_class_without_the_head(packed: Path) -> None:
    assert len(list(packed.glob("model-*.safetensors"))) > 2
    with_head, without = AutoModelForCausalLM.from_pretrained(packed), AutoModel.from_pretrained(packed)
    assert len(layers(with_head)) == len(layers(without)) == 14
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(with_head.model(ids).last_hidden_state, without(ids).last_hidden_state)


class Made(TorchDispatchMode):
    """The largest floating-point tensor that an operation gives back, in values, but for those on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
            self.largest = max(self.largest, out.numel())
        return out


def test_it_loads_without_a_dense_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each packed weight is larger here than all that is dense, so that a dense copy would show."""
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "false")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where the operations are seen
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "source")
    folders = {form: made(tmp_path / "source", tmp_path, form, quant__bits=3) for form in ("dense", "packed")}
    largest = {}
    for form, folder in folders.items():
        with Made() as seen:
            AutoModelForCausalLM.from_pretrained(folder)
        largest[form] = seen.largest
    assert largest["dense"] >= 128 * 128, "it would be seen"
    assert largest["packed"] <= 16 * 128


@pytest.mark.parametrize("quant", [{"quant__double": True}, {"quant__levels": "optimal"}], ids=str)
def test_what_is_saved_again_has_the_same_bytes(tiny_llama_dir: Path, tmp_path: Path, quant: dict[str, Any]) -> None:
    source = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    folders = [
        made(tmp_path / "source", tmp_path, quant__bits=3, **quant),
        tmp_path / "one",
        tmp_path / "two",
    ]
    for before, after in itertools.pairwise(folders):
        AutoModelForCausalLM.from_pretrained(before).save_pretrained(after)
    for name in ("model.safetensors", "config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "loftq"
    assert config["quantization_config"].get("levels", "nf") == quant.get("quant__levels", "nf")
    assert ("levels" in config["quantization_config"]) == ("quant__levels" in quant)


def test_shards_that_are_saved_again_have_the_same_values(packed: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="30KB")
    before, after = (
        {name: value for file in folder.glob("model-*.safetensors") for name, value in load_file(file).items()}
        for folder in (packed, tmp_path)
    )
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())


def test_peft_attaches_the_adapter_and_trains_it(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of unsupported layers and missing keys
        adapted = PeftModel.from_pretrained(model, str(packed), subfolder="loftq_init", is_trainable=True)
    taken = get_peft_model_state_dict(adapted)
    stored = load_file(packed / "loftq_init" / "adapter_model.safetensors")
    assert taken.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in taken.items())
    assert sum(isinstance(module, PackedLoraLayer) for module in adapted.modules()) == 14
    before = {name: part.clone() for name, layer in layers(adapted).items() for part in layer.parts.values()}
    ids = torch.arange(3, 43).reshape(2, 20)
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert {name for name, value in adapted.named_parameters() if value.requires_grad} == {
        name.replace(".weight", ".default.weight") for name in stored}  # fmt: skip
    after = {name: part for name, layer in layers(adapted).items() for part in layer.parts.values()}
    assert all(torch.equal(part, after[name]) for name, part in before.items())


def test_an_adapter_of_ones_own_on_a_packed_model(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert sum(isinstance(module, PackedLoraLayer) for module in adapted.modules()) == 4
    assert torch.equal(logits(adapted), expected)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(adapted.unload()), expected)


def test_merging_is_refused_in_one_line(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    adapted = PeftModel.from_pretrained(model, str(packed), subfolder="loftq_init")
    expected = logits(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(UserError) as caught:
            merge()
        assert str(caught.value).startswith(
            "merge: an adapter cannot be merged into a packed backbone; python -m loftq_e"
        )
        assert "\n" not in str(caught.value)
    assert torch.equal(logits(adapted), expected)


# Processes of their own ------------------------------------------------------------------------------------------------


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def test_who_lacks_loftq_exp_is_told_what_to_install(packed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(packed).save_pretrained(again)
    found = python(
        "from transformers import AutoModelForCausalLM",
        f"for folder in ({str(packed)!r}, {str(again)!r}):",
        "    try: AutoModelForCausalLM.from_pretrained(folder)",
        "    except Exception as error: print('refused:', error)",
    )
    assert found.returncode == 0, found.stderr
    assert len(re.findall(r"refused: .*pip install loftq_exp and import loftq_exp before", found.stdout)) == 2, (
        found.stdout
    )


def test_one_import_is_enough_wherever_it_stands(packed: Path) -> None:
    load = f"AutoModelForCausalLM.from_pretrained({str(packed)!r})"
    ends = f"print(len([m for m in PeftModel.from_pretrained({load}, {str(packed)!r}, subfolder='loftq_init').modules()"
    ends += " if type(m).__name__ == 'PackedLoraLayer']))"
    orders = [
        ["import loftq_exp", "from transformers import AutoModelForCausalLM", "from peft import PeftModel"],
        ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", "import loftq_exp"],
    ]
    for order in orders:
        found = python(*order, ends)
        assert found.stdout.split() == ["14"], found.stderr


# Damage ---------------------------------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        if f"{LAYER}.qweight" in tensors:
            change(tensors)
            save_file(tensors, file, {"format": "pt"})


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"][:-2].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, rf"{LAYER}\.qweight: uint8 \(2046,\), but a weight of 128 x 64 at 2 bits has uint8 \(2048,\); get "),
        (
            lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}),
            rf"{LAYER}\.scales: float32 \(128, 1\), ",
        ),
        (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].long()}), rf"{LAYER}\.scales: I64 \(128, 1\), "),
        (lambda t: t.pop(f"{LAYER}.qweight"), rf"{LAYER}\.qweight: missing, but a weight of 128 x 64 at 2 bits has "),
        (
            lambda t: t[f"{LAYER}.scale_steps"].fill_(torch.nan),
            rf"{LAYER}: 1 of its scales are NaN or infinite; get the",
        ),
    ],
    ids=["shorter", "other type", "unknown type", "missing", "not finite"],
)
def test_damaged_tensors_are_told_in_one_line(copied: Path, change: Any, message: str) -> None:
    change_tensors(copied, change)
    assert re.match(message, refused(copied))
    assert re.match(message, refused(copied, ignore_mismatched_sizes=True))


def test_a_file_that_is_cut_off(copied: Path) -> None:
    file = max(copied.glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(copied).startswith(f"{file}: not a complete safetensors file (")


def change_config(folder: Path, **changes: Any) -> None:
    place = folder / "config.json"
    values = json.loads(place.read_text())
    for name, value in changes.items():
        if value is None:
            del values["quantization_config"][name]
        else:
            values["quantization_config"][name] = value
    place.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "quantization_config: packed by another loftq_exp (format 2; this one reads 1); update loftq_exp, or"),
        ({"colour": "red"}, "quantization_config: packed by another loftq_exp (format 1 and colour; this one reads 1); upd"),
        ({"bits": None}, "quantization_config.bits: not a mapping of module names to bits; get config.json again"),
        ({"bits": {"model.layers.7.mlp.up_proj": 2}}, "quantization_config.bits: model.layers.7.mlp.up_proj is not a linear layer of Llama"),
        ({"bits": {"model.layers.0": 2}}, "quantization_config.bits: model.layers.0 is not a linear layer of LlamaForCausalLM; load "),
        ({"bits": {LAYER: 9}}, "bits=9: quantizer type nf has 2, 3, 4 bits; choose one of them or another type"),
        ({"bits": {LAYER: 4}}, f"{LAYER}.qweight: uint8 (2048,), but a weight of 128 x 64 at 4 bits has uint8 (4096,); get the"),
        ({"type": "fp"}, "quantizer type 'fp': unknown; choose one of nf"),
        ({"double": False}, "model.layers.0.mlp.down_proj.scales: uint8 (128, 1), but a weight of 64 x 128 at 4 bits has bfloat16"),
        ({"scale_dtype": "bfloat8"}, "quantization_config.scale_dtype=bfloat8: not a torch dtype; get config.json again"),
        ({"scale_dtype": "int3"}, "scale_dtype=torch.int3: not a type for scales; choose float32, bfloat16 or float16"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_does_not_fit_is_told_in_one_line(copied: Path, changes: dict[str, Any], message: str) -> None:
    change_config(copied, **changes)
    assert refused(copied).startswith(message)


def test_a_dense_checkpoint_is_not_packed_while_it_loads(tiny_llama_dir: Path) -> None:
    message = refused(tiny_llama_dir, quantization_config=LoftQConfig({LAYER: 2}))
    assert message.startswith("quantization_config: LoftQConfig only reads what was packed before; the quantize stage ")
