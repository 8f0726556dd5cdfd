"""`python -m loftq_exp.export`: its output computes the same as the adapter on its backbone, and loads with a plain from_pretrained."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from checkpoints import without_manifests
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from weights import in_float32
from zoo import ENCODER, sized

from loftq_exp.artifact import exported as work
from loftq_exp.artifact.folder import Initialised
from loftq_exp.commands import export_model as command
from loftq_exp.config import CalibrationConfig, RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.source.locate import locate
from loftq_exp.training.load import load_model

BART, T5 = sized(zoo.BART, 1), sized(zoo.T5, 1)
MODELS: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "bart": ("seq2seq", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART))),
    "t5": ("seq2seq", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "bert": ("classification", lambda: hf.BertModel(hf.BertConfig(**ENCODER))),
    "roberta": ("classification", lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER))),
    "bert-qa": ("question-answering", lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER))),
}
LLAMA: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "tie_word_embeddings": True}
TIED: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "tied llama": ("causal", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))),
    "bart": MODELS["bart"],
    "t5": MODELS["t5"],
}
FORMATS = ("dense", "bnb4", "packed")
BITS: dict[str, dict[str, Any]] = {
    "nf2": {"bits": 2}, "nf3": {"bits": 3}, "nf4": {"bits": 4}, "mixed": {"bits_per_layer": {"*.layers.0.*": 4, "*": 2}},
}  # fmt: skip


@dataclass
class Models:
    """Initialised checkpoints of tiny models, each made once."""

    root: Path
    llama: Path

    def source(self, name: str) -> tuple[str, Path]:
        """Kind and folder of a pre-trained model."""
        if name == "llama":
            return "causal", self.llama
        folder = self.root / name
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                (MODELS | TIED)[name][1]().save_pretrained(folder)
        return (MODELS | TIED)[name][0], folder

    def config(self, name: str, save_format: str, save_dtype: str = "float32", **quant: Any) -> RunConfig:
        """LoftQ of a model, with an alpha that is not its rank."""
        kind, folder = self.source(name)
        values = {"method": "loftq", "type": "nf", "bits": 4, "rank": 8, "alpha": 12, "iter": 1, **quant}
        place = f"{name}-{save_format}-{save_dtype}-{'-'.join(map(str, quant.values()))}"
        return RunConfig.from_mapping({
            "model": {"path": str(folder), "kind": kind}, "quant": values, "task": {"kind": "gsm8k"}, "train": {},
            "stages": ["quantize"], "device": "cpu", "save_format": save_format, "save_dtype": save_dtype,
            "save_dir": str(self.root / re.sub(r"\W+", "-", place)), "cache_dir": str(self.root / "cache"),
        })  # fmt: skip

    def made(self, *arguments: Any, **quant: Any) -> Initialised:
        config = self.config(*arguments, **quant)
        return initialise(locate(config.model, config.cache_path), config)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Models:
    return Models(tmp_path_factory.mktemp("export"), tiny_llama_dir)


def kind_of(init: Initialised) -> str:
    kind: str = init.report["model"]["kind"]
    return kind


def plainly(folder: Path, init: Initialised) -> hf.PreTrainedModel:
    """The checkpoint in `folder`, loaded by transformers alone; every parameter comes from its file."""
    model, info = AUTO_CLASSES[kind_of(init)].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def backbone(init: Initialised) -> hf.PreTrainedModel:
    return in_float32(AUTO_CLASSES[kind_of(init)].from_pretrained(init.folder, dtype=torch.float32))


def outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).remainder(60).reshape(2, 20)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model.eval()(input_ids=ids, **more)
    return (found.start_logits if "start_logits" in found else found.logits).float()


def trained(init: Initialised, place: Path, seed: int = 3) -> PeftModel:
    """The adapter model after some training: every parameter of the adapter has moved. It is saved to `place`."""
    model = PeftModel.from_pretrained(backbone(init), str(init.folder / "loftq_init"), is_trainable=True)
    moved(model, seed)
    model.save_pretrained(str(place))
    return model


def moved(model: PeftModel, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.03 * torch.randn(weight.shape, generator=generator))


def run(init: Initialised | Path, out: Path, *arguments: str) -> int:
    folder = init.folder if isinstance(init, Initialised) else init
    return command.main([str(folder), str(out), *arguments])


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Equal within a share of the whole, and no zeros."""
    assert float(expected.std()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < share


@pytest.mark.parametrize(
    ("bits", "save_format"),
    [(bits, save_format) for bits in BITS for save_format in FORMATS if (bits, save_format) != ("nf3", "bnb4")],
)
def test_what_is_merged_computes_what_the_adapter_on_its_backbone_does(
    models: Models, tmp_path: Path, bits: str, save_format: str
) -> None:
    init = models.made("llama", save_format, **BITS[bits])
    expected = outputs(trained(init, tmp_path / "adapter"))
    initial = outputs(PeftModel.from_pretrained(backbone(init), str(init.folder / "loftq_init")))
    assert run(init, tmp_path / "first") == 0
    close(outputs(plainly(tmp_path / "first", init)), initial, 1e-5)
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0
    model = plainly(tmp_path / "out", init)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(module, (PackedLinear, Linear4bit)) for module in model.modules())
    close(outputs(model), expected, 1e-5)
    assert float((outputs(model) - initial).norm() / initial.norm()) > 0.05, "the training is in it"


