"""The head that a task trains: kept if the checkpoint has one, drawn from the seed otherwise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from zoo import sized

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.head import draw_head
from loftq_exp.source.layout import find_layout, skeleton
from loftq_exp.source.locate import locate
from loftq_exp.storage.bnb4 import bnb4_config

SPREAD = 0.05
ENCODER, BART, T5 = (sized(config, 1, SPREAD) for config in (zoo.ENCODER, zoo.BART, zoo.T5))
RELATIVE = sized(zoo.RELATIVE, 1, SPREAD) | {"share_att_key": True}
PREFIX = "base_model.model."

Make = Callable[[], hf.PreTrainedModel]


def saved(model: hf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def made(folder: Path, root: Path, kind: str = "classification", seed: int = 11, **changes: Any) -> Initialised:
    config = RunConfig.from_mapping({
        "model": {"path": str(folder), "kind": kind}, "task": {"kind": "gsm8k"}, "train": {}, "seed": seed,
        "quant": {"method": "loftq", "type": "nf", "bits": 4, "rank": 8, "iter": 1}, "stages": ["quantize"],
        "save_dir": str(root / f"seed-{seed}"), "cache_dir": str(root / "cache"), "device": "cpu", **changes,
    })  # fmt: skip
    return initialise(locate(config.model, config.cache_path), config)


def head_of(init: Initialised) -> dict[str, torch.Tensor]:
    """The parameters of the adapter that are no factors, by their name in the model."""
    values = load_file(init.folder / "loftq_init" / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): value for name, value in values.items() if ".lora_" not in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


HEADS: dict[str, tuple[Make, str, set[str], float]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), "classification", {"classifier"}, 0.05),
    "bert without pooler": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), "classification", {"bert.pooler.dense", "classifier"}, 0.05,
    ),
    "roberta": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)), "classification",
        {"classifier.dense", "classifier.out_proj"}, 0.05,
    ),
    "deberta v3": (
        lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**RELATIVE)), "classification", {"pooler.dense", "classifier"}, 0.05,
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "classification",
        {"classification_head.dense", "classification_head.out_proj"}, 0.05,
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "classification",
        {"classification_head.dense", "classification_head.out_proj"}, 64**-0.5,
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ENCODER)), "classification", {"score"}, 0.05),
    "bert answering": (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), "question-answering", {"qa_outputs"}, 0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_new_head_is_drawn_as_transformers_would_from_the_seed(name: str, tmp_path: Path) -> None:
    make, kind, modules, deviation = HEADS[name]
    folder = saved(make(), tmp_path / "source")
    before = torch.random.get_rng_state()
    init = made(folder, tmp_path, kind)
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's random numbers move"
    head = head_of(init)
    assert {key.rpartition(".")[0] for key in head} == modules
    for key, value in head.items():
        assert value.dtype == torch.float32
        if key.endswith("bias"):
            assert not value.any()
        else:
            assert float(value.std()) == pytest.approx(deviation, rel=0.3 if value.numel() < 200 else 0.05)
    # Another revision of the same model, in another place: its new head is the same, whatever was drawn before it.
    torch.rand(7)
    torch.manual_seed(torch.initial_seed() + 1)
    again = head_of(made(saved(make(), tmp_path / "other"), tmp_path, kind))
    assert same(head, again)
    other = head_of(made(folder, tmp_path, kind, seed=12))
    assert not any(torch.equal(value, other[key]) for key, value in head.items() if key.endswith("weight"))
    weights = [value for key, value in sorted(head.items()) if key.endswith("weight")]
    assert all(not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(weights))


def test_another_number_of_outputs_changes_only_what_depends_on_it(tmp_path: Path) -> None:
    folder = saved(hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)), tmp_path / "source")
    two, five = (draw_head(skeleton(folder, "classification", num_labels=n), ["classifier"], 3) for n in (2, 5))
    assert two["classifier.out_proj.weight"].shape == (2, 64)
    assert five["classifier.out_proj.weight"].shape == (5, 64)
    assert torch.equal(two["classifier.dense.weight"], five["classifier.dense.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)),
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=3)),
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**RELATIVE, num_labels=3)),
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART, num_labels=3)),
    ],
    ids=["bert", "roberta", "deberta", "bart"],
)
def test_a_trained_head_is_kept(make: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make().to(dtype)
    init = made(saved(source, tmp_path / "source"), tmp_path)
    expected = source.state_dict()
    head = head_of(init)
    assert {value.shape[0] for name, value in head.items() if "dense" not in name} == {3}
    assert all(torch.equal(value, expected[name].float()) for name, value in head.items())
    own = {name for name in expected if name.startswith(("classifier", "pooler", "classification_head"))}
    assert set(head) == own


def test_a_head_of_another_size_than_the_config_says_is_refused(tmp_path: Path) -> None:
    folder = saved(hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)), tmp_path / "source")
    settings = json.loads((folder / "config.json").read_text())
    del settings["id2label"], settings["label2id"]
    (folder / "config.json").write_text(json.dumps(settings))
    told = r"classifier\.weight has shape \(3, 64\), config\.json expects \(2, 64\); correct num_labels"
    with pytest.raises(UserError, match=told):
        made(folder, tmp_path)
    assert not list((tmp_path / "seed-11").glob("[!.]*"))


@pytest.mark.parametrize("lost", ["classifier.bias", "classifier.weight"])
def test_a_head_that_is_half_there_is_refused(lost: str, tmp_path: Path) -> None:
    """A new half beside a trained one is a weight that was invented."""
    folder = saved(hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{lost} is missing from the weights, which have the rest of classifier"):
        made(folder, tmp_path)


def test_another_classs_head_of_the_same_name_is_left_out(tmp_path: Path) -> None:
    source = hf.RobertaForTokenClassification(hf.RobertaConfig(**ENCODER))
    init = made(saved(source, tmp_path / "source"), tmp_path)
    assert set(head_of(init)) == {f"classifier.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")}
    _, info = hf.AutoModelForSequenceClassification.from_pretrained(init.folder, output_loading_info=True)
    assert not info["unexpected_keys"]


def test_the_head_stays_dense_in_a_packed_checkpoint(tmp_path: Path) -> None:
    source = hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**RELATIVE))
    init = made(saved(source, tmp_path / "source"), tmp_path, save_format="bnb4")
    backbone = hf.AutoModelForSequenceClassification.from_pretrained(init.folder)
    model = PeftModel.from_pretrained(backbone, str(init.folder), subfolder="loftq_init", is_trainable=True)
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == len(init.report["weights"]) == 6
    assert not any("classifier" in name or "pooler" in name for name in packed)
    for name, value in head_of(init).items():
        module, _, parameter = name.partition(".")
        copy = model.base_model.model.get_submodule(module).modules_to_save["default"]
        assert torch.equal(copy.get_parameter(parameter), value)  # the checkpoint loads in the source's float32


def test_a_language_model_has_no_head_to_train(tiny_llama_dir: Path, tmp_path: Path) -> None:
    init = made(tiny_llama_dir, tmp_path, "causal")
    assert head_of(init) == {}
    assert init.report["head"] == []
    adapter = json.loads((init.folder / "loftq_init" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] is None


# Question answering


ANSWERING: dict[str, Make] = {
    "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**ENCODER)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)),
    "deberta v1": lambda: hf.DebertaForMaskedLM(hf.DebertaConfig(**{**RELATIVE, "share_att_key": False})),
    "deberta v3": lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**RELATIVE)),
    "bert of three classes": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3)),
}


@pytest.mark.parametrize("name", ANSWERING)
def test_an_encoder_that_answers_questions_loads_plainly(name: str, tmp_path: Path) -> None:
    init = made(saved(ANSWERING[name](), tmp_path / "source"), tmp_path, "question-answering")
    assert init.report["head"] == ["qa_outputs"]
    head = head_of(init)
    assert {key: tuple(value.shape) for key, value in head.items()} == {
        "qa_outputs.weight": (2, 64),
        "qa_outputs.bias": (2,),
    }
    four_bit = bnb4_config(["qa_outputs"], torch.float32)
    backbone, info = hf.AutoModelForQuestionAnswering.from_pretrained(
        init.folder, dtype=torch.float32, quantization_config=four_bit, output_loading_info=True
    )
    assert not info["unexpected_keys"], "no pooler, no head of another task"
    assert set(info["missing_keys"]) == set(head)
    assert backbone.config.num_labels == 2
    model = PeftModel.from_pretrained(backbone, str(init.folder), subfolder="loftq_init", is_trainable=True)
    ids, start, end = torch.arange(3, 23)[None], torch.tensor([4]), torch.tensor([6])
    model(input_ids=ids, start_positions=start, end_positions=end).loss.backward()
    copy = model.base_model.model.qa_outputs.modules_to_save["default"]
    assert torch.equal(copy.weight, head["qa_outputs.weight"])
    assert copy.weight.grad.any()
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == len(init.report["weights"])


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ENCODER)), "llama"),
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "t5"),
        (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "bart"),
    ],
    ids=["llama", "t5", "bart"],
)
def test_answering_is_for_encoders(make: Make, family: str, tmp_path: Path) -> None:
    folder = saved(make(), tmp_path / "source")
    with pytest.raises(
        UserError, match=f"model.kind=question-answering: a {family} checkpoint .* is no encoder"
    ) as caught:
        find_layout(folder, "question-answering", {})
    assert "\n" not in str(caught.value)
