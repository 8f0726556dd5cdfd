"""Every stage on packed backbones, from the command: families, heads, precisions, types, and unsupported combinations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from safetensors.torch import load_file
from zoo import DECODER as SIZES
from zoo import ENCODER, FALCON, RELATIVE, quantize_config, sized

from loftq_exp.artifact.folder import Initialised
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.integrations.linear import PackedLinear
from loftq_exp.source.locate import locate
from loftq_exp.training.load import backbone_form, load_model

CPU = torch.device("cpu")
QUICK = ("save_format=packed", "quant.rank=4", "quant.iter=1", "device=cpu", "train.per_device_train_batch_size=4",
         "task.max_train_samples=4", "task.max_eval_samples=2", "train.max_steps=2", "train.logging_steps=1")  # fmt: skip
PRECISIONS = {
    "nf2": (("quant.bits=2",), {2}),
    "nf3": (("quant.bits=3",), {3}),
    "mixed": (("quant.bits=3", "quant.allocation=paper"), {2, 4}),
    "uniform2": (("quant.type=uniform", "quant.bits=2"), {2}),
    "double": (("quant.bits=3", "quant.double=true"), {3}),
}


def metrics(cli: Any, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and init_report.json of a run that must succeed."""
    outcome = cli(*arguments, *QUICK)
    assert outcome.code == 0, outcome
    (run,) = Path("outputs/runs").iterdir()
    (report,) = Path("outputs/inits").glob("*/init_report.json")
    return json.loads((run / "metrics.json").read_text()), json.loads(report.read_text())


def check(found: tuple[dict[str, Any], dict[str, Any]], widths: set[int], dtype: str) -> None:
    record, report = found
    assert record["finetune"]["backbone"] == "packed"
    assert record["finetune"]["dtype"] == dtype
    assert record["finetune"]["steps"] == len(record["losses"]) == 2
    assert record["scored_adapter"] == "fine-tuned"
    assert record["scores"]
    assert report["quant"]["save_format"] == "packed"
    assert {weight["bits"] for weight in report["weights"]} == widths


@pytest.mark.parametrize(("precision", "bf16"), [("nf2", True), ("nf3", False), ("mixed", True), ("uniform2", False),
                                                 ("double", True)])  # fmt: skip
def test_a_decoder(cli: Any, precision: str, bf16: bool) -> None:
    overrides, widths = PRECISIONS[precision]
    found = metrics(cli, *cli.tiny, *overrides, f"train.bf16={str(bf16).lower()}", "train.gradient_checkpointing=true")
    check(found, widths, "bfloat16" if bf16 else "float32")


# In process -----------------------------------------------------------------------------------------------------------

T5, BART = sized(zoo.T5, 2), sized(zoo.BART, 2)

MODELS: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "llama, tied": ("causal", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True))),
    "falcon": ("causal", lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, multi_query=True))),
    "falcon, with biases": ("causal", lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, alibi=True, bias=True))),
    "bart": ("seq2seq", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART))),
    "t5": ("seq2seq", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "t5 v1.1": (
        "seq2seq",
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    ),
    "deberta v1": ("classification", lambda: hf.DebertaForMaskedLM(hf.DebertaConfig(**RELATIVE))),
    "deberta v3": ("classification", lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**RELATIVE, share_att_key=True))),
    "bert without a prefix": ("classification", lambda: hf.BertModel(hf.BertConfig(**ENCODER))),
    "bert that answers": ("question-answering", lambda: hf.BertModel(hf.BertConfig(**ENCODER))),
    "deberta that answers": ("question-answering", lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**RELATIVE))),
}  # fmt: skip


def initialised(folder: Path, root: Path, kind: str, save_format: str, **changes: Any) -> tuple[Initialised, RunConfig]:
    config = quantize_config(folder, root, kind, save_format, **{"quant__bits": 3, **changes})
    return initialise(locate(config.model, config.cache_path), config), config


