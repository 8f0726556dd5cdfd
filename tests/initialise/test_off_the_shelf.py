"""Published checkpoints: downloaded by the real client from a local hub, and used like any other."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from zoo import BART, DECODER, sized

from loftq_exp.commands.run import compose
from loftq_exp.config import RunConfig
from loftq_exp.errors import UserError
from loftq_exp.initialise.off_the_shelf import take
from loftq_exp.initialise.published import locate_published, published_names

MISTRAL = "LoftQ/Mistral-7B-v0.1-4bit-64rank"
Files = dict[str, bytes]


def published(folder: Path, model: PreTrainedModel, rank: int, alpha: int, endings: list[str], adapter: str) -> None:
    """`model` as the authors published theirs: quantized by bitsandbytes, with a plain SVD, by PEFT's own writer."""
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.1, target_modules=endings)
    with torch.random.fork_rng():
        wrapped = get_peft_model(model, lora)
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight.data
            quantized = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")).to(weight.dtype)
            u, s, v = torch.linalg.svd((weight - quantized).float(), full_matrices=False)
            count = min(rank, len(s))
            module.lora_A["default"].weight.data.zero_()[:count] = (s.sqrt()[:, None] * v)[:count]
            module.lora_B["default"].weight.data.zero_()[:, :count] = (u * s.sqrt())[:, :count]
            module.base_layer.weight.data = quantized
    wrapped.save_pretrained(folder / adapter)
    wrapped.unload().save_pretrained(folder)
    (folder / "README.md").write_text("A published checkpoint.\n")


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def mistral_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny mistral with 4 bits and rank 64, at the alpha of 16 that was published; the output layer is not quantized."""
    folder = tmp_path_factory.mktemp("published") / "mirror"
    sizes = {
        "vocab_size": len(tiny_tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    config = MistralConfig(**sized(DECODER, 1) | sizes, bos_token_id=0, eos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config).half()
    endings = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    published(folder, model, 64, 16, endings, "loftq_init")
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mistral(mistral_dir: Path) -> Files:
    return contents(mistral_dir)


def settings(place: Path, *more: str) -> RunConfig:
    return compose(["quant=off-the-shelf", "model=mistral", f"save_dir={place}", "device=cpu", *more])


def taken(place: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    """The initialised checkpoint of a run, and its report."""
    config = settings(place, *more)
    init = take(locate_published(config), config)
    assert json.loads((init.folder / "init_report.json").read_text()) == init.report
    return init.folder, init.report


def refused(place: Path, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        taken(place, *more)
    assert "\n" not in str(caught.value)
    assert not [path for path in place.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return str(caught.value)


# From the command to the score ----------------------------------------------------------------------------------------


def test_every_stage_runs_on_a_published_checkpoint(cli: Any, fake_hub: Any, mistral: Files) -> None:
    commit = fake_hub.publish(MISTRAL, mistral)
    quick = [override for override in cli.tiny if not override.startswith(("model", "quant"))]
    outcome = cli("quant=off-the-shelf", "model=mistral", *quick, "task.max_source_length=48")
    assert outcome.code == 0, outcome
    assert f"7 weights taken off the shelf from {MISTRAL} at commit {commit[:12]}" in outcome.out
    assert "the published alpha 16 does not match rank 64 and is kept: training starts from Q + 0.25 B A" in outcome.out
    assert "LoftQ as published" in outcome.out
    (run,) = Path("outputs/runs").iterdir()
    assert run.name.startswith("Mistral-7B-v0.1-4bit-64rank-off-the-shelf-arithmetic-")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["model"] == {"requested": MISTRAL, "commit": commit, "kind": "causal"}
    assert metrics["init"]["mean_error"] is None
    assert metrics["finetune"]["backbone"] == "bnb4"
    nlls = [json.loads(line)["nll"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(nlls) == 4
    assert metrics["scores"]["nll"] == pytest.approx(sum(nlls) / 4), "each target is cut to the same 8 tokens"
    (init,) = Path("outputs/inits").glob("Mistral-7B-v0.1-4bit-64rank-*")
    adapter = json.loads((init / "loftq_init" / "adapter_config.json").read_text())
    assert adapter["init_lora_weights"] is True
    assert adapter["lora_alpha"] == 16
    assert adapter["base_model_name_or_path"] == str(init.resolve())

    fetched = len(fake_hub.asked("/resolve/|/large/"))
    again = cli("quant=off-the-shelf", "model=mistral", *quick, "task.max_source_length=48")
    assert "exists: taken from a published checkpoint" in again.out
    assert len(fake_hub.asked("/resolve/|/large/")) == fetched
    assert not (init / "README.md").exists()

    asked = len(fake_hub.requests)
    alone = cli("quant=off-the-shelf", "model=mistral", *quick, "task.max_source_length=48", "stages=[evaluate]")
    assert alone.code == 0, alone
    assert len(fake_hub.requests) == asked


@pytest.mark.slow
def test_the_address_of_a_hub_comes_from_the_environment(fake_hub: Any, mistral: Files, tmp_path: Path) -> None:
    """A process of its own, as a user starts it: HF_ENDPOINT, and nothing patched."""
    fake_hub.publish(MISTRAL, mistral)
    variables = {
        "HF_ENDPOINT": fake_hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "loftq_exp", "quant=off-the-shelf", "model=mistral", "stages=[quantize]"]
    called = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert called.returncode == 0, called.stderr
    assert "7 weights taken off the shelf" in called.stdout


def logits(backbone: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def test_what_is_taken_computes_what_was_published(mistral_dir: Path, tmp_path: Path) -> None:
    folder, report = taken(tmp_path, f"quant.path={mistral_dir}")
    assert torch.equal(logits(folder, folder / "loftq_init"), logits(mistral_dir, mistral_dir / "loftq_init"))
    kept, original = (load_file(place / "model.safetensors") for place in (folder, mistral_dir))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) and kept[name].dtype == torch.float16 for name in kept)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert report["model"] == {"requested": str(mistral_dir), "commit": None, "kind": "causal"}
    assert report["off_the_shelf"] == {
        "taken_from": str(mistral_dir), "commit": None, "adapter_folder": "loftq_init", "lora_alpha": 16,
        "alpha_matches_rank": False, "stored_dtype": "float16", "values_in_a_block": 16,
    }  # fmt: skip
    assert report["quant"]["scaling"] == 0.25
    assert all(weight["errors"] == [] for weight in report["weights"])


def test_an_older_layout_is_taken_too(
    fake_hub: Any, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """An older name, a .bin of tied embeddings, the adapter beside it, and modules without factors, which stay dense."""
    config = BartConfig(**sized(BART, 1) | {"vocab_size": 512})
    folder = tmp_path / "bart"
    published(folder, BartForConditionalGeneration(config), 16, 16, ["q_proj", "k_proj", "v_proj", "fc1", "fc2"], "")
    for stem in ("model", "adapter_model"):
        weights = load_file(folder / f"{stem}.safetensors")
        if stem == "model":  # as older transformers wrote them: every name of a tied tensor
            weights |= {
                f"model.{part}.embed_tokens.weight": weights["model.shared.weight"] for part in ("encoder", "decoder")
            }
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            torch.save(weights, folder / "adapter_model.bin")
        (folder / f"{stem}.safetensors").unlink()
    fake_hub.publish("LoftQ/bart-large-bit4-rank16", contents(folder))
    caplog.set_level(logging.INFO)
    init, report = taken(tmp_path / "out", "model=bart", "quant.rank=16")
    assert report["off_the_shelf"]["taken_from"] == "LoftQ/bart-large-bit4-rank16"
    assert report["off_the_shelf"]["adapter_folder"] == "."
    assert report["off_the_shelf"]["alpha_matches_rank"]
    assert "does not match" not in caplog.text
    assert report["totals"]["weights"] == 3 * 3 + 2 * 2
    assert [name for name in report["other_linears"] if name.endswith("out_proj")] != []
    model = BartForConditionalGeneration.from_pretrained(init)
    PeftModel.from_pretrained(model, str(init), subfolder="loftq_init")
    assert (init / "loftq_init" / "adapter_model.safetensors").is_file()
    assert not list(init.glob("*.bin"))


def test_a_mirror_with_the_adapter_in_loft_init(mistral_dir: Path, tmp_path: Path) -> None:
    """As PEFT's example leaves it."""
    place = tmp_path / "mine"
    for name, data in contents(mistral_dir).items():
        target = place / name.replace("loftq_init", "loft_init")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    folder, report = taken(tmp_path / "out", f"quant.path={place}", "model.path=somebody/else")
    assert folder.name == "else-4bit-64rank"
    assert report["off_the_shelf"]["adapter_folder"] == "loft_init"


