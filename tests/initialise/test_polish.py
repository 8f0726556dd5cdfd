"""The polish: the model's last hidden state comes closer to the pre-trained one's, and nothing but the factors changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from zoo import FAMILIES, seeded, with_tokenizer

import loftq_exp
from loftq_exp import ranks
from loftq_exp.artifact.folder import Initialised
from loftq_exp.calibration.samples import IGNORED, calibration_samples, padded_batches
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.stage import initialise
from loftq_exp.source.locate import locate

TEXT = "".join(f"{n} apples and {n} plums are {2 * n} fruits.\n" for n in range(200))


def settings(model: Path, root: Path, kind: str = "causal", **changes: Any) -> RunConfig:
    """NF2 of rank 8 in 1 step, polished for 8 steps, but for `changes` of quant."""
    root.mkdir(exist_ok=True)
    text = root / "text.txt"
    text.write_text(TEXT)
    task = {
        "causal": {"kind": "gsm8k"},
        "seq2seq": {"kind": "summarization", "name": "xsum"},
        "classification": {"kind": "glue", "name": "mrpc"},
    }[kind]
    values: dict[str, Any] = {
        "model": {"path": str(model), "kind": kind}, "task": task, "train": {}, "stages": ["quantize"],
        "quant": {"method": "loftq", "bits": 2, "rank": 8, "iter": 1, "polish_steps": 8, **changes},
        "calibration": {"file": str(text), "samples": 8, "length": 32}, "device": "cpu", "save_dtype": "float32",
        "output_dir": str(root / "out"), "cache_dir": str(root / "cache"),
    }  # fmt: skip
    return RunConfig.from_mapping(values)


def make(config: RunConfig) -> Initialised:
    return initialise(locate(config.model, config.cache_path), config)


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states of all tokens that are no padding: (tokens, width)."""
    with torch.no_grad():
        out = model.eval()(**batch, output_hidden_states=True)
    if "labels" in batch:
        return out.decoder_hidden_states[-1][batch["labels"] != IGNORED]
    return out.hidden_states[-1][batch["attention_mask"].bool()]


def relative(init: Initialised, source: Path, auto: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """The relative squared error of the last hidden state, by the README's lines."""
    theirs = auto.from_pretrained(source, dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(
        auto.from_pretrained(init.folder, dtype=torch.float32), init.folder / "loftq_init"
    )
    pairs = [(hidden(ours, batch), hidden(theirs, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize(
    ("family", "kind", "auto"),
    [
        ("llama-2", "causal", hf.AutoModelForCausalLM),
        ("bart", "seq2seq", hf.AutoModelForSeq2SeqLM),
        ("t5", "seq2seq", hf.AutoModelForSeq2SeqLM),
        ("deberta v3", "classification", hf.AutoModelForSequenceClassification),
    ],
)
def test_the_last_hidden_state_comes_closer(
    family: str, kind: str, auto: Any, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def model() -> hf.PreTrainedModel:
        config = FAMILIES[family].make().config
        config.vocab_size = len(tiny_tokenizer)
        return seeded(lambda: type(FAMILIES[family].make())(config))

    source = with_tokenizer(model, tiny_tokenizer, tmp_path / "model")
    config = settings(source, tmp_path / "polished", kind)
    init, plain = make(config), make(settings(source, tmp_path / "plain", kind, polish_steps=0))
    found = init.report["polish"]
    batches = padded_batches(calibration_samples(locate(config.model, config.cache_path), config), 2048)
    before, after = (relative(each, source, auto, batches) for each in (plain, init))
    assert after < before
    assert found["error_before"] == pytest.approx(before, rel=1e-4)
    assert found["error_after"] == pytest.approx(after, rel=1e-4)
    factors, unpolished = (load_file(each.folder / "loftq_init/adapter_model.safetensors") for each in (init, plain))
    assert set(factors) == set(unpolished)
    for name, value in factors.items():
        assert torch.equal(value, unpolished[name]) == (".lora_" not in name), name
    backbones = [load_file(each.folder / "model.safetensors") for each in (init, plain)]
    assert all(torch.equal(value, backbones[1][name]) for name, value in backbones[0].items())


@pytest.mark.parametrize("changes", [{}, {"calibration": "full"}, {"method": "qlora", "iter": 0}], ids=str)
def test_reported_errors_are_those_of_the_polished_factors(
    changes: dict[str, Any], tmp_path: Path, tiny_llama_dir: Path
) -> None:
    init = make(settings(tiny_llama_dir, tmp_path, **changes))
    source, stored = load_file(tiny_llama_dir / "model.safetensors"), load_file(init.folder / "model.safetensors")
    factors = load_file(init.folder / "loftq_init/adapter_model.safetensors")
    errors = []
    for weight in init.report["weights"]:
        name = f"{weight['name']}.weight"
        A, B = (factors[f"base_model.model.{weight['name']}.lora_{part}.weight"].double() for part in "AB")
        left = source[name].double() - stored[name].double() - B @ A
        errors.append(float(left.norm() / source[name].double().norm()))
        assert weight["polished_error"] == pytest.approx(errors[-1], rel=1e-5)
        assert ("polished_output_error" in weight) == ("calibration" in changes)
    assert init.report["totals"]["mean_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_polish_is_reproducible_and_found_again(tmp_path: Path, tiny_llama_dir: Path) -> None:
    init = make(settings(tiny_llama_dir, tmp_path))
    again = make(settings(tiny_llama_dir, tmp_path / "again"))
    assert make(settings(tiny_llama_dir, tmp_path)).report == json.loads(json.dumps(init.report))
    files = [each.folder / "loftq_init/adapter_model.safetensors" for each in (init, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert make(settings(tiny_llama_dir, tmp_path, polish_steps=9)).folder != init.folder
    assert not list(init.folder.rglob("*.new"))


@pytest.mark.parametrize("save_format", ["bnb4", "packed"])
def test_every_format_is_polished(save_format: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = settings(tiny_llama_dir, tmp_path)
    values = config.to_dict() | {"save_format": save_format}
    init, dense = make(RunConfig.from_mapping(values)), make(config)
    assert init.report["polish"]["kept"]
    found, expected = (each.report["polish"]["error_after"] for each in (init, dense))
    assert found == pytest.approx(expected, rel=1e-2)


def test_factors_that_would_be_worse_are_not_kept(
    tmp_path: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init = make(settings(tiny_llama_dir, tmp_path, polish_learning_rate=10.0))
    plain = make(settings(tiny_llama_dir, tmp_path, polish_steps=0))
    assert not init.report["polish"]["kept"]
    assert "lower quant.polish_learning_rate=10" in caplog.text
    files = [each.folder / "loftq_init/adapter_model.safetensors" for each in (init, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert init.report["totals"]["mean_error"] == plain.report["totals"]["mean_error"]


def test_several_ranks_are_refused(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(
        UserError, match=r"^quant\.polish_steps=8: a polish runs in one process; run stages=\[quantize\]"
    ):
        make(settings(tiny_llama_dir, tmp_path))


def test_a_polished_start_is_trained_and_scored(tmp_path: Path, tiny_llama_dir: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    overrides = [
        f"model.path={tiny_llama_dir}", "model.name=tiny", "task=wikitext", f"task.train_file={text}", f"task.eval_file={text}",
        "task.block_size=32", "quant.bits=2", "quant.rank=8", "quant.polish_steps=2", "calibration.samples=4",
        "train.max_steps=2", f"output_dir={tmp_path}", "device=cpu",
    ]  # fmt: skip
    result = loftq_exp.run(loftq_exp.compose(overrides))
    assert result.metrics["scores"]["perplexity"] > 1
