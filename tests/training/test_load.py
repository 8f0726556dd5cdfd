"""The model that trains: 4-bit and dense layers compute the same function, and only the adapter moves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from checkpoints import without_manifests
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ENCODER, FALCON, sized

from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.origin import Origin
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate
from loftq_exp.training.finetune import _save_adapter, training_arguments
from loftq_exp.training.load import backbone_form, load_model, load_tokenizer

CPU = torch.device("cpu")


def settings(model: Path, root: Path, **changes: Any) -> RunConfig:
    """LoftQ NF4 of `model` into `root`, but for the `changes`, where __ stands for a dot."""
    values: dict[str, Any] = {
        "model": {"path": str(model), "kind": "causal"},
        "quant": {"method": "loftq", "type": "nf", "bits": 4, "rank": 8, "iter": 1},
        "task": {"kind": "gsm8k"}, "train": {}, "stages": ["quantize"], "device": "cpu",
        "save_dir": str(root / "saved"), "cache_dir": str(root / "cache"),
    }  # fmt: skip
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (values[group] if group else values)[key] = value
    return RunConfig.from_mapping(values)


def made(config: RunConfig) -> Initialised:
    return initialise(locate(config.model, config.cache_path), config)


def loaded(config: RunConfig, adapter: Path | None = None) -> PeftModel:
    return load_model(made(config), adapter, config, CPU, torch.float32)


def logits(model: PeftModel) -> torch.Tensor:
    ids = torch.arange(3, 43).remainder(model.config.vocab_size).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def targets(model: PeftModel, init: Initialised) -> dict[str, nn.Module]:
    """The backbone's layers below the adapter's, by name."""
    base = model.base_model.model
    return {weight["name"]: base.get_submodule(weight["name"]).base_layer for weight in init.report["weights"]}


def dequantized(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer, Linear4bit)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("save_format", ["dense", "bnb4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 2])
def test_four_bit_and_dense_backbones_compute_the_same(
    tiny_llama_dir: Path, tmp_path: Path, bits: int, dtype: torch.dtype, save_format: str
) -> None:
    common = {"quant__bits": bits, "save_dtype": str(dtype).removeprefix("torch.")}
    dense = settings(tiny_llama_dir, tmp_path / "dense", **common, train__backbone="dense")
    packed = settings(tiny_llama_dir, tmp_path / "packed", **common, save_format=save_format, train__backbone="bnb4")
    init, other_init = made(dense), made(packed)
    one, other = (load_model(x, None, config, CPU, dtype) for x, config in ((init, dense), (other_init, packed)))
    assert not any(isinstance(layer, Linear4bit) for layer in targets(one, init).values())
    values = load_file(init.folder / "model.safetensors")
    for name, layer in targets(other, other_init).items():
        assert torch.equal(dequantized(layer), values[f"{name}.weight"])
        assert isinstance(layer, Linear4bit)
        assert layer.compute_dtype == dtype
    expected, found = logits(one).float(), logits(other).float()
    assert expected.std() > 0.1
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("save_format", ["dense", "bnb4"])
def test_in_float32_four_bit_layers_leave_out_the_rounding_to_bfloat16(
    tiny_llama_dir: Path, tmp_path: Path, save_format: str
) -> None:
    dense = settings(tiny_llama_dir, tmp_path / "dense", train__backbone="dense")
    packed = settings(tiny_llama_dir, tmp_path / "packed", save_format=save_format)
    one, other = loaded(dense), loaded(packed)
    values = load_file(made(dense).folder / "model.safetensors")
    for name, layer in targets(other, made(packed)).items():
        assert torch.equal(dequantized(layer).bfloat16(), values[f"{name}.weight"])
    expected, found = logits(one), logits(other)
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_what_loads_is_close_to_the_pretrained_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = hf.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    expected = logits(source)
    error = {}
    for rank in (1, 8, 32):
        found = logits(loaded(settings(tiny_llama_dir, tmp_path, quant__rank=rank, quant__alpha=5.5)))
        error[rank] = float((found - expected).norm() / expected.norm())
    assert error[32] < error[8] < error[1] < 0.5
    lora = {"quant__method": "lora", "quant__type": "none", "quant__bits": 16, "quant__iter": 0}
    exact = logits(loaded(settings(tiny_llama_dir, tmp_path, **lora, save_dtype="float32")))
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["bnb4", "dense"])
def test_only_the_adapter_is_trainable_and_in_float32(tiny_llama_dir: Path, tmp_path: Path, backbone: str) -> None:
    config = settings(tiny_llama_dir, tmp_path, train__backbone=backbone)
    init = made(config)
    model = load_model(init, None, config, CPU, torch.float32)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    factors = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in trainable} == set(factors)
    for name, weight in trainable.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, factors[name.replace(".default", "")]), "PEFT draws no others"
    ids = torch.arange(3, 23)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trainable.values())
    assert all(weight.grad is None for name, weight in model.named_parameters() if name not in trainable)


def test_an_adapter_that_was_saved_is_loaded_in_place_of_the_first(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_dir, tmp_path)
    model = loaded(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(config, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(again), logits(loaded(config)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"quant__bits": 2}, True),
        ({"train__backbone": "dense"}, False),
        ({"train__backbone": "bnb4"}, True),
        ({"quant__bits": 3}, False),
        ({"quant__block_size": 32}, False),
        ({"quant__type": "uniform"}, False),
    ],
    ids=str,
)
def test_auto_takes_four_bit_layers_where_they_hold_the_values(
    tiny_llama_dir: Path, tmp_path: Path, changes: dict[str, Any], expected: bool
) -> None:
    config = settings(tiny_llama_dir, tmp_path, **changes)
    assert (backbone_form(made(config), config, CPU) == "bnb4") is expected
    layers = targets(loaded(config), made(config)).values()
    assert {isinstance(layer, Linear4bit) for layer in layers} == {expected}


def test_rows_that_are_not_whole_blocks_stay_dense_on_a_processor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = a_model(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **sizes)), tmp_path / "tiny")
    config = settings(folder, tmp_path)
    assert not any(isinstance(layer, Linear4bit) for layer in targets(loaded(config), made(config)).values())
    assert backbone_form(made(config), config, torch.device("cuda")) == "bnb4"
    with pytest.raises(UserError, match=r"train.backbone=bnb4: model\.layers\.0\S+ has rows of 96 values"):
        loaded(settings(folder, tmp_path, train__backbone="bnb4"))


def a_model(model: hf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}],
    ids=["old", "new, with biases"],
)
def test_falcons_layers_become_four_bit_by_our_loader(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    model = hf.FalconForCausalLM(hf.FalconConfig(**sized(FALCON, spread=0.2), **options))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    folder = a_model(model, tmp_path / "falcon")
    common = {"quant__bits": bits, "save_dtype": "float32"}
    config = settings(folder, tmp_path, **common)
    init = made(config)
    packed = load_model(init, None, config, CPU, torch.float32)
    layers = targets(packed, init)
    assert len(layers) == 8
    values = load_file(init.folder / "model.safetensors")
    for name, layer in layers.items():
        assert torch.equal(dequantized(layer), values[f"{name}.weight"])
        assert layer.weight.dtype == torch.uint8
        assert (layer.bias is not None) == bool(options)
    assert not any(weight.requires_grad for name, weight in packed.named_parameters() if "lora_" not in name)
    dense = load_model(init, None, settings(folder, tmp_path, **common, train__backbone="dense"), CPU, torch.float32)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5_keeps_its_wo_and_computes_the_same(tmp_path: Path, feed_forward: str) -> None:
    config = hf.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )  # fmt: skip
    folder = a_model(hf.T5ForConditionalGeneration(config), tmp_path / "t5")
    ids = torch.arange(3, 43).reshape(2, 20)
    found = {}
    for backbone in ("bnb4", "dense"):
        run = settings(folder, tmp_path, model__kind="seq2seq", train__backbone=backbone, save_dtype="float32")
        init = made(run)
        model = load_model(init, None, run, CPU, torch.float32).eval()
        layers = targets(model, init)
        four_bit = {name for name, layer in layers.items() if isinstance(layer, Linear4bit)}
        assert four_bit == ({name for name in layers if not name.endswith(".wo")} if backbone == "bnb4" else set())
        with torch.no_grad():
            found[backbone] = model(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(found["bnb4"], found["dense"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.BertForPreTraining(hf.BertConfig(**ENCODER)),
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)),
        lambda: hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True)
        ),
    ],
    ids=["bert", "roberta", "deberta"],
)
def test_an_encoder_trains_its_head_beside_the_adapter(tmp_path: Path, model: Callable[[], hf.PreTrainedModel]) -> None:
    folder = a_model(model(), tmp_path / "encoder")
    config = settings(folder, tmp_path, model__kind="classification")
    init = made(config)
    loaded = load_model(init, None, config, CPU, torch.float32)
    layers = targets(loaded, init)
    assert all(isinstance(layer, Linear4bit) for layer in layers.values())
    fours = [name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)]
    assert len(fours) == len(layers), "the head and the pooler stay dense"
    trainable = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    head = {name.split(".")[2] for name in trainable if ".lora_" not in name}
    # deberta's pooler is part of its head: no pre-trained checkpoint has one, and a random one that stays is of no use.
    assert head == ({"classifier", "pooler"} if loaded.config.model_type == "deberta-v2" else {"classifier"})
    assert all(".modules_to_save.default." in name for name in trainable if ".lora_" not in name)


MAKES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)),
    "deberta": lambda: hf.DebertaV2ForMaskedLM(
        hf.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True)
    ),
    "trained": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**ENCODER, num_labels=2, problem_type="multi_label_classification")
    ),
}


def trained_head(model: PeftModel) -> dict[str, torch.Tensor]:
    """The parameters that are trained beside the factors, by their name in an adapter file."""
    values = {name: value.detach() for name, value in model.named_parameters() if ".modules_to_save." in name}
    return {name.replace(".modules_to_save.default", ""): value for name, value in values.items()}


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_task_of_another_number_of_classes_gets_its_head_from_the_seed(
    tmp_path: Path, make: Callable[[], hf.PreTrainedModel], labels: int
) -> None:
    folder = a_model(make(), tmp_path / "encoder")
    heads = []
    for seed in (11, 11, 12):
        place = str(tmp_path / f"seed {seed}")
        config = settings(folder, tmp_path, model__kind="classification", seed=seed, save_dir=place)
        init = made(config)
        torch.rand(3)  # whatever was drawn before does not matter
        model = load_model(init, None, config, CPU, torch.float32, labels)
        heads.append(trained_head(model))
    assert logits(model).shape == (2, labels)
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    initial = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    sized = {name for name, value in heads[0].items() if value.shape != initial[name].shape}
    assert {name.rpartition(".")[2] for name in sized} == {"weight", "bias"}
    assert len(sized) == 2
    for name, value in heads[2].items():
        if name not in sized:
            assert torch.equal(value, initial[name]), "what does not depend on the number stays as it was"
        elif name.endswith("weight"):
            assert not torch.equal(value, heads[0][name])
            assert float(value.std()) == pytest.approx(model.config.initializer_range, rel=0.3)
        else:
            assert not value.any()
    factors = {name.replace(".default", ""): value for name, value in model.named_parameters() if ".lora_" in name}
    assert len(factors) == 2 * len(init.report["weights"])
    assert all(torch.equal(value, initial[name]) and value.requires_grad for name, value in factors.items())


@pytest.mark.parametrize("labels", [1, 3])
def test_a_packed_checkpoint_takes_a_head_of_another_size(tmp_path: Path, labels: int) -> None:
    folder = a_model(MAKES["trained"](), tmp_path / "encoder")
    found = []
    for save_format in ("bnb4", "dense"):
        config = settings(
            folder, tmp_path / save_format, model__kind="classification", save_format=save_format, save_dtype="float32"
        )
        model = load_model(made(config), None, config, CPU, torch.float32, labels)
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 12
        found.append(logits(model))
    assert found[0].shape == (2, labels)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_number_of_classes_is_the_checkpoints_own_where_the_task_says_none(
    tmp_path: Path, make: Callable[[], hf.PreTrainedModel]
) -> None:
    config = settings(a_model(make(), tmp_path / "encoder"), tmp_path, model__kind="classification")
    init = made(config)
    initial = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    for labels in (None, 2):
        head = trained_head(load_model(init, None, config, CPU, torch.float32, labels))
        assert head.keys() == {name for name in initial if ".lora_" not in name}
        assert all(torch.equal(value, initial[name]) for name, value in head.items())


@pytest.mark.parametrize(
    ("labels", "target", "kind"),
    [(1, torch.tensor([0.5, 3.0]), "regression"), (3, torch.tensor([0, 2]), "single_label_classification")],
)
def test_the_loss_is_the_tasks_and_not_that_of_the_checkpoints_last_one(
    tmp_path: Path, labels: int, target: torch.Tensor, kind: str
) -> None:
    config = settings(a_model(MAKES["trained"](), tmp_path / "encoder"), tmp_path, model__kind="classification")
    model = load_model(made(config), None, config, CPU, torch.float32, labels).eval()
    out = model(input_ids=torch.arange(3, 43).reshape(2, 20), labels=target)
    expected = (
        nn.functional.mse_loss(out.logits[:, 0], target)
        if labels == 1
        else nn.functional.cross_entropy(out.logits, target)
    )
    torch.testing.assert_close(out.loss, expected)
    assert model.config.problem_type == kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [("bert", "classification", 1), ("roberta", "classification", 3), ("deberta", "classification", 2),
     ("trained", "classification", None), ("deberta", "question-answering", None)],
)  # fmt: skip
def test_a_trained_head_comes_back_with_its_adapter(
    tmp_path: Path, name: str, kind: str, labels: int | None, dtype: torch.dtype
) -> None:
    config = settings(a_model(MAKES[name](), tmp_path / "encoder"), tmp_path, model__kind=kind)
    init = made(config)
    model = load_model(init, None, config, CPU, dtype, labels)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=0.03)
    _save_adapter(model, tmp_path / "adapter", Origin("adapter", "initialisation"))
    again = load_model(init, tmp_path / "adapter", config, CPU, dtype, labels)
    assert all(value.dtype == torch.float32 for value in trained_head(model).values())
    before, after = ({n: v for n, v in m.named_parameters() if v.requires_grad} for m in (model, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        one, other = (m.eval()(input_ids=ids)[0] for m in (model, again))
    assert torch.equal(one, other)


def test_training_moves_the_head_and_a_resumed_run_ends_with_the_same_one(tmp_path: Path) -> None:
    config = settings(a_model(MAKES["deberta"](), tmp_path / "encoder"), tmp_path, model__kind="classification",
                      train={"max_steps": 4, "save_steps": 2, "save_total_limit": 2})  # fmt: skip
    init = made(config)
    rows = [{"input_ids": torch.arange(3 + i, 11 + i), "labels": torch.tensor(i % 3)} for i in range(16)]
    ends = []
    for resumed in (None, str(tmp_path / "checkpoints" / "checkpoint-2")):
        hf.set_seed(config.seed)
        model = load_model(init, None, config, CPU, torch.float32, 3)
        before = {name: value.clone() for name, value in trained_head(model).items()}
        arguments = training_arguments(config, tmp_path / "checkpoints", CPU, torch.float32)
        hf.Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=resumed)
        ends.append(trained_head(model))
    assert len(before) == 4
    assert all(not torch.equal(value, before[name]) for name, value in ends[0].items())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = a_model(MAKES["bert"](), tmp_path / "encoder")
    init = made(settings(folder, tmp_path, model__kind="classification"))
    other = settings(folder, tmp_path, model__kind="question-answering")
    with pytest.raises(
        UserError, match=r"model\.kind=question-answering: the checkpoint at .* was made for classification"
    ):
        load_model(init, None, other, CPU, torch.float32)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = a_model(hf.FalconForCausalLM(hf.FalconConfig(**FALCON)), tmp_path / "falcon")
    config = settings(folder, tmp_path)
    with pytest.raises(UserError, match=f"model.path={folder}: no readable tokenizer") as caught:
        load_tokenizer(made(config), config)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_is_the_sources(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_dir, tmp_path)
    init = made(config)
    text = "Tom has 3 apples, and buys 4 more."
    expected = hf.AutoTokenizer.from_pretrained(tiny_llama_dir)(text)["input_ids"]
    assert load_tokenizer(init, config)(text)["input_ids"] == expected
    assert json.loads((init.folder / "config.json").read_text())["vocab_size"] == 512


# What is whole --------------------------------------------------------------------------------------------------------


def edited(
    init: Initialised, place: Path, change: Callable[[dict[str, torch.Tensor]], Any], adapter: bool = False
) -> Path:
    """A copy of the checkpoint in `place` with other tensors in its backbone or its adapter."""
    without_manifests(Path(shutil.copytree(init.folder, place)))
    file = place / "loftq_init/adapter_model.safetensors" if adapter else place / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return place


def refused(init: Initialised, config: RunConfig, adapter: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_model(init, adapter, config, CPU, torch.float32)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("save_format", ["dense", "bnb4", "packed"])
def test_a_backbone_that_is_not_whole_is_refused(tiny_llama_dir: Path, tmp_path: Path, save_format: str) -> None:
    """transformers would draw missing tensors and drop unknown ones, with only a log line."""
    config = settings(tiny_llama_dir, tmp_path, save_format=save_format)
    init = made(config)
    names = {name for name in load_file(init.folder / "model.safetensors") if ".self_attn." not in name}
    part = {"dense": "weight", "bnb4": "weight.quant_state.bitsandbytes__nf4", "packed": "scales"}[save_format]
    lost = [name for name in sorted(names) if ".layers.0." not in name or name.endswith(f"mlp.up_proj.{part}")]
    assert {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"} < set(lost)
    for number, name in enumerate(lost):
        copy = edited(init, tmp_path / f"lost{number}", lambda tensors, name=name: tensors.pop(name))
        message = refused(Initialised(copy, init.report), config)
        assert message.startswith(f"{copy}: ")
        assert re.sub(r"\.weight\..*", ".weight", name) in message
        assert message.endswith((f"the checkpoint is damaged: delete {copy} and quantize again", "get the file again"))
    copy = edited(init, tmp_path / "more", lambda tensors: tensors.update(odd=torch.ones(2)))
    assert f"{copy}: odd has no place in the model; " in refused(Initialised(copy, init.report), config)
    renamed = edited(init, tmp_path / "renamed", lambda tensors: tensors.update(bnorm=tensors.pop("model.norm.weight")))
    assert ": model.norm.weight is missing from the weights (and 1 more); " in refused(
        Initialised(renamed, init.report), config
    )
    short = {"model.norm.weight": torch.ones(32)}
    copy = edited(init, tmp_path / "short", lambda tensors: tensors.update(short))
    expected = f"{copy}: model.norm.weight has shape (32,), config.json means (64,); the checkpoint is damaged: "
    assert refused(Initialised(copy, init.report), config).startswith(expected)
    (copy / "model.safetensors").write_bytes(b"\x10")
    assert refused(Initialised(copy, init.report), config).startswith(f"{copy}: ")
    (copy / "model.safetensors").unlink()
    assert f"{copy}: the weights cannot be read" in refused(Initialised(copy, init.report), config)


FACTOR = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
FAULTS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda tensors: tensors.pop(FACTOR), f"{FACTOR} is missing from adapter_model.safetensors (1 of 27 names differ)"),
    (lambda tensors: tensors.update({f"{FACTOR}s": torch.ones(2)}), f"{FACTOR}s has no place in the model and would be lost"),
    (lambda tensors: tensors[FACTOR].fill_(torch.inf), f"{FACTOR} has NaN or infinite values"),
    (lambda tensors: tensors[FACTOR][0, 0].fill_(torch.nan), f"{FACTOR} has NaN or infinite values"),
    (lambda tensors: tensors.update({FACTOR: torch.ones(4, 64)}), f"{FACTOR} has shape (4, 64), the model means (8, 64)"),
    (lambda tensors: tensors.clear(), "is missing from adapter_model.safetensors (28 of 0 names differ)"),
]  # fmt: skip


@pytest.mark.parametrize("finetuned", [False, True])
def test_an_adapter_that_is_not_whole_is_refused(tiny_llama_dir: Path, tmp_path: Path, finetuned: bool) -> None:
    config = settings(tiny_llama_dir, tmp_path)
    init = made(config)
    for number, (change, fault) in enumerate(FAULTS):
        copy = edited(init, tmp_path / f"bad{number}", change, adapter=True)
        folder = copy / "loftq_init"
        message = refused(init, config, folder) if finetuned else refused(Initialised(copy, init.report), config)
        assert message.startswith(f"{folder}: ")
        assert fault in message
        assert message.endswith(f"delete {copy} and {'fine-tune' if finetuned else 'quantize'} again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        copy = edited(init, tmp_path / name, lambda tensors: None, adapter=True)
        (copy / "loftq_init" / name).unlink()
        assert f"{copy / 'loftq_init'}: {name} cannot be read" in refused(Initialised(copy, init.report), config)


def test_a_model_whose_targets_peft_renames(tmp_path: Path) -> None:
    """deepseek-v3's feed-forward layers: PEFT would make them experts' parameters, so they are adapted as parameters."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "moe_intermediate_size": 64,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    }  # fmt: skip
    folder = a_model(hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)), tmp_path / "deepseek")
    dropped = settings(folder, tmp_path, quant__dropout=0.1)
    with pytest.raises(
        UserError, match=r"^quant.dropout=0.1: PEFT has no dropout for model.layers.0.mlp.gate_proj.weight"
    ):
        made(dropped)
    assert not (dropped.inits_path / dropped.init_name).exists()
    config = settings(folder, tmp_path, quant__dropout=0)
    init = made(config)
    model = load_model(init, None, config, torch.device("cpu"), torch.float32)
    factors = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(factors) == 2 * len(init.report["weights"]) == 2 * 2 * 8