@pytest.mark.parametrize("save_format", ["dense", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_other_kinds_of_models_and_their_heads(models: Models, tmp_path: Path, name: str, save_format: str) -> None:
    init = models.made(name, save_format, bits=2)
    expected = outputs(trained(init, tmp_path / "adapter"))
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0
    close(outputs(plainly(tmp_path / "out", init)), expected, 1e-5)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_in_a_narrow_type_it_is_as_near_as_that_type(models: Models, tmp_path: Path, dtype: str, share: float) -> None:
    init = models.made("llama", "packed", "bfloat16", bits=2)
    expected = outputs(trained(init, tmp_path / "adapter"))
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter"), "--dtype", dtype) == 0
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {getattr(torch, dtype)}
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    close(outputs(plainly(tmp_path / "out", init).float()), expected, share)


@pytest.mark.parametrize("save_format", FORMATS)
def test_each_weight_is_q_plus_s_b_a(models: Models, tmp_path: Path, save_format: str) -> None:
    dense = models.made("llama", "dense", "bfloat16", bits=2)
    init = models.made("llama", save_format, "bfloat16", bits=2)
    trained(init, tmp_path / "adapter")
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter"), "--dtype", "float32") == 0
    found, values = load_file(tmp_path / "out/model.safetensors"), load_file(dense.folder / "model.safetensors")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for weight in init.report["weights"]:
        lora_A, lora_B = (factors[f"base_model.model.{weight['name']}.lora_{x}.weight"].double() for x in "AB")
        expected = values[f"{weight['name']}.weight"].double() + 12 / 8 * lora_B @ lora_A
        torch.testing.assert_close(found[f"{weight['name']}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    others = [name for name in values if "_proj" not in name]
    assert all(torch.equal(found[name], values[name].float()) for name in others)
    assert found.keys() == values.keys()


@pytest.mark.parametrize("variant", ["ranks", "rslora"])
def test_patterns_of_ranks_and_alphas_mean_what_they_mean_to_peft(models: Models, tmp_path: Path, variant: str) -> None:
    init = models.made("llama", "packed", bits=3)
    options: dict[str, Any] = {"use_rslora": True}
    if variant == "ranks":
        options = {
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 16},
            "alpha_pattern": {"q_proj": 1, "v_proj": 20},
        }
    adapter = LoraConfig(
        r=4, lora_alpha=6, target_modules=init.report["target_modules"], task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(backbone(init), adapter)
    moved(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0
    close(outputs(plainly(tmp_path / "out", init)), outputs(model), 1e-5)


def test_ranks_that_the_initialisation_chose(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "packed", bits=3, allocation="error+rank", rank_choices=[4, 8, 16])
    assert json.loads((init.folder / "loftq_init/adapter_config.json").read_text())["rank_pattern"]
    expected = outputs(trained(init, tmp_path / "adapter"))
    assert run(init, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0
    close(outputs(plainly(tmp_path / "out", init)), expected, 1e-5)


@pytest.mark.parametrize("save_format", FORMATS)
def test_to_bnb4_holds_the_merged_values_quantized_anew(models: Models, tmp_path: Path, save_format: str) -> None:
    init = models.made("llama", save_format, bits=2)
    adapter = ("--adapter", str(tmp_path / "adapter"))
    trained(init, tmp_path / "adapter")
    assert run(init, tmp_path / "dense", *adapter) == 0
    assert run(init, tmp_path / "out", *adapter, "--to", "bnb4") == 0
    model, dense = plainly(tmp_path / "out", init), load_file(tmp_path / "dense/model.safetensors")
    for weight in init.report["weights"]:
        layer, values = model.get_submodule(weight["name"]), dense[f"{weight['name']}.weight"]
        assert isinstance(layer, Linear4bit)
        found = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        scale = values.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
        assert float(((found - values).reshape(-1, 64).abs() / scale).max()) < 0.153, "half of NF4's widest step"
    assert not isinstance(model.lm_head, Linear4bit)
    close(outputs(model), outputs(plainly(tmp_path / "dense", init)), 0.5)


def test_to_packed_keeps_the_backbone_and_the_adapter(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "packed", "bfloat16", bits=2)
    expected = outputs(trained(init, tmp_path / "adapter"))
    out = tmp_path / "out"
    assert run(init, out, "--adapter", str(tmp_path / "adapter"), "--to", "packed") == 0
    assert load_file(out / "model.safetensors").keys() == load_file(init.folder / "model.safetensors").keys()
    for name, tensor in load_file(init.folder / "model.safetensors").items():
        assert torch.equal(load_file(out / "model.safetensors")[name].view(torch.uint8), tensor.view(torch.uint8))
    model = PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), out, subfolder="loftq_init"
    )
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == len(init.report["weights"])
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=0)
    assert json.loads((out / "loftq_init/adapter_config.json").read_text())["base_model_name_or_path"] == str(out)
    assert json.loads((out / "config.json").read_text()) == json.loads((init.folder / "config.json").read_text())
    assert run(out, tmp_path / "dense") == 0, "and can be merged later"
    assert run(init, tmp_path / "at-once", "--adapter", str(tmp_path / "adapter")) == 0
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "at-once")]
    assert written[0] == written[1]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_with_another_number_of_classes(models: Models, tmp_path: Path, name: str, to: str) -> None:
    config = models.config(name, "packed", bits=4)
    init = models.made(name, "packed", bits=4)
    model = load_model(init, None, config, torch.device("cpu"), torch.float32, num_labels=3)
    moved(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    out = tmp_path / "out"
    assert run(init, out, "--adapter", str(tmp_path / "adapter"), "--to", to) == 0
    found: Any = plainly(out, init)
    if to == "packed":
        found = PeftModel.from_pretrained(found, out, subfolder="loftq_init")
    assert found.config.num_labels == 3
    assert outputs(found).shape == (2, 3)
    close(outputs(found), outputs(model), 0.3 if to == "bnb4" else 1e-5)


def test_what_lies_beside_the_weights_is_carried(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "packed", "bfloat16", bits=2)
    assert run(init, tmp_path / "out") == 0
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & values.keys()
    assert values["architectures"] == ["LlamaForCausalLM"]
    text = "Tom has 3 apples."
    found, expected = (
        hf.AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (tmp_path / "out", init.folder)
    )
    assert found == expected
    generation = [path.name for path in init.folder.glob("generation_config.json")]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "model.safetensors", *generation}
    assert not (tmp_path / "out/init_report.json").exists()
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    script = f"import sys, transformers; {load}; assert 'loftq_exp' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_a_large_one_is_sharded(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = models.made("llama", "packed", bits=2)
    expected = outputs(PeftModel.from_pretrained(backbone(init), str(init.folder / "loftq_init")))
    assert SHARDED.__defaults__ is not None
    monkeypatch.setattr(SHARDED, "__defaults__", (*SHARDED.__defaults__[:-1], 100_000))
    assert run(init, tmp_path / "out") == 0
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    close(outputs(plainly(tmp_path / "out", init)), expected, 1e-5)


SHARDED = work.SafetensorsWriter.__init__


# What is refused


@pytest.fixture
def refused(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, checks that it refuses in one line and writes nothing, and gives that line."""

    def call(*arguments: Any) -> str:
        capsys.readouterr()
        assert command.main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*.partial"))
        return captured.err.removeprefix("error: ").rstrip("\n")

    return call


def test_options_that_there_are_not(models: Models, tmp_path: Path, refused: Callable[..., str]) -> None:
    init, out = models.made("llama", "dense", bits=2), tmp_path / "out"
    assert "--to: invalid choice: 'awq'" in refused(init.folder, out, "--to", "awq")
    assert refused(init.folder, out, "--dtype", "int8").endswith("see python -m loftq_exp.export --help")
    assert "required: OUT" in refused(init.folder)
    assert refused(init.folder, out, "--to", "packed", "--dtype", "float32").startswith(
        "--dtype=float32: --to packed keeps"
    )
    assert "is stored as dense, and only save_format=packed" in refused(init.folder, out, "--to", "packed")


def test_nothing_but_an_initialised_checkpoint_is_merged_into(
    models: Models, tmp_path: Path, tiny_llama_dir: Path, refused: Callable[..., str]
) -> None:
    init, out = models.made("llama", "dense", bits=2), tmp_path / "out"
    for folder in (tiny_llama_dir, tmp_path / "nowhere", "meta-llama/Llama-2-7b"):
        told = refused(folder, out, "--adapter", init.folder / "loftq_init")
        assert told.startswith(f"DIR={folder}: no initialised checkpoint (it has no init_report.json)")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_or_cannot_be_written(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = models.made("llama", "dense", bits=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full/mine", init.folder):
        before = sorted(path.name for path in out.parent.rglob("*") if not path.name.endswith(".lock"))
        assert run(init, out) == 1
        assert capsys.readouterr().err == f"error: OUT={out}: already exists and is not empty; give a new folder\n"
        assert sorted(path.name for path in out.parent.rglob("*") if not path.name.endswith(".lock")) == before
    assert run(init, tmp_path / "full/mine/out") == 1
    assert re.fullmatch(r"error: OUT=.*: cannot be written \(.*\); set another OUT\n", capsys.readouterr().err)
    (tmp_path / "empty").mkdir()
    assert run(init, tmp_path / "empty") == 0


def test_a_model_that_4_bit_layers_cannot_hold(models: Models, tmp_path: Path, refused: Callable[..., str]) -> None:
    init = models.made("t5", "dense", bits=2)
    told = refused(init.folder, tmp_path / "out", "--to", "bnb4")
    assert re.match(r"--to=bnb4: transformers loads \S+\.wo only as a dense layer; use --to dense", told)
    told = refused(init.folder, tmp_path / "out", "--to", "packed")
    assert told.endswith("only save_format=packed has packed weights; use --to dense")


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS: dict[str, tuple[Change, str]] = {
    "dora": (lambda s, t: s.update(use_dora=True), "use_dora=True is more than Q"),
    "bias": (lambda s, t: s.update(bias="all"), "bias='all' is more than"),
    "another method": (lambda s, t: s.update(peft_type="IA3"), "a IA3 adapter, and only LoRA's"),
    "pissa": (lambda s, t: s.update(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the backbone"),
    "a setting to come": (lambda s, t: s.update(use_more=2), "use_more=2 is more than"),
    "fewer targets": (
        lambda s, t: s.update(target_modules=["q_proj"]), r"layers\.0\.mlp\.down_proj: the adapter has no factors for it",
    ),
    "more targets": (lambda s, t: s["target_modules"].append("lm_head"), "lm_head: the adapter adapts it, but it is not part"),
    "no targets": (lambda s, t: s.update(target_modules=["query"]), "PEFT cannot put it on DIR="),
    "another rank": (lambda s, t: s.update(r=4), r"has shape \(8, \d+\), DIR=.* need \(4, \d+\)"),
    "rank zero": (lambda s, t: s.update(r=0), "PEFT cannot put it on DIR="),
    "another width": (lambda s, t: t.update({A: torch.zeros(8, 32)}), r"q_proj.lora_A.weight has shape \(8, 32\)"),
    "a missing factor": (lambda s, t: t.pop(A), r"q_proj.lora_A.weight is missing"),
    "a stray tensor": (lambda s, t: t.update({"stray": torch.zeros(1)}), "stray belongs to no layer that it adapts"),
    "nan": (lambda s, t: t[A].fill_(float("nan")), "NaN or infinite values"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit(
    models: Models, tmp_path: Path, refused: Callable[..., str], change: Change, told: str
) -> None:
    init = models.made("llama", "dense", bits=2)
    place = tmp_path / "adapter"
    place.mkdir()
    settings = json.loads((init.folder / "loftq_init/adapter_config.json").read_text())
    tensors = load_file(init.folder / "loftq_init/adapter_model.safetensors")
    change(settings, tensors)
    (place / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, place / "adapter_model.safetensors")
    assert re.search(told, refused(init.folder, tmp_path / "out", "--adapter", place))


def test_an_adapter_that_cannot_be_read(models: Models, tmp_path: Path, refused: Callable[..., str]) -> None:
    init, place = models.made("llama", "dense", bits=2), tmp_path / "adapter"
    arguments = (init.folder, tmp_path / "out", "--adapter", place)
    assert "no adapter (adapter_config.json cannot be read" in refused(*arguments)
    place.mkdir()
    (place / "adapter_config.json").write_text("{")
    assert "no adapter (adapter_config.json cannot be read" in refused(*arguments)
    (place / "adapter_config.json").write_bytes((init.folder / "loftq_init/adapter_config.json").read_bytes())
    assert "adapter_model.safetensors cannot be read" in refused(*arguments)
    (place / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    assert "adapter_model.safetensors cannot be read" in refused(*arguments)


def test_the_backbone_that_the_adapter_names(
    models: Models,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    init, other = models.made("llama", "dense", bits=2), models.made("llama", "dense", bits=4)
    same = models.made("llama", "packed", bits=2)
    trained(init, tmp_path / "adapter")
    place = tmp_path / "adapter/adapter_config.json"

    def named(base: Any) -> tuple[Any, ...]:
        place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": str(base)}))
        return init.folder, tmp_path / "out", "--adapter", tmp_path / "adapter"

    assert "which was quantized differently; give" in refused(*named(other.folder))
    assert "and that is no initialised checkpoint" in refused(*named(models.llama))
    report = json.loads((init.folder / "init_report.json").read_text())
    moved_dir = tmp_path / "moved"
    moved_dir.mkdir()
    for path in init.folder.rglob("*"):
        if path.is_file():
            (moved_dir / path.relative_to(init.folder)).parent.mkdir(exist_ok=True)
            (moved_dir / path.relative_to(init.folder)).write_bytes(path.read_bytes())
    report["model"]["requested"] = "meta-llama/Llama-2-7b-hf"
    (moved_dir / "init_report.json").write_text(json.dumps(report))
    without_manifests(moved_dir)
    told = refused(moved_dir, *named("meta-llama/Llama-2-7b-hf")[1:])
    assert "that is the pre-trained model; s B A fits only the Q" in told
    assert caplog.messages == []
    for place_of_q in (init.folder, same.folder):
        assert run(moved_dir, tmp_path / place_of_q.parent.name, *map(str, named(place_of_q)[2:])) == 0, (
            "the same values"
        )
    assert caplog.messages == []
    assert run(moved_dir, tmp_path / "gone", *map(str, named(tmp_path / "where-it-was")[2:])) == 0
    assert "which does not exist; DIR=" in caplog.text
    caplog.clear()
    assert run(moved_dir, tmp_path / "initial") == 0
    assert caplog.messages == [], "the adapter in DIR belongs to it wherever it was moved"


def test_a_backbone_that_was_calibrated_otherwise_is_another(
    models: Models, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Two texts give two backbones, of the same settings `quant`. The adapter of one does not belong to the other."""
    made: list[Initialised] = []
    for text in ("two and two are four. " * 40, "Emma sells 31 red cups. " * 40):
        file = tmp_path / f"{len(made)}.txt"
        file.write_text(text)
        config = models.config("llama", "dense", bits=2, iter=2, calibration="full")
        chosen = CalibrationConfig(file=str(file), samples=2, length=16)
        config = dataclasses.replace(config, calibration=chosen, save_dir=str(tmp_path / f"init-{len(made)}"))
        made.append(initialise(locate(config.model, config.cache_path), config))
    one, other = made
    values = [load_file(init.folder / "model.safetensors") for init in made]
    assert any(not torch.equal(value, values[1][name]) for name, value in values[0].items())
    trained(one, tmp_path / "adapter")
    told = refused(other.folder, tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "which was quantized differently; give" in told
    assert run(one.folder, tmp_path / "out", "--adapter", str(tmp_path / "adapter")) == 0


def test_a_checkpoint_that_is_damaged(models: Models, tmp_path: Path, refused: Callable[..., str]) -> None:
    for save_format in FORMATS:
        init = models.made("llama", save_format, bits=2)
        tensors = load_file(init.folder / "model.safetensors")
        q = "model.layers.0.self_attn.q_proj"
        broken = {
            "dense": {f"{q}.weight": torch.zeros(64, 32)},
            "bnb4": {f"{q}.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)},
            "packed": {f"{q}.qweight": torch.zeros(8, dtype=torch.uint8)},
        }
        place = tmp_path / save_format
        place.mkdir()
        for path in init.folder.glob("*.json"):
            (place / path.name).write_bytes(path.read_bytes())
        without_manifests(place)
        arguments = (place, tmp_path / "out", "--adapter", init.folder / "loftq_init")
        save_file(tensors | broken[save_format], place / "model.safetensors")
        assert q in refused(*arguments)
        save_file({name: value for name, value in tensors.items() if q not in name}, place / "model.safetensors")
        assert re.search(rf"the weights lack {q}\.q?weight; quantize again", refused(*arguments))
        (place / "config.json").unlink()
        assert "config.json cannot be read" in refused(*arguments)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
@pytest.mark.parametrize(
    ("name", "save_format"), [*(("tied llama", form) for form in FORMATS), ("bart", "dense"), ("t5", "packed")]
)
def test_weights_that_were_tied_and_come_apart(
    models: Models, tmp_path: Path, name: str, save_format: str, modules: list[str]
) -> None:
    """A config that ties them would put the one in the other's place wherever it is believed, as in transformers 4."""
    init = models.made(name, save_format, bits=2)
    settings = LoraConfig(
        r=4, target_modules=init.report["target_modules"], modules_to_save=modules, task_type="CAUSAL_LM"
    )
    model = get_peft_model(backbone(init), settings)
    moved(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = outputs(model)
    for to in ("dense", *(("packed",) if save_format == "packed" else ())):
        assert run(init, tmp_path / to, "--adapter", str(tmp_path / "adapter"), "--to", to) == 0
        assert json.loads((tmp_path / to / "config.json").read_text())["tie_word_embeddings"] is False
        merged = plainly(tmp_path / to, init)
        if to == "packed":
            merged = PeftModel.from_pretrained(merged, tmp_path / to, subfolder="loftq_init")
        close(outputs(merged), expected, 1e-5)
    unmoved = outputs(PeftModel.from_pretrained(backbone(init), str(init.folder / "loftq_init")))
    assert float((expected - unmoved).norm() / unmoved.norm()) > 0.05, "the training is in it"


def test_tied_weights_that_were_not_trained_stay_tied(models: Models, tmp_path: Path) -> None:
    init = models.made("tied llama", "dense", bits=2)
    assert run(init, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize("lost", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_lacks_what_is_no_target(
    models: Models, tmp_path: Path, refused: Callable[..., str], save_format: str, lost: str
) -> None:
    init = models.made("llama", save_format, bits=2)
    without_manifests(Path(shutil.copytree(init.folder, tmp_path / "init")))
    tensors = load_file(init.folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "init/model.safetensors", {"format": "pt"})
    told = refused(tmp_path / "init", tmp_path / "out")
    assert told == f"DIR={tmp_path}/init: {lost} is missing from the weights; the checkpoint is damaged: quantize again"
    save_file(tensors | {lost: torch.ones(64), "odd": torch.ones(2)}, tmp_path / "init/model.safetensors")
    assert re.search(
        rf"{lost} has shape \(64,\)|odd has no place in the model", refused(tmp_path / "init", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16(models: Models, tmp_path: Path, refused: Callable[..., str]) -> None:
    init = models.made("llama", "dense", bits=2)
    model = PeftModel.from_pretrained(backbone(init), str(init.folder / "loftq_init"), is_trainable=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.fill_(300)
    model.save_pretrained(str(tmp_path / "adapter"))
    told = refused(init.folder, tmp_path / "out", "--adapter", tmp_path / "adapter", "--dtype", "float16")
    assert re.match(
        r"--dtype=float16: \S+ has values up to 1\.\d+e\+06, beyond that type; use bfloat16 or float32", told
    )


@pytest.mark.parametrize("to", FORMATS)
def test_what_ends_half_way_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    init = models.made("llama", "packed", bits=2)
    write = work.SafetensorsWriter.write
    written: list[str] = []

    def stopped(writer: Any, name: str, tensor: torch.Tensor, index: int | None = None) -> None:
        written.append(name)
        if "layers.1." in name and "_proj" in name:
            raise ends[0]
        write(writer, name, tensor, index)

    ends = [KeyboardInterrupt(), OSError(28, "No space left on device")]
    for code in (130, 1):
        with monkeypatch.context() as patch:
            patch.setattr(work.SafetensorsWriter, "write", stopped)
            assert run(init, tmp_path / "out", "--to", to) == code
        ends.pop(0)
        assert capsys.readouterr().err.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} <= {".out.lock"}
    assert len(written) > 10
    assert run(init, tmp_path / "out", "--to", to) == 0


def test_a_killed_one_leaves_no_checkpoint_and_the_next_one_is_whole(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "packed", bits=2)
    code = f"""
import os, signal
from loftq_exp.artifact import exported as export
def kill(*arguments): os.kill(os.getpid(), signal.SIGKILL)
export.carry_files = kill
from loftq_exp.commands.export_model import main
main([{str(init.folder)!r}, {str(tmp_path / "out")!r}])
"""
    process = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run(init, tmp_path / "out") == 0
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}
    plainly(tmp_path / "out", init)


def test_python_gets_the_same_refusal(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only save_format=packed has packed weights"):
        work.export(models.made("llama", "dense", bits=2).folder, tmp_path / "out", to="packed")


def test_merged_is_another_name_of_dense(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "dense", bits=2)
    for form in ("dense", "merged"):
        assert command.main([str(init.folder), str(tmp_path / form), "--to", form]) == 0
    one, two = (tmp_path / form / "model.safetensors" for form in ("dense", "merged"))
    assert one.read_bytes() == two.read_bytes()


def test_as_a_module(models: Models, tmp_path: Path) -> None:
    init = models.made("llama", "packed", "bfloat16", bits=2)
    call = [sys.executable, "-m", "loftq_exp.export", str(init.folder), str(tmp_path / "out")]
    result = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == (
        f"{tmp_path}/out: 14 weights merged, in bfloat16; AutoModelForCausalLM.from_pretrained('{tmp_path}/out') loads it"
    )


@pytest.mark.parametrize("save_format", FORMATS)
def test_base_and_adapter_for_plain_peft(models: Models, tmp_path: Path, save_format: str) -> None:
    init = models.made("llama", save_format)
    line = work.export(init.folder, tmp_path / "out", to="adapter")
    assert "weights of Q in float32 in base" in line
    settings = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert not any("loftq" in name for name in settings)
    assert settings["base_model_name_or_path"] == str((tmp_path / "out/base").resolve())
    base = plainly(tmp_path / "out/base", init)
    merged = work.export(init.folder, tmp_path / "merged", to="dense")
    assert "merged" in merged
    found = PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    torch.testing.assert_close(outputs(found), outputs(plainly(tmp_path / "merged", init)), rtol=1e-4, atol=1e-4)
    quantized = json.loads((init.folder / "init_report.json").read_text())["weights"][0]["name"]
    with work.open_backbone(init.folder) as opened:
        assert torch.equal(opened.values(quantized), base.get_submodule(quantized).base_layer.weight)
