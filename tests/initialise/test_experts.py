"""Mixtures of experts and transposed layers: each matrix is decomposed alone, and PEFT computes exactly its Q + s B A."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import CONFIGS, MODELS, quantize_config, seeded, with_tokenizer

import loftq_exp
from loftq_exp.artifact.card import model_card
from loftq_exp.artifact.exported import export
from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise import proof
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.source import adapted as names_for_peft
from loftq_exp.source.locate import locate
from loftq_exp.training.load import load_model

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe", "deepseek-v3", "qwen3.5-moe")
IDS = torch.arange(3, 43).reshape(2, 20)
RANK = 4
FIT: dict[str, Any] = {
    "quant__bits": 4,
    "quant__rank": RANK,
    "quant__alpha": 6,
    "quant__dropout": 0,
    "save_dtype": "float32",
}


def made(folder: Path, root: Path, save_format: str = "dense", **changes: Any) -> tuple[Initialised, RunConfig]:
    config = quantize_config(folder, root, "causal", save_format, **FIT | changes)
    return initialise(locate(config.model, config.cache_path), config), config


def fitted(weight: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    """Q + B A after one step, by bitsandbytes and torch's SVD: a matrix (out, in), in float32."""
    weight = weight.detach().float().contiguous()
    Q = dequantize_4bit(*quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4")).reshape(weight.shape)
    U, S, V = torch.linalg.svd(weight - Q, full_matrices=False)
    rank = min(rank, *weight.shape)
    return Q + (U[:, :rank] * S[:rank]) @ V[:rank]


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of the model after the fit: matrices of blocks, those of each expert alone; others unchanged."""
    found = {}
    for name, value in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if value.ndim == 3 and hasattr(owner, "num_experts"):
            flip = type(owner).__name__ == "GptOssExperts"
            matrices = [fitted(matrix.T).T if flip else fitted(matrix) for matrix in value]
            found[name] = torch.stack(matrices)
        elif ".layers." in name and isinstance(owner, nn.Linear) and value.ndim == 2 and min(value.shape) >= 8:
            found[name] = fitted(value)
        elif name.startswith("transformer.h.") and value.ndim == 2:
            found[name] = fitted(value.T).T
        else:
            found[name] = value.detach()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[hf.PreTrainedModel, Path]]:
    cases: dict[str, tuple[hf.PreTrainedModel, Path]] = {}

    def of(name: str) -> tuple[hf.PreTrainedModel, Path]:
        if name not in cases:
            folder = tmp_path_factory.mktemp("source")
            model = seeded(MODELS[name])
            with torch.no_grad():
                for parameter in model.parameters():  # routers of zeros choose arbitrarily
                    if parameter.ndim > 1 and not bool(parameter.any()):
                        parameter.normal_(std=0.1)
            model.save_pretrained(folder)
            cases[name] = model, folder
        return cases[name]

    return of


def check_merged(adapted: PeftModel, model: nn.Module) -> None:
    """The merged weights are those of the independent decomposition, and the adapters change the model as merged ones."""
    with torch.no_grad():
        found = adapted.eval()(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    values = expected(model)
    assert dict(merged.named_parameters()).keys() == values.keys()
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value.detach(), values[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*MIXTURES, "gpt2"])
def test_plain_transformers_and_peft_compute_each_matrix_decomposition(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], name: str, tmp_path: Path
) -> None:
    model, folder = source(name)
    init, config = made(folder, tmp_path)
    held = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    plain = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(init.folder), subfolder="loftq_init", is_trainable=True)
    taken = get_peft_model_state_dict(adapted)
    assert taken.keys() == held.keys()
    assert all(torch.equal(value, held[key]) for key, value in taken.items())
    check_merged(adapted, model)
    totals = init.report["totals"]
    assert totals["quantized_values"] == totals["values"]
    assert totals["quantized_values"] > 0.97 * totals["linear_values"]
    assert all("experts" not in weight["name"] for weight in init.report["not_quantized"])
    own = load_model(init, None, config, torch.device("cpu"), torch.float32)
    again = load_model(init, None, config, torch.device("cpu"), torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in again.parameters() if value.requires_grad)
    loss = own(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {key for key, value in own.named_parameters() if value.requires_grad}
    assert {key.replace(".default", "") for key in trained} == set(held)
    assert sum(value.grad is not None and bool(value.grad.any()) for value in own.parameters()) > len(held) * 0.9


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3", "gpt2"])
def test_apply_gives_the_bytes_of_the_stage(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], name: str, tmp_path: Path
) -> None:
    _, folder = source(name)
    init, _ = made(folder, tmp_path)
    backbone = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    held = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = loftq_exp.apply(model, bits=4, rank=RANK, alpha=6, dropout=0, iter=1)
    taken = get_peft_model_state_dict(adapted)
    assert taken.keys() == held.keys()
    assert all(torch.equal(value, held[key]) for key, value in taken.items())
    for key, value in adapted.unload().named_parameters():
        assert torch.equal(value, backbone.get_parameter(key)), key


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "gpt2"])
def test_exports_hold_each_matrix(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], name: str, tmp_path: Path
) -> None:
    model, folder = source(name)
    init, _ = made(folder, tmp_path)
    export(init.folder, tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for key, value in expected(model).items():
        torch.testing.assert_close(merged.get_parameter(key).detach(), value, rtol=1e-4, atol=1e-5)
    said = export(init.folder, tmp_path / "pair", to="adapter")
    assert said.endswith("PEFT and vLLM load both" if name == "gpt2" else "PEFT loads both, vLLM no target_parameters")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "pair/base", dtype=torch.float32)
    check_merged(PeftModel.from_pretrained(base, str(tmp_path / "pair/adapter")), model)
    if name != "gpt2":
        with pytest.raises(UserError, match=r"--to=bnb4: transformers loads .+experts.+ only as a dense layer"):
            export(init.folder, tmp_path / "four", to="bnb4")


@pytest.mark.parametrize("save_format", ["bnb4", "packed"])
def test_conv1d_in_every_format(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], save_format: str, tmp_path: Path
) -> None:
    model, folder = source("gpt2")
    init, config = made(folder, tmp_path, save_format)
    dense, _ = made(folder, tmp_path)
    plain = hf.AutoModelForCausalLM.from_pretrained(dense.folder, dtype=torch.float32)
    expected_logits = (
        PeftModel.from_pretrained(plain, str(dense.folder), subfolder="loftq_init").eval()(input_ids=IDS).logits
    )
    adapted = load_model(init, None, config, torch.device("cpu"), torch.float32)
    kind = PackedLinear if save_format == "packed" else Linear4bit
    assert sum(isinstance(module, kind) for module in adapted.modules()) == 2 * 4
    torch.testing.assert_close(adapted.eval()(input_ids=IDS).logits, expected_logits, rtol=1e-3, atol=1e-3)
    stored = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    by_hand = PeftModel.from_pretrained(stored, str(init.folder), subfolder="loftq_init")
    torch.testing.assert_close(by_hand.eval()(input_ids=IDS).logits, expected_logits, rtol=1e-3, atol=1e-3)
    export(init.folder, tmp_path / "merged", dtype="float32")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for key, value in expected(model).items():
        torch.testing.assert_close(merged.get_parameter(key).detach(), value, rtol=1e-4, atol=1e-5)
    export(init.folder, tmp_path / "four", to="bnb4")
    four = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32)
    assert sum(isinstance(module, Linear4bit) for module in four.modules()) == 2 * 4
    torch.testing.assert_close(four(input_ids=IDS).logits, expected_logits, rtol=0.5, atol=0.5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_bnb4_beside_layer_norms_of_another_type_loads_by_the_documented_lines(
    name: str, stored: torch.dtype, tmp_path: Path
) -> None:
    """The type that config.json and the card name is that of the tensors beside the targets, whatever save_dtype is."""
    seeded(MODELS[name]).to(stored).save_pretrained(tmp_path / "source")
    other = "bfloat16" if stored == torch.float32 else "float32"
    init, config = made(tmp_path / "source", tmp_path, "bnb4", save_dtype=other)
    plain = hf.AutoModelForCausalLM.from_pretrained(init.folder)
    assert {value.dtype for value in plain.parameters() if value.is_floating_point()} == {stored}
    assert bool(torch.isfinite(plain(input_ids=IDS).logits).all())
    assert init.report["quant"]["load_dtype"] == str(stored).removeprefix("torch.")
    assert f"from_pretrained(REPO, dtype={stored}" in model_card(init, config, None)


def test_a_checkpoint_that_stores_merged_experts(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], tmp_path: Path
) -> None:
    model, _ = source("mixtral")
    merged = tmp_path / "merged"
    merged.mkdir()
    model.config.save_pretrained(merged)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        merged / "model.safetensors",
        {"format": "pt"},
    )
    init, _ = made(merged, tmp_path)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(init.folder / "model.safetensors")
    plain = hf.AutoModelForCausalLM.from_pretrained(init.folder, dtype=torch.float32)
    check_merged(PeftModel.from_pretrained(plain, str(init.folder), subfolder="loftq_init"), model)


def test_experts_alone_or_all_but_experts(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], tmp_path: Path
) -> None:
    model, folder = source("deepseek-v3")
    rest, config = made(folder, tmp_path, quant__exclude=["mlp.experts.*"])
    assert {weight["name"].rpartition(".")[2] for weight in rest.report["not_quantized"]} == {
        "gate_up_proj",
        "down_proj",
        "weight",
    }
    values = 4 * (64 * 64 + 64 * 32)
    assert rest.report["totals"]["linear_values"] - rest.report["totals"]["quantized_values"] == values + 4 * 64
    adapted = load_model(rest, None, config, torch.device("cpu"), torch.float32)
    merged = adapted.merge_and_unload()
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(
            merged.get_parameter(f"model.layers.1.mlp.experts.{name}"),
            model.get_parameter(f"model.layers.1.mlp.experts.{name}"),
        )
    alone, _ = made(folder, tmp_path, quant__target_modules=["experts.down_proj"], quant__rank=8)
    adapter = json.loads((alone.folder / "loftq_init/adapter_config.json").read_text())
    assert (adapter["target_modules"], len(adapter["target_parameters"])) == ([], 1)
    assert {key.rpartition(".lora")[0] for key in load_file(alone.folder / "loftq_init/adapter_model.safetensors")} == {
        "base_model.model.model.layers.1.mlp.experts"
    }


def test_a_rank_above_an_expert_s(source: Callable[[str], tuple[hf.PreTrainedModel, Path]], tmp_path: Path) -> None:
    """Ranks of 40 where it fits; 32 for experts of 32 inputs, at the same s."""
    _, folder = source("qwen3-moe")
    init, config = made(folder, tmp_path, quant__rank=40, quant__alpha=80)
    adapter = json.loads((init.folder / "loftq_init/adapter_config.json").read_text())
    assert {adapter["rank_pattern"][f"model.layers.{layer}.mlp.experts.down_proj"] for layer in (0, 1)} == {32}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r"The following (rank|alpha)_pattern")
        adapted = load_model(init, None, config, torch.device("cpu"), torch.float32)
        export(init.folder, tmp_path / "merged")
    assert {module.scaling["default"] for module in adapted.modules() if isinstance(module, LoraLayer)} == {2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant__dropout": 0.1}, r"quant.dropout=0.1: PEFT has no dropout for .+experts.+; use quant.dropout=0"),
        ({"quant__allocation": "error+rank"}, "quant.allocation=error.rank: PEFT has one rank for all matrices of model.layers"),
        ({"save_format": "bnb4"}, r"save_format=bnb4: 4-bit layers replace linear layers alone, and .+; use save_format=dense"),
        ({"train__backbone": "bnb4"}, r"train.backbone=bnb4: 4-bit layers replace linear layers alone"),
    ],
)  # fmt: skip
def test_settings_that_experts_do_not_allow(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, folder = source("qwen3-moe")
    with pytest.raises(UserError, match=message) as caught:
        made(folder, tmp_path, **{"save_format": "dense"} | changes)
    assert "\n" not in str(caught.value)


def test_a_peft_that_loses_factors_stops_the_run(
    source: Callable[[str], tuple[hf.PreTrainedModel, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deepseek-v3's shared experts as modules: PEFT makes them experts' parameters. Before the work, and on loading."""
    _, folder = source("deepseek-v3")
    monkeypatch.setattr(names_for_peft, "_renames", lambda model, name: False)
    with pytest.raises(UserError, match=r"PEFT (loses|also has|has another shape of) .+ factors differ"):
        made(folder, tmp_path / "other")
    assert not list((tmp_path / "other").glob("**/init_report.json"))
    monkeypatch.setattr(proof, "_check_adapter", lambda *_: None)
    unchecked, config = made(folder, tmp_path / "unchecked")
    with pytest.raises(
        UserError, match=r"lora_[AB].weight (has no place in the model and would be lost|is missing from)"
    ):
        load_model(unchecked, None, config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("name", "form"), [("deepseek-v3", "packed"), ("gpt-oss", "dense"), ("gpt2", "dense")])
def test_a_run_from_the_command_to_its_scores(
    name: str, form: str, cli: Any, tiny_tokenizer: hf.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = CONFIGS[name]()
    config.update({"vocab_size": len(tiny_tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
                   "max_position_embeddings": 164})  # fmt: skip
    folder = with_tokenizer(lambda: hf.AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / "source")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"}) + "\n" for n in range(8))
    )
    outcome = cli(
        f"model.path={folder}", "task=gsm8k", f"task.train_file={rows}", f"task.eval_file={rows}", "task.max_target_length=16",
        "quant.rank=4", "quant.iter=1", "quant.dropout=0", f"save_format={form}", "train.max_steps=2", "train.per_device_train_batch_size=4", "device=cpu",
        "train.warmup_ratio=0", f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    (record,) = (tmp_path / "out").glob("runs/*/metrics.json")
    metrics = json.loads(record.read_text())
    assert (metrics["init"]["quantized_values"] < metrics["init"]["linear_values"]) == (name != "gpt2")
    start = load_file(next((tmp_path / "out/inits").glob("*/loftq_init/adapter_model.safetensors")))
    trained = load_file(record.parent / "adapter" / "adapter_model.safetensors")
    assert start.keys() == trained.keys()
    assert any(
        not torch.equal(value, trained[key]) for key, value in start.items() if "experts" in key or name == "gpt2"
    )
