"""Publishing an initialised checkpoint: the files that arrive at a local hub, the model card, and errors."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loftq_exp.artifact.card import model_card
from loftq_exp.artifact.folder import Initialised, read_artifact
from loftq_exp.commands.run import compose
from loftq_exp.manifest import faults

REPOSITORY = "me/tiny-llama-4bit-4rank"
PUSH = ("hub.push=true", f"hub.repo_id={REPOSITORY}")
QUANTIZE = ("stages=[quantize]", "save_dir=out", "quant.iter=2")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, fake_hub: Any) -> Any:
    """The hub, with a token in the environment that may write to it."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return fake_hub


def checkpoint() -> Path:
    (report,) = Path("out").glob("*/init_report.json")
    return report.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def latest(hub: Any, name: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[REPOSITORY]
    files: dict[str, bytes] = repository.commits[repository.names[name]]
    return files


def test_a_push_arrives_whole_and_loads(cli: Any, writer: Any, tmp_path: Path, tiny_llama_dir: Path) -> None:
    outcome = cli(*cli.tiny, *QUANTIZE, *PUSH, "hub.private=true")
    assert outcome.code == 0, outcome
    assert f"push: {REPOSITORY}: {writer.endpoint}/{REPOSITORY}/commit/" in outcome.out
    local, there = contents(checkpoint()), latest(writer)
    assert writer.repositories[REPOSITORY].private is True
    assert there.keys() == local.keys() | {"README.md"}
    changed = {name for name in local if local[name] != there[name]}
    assert changed == {
        "init_report.json",
        "loftq_init/adapter_config.json",
        "manifest.json",
        "loftq_init/manifest.json",
    }
    adapter = json.loads(there["loftq_init/adapter_config.json"])
    assert adapter == json.loads(local["loftq_init/adapter_config.json"]) | {"base_model_name_or_path": REPOSITORY}
    for name, data in there.items():
        assert str(tmp_path).encode() not in data, name
        assert str(tiny_llama_dir.parent).encode() not in data, name
    for place in (Path("out"), Path("outputs")):
        assert not any(b"hf_writer" in path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert "hf_writer" not in outcome.out + outcome.err

    for name, data in there.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(data)
    assert list(faults(tmp_path / "fetched")) == list(faults(tmp_path / "fetched" / "loftq_init")) == []
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), str(place), subfolder="loftq_init")
        for place in (tmp_path / "fetched", checkpoint())
    ]
    with torch.no_grad():
        pushed, kept = (model(torch.arange(40)[None]).logits for model in models)
    assert torch.equal(pushed, kept)

    uploads = len(writer.asked("^/upload/", "PUT"))
    commit = writer.repositories[REPOSITORY].names["main"]
    assert cli(*cli.tiny, *QUANTIZE, *PUSH).code == 0
    assert len(writer.asked("^/upload/", "PUT")) == uploads == 2
    assert writer.repositories[REPOSITORY].names["main"] == commit


def test_what_was_pushed_can_be_taken_off_the_shelf(cli: Any, writer: Any) -> None:
    assert cli(*cli.tiny, *QUANTIZE, *PUSH, "hub.revision=first").code == 0
    assert latest(writer) == {}
    assert "model.safetensors" in latest(writer, "first")
    mirror = (f"quant.path={REPOSITORY}", "quant.revision=first")
    outcome = cli(*cli.tiny, "quant=off-the-shelf", *mirror, "stages=[quantize,evaluate]")
    assert outcome.code == 0, outcome
    assert f"14 weights taken off the shelf from {REPOSITORY} at commit" in outcome.out
    assert "does not match" not in outcome.out


def test_a_pushed_mirror_names_no_folder_of_this_machine(cli: Any, writer: Any, tmp_path: Path) -> None:
    assert cli(*cli.tiny, *QUANTIZE).code == 0
    mirror = checkpoint().rename(tmp_path / "mirror")
    outcome = cli(*cli.tiny, "quant=off-the-shelf", f"quant.path={mirror}", "stages=[quantize]", *PUSH)
    assert outcome.code == 0, outcome
    assert b"| taken from | mirror |" in latest(writer)["README.md"]
    assert not any(str(tmp_path).encode() in data for data in latest(writer).values())


def test_the_card_says_what_it_is(cli: Any) -> None:
    cli(*cli.tiny, *QUANTIZE)
    init = read_artifact(checkpoint())
    assert init is not None
    config = compose([*cli.tiny, *QUANTIZE, *PUSH])
    card = model_card(init, config, "somebody/llama")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    settings = yaml.safe_load(front)
    assert settings["base_model"] == "somebody/llama"
    assert settings["library_name"] == "transformers"
    assert {"loftq", "lora", "peft", "4-bit"} <= set(settings["tags"])
    for line in (
        "| bits | 4 (4.25 per weight, scales included) |",
        "| rank | 4 |",
        "| alpha | 4 (s = 1) |",
        "| steps | 2 |",
    ):
        assert line in body
    totals = init.report["totals"]
    assert "| quantization alone | step 1 | step 2 |" in body
    assert f"| {totals['mean_error_quantized']:.4f} | " in body
    assert f" | {totals['mean_error']:.4f} |" in body
    assert model_card(init, config, None).count("base_model") == 0
    assert "trust_remote_code" not in card
    trusting = compose([*cli.tiny, *QUANTIZE, *PUSH, "model.trust_remote_code=true"])
    assert ", trust_remote_code=True, " in model_card(init, trusting, None)