def a_step(model: Any, kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of two rows, and the gradients of all that is trained."""
    ids = torch.arange(3, 43).reshape(2, 20)
    labels = {"classification": {"labels": torch.tensor([0, 1])}, "question-answering": {
        "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}}.get(kind, {"labels": ids})  # fmt: skip
    loss = model.eval()(input_ids=ids, **labels).loss
    loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.dtype == torch.float32 and value.grad is not None for value in trained.values())
    return loss.detach(), {name: value.grad for name, value in trained.items()}


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_backbone_trains_as_the_dense_one_does(name: str, double: bool, tmp_path: Path) -> None:
    kind, make = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "source")
    changes = {"quant__double": double, "quant__type": "uniform" if double else "nf"}
    for dtype in (torch.float32, torch.bfloat16):
        steps = {}
        for form in ("dense", "packed"):
            init, config = initialised(tmp_path / "source", tmp_path, kind, form, **changes)
            model = load_model(init, None, config, CPU, dtype)
            assert backbone_form(init, config, CPU) == form
            layers = {
                n: layer for n, layer in model.base_model.model.named_modules() if isinstance(layer, PackedLinear)
            }
            names = [f"{weight['name']}.base_layer" for weight in init.report["weights"]]
            assert sorted(layers) == (sorted(names) if form == "packed" else [])
            for layer in layers.values():
                layer.check(name)
            steps[form] = a_step(model, kind)
        packed, dense = steps["packed"], steps["dense"]
        exact = 1e-5 if dtype == torch.float32 else 0.05  # t5's wo is computed in float32 where it is dense
        assert float(packed[0]) == pytest.approx(float(dense[0]), rel=exact)
        assert packed[1].keys() == dense[1].keys()
        norm = sum(float(value.pow(2).sum()) for value in dense[1].values()) ** 0.5
        apart = sum(float((value - packed[1][n]).pow(2).sum()) for n, value in dense[1].items()) ** 0.5
        assert 0 < apart / norm < exact or apart == 0


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_of_another_size_on_a_packed_backbone(labels: int, tmp_path: Path) -> None:
    hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=2)).save_pretrained(tmp_path / "source")
    found = []
    for form in ("dense", "packed"):
        init, config = initialised(tmp_path / "source", tmp_path, "classification", form)
        model = load_model(init, None, config, CPU, torch.float32, labels).eval()
        with torch.no_grad():
            found.append(model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits)
    assert found[0].shape == (2, labels)
    torch.testing.assert_close(found[0], found[1])
    file = init.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (init.folder / "manifest.json").unlink()  # which would say so first
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_model(init, None, config, CPU, torch.float32, labels)


def test_tied_embeddings_stay_tied_and_dense(tmp_path: Path) -> None:
    kind, make = MODELS["llama, tied"]
    make().save_pretrained(tmp_path / "source")
    init, config = initialised(tmp_path / "source", tmp_path, kind, "packed")
    tensors = load_file(init.folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].is_floating_point()
    model = load_model(init, None, config, CPU, torch.float32).get_base_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# What does not go together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("quant=lora",), "save_format=packed: lora has no codes to pack; use save_format=dense, or quant=loftq or qlora"),
        (("quant=off-the-shelf",), "save_format=packed: off-the-shelf has no codes to pack; use save_format=dense, or quant="),
        (("train.backbone=dense",), "train.backbone=dense: save_format=packed stores packed layers, which load as such; use "),
        (("train.backbone=bnb4",), "train.backbone=bnb4: save_format=packed stores packed layers, which load as such; use "),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_packed_storage(cli: Any, overrides: tuple[str, ...], message: str) -> None:
    assert cli.refused(*cli.tiny, "save_format=packed", *overrides).startswith(message)
    assert not Path("outputs").exists()


def test_a_packed_checkpoint_is_not_taken_for_a_dense_one(cli: Any) -> None:
    common = (*cli.tiny, "quant.iter=1", "save_dir=kept")
    assert cli(*common, "stages=[quantize]", "save_format=packed").code == 0
    message = cli.refused(*common, "stages=[finetune]")
    assert message.startswith("save_format=dense: the checkpoint at ")
    assert "was made with packed" in message
