"""The targets of every family: each linear layer of each block, nothing else, and PEFT finds exactly these."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
import zoo
from peft.tuners.lora import LoraLayer
from torch import nn
from zoo import T5, sized

from loftq_exp.errors import UserError
from loftq_exp.source.layout import AUTO_CLASSES, TASK_TYPES, Layout, find_layout, load_config

DECODER = sized(zoo.DECODER, 3)
ENCODER = sized(zoo.ENCODER, 3) | {"type_vocab_size": 2}
RELATIVE = sized(zoo.RELATIVE, 3) | {"type_vocab_size": 2}
BART = zoo.BART | {"decoder_ffn_dim": 80}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model, and what is known of it from its paper and its code rather than from layout's: blocks and layer names."""

    config: hf.PretrainedConfig
    kind: str
    blocks: dict[str, set[str]]
    """Where blocks are, and the names of the linear layers inside one."""


LLAMA_BLOCK = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
FALCON_BLOCK = {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
PHI_BLOCK = {f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "dense")} | {"mlp.fc1", "mlp.fc2"}
BERT_BLOCK = {f"attention.self.{x}" for x in ("query", "key", "value")} | {
    "attention.output.dense", "intermediate.dense", "output.dense"
}  # fmt: skip
DEBERTA_BLOCK = {f"attention.self.{x}" for x in ("in_proj", "pos_proj", "pos_q_proj")} | {
    "attention.output.dense", "intermediate.dense", "output.dense"
}  # fmt: skip
DEBERTA_V2_BLOCK = {f"attention.self.{x}_proj" for x in ("query", "key", "value")} | {
    "attention.output.dense", "intermediate.dense", "output.dense"
}  # fmt: skip
DEBERTA_V2_APART = DEBERTA_V2_BLOCK | {"attention.self.pos_key_proj", "attention.self.pos_query_proj"}
BART_ENCODER = {f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"fc1", "fc2"}
BART_DECODER = BART_ENCODER | {f"encoder_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "out_proj")}


def t5_blocks(feed_forward: tuple[str, ...], prefix: str = "") -> dict[str, set[str]]:
    attention = {f"layer.0.SelfAttention.{x}" for x in "qkvo"}
    cross = {f"layer.1.EncDecAttention.{x}" for x in "qkvo"}
    return {
        f"{prefix}encoder.block": attention | {f"layer.1.DenseReluDense.{x}" for x in feed_forward},
        f"{prefix}decoder.block": attention | cross | {f"layer.2.DenseReluDense.{x}" for x in feed_forward},
    }


FAMILIES = {
    "llama": Family(hf.LlamaConfig(**DECODER, num_key_value_heads=2), "causal", {"model.layers": LLAMA_BLOCK}),
    "llama tied": Family(
        hf.LlamaConfig(**DECODER, attention_bias=True, tie_word_embeddings=True), "causal", {"model.layers": LLAMA_BLOCK}
    ),
    "llama scoring": Family(hf.LlamaConfig(**DECODER), "classification", {"model.layers": LLAMA_BLOCK}),
    "mistral": Family(hf.MistralConfig(**DECODER, num_key_value_heads=2), "causal", {"model.layers": LLAMA_BLOCK}),
    "falcon": Family(hf.FalconConfig(**DECODER), "causal", {"transformer.h": FALCON_BLOCK}),
    "falcon new": Family(
        hf.FalconConfig(**DECODER, new_decoder_architecture=True, num_kv_heads=2, bias=True),
        "causal",
        {"transformer.h": FALCON_BLOCK},
    ),
    "phi": Family(hf.PhiConfig(**DECODER), "causal", {"model.layers": PHI_BLOCK}),
    "bart": Family(
        hf.BartConfig(**BART), "seq2seq", {"model.encoder.layers": BART_ENCODER, "model.decoder.layers": BART_DECODER}
    ),
    "bart scoring": Family(
        hf.BartConfig(**BART), "classification", {"model.encoder.layers": BART_ENCODER, "model.decoder.layers": BART_DECODER}
    ),
    "t5": Family(hf.T5Config(**T5), "seq2seq", t5_blocks(("wi", "wo"))),
    "t5 v1.1": Family(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "seq2seq",
        t5_blocks(("wi_0", "wi_1", "wo")),
    ),
    "t5 scoring": Family(hf.T5Config(**T5), "classification", t5_blocks(("wi", "wo"), "transformer.")),
    "bert": Family(hf.BertConfig(**ENCODER), "classification", {"bert.encoder.layer": BERT_BLOCK}),
    "roberta": Family(hf.RobertaConfig(**ENCODER), "classification", {"roberta.encoder.layer": BERT_BLOCK}),
    "deberta v1": Family(
        hf.DebertaConfig(**RELATIVE), "classification", {"deberta.encoder.layer": DEBERTA_BLOCK}
    ),
    "deberta v2": Family(
        hf.DebertaV2Config(**RELATIVE, share_att_key=True, conv_kernel_size=3),
        "classification",
        {"deberta.encoder.layer": DEBERTA_V2_BLOCK},
    ),
    "deberta v2, keys apart": Family(
        hf.DebertaV2Config(**RELATIVE), "classification", {"deberta.encoder.layer": DEBERTA_V2_APART}
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def skeleton(family: Family) -> hf.PreTrainedModel:
    with torch.device("meta"):
        return AUTO_CLASSES[family.kind].from_config(family.config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def base_shapes(model: hf.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """A checkpoint of the base without its prefix, and with the language model's head that nothing else stands for."""
    heads = {} if getattr(model.config, "tie_word_embeddings", False) else shapes(model)
    return shapes(getattr(model, model.base_model_prefix)) | {
        name: shape for name, shape in heads.items() if name.startswith("lm_head.")
    }


def layout_of(family: Family, folder: Path, tensors: dict[str, tuple[int, ...]] | None = None) -> Layout:
    family.config.save_pretrained(folder)
    return find_layout(folder, family.kind, shapes(skeleton(family)) if tensors is None else tensors)


def test_each_linear_layer_of_each_block_is_a_target_and_nothing_else(family: Family, tmp_path: Path) -> None:
    model = skeleton(family)
    expected = set()
    for place, names in family.blocks.items():
        blocks = model.get_submodule(place)
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            # Any module that holds one matrix and is no embedding: what a linear layer is, whatever its class.
            linear = {
                name
                for name, module in block.named_modules()
                if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
                and weight.ndim == 2
                and not isinstance(module, nn.Embedding)
            }
            assert linear == names
            expected |= {f"{place}.{i}.{name}" for name in names}
    layout = layout_of(family, tmp_path)
    assert {target.module for target in layout.targets} == expected
    assert len(layout.targets) == len(expected)
    for target in layout.targets:
        assert target.tensor == f"{target.module}.weight"
        assert target.shape == tuple(model.get_parameter(target.tensor).shape)


def test_what_lies_outside_the_blocks_is_named(family: Family, tmp_path: Path) -> None:
    model = skeleton(family)
    layout = layout_of(family, tmp_path)
    outside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    outside -= {target.module for target in layout.targets}
    assert set(layout.other_linears) == outside
    assert outside, "each of these models has a head"
    endings = ("lm_head", "score", "classifier", "classifier.dense", "classifier.out_proj", "pooler.dense",
               "classification_head.dense", "classification_head.out_proj")  # fmt: skip
    assert all(name.endswith(endings) for name in outside)


def test_peft_puts_its_layers_on_exactly_the_targets(family: Family, tmp_path: Path) -> None:
    layout = layout_of(family, tmp_path)
    config = peft.LoraConfig(
        task_type=peft.TaskType(TASK_TYPES[family.kind]), r=2, target_modules=list(layout.target_modules)
    )
    model = peft.get_peft_model(skeleton(family), config, low_cpu_mem_usage=True)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert adapted == {target.module for target in layout.targets}


def test_target_modules_are_short_and_few(family: Family, tmp_path: Path) -> None:
    modules = layout_of(family, tmp_path).target_modules
    names = {name for names in family.blocks.values() for name in names}
    assert len(set(modules)) == len(modules) <= len(names), "they do not grow with the number of blocks"
    assert not any(".0." in f".{ending}." for ending in modules)


def test_the_order_is_the_same_in_every_process(family: Family, tmp_path: Path) -> None:
    assert layout_of(family, tmp_path) == layout_of(family, tmp_path)


def test_a_base_checkpoint_without_the_prefix_resolves(family: Family, tmp_path: Path) -> None:
    model = skeleton(family)
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None)
    if base is None:
        pytest.skip("t5's parts lie side by side, without a prefix")
    layout = layout_of(family, tmp_path, base_shapes(model))
    assert {target.module: target.shape for target in layout.targets} == {
        target.module: target.shape for target in layout_of(family, tmp_path).targets
    }
    for target in layout.targets:
        assert target.module == f"{prefix}.{target.tensor.removesuffix('.weight')}"
        assert tuple(base.get_parameter(target.tensor).shape) == target.shape


def test_a_checkpoint_with_a_prefix_that_the_class_lacks_resolves(tmp_path: Path) -> None:
    family = FAMILIES["t5"]
    model = skeleton(family)
    layout = layout_of(family, tmp_path, {f"transformer.{name}": shape for name, shape in shapes(model).items()})
    assert all(target.tensor == f"transformer.{target.module}.weight" for target in layout.targets)


@pytest.mark.parametrize(
    ("name", "left"),
    [("llama", 0), ("bert", 0), ("bart", 0), ("falcon", 12), ("falcon new", 12), ("t5", 5), ("t5 v1.1", 5)],
)
def test_targets_that_transformers_leaves_dense_are_known(tmp_path: Path, name: str, left: int) -> None:
    family = FAMILIES[name]
    layout = layout_of(family, tmp_path)
    assert len(layout.left_dense) == left
    assert set(layout.left_dense) <= {target.module for target in layout.targets}
    model = skeleton(family)
    quantizer = hf.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(layout.other_linears))
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(quantizer).preprocess_model(model, device_map={"": "cpu"})
    dense = {
        target.module for target in layout.targets if "4bit" not in type(model.get_submodule(target.module)).__name__
    }
    assert dense == set(layout.left_dense)


@pytest.mark.parametrize(
    ("name", "trained_as", "heads"),
    [
        ("bert", hf.BertForPreTraining, {"cls"}),
        ("roberta", hf.RobertaForMaskedLM, {"lm_head"}),
        ("deberta v1", hf.DebertaForMaskedLM, {"cls"}),
        ("deberta v2", hf.DebertaV2ForMaskedLM, {"cls"}),
        ("llama scoring", hf.LlamaForCausalLM, {"lm_head"}),
        ("llama", hf.LlamaForSequenceClassification, {"score"}),
        ("bart", hf.BartForSequenceClassification, {"classification_head"}),
        ("t5", hf.T5ForConditionalGeneration, set()),
        ("falcon", hf.FalconForCausalLM, set()),
    ],
)
def test_tensors_of_another_head_are_known_as_foreign(
    tmp_path: Path, name: str, trained_as: type[hf.PreTrainedModel], heads: set[str]
) -> None:
    with torch.device("meta"):
        tensors = shapes(trained_as(FAMILIES[name].config))
    # Old checkpoints have other names for some tensors, and hold buffers that the class no longer does.
    inside = next(iter(tensors)).split(".")[0]
    if f"{inside}.embeddings.LayerNorm.weight" in tensors:
        tensors |= {f"{inside}.embeddings.LayerNorm.gamma": tensors.pop(f"{inside}.embeddings.LayerNorm.weight")}
        tensors |= {f"{inside}.embeddings.position_ids": (1, 64)}
    if name == "llama":
        tensors["lm_head.weight"] = (96, 64)
    foreign = layout_of(FAMILIES[name], tmp_path, tensors).foreign
    assert set(foreign) == {tensor for tensor in tensors if tensor.split(".")[0] in heads}
    assert {tensor.split(".")[0] for tensor in foreign} == heads


def test_nothing_of_a_models_own_checkpoint_is_foreign(family: Family, tmp_path: Path) -> None:
    model = skeleton(family)
    assert layout_of(family, tmp_path).foreign == ()
    base = getattr(model, model.base_model_prefix, None)
    assert base is None or layout_of(family, tmp_path, base_shapes(model)).foreign == ()


@pytest.mark.parametrize(
    ("name", "ties"), [("llama", False), ("llama tied", True), ("bart", True), ("t5", True), ("falcon", True)]
)
def test_whether_embeddings_are_tied_is_known(tmp_path: Path, name: str, ties: bool) -> None:
    assert layout_of(FAMILIES[name], tmp_path).ties_embeddings is ties


@pytest.mark.parametrize(
    ("config", "weights", "told"),
    [
        ("llama", "falcon", "no weight named model.layers.0.self_attn.q_proj.weight"),
        ("phi", "llama tied", "no weight named model.layers.0.self_attn.dense.weight"),
        ("bert", "deberta v2", "no weight named bert.encoder.layer.0.attention.self.query.weight"),
        ("t5 v1.1", "t5", "no weight named encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        ("bart", "bert", "no weight named model.encoder.layers.0"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path: Path, config: str, weights: str, told: str) -> None:
    with pytest.raises(UserError, match=r"have another architecture than config\.json") as caught:
        layout_of(FAMILIES[config], tmp_path, shapes(skeleton(FAMILIES[weights])))
    assert told in str(caught.value)
    assert f"model.path={tmp_path}" in str(caught.value)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    small = dataclasses.replace(FAMILIES["llama"], config=hf.LlamaConfig(**DECODER))
    wide = dataclasses.replace(small, config=hf.LlamaConfig(**{**DECODER, "intermediate_size": 96}))
    with pytest.raises(UserError, match=r"has shape \(96, 64\), config\.json expects \(128, 64\)"):
        layout_of(small, tmp_path, shapes(skeleton(wide)))
    deep = dataclasses.replace(small, config=hf.LlamaConfig(**{**DECODER, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"no weight named model\.layers\.3"):
        layout_of(deep, tmp_path, shapes(skeleton(small)))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.kind=seq2seq: a llama checkpoint"):
        layout_of(dataclasses.replace(FAMILIES["llama"], kind="seq2seq"), tmp_path, {})


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "no-such-model"}', None])
def test_a_config_that_transformers_does_not_know_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="transformers cannot read the config") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)