# The hub --------------------------------------------------------------------------------------------------------------


def test_a_revision(fake_hub: Any, mistral: Files, tmp_path: Path) -> None:
    old = fake_hub.publish("me/mirror", mistral, "v1")
    new = fake_hub.publish("me/mirror", mistral | {"generation_config.json": b"{}"}, "main")
    _, report = taken(tmp_path / "a", "quant.path=me/mirror", "quant.revision=v1")
    assert report["off_the_shelf"]["commit"] == old
    folder, report = taken(tmp_path / "b", "quant.path=me/mirror")
    assert report["off_the_shelf"]["commit"] == new
    assert (folder / "generation_config.json").is_file()
    message = refused(tmp_path / "c", "quant.path=me/mirror", "quant.revision=v2")
    assert message.startswith("quant.revision=v2: me/mirror has no such branch, tag or commit")


def test_large_files_come_by_a_redirect_which_gets_no_token(
    fake_hub: Any, mistral: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    fake_hub.publish(MISTRAL, mistral)
    folder, _ = taken(tmp_path)
    redirected = fake_hub.asked("^/large/")
    assert len(redirected) == 2
    assert {request.token for request in redirected} == {None}
    assert {request.token for request in fake_hub.asked("^/LoftQ/.*/resolve/", "HEAD")} == {"Bearer hf_reader"}
    assert "hf_reader" not in (folder / "init_report.json").read_text()
    adapter = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    assert len(adapter) == 14


def test_a_download_that_breaks_off_is_resumed(
    fake_hub: Any, mistral: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client resumes within one process, from the last complete chunk. A file of a killed process is downloaded again."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # else 10 MB
    mistral = {name: data for name, data in mistral.items() if not name.endswith("adapter_model.safetensors")}
    fake_hub.publish("me/mirror", mistral)
    fake_hub.breaks_after = 50_000
    message = refused(
        tmp_path / "out", "quant.path=me/mirror"
    )  # it has no adapter: only its large file is of interest here
    assert "has no adapter_model.safetensors or adapter_model.bin" in message
    first, second = fake_hub.asked("^/large/")
    assert (first.range, second.range) == (None, "bytes=50000-")
    (copy,) = tmp_path.glob("hub-cache/models--me--mirror/snapshots/*/model.safetensors")
    assert copy.read_bytes() == mistral["model.safetensors"]


def test_a_file_that_did_not_change_is_not_fetched_again(fake_hub: Any, mistral: Files, tmp_path: Path) -> None:
    """The hub names contents by their digest (etag), and so does its client's cache."""
    fake_hub.publish(MISTRAL, mistral)
    taken(tmp_path / "a")
    large, small = len(fake_hub.asked("^/large/")), len(fake_hub.asked("/resolve/"))
    fake_hub.publish(MISTRAL, mistral | {"generation_config.json": b'{"do_sample": false}'})
    folder, _ = taken(tmp_path / "b")
    assert len(fake_hub.asked("^/large/")) == large
    assert [request.path.rpartition("/")[2] for request in fake_hub.asked("/resolve/")[small:]] == [
        "generation_config.json"
    ]
    assert json.loads((folder / "generation_config.json").read_text()) == {"do_sample": False}


def test_a_repository_that_is_not_there(fake_hub: Any, tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"quant.path={MISTRAL}: there is no such folder, and no such model on the hub")
    message = refused(tmp_path, "model=bart", "quant.rank=8")
    assert message.startswith("quant.path=LoftQ/bart-large-4bit-8rank: there is no such folder, and no such model")


def test_a_gated_repository(fake_hub: Any, mistral: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.publish(MISTRAL, mistral)
    fake_hub.repositories[MISTRAL].gated = True
    message = refused(tmp_path)
    assert "accept the licence on the model's page and set HF_TOKEN in the environment" in message
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert taken(tmp_path)[0].is_dir()


# What is refused ------------------------------------------------------------------------------------------------------


def test_every_published_combination_has_a_name() -> None:
    """The list of facts.md, and the names that the authors' and PEFT's pages use."""
    for overrides, names in {
        ("model=mistral",): [MISTRAL],
        ("model=mistral", "quant.rank=32"): ["LoftQ/Mistral-7B-v0.1-4bit-32rank"],
        ("model=llama-2",): ["LoftQ/Llama-2-7b-hf-4bit-64rank"],
        ("model=llama-2", "model.path=meta-llama/Llama-2-70b-hf"): ["LoftQ/Llama-2-70b-hf-4bit-64rank"],
        ("model=llama-2", "model.path=meta-llama/Meta-Llama-3-8B"): ["LoftQ/Meta-Llama-3-8B-4bit-64rank"],
        ("model=llama-2", "model.path=codellama/CodeLlama-13b-hf"): ["LoftQ/CodeLlama-13b-hf-4bit-64rank"],
        ("model=llama-2", "model.path=microsoft/phi-2"): ["LoftQ/phi-2-4bit-64rank"],
        ("model=bart", "quant.rank=8", "quant.bits=2"): ["LoftQ/bart-large-2bit-8rank", "LoftQ/bart-large-bit2-rank8"],
    }.items():  # fmt: skip
        assert list(published_names(compose(["quant=off-the-shelf", *overrides]))) == names


@pytest.mark.parametrize(("arguments", "message"), [
    (["model=falcon"], "quant=off-the-shelf: falcon-7b with 4 bits and rank 64 is not published; available (bits/rank): Llama-2-7b-hf 4/64; "),
    (["model=mistral", "quant.bits=2"], "available (bits/rank): Mistral-7B-v0.1 4/64, 4/32; use quant=loftq, or set quant.path"),
    (["model=mistral", "quant.alpha=64"], "quant.alpha=64.0: off-the-shelf takes a checkpoint as it was published; leave quant.alpha out"),
    (["model=mistral", "quant.type=uniform"], "quant.type=uniform: off-the-shelf takes"),
    (["model=mistral", "quant.block_size=32"], "quant.block_size=32: off-the-shelf takes"),
    (["model=mistral", "quant.iter=5"], "quant.iter=5: off-the-shelf has no alternating steps"),
    (["model=mistral", "save_format=bnb4"], "save_format=bnb4: off-the-shelf has no codes to pack"),
    (["quant=loftq", "quant.path=a/b"], "quant.path=a/b: names a published checkpoint; add quant=off-the-shelf"),
])  # fmt: skip
def test_settings_that_do_not_fit(cli: Any, arguments: list[str], message: str) -> None:
    """The error is raised before the hub is asked for the task's data."""
    assert message in cli.refused("quant=off-the-shelf", *arguments, "task=gsm8k")
    assert not Path("outputs").exists()


def test_an_adapter_that_does_not_fit(mistral_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "published"
    for name, data in contents(mistral_dir).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    weights, out = place / "loftq_init" / "adapter_model.safetensors", tmp_path / "out"
    given = f"quant.path={place}"
    assert refused(out, given, "quant.rank=8") == f"quant.rank=8: the adapter of {place} has rank 64; set quant.rank=64"
    plain = (place / "loftq_init" / "adapter_config.json").read_text()
    (place / "loftq_init" / "adapter_config.json").write_text(json.dumps(json.loads(plain) | {"use_rslora": True}))
    assert "its adapter uses use_rslora, which changes what its factors mean" in refused(out, given)
    (place / "loftq_init" / "adapter_config.json").write_text(plain)
    factors = load_file(weights)
    first, *others = factors
    for wrong, message in (
        ({name: factors[name] for name in others}, "its adapter lacks base_model.model."),
        (factors | {first: torch.zeros(64, 3)}, "backbone and adapter do not belong together"),
        (factors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(64, 64)}, "lm_head.lora_A.weight, which belongs to no linear"),
        ({}, "its adapter is empty"),
    ):  # fmt: skip
        save_file(wrong, weights)
        assert message in refused(out, given)
    weights.write_bytes(b"not a file of tensors")
    assert "cannot be read (SafetensorError); download it again" in refused(out, given)
    weights.unlink()
    assert "has no adapter_model.safetensors or adapter_model.bin" in refused(out, given)
    (place / "loftq_init" / "adapter_config.json").unlink()
    assert "it has no adapter (searched loftq_init/, loft_init/, its root)" in refused(out, given)
    os.truncate(place / "model.safetensors", 100)
    assert refused(out, given).startswith(f"quant.path: {place / 'model.safetensors'} is cut short")


def test_a_backbone_that_is_not_quantized_is_told(
    mistral_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "published"
    for name, data in contents(mistral_dir).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    weights = load_file(place / "model.safetensors")
    nn.init.normal_(weights["model.layers.0.mlp.up_proj.weight"])
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    taken(tmp_path / "out", f"quant.path={place}")
    assert "distinct ones, too many for 4 bits: loading in 4 bits will change them" in caplog.text
