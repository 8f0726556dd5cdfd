"""Tensors that a plain load would lack, drop or resize: refused before the long work, or left out and named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from zoo import DECODER, ENCODER, FAMILIES, quantize_config, seeded

from loftq_exp.artifact.folder import Initialised
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.layout import AUTO_CLASSES
from loftq_exp.source.loading import load_report
from loftq_exp.source.locate import locate

Weights = dict[str, torch.Tensor]


def source(root: Path, make: Callable[[], hf.PreTrainedModel], change: Callable[[Weights], Any] | None = None) -> Path:
    """The model in a folder, its weights changed."""
    folder = root / "source"
    seeded(make).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if change is not None:
        change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def made(folder: Path, root: Path, kind: str, save_format: str = "dense", **changes: Any) -> Initialised:
    config = quantize_config(folder, root, kind, save_format, **{"quant__iter": 1, **changes})
    return initialise(locate(config.model, config.cache_path), config)


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, **changes}))


def plain_load(init: Initialised, kind: str) -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    """In float32, which holds every stored value."""
    return AUTO_CLASSES[kind].from_pretrained(init.folder, dtype=torch.float32, output_loading_info=True)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama-2", "lm_head.weight"), ("llama-2", "model.norm.weight"), ("llama-2", "model.embed_tokens.weight"),
        ("phi", "model.layers.1.mlp.fc1.bias"), ("bart", "model.shared.weight"), ("t5", "decoder.final_layer_norm.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight"), ("deberta v3", "deberta.encoder.rel_embeddings.weight"),
        ("falcon", "transformer.ln_f.bias"),
    ],
)  # fmt: skip
def test_a_weight_that_the_source_lacks_is_named(tmp_path: Path, name: str, lost: str) -> None:
    family = FAMILIES[name]

    def drop(weights: Weights) -> None:
        ties = ("model.shared.weight", "bert.embeddings.word_embeddings.weight")  # and all that it is tied to
        for key in [k for k in weights if k == lost or (lost in ties and weights[k].shape == weights[lost].shape)]:
            del weights[key]

    folder = source(tmp_path, family.make, drop)
    with pytest.raises(UserError, match=r"is missing from the weights.+; give a checkpoint") as caught:
        made(folder, tmp_path, family.kind)
    assert lost in str(caught.value)
    assert not (tmp_path / "dense").exists() or not any((tmp_path / "dense").glob("source*"))


def test_a_missing_weight_has_the_name_that_it_has_in_the_file(tmp_path: Path) -> None:
    folder = source(
        tmp_path, lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)), lambda w: w.pop("embed_out.weight")
    )
    with pytest.raises(
        UserError, match=r"embed_out\.weight \(in the model: lm_head\.weight\) is missing from the weights"
    ):
        made(folder, tmp_path, "causal")


@pytest.mark.parametrize("there", [True, False])
def test_t5_s_own_head_is_kept_or_missed(tmp_path: Path, there: bool) -> None:
    """transformers 5 ties the embeddings of every t5, unless the weights hold a head beside them."""
    head = {"lm_head.weight": torch.randn(96, 64)} if there else {}
    folder = source(tmp_path, FAMILIES["t5 v1.1"].make, lambda weights: weights.update(head))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    if there:
        loaded, _ = plain_load(made(folder, tmp_path, "seq2seq"), "seq2seq")
        assert torch.equal(loaded.lm_head.weight, head["lm_head.weight"])
        assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    else:
        with pytest.raises(UserError, match=r"lm_head\.weight is missing.+tie_word_embeddings=false"):
            made(folder, tmp_path, "seq2seq")


def test_shapes_that_the_config_does_not_mean_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, llama, lambda weights: weights.update({"model.embed_tokens.weight": torch.ones(90, 64)}))
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight has shape \(90, 64\), config\.json expects \(96, 64\)"
    ):
        made(folder, tmp_path, "causal")


@pytest.mark.parametrize(
    "extra",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight",
     "model.norm2.weight", "lm_head.bias"],
)  # fmt: skip
def test_a_weight_that_config_json_has_no_place_for_is_not_dropped(tmp_path: Path, extra: str) -> None:
    folder = source(tmp_path, llama, lambda weights: weights.update({extra: torch.ones(64)}))
    with pytest.raises(UserError, match="has no place for") as caught:
        made(folder, tmp_path, "causal")
    assert extra in str(caught.value)
    assert "config.json" in str(caught.value)


def test_what_is_no_weight_of_the_model_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"v_head.summary.weight": torch.ones(1, 64), "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
             "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9), "model.embed_tokens._weight": torch.ones(96, 64)}  # fmt: skip
    folder = source(tmp_path, llama, lambda weights: weights.update(extra))
    with caplog.at_level(logging.INFO):
        init = made(folder, tmp_path, "causal")
    assert set(init.report["left_out"]) == set(extra)
    assert all(name in caplog.text for name in extra)
    _, info = plain_load(init, "causal")
    assert not any(info.values())


def test_the_head_of_gpt_neox_is_kept(tmp_path: Path) -> None:
    """`embed_out` shares no part of its name with anything in the base."""
    folder = source(tmp_path, lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)))
    init = made(folder, tmp_path, "causal")
    assert init.report["left_out"] == []
    loaded, info = plain_load(init, "causal")
    assert not any(info.values())
    assert torch.equal(
        loaded.get_output_embeddings().weight, load_file(folder / "model.safetensors")["embed_out.weight"]
    )


def test_old_names_of_tensors_keep_their_values(tmp_path: Path) -> None:
    """transformers renames them while it loads, and goes on to do so."""

    def older(weights: Weights) -> None:
        for name in [name for name in weights if "LayerNorm." in name]:
            weights[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                weights.pop(name)
            )

    make = FAMILIES["bert"].make
    folder = source(tmp_path, make, older)
    init = made(folder, tmp_path, "classification")
    loaded, info = plain_load(init, "classification")
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}, "the new task head"
    assert all(name.startswith("cls.") for name in init.report["left_out"])
    assert any(name.endswith(".gamma") for name in init.report["left_out"]), "named as in the source"
    norm = "bert.encoder.layer.1.output.LayerNorm.bias"
    assert torch.equal(loaded.state_dict()[norm], seeded(make).state_dict()[norm])


def test_the_report_is_that_of_a_real_load(tmp_path: Path) -> None:
    """On a checkpoint with every kind of fault, against transformers' own load from the files."""

    def spoil(weights: Weights) -> None:
        del weights["roberta.embeddings.LayerNorm.weight"]
        weights["roberta.encoder.layer.5.output.dense.bias"] = torch.ones(64)
        weights["roberta.embeddings.position_embeddings.weight"] = torch.ones(12, 64)

    folder = source(tmp_path, FAMILIES["roberta"].make, spoil)
    real, info = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    with torch.device("meta"):
        model = hf.AutoModelForSequenceClassification.from_config(real.config)
    shapes = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    report = load_report(model, shapes)
    assert set(report.missing) == set(info["missing_keys"])
    assert set(report.unexpected) == set(info["unexpected_keys"])
    assert set(report.mismatched) == {(name, tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}
    assert all([report.missing, report.unexpected, report.mismatched])


def test_a_missing_matrix_of_the_base_is_no_new_head(tmp_path: Path) -> None:
    """A classifier trains its own head; OPT's projection between embeddings and blocks is none."""
    make = lambda: hf.OPTForCausalLM(hf.OPTConfig(  # noqa: E731
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, max_position_embeddings=64,
        word_embed_proj_dim=32))  # fmt: skip
    folder = source(tmp_path, make, lambda weights: weights.pop("model.decoder.project_in.weight"))
    with pytest.raises(UserError, match=r"model\.decoder\.project_in\.weight is missing"):
        made(folder, tmp_path, "classification")


@pytest.mark.parametrize("save_format", ["dense", "packed", "bnb4"])
def test_every_tensor_that_is_no_target_is_the_sources(tmp_path: Path, save_format: str) -> None:
    folder = source(tmp_path, lambda: llama(tie_word_embeddings=False))
    init = made(folder, tmp_path, "causal", save_format)
    before, after = load_file(folder / "model.safetensors"), load_file(init.folder / "model.safetensors")
    for name in [name for name in before if "_proj" not in name]:
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


def test_a_config_of_fewer_layers_than_the_weights_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path, lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"has no place for bert\.encoder\.layer\.1\."):
        made(folder, tmp_path, "classification")


def test_a_pooler_that_is_a_layer_of_its_own_is_the_new_head_and_its_base_is_not(tmp_path: Path) -> None:
    """albert's pooler lies in the base without a module around it."""
    config = hf.AlbertConfig(**ENCODER, embedding_size=32)
    folder = source(tmp_path, lambda: hf.AlbertForMaskedLM(config))
    init = made(folder, tmp_path, "classification")
    assert init.report["head"] == ["albert.pooler", "classifier"]
    other = tmp_path / "other"
    folder = source(other, lambda: hf.AlbertForMaskedLM(config), lambda w: w.pop("albert.embeddings.LayerNorm.weight"))
    with pytest.raises(UserError, match=r"albert\.embeddings\.LayerNorm\.weight is missing"):
        made(folder, other, "classification")