@pytest.mark.parametrize("overrides", [(), ("save_format=bnb4",), ("save_format=packed",), ("quant.bits=3",)])
def test_the_code_on_the_card_runs(cli: Any, overrides: tuple[str, ...]) -> None:
    """As it stands there, but for the place: it must load the very model that was pushed."""
    cli(*cli.tiny, *QUANTIZE, *overrides)
    init = read_artifact(checkpoint())
    assert init is not None
    code = model_card(init, compose([*cli.tiny, *QUANTIZE, *PUSH, *overrides]), None).split("```")[1]
    assert ("four_bit" in code) == (not overrides)
    assert ("import loftq_exp" in code) == ("save_format=packed" in overrides)
    loaded: dict[str, Any] = {}
    exec(code.removeprefix("python").replace(f'"{REPOSITORY}"', repr(str(checkpoint()))), loaded)
    assert type(loaded["model"].get_base_model()).__name__ == "LlamaForCausalLM"
    trainable = [name for name, parameter in loaded["model"].named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28


def test_the_code_on_the_card_leaves_a_head_dense(cli: Any) -> None:
    """transformers would pack it, and PEFT, which trains a copy of it, fails on a packed one."""
    cli(*cli.tiny, *QUANTIZE, "model.kind=classification")
    init = read_artifact(checkpoint())
    assert init is not None
    card = model_card(init, compose([*cli.tiny, *QUANTIZE, *PUSH, "model.kind=classification"]), None)
    assert "    llm_int8_skip_modules=['score'],\n" in card
    assert "AutoModelForSequenceClassification.from_pretrained(REPO, dtype=torch.bfloat16, quantization" in card


def test_the_card_of_what_was_taken_off_the_shelf(cli: Any) -> None:
    cli(*cli.tiny, *QUANTIZE)
    made = read_artifact(checkpoint())
    assert made is not None
    shelf = {"taken_from": "LoftQ/x", "commit": "c0ffee", "stored_dtype": "float16"}
    weights = [weight | {"errors": []} for weight in made.report["weights"]]
    init = Initialised(made.folder, made.report | {"off_the_shelf": shelf, "weights": weights})
    card = model_card(init, compose([*cli.tiny, "quant=off-the-shelf", *PUSH]), None)
    assert "| taken from | LoftQ/x, commit c0ffee |" in card
    assert "Unknown: computing them requires the pre-trained weights." in card
    assert "| steps | as published |" in card


@pytest.mark.parametrize(("overrides", "message"), [
    (["hub.push=true"], "hub.push=true: no repository is named; give hub.repo_id=OWNER/NAME"),
    (["hub.push=true", "hub.repo_id=mine"], "hub.repo_id=mine: not a repository's name; give hub.repo_id=OWNER/NAME"),
    ([*PUSH, "stages=[evaluate]"], "hub.push=true: publishes what the quantize stage makes or finds; add quantize to stages"),
    ([*PUSH], f"hub.push=true: pushing to {REPOSITORY} needs a token; set HF_TOKEN in the environment"),
    (["hub.psuh=true"], "hub.psuh=true: there is no such setting; did you mean 'hub.push'?"),
])  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_any_work(
    cli: Any, fake_hub: Any, overrides: list[str], message: str
) -> None:
    assert cli.refused(*cli.tiny, *overrides).startswith(message)
    assert not list(Path.cwd().iterdir())
    assert fake_hub.requests == []


@pytest.mark.parametrize(("pattern", "status", "message"), [
    ("^/api/repos/create", 401, "the hub does not know the token (status 401); set HF_TOKEN to a valid one"),
    ("^/api/repos/create", 403, "the token may not write there (status 403); set HF_TOKEN to one that may"),
    ("^/upload/", 403, "the token may not write there (status 403)"),
    ("/commit/main", 409, "the hub answered with status 409; try again later"),
])  # fmt: skip
def test_a_push_that_fails_names_the_cause_and_leaves_the_checkpoint(
    cli: Any, writer: Any, pattern: str, status: int, message: str
) -> None:
    writer.refused[pattern] = status
    line = cli(*cli.tiny, *QUANTIZE, *PUSH)
    assert line.code == 1
    told = line.err.splitlines()[-1]
    assert told.startswith(f"error: hub.repo_id={REPOSITORY}: {message}")
    assert told.endswith(f"the checkpoint is kept in {checkpoint()}, and the same command pushes it again")
    assert "hf_" not in told
    before = contents(checkpoint())
    writer.refused.clear()
    again = cli(*cli.tiny, *QUANTIZE, *PUSH)
    assert again.code == 0, again
    assert "exists: 14 weights, 0 computed" in again.out
    assert contents(checkpoint()) == before


def test_a_hub_that_cannot_be_reached_or_must_not_be(cli: Any, writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else answers on this port
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert "the hub cannot be reached; connect to the network" in cli.refused(*cli.tiny, *QUANTIZE, *PUSH)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "hub.push=true: offline mode is on; unset HF_HUB_OFFLINE" in cli.refused(*cli.tiny, *QUANTIZE, *PUSH)
    assert (checkpoint() / "loftq_init" / "adapter_model.safetensors").is_file()
