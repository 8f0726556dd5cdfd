"""Every file that is read back is checked against the digest written beside it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import loftq_exp
from loftq_exp import RunResult, UserError, manifest
from loftq_exp.artifact.exported import export
from loftq_exp.artifact.writer import SafetensorsWriter
from loftq_exp.commands import manage_cache
from loftq_exp.storage.specs import TensorSpec
from loftq_exp.training import finetune

Change = Callable[[Path], None]


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


CHANGES: dict[str, Change] = {
    "flipped": flipped,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    specs = {
        "a": TensorSpec(torch.float32, (3, 5)),
        "b": TensorSpec(torch.bfloat16, (7,)),
        "c": TensorSpec(torch.int8, (2,)),
    }
    with SafetensorsWriter(folder, specs) as out:
        for name in ("c", "a", "b"):  # in any order
            out.write(name, torch.ones(specs[name].shape).to(specs[name].dtype))
    (folder / "config.json").write_text("{}")
    manifest.complete(folder)
    return folder


def test_the_pieces_of_a_streamed_file_are_those_of_its_bytes(folder: Path) -> None:
    (state,) = json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"]
    data, start = (folder / "model.safetensors").read_bytes(), 0
    assert len(state["pieces"]) == 4  # the header and three tensors
    for length, digest in state["pieces"]:
        assert digest == xxhash.xxh3_128_hexdigest(data[start : start + length])
        start += length
    assert start == state["bytes"] == len(data)
    assert list(manifest.faults(folder)) == []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_change_names_the_file(folder: Path, name: str, change: str) -> None:
    if (folder / name).stat().st_size < 8 and change == "cut":
        pytest.skip("too short to be cut")
    CHANGES[change](folder / name)
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder / name))} .*; quantize again$"):
        manifest.check(folder, "quantize again")


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (folder / "model.safetensors").write_bytes(bytes(data))
        assert len(list(manifest.faults(folder))) == 1, position


def test_a_damaged_manifest_and_a_file_that_a_load_would_add_are_faults(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine")
    assert list(manifest.faults(folder)) == []
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert "adapter_model.bin was added" in next(manifest.faults(folder))
    (folder / "manifest.json").write_text('{"format": 1, "files": {"config.json": 3}}')
    assert "manifest.json is damaged" in next(manifest.faults(folder))


def test_a_folder_of_an_older_version_is_read_with_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "manifest.json").unlink()
    with caplog.at_level(logging.INFO):
        manifest.check(folder, "quantize again")
        manifest.check(folder, "quantize again")
    assert [line for line in caplog.messages if "not verified" in line] == [
        f"{folder}: without manifest.json, as older versions and other tools write it: its files are not verified"
    ]


def test_a_record_is_right_at_every_moment_of_its_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / "metrics.json"
    manifest.write_listed(place, "old")
    monkeypatch.setattr(manifest, "write_whole", killed_after(1, manifest.write_whole))
    with pytest.raises(KeyboardInterrupt):
        manifest.write_listed(place, "new")
    assert (place.read_text(), manifest.fault_of(place)) == ("old", None)
    monkeypatch.undo()
    manifest.write_listed(place, "new")
    assert (place.read_text(), manifest.fault_of(place)) == ("new", None)
    place.write_text("other")
    assert "was changed" in str(manifest.fault_of(place))


def killed_after(calls: int, function: Callable[..., None]) -> Callable[..., None]:
    count = iter(range(calls))

    def call(*args: object) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        function(*args)

    return call


# What a run reads back ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> RunResult:
    """A whole run, whose results the tests copy before they change them."""
    return loftq_exp.run(configured(tmp_path_factory.mktemp("first"), tiny_llama_dir))


def configured(root: Path, model: Path, *overrides: str) -> loftq_exp.RunConfig:
    return loftq_exp.compose([
        "model=llama-2", f"model.path={model}", "quant.rank=4", "quant.iter=1", "quant.dropout=0", f"output_dir={root}",
        "task=arithmetic", "task.max_train_samples=8", "task.max_eval_samples=2", "task.max_source_length=48",
        "task.max_target_length=8", "train.per_device_train_batch_size=4", "train.logging_steps=1", "device=cpu", *overrides,
    ])  # fmt: skip


@pytest.fixture
def again(first: RunResult, tmp_path: Path, tiny_llama_dir: Path) -> Callable[..., RunResult]:
    """Runs the command again on a copy of the first run's results, with further overrides."""
    root = tmp_path / "out"
    shutil.copytree(first.run_dir.parents[1], root)
    for config in root.glob("inits/*/loftq_init/adapter_config.json"):
        assert config.exists()
    return lambda *overrides: loftq_exp.run(configured(root, tiny_llama_dir, *overrides))


def one(root: Path, pattern: str) -> Path:
    (found,) = root.glob(pattern)
    return found


MORE = "task.max_eval_samples=1"
"""An override for which the run loads its model again."""
INIT_FILES = ("model.safetensors", "config.json", "tokenizer.json", "init_report.json", "loftq_init/adapter_model.safetensors",
              "loftq_init/adapter_config.json", "loftq_init/manifest.json")  # fmt: skip


@pytest.mark.parametrize("name", INIT_FILES)
def test_a_damaged_initialisation_of_our_own_store_is_made_again(
    again: Callable[..., RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = one(tmp_path / "out", f"inits/[!.]*/{name}")
    whole = path.read_bytes()
    flipped(path)
    with caplog.at_level(logging.INFO):
        again(MORE)
    assert any(f"{path} " in line and "the checkpoint is made again" in line for line in caplog.messages)
    if name not in (
        "init_report.json",
        "loftq_init/manifest.json",
        "loftq_init/adapter_config.json",
    ):  # with times and places
        assert path.read_bytes() == whole
    assert list(manifest.faults(path.parent)) == []


def test_a_damaged_initialisation_without_its_source_is_refused(
    again: Callable[..., RunResult], tmp_path: Path
) -> None:
    path = one(tmp_path / "out", "inits/[!.]*/model.safetensors")
    whole = path.read_bytes()
    flipped(path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} was changed: .*; delete .* quantize .*again$"):
        again(MORE, "stages=[evaluate]")
    path.write_bytes(whole)
    path = one(tmp_path / "out", "inits/[!.]*/tokenizer.json")
    flipped(path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} was changed: "):
        again(MORE, "stages=[evaluate]")


def test_a_model_file_of_another_model_of_the_same_shapes_is_refused(
    again: Callable[..., RunResult], tmp_path: Path
) -> None:
    path = one(tmp_path / "out", "inits/[!.]*/model.safetensors")
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors was changed: "):
        again(MORE, "stages=[evaluate]")


def test_adapters_of_two_runs_that_changed_places_are_noticed(
    again: Callable[..., RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, other = again(), again("train.learning_rate=1e-2")
    adapters = [result.run_dir / "adapter" for result in (mine, other)]
    weights = [(adapter / "adapter_model.safetensors").read_bytes() for adapter in adapters]
    for adapter, data in zip(adapters, reversed(weights), strict=True):
        (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"was deleted or changed since it was trained"):
        again(MORE, "stages=[evaluate]")
    (mine.run_dir / "finetune.json").unlink()  # so that the adapter's own manifest alone says so
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was changed: .*; delete .* and fine-tune again$"):
        again(MORE, "stages=[evaluate]")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was changed: "):
        export(mine.init_dir, tmp_path / "exported", adapters[0])
    with caplog.at_level(logging.INFO):
        assert again().scores == mine.scores  # trained again
    assert (adapters[0] / "adapter_model.safetensors").read_bytes() == weights[0]


@pytest.mark.parametrize("name", ["finetune.json", "adapter/made_from.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_record_of_the_training_never_scores_the_initial_factors(
    again: Callable[..., RunResult], first: RunResult, tmp_path: Path, name: str, change: str
) -> None:
    if (name, change) == ("finetune.json", "missing"):
        pytest.skip("then the adapter's own files say what it was trained from")
    path = one(tmp_path / "out", f"runs/*/{name}")
    CHANGES[change](path)
    with pytest.raises(UserError, match=re.escape(str(path.parent)) + ".*add finetune to stages"):
        again(MORE, "stages=[evaluate]")


def test_an_adapter_whose_origin_is_damaged_is_trained_again(
    again: Callable[..., RunResult], first: RunResult, tmp_path: Path
) -> None:
    path = one(tmp_path / "out", "runs/*/adapter/made_from.json")
    flipped(path)
    assert again().scores == first.scores
    assert list(manifest.faults(path.parent)) == []


@pytest.mark.parametrize("name", ["finetune.json", "evaluate.json", "samples.jsonl", "evaluations/*/evaluate.json",
                                  "evaluations/*/samples.jsonl", "metrics.json", "config.json"])  # fmt: skip
def test_a_damaged_record_is_made_again(
    again: Callable[..., RunResult], first: RunResult, tmp_path: Path, name: str
) -> None:
    path = one(tmp_path / "out", f"runs/*/{name}")
    data = path.read_text()
    digit = next(place for place in range(len(data) // 2, len(data)) if data[place].isdigit())
    path.write_text(data[:digit] + str((int(data[digit]) + 1) % 10) + data[digit + 1 :])
    result = again()
    assert (result.scores, result.metrics["losses"]) == (first.scores, first.metrics["losses"])
    assert list(manifest.faults(result.run_dir)) == []
    again(MORE)  # which is shown at the top now
    again()
    for folder in (result.run_dir, *result.run_dir.glob("evaluations/*"), result.run_dir / "adapter"):
        assert list(manifest.faults(folder)) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                                  "made_from.json", "all"])  # fmt: skip
def test_a_damaged_training_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    often = (
        "train.save_steps=1",
        "train.save_total_limit=3",
        "task.max_train_samples=12",
        "stages=[quantize,finetune]",
    )
    config = configured(tmp_path / "out", tiny_llama_dir, *often)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loftq_exp.run(config)
    for step in (2, 3):
        last = one(tmp_path / "out", f"runs/*/checkpoints/checkpoint-{step}")
        if step == 3 or name == "all":
            flipped(last / ("optimizer.pt" if name == "all" else name))
    with caplog.at_level(logging.INFO):
        result = loftq_exp.run(config)
    found = [int(line[-1]) for line in caplog.messages if "resumes from" in line]
    assert found == [1 if name == "all" else 2]
    whole = loftq_exp.run(configured(tmp_path / "whole", tiny_llama_dir, *often))
    adapters = [result.run_dir / "adapter" / "adapter_model.safetensors" for result in (result, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not (result.run_dir / "checkpoints").exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_lacks_a_factor_is_refused_also_without_a_manifest(
    again: Callable[..., RunResult], tmp_path: Path, factor: str
) -> None:
    for path in (one(tmp_path / "out", "runs/*/adapter"), one(tmp_path / "out", "inits/[!.]*/loftq_init")):
        (path / "manifest.json").unlink()
        values = load_file(path / "adapter_model.safetensors")
        values.pop(next(name for name in values if factor in name))
        save_file(values, path / "adapter_model.safetensors", {"format": "pt"})
    (one(tmp_path / "out", "inits/[!.]*") / "manifest.json").unlink()
    one(tmp_path / "out", "runs/*/finetune.json").unlink()
    with pytest.raises(UserError, match=rf"{factor}\.weight"):
        again(MORE, "stages=[evaluate]")
    shutil.rmtree(one(tmp_path / "out", "runs/*"))
    with pytest.raises(UserError, match=rf"{factor}\.weight"):
        again("stages=[evaluate]")


def test_a_backbone_that_lacks_a_tensor_is_refused_also_without_a_manifest(
    again: Callable[..., RunResult], tmp_path: Path
) -> None:
    init = one(tmp_path / "out", "inits/[!.]*")
    (init / "manifest.json").unlink()
    values = load_file(init / "model.safetensors")
    values.pop("model.layers.1.mlp.up_proj.weight")
    save_file(values, init / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj.* is missing from the weights"):
        again(MORE, "stages=[evaluate]")


def test_a_source_that_lacks_a_tensor_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        values = load_file(tiny_llama_dir / "model.safetensors")
        values.pop(name)
        save_file(values, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"model\.path.*" + re.escape(name)):
            loftq_exp.run(configured(tmp_path / "out", model))
    assert not list((tmp_path / "out").glob("inits/[!.]*"))


def test_an_adapter_is_not_merged_into_the_backbone_that_took_the_place_of_its_own(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    saved = tmp_path / "saved"
    mine = loftq_exp.run(configured(tmp_path / "one", tiny_llama_dir, f"save_dir={saved}"))
    shutil.move(mine.init_dir, tmp_path / "aside")
    loftq_exp.run(
        configured(tmp_path / "two", tiny_llama_dir, f"save_dir={saved}", "quant.block_size=32", "stages=[quantize]")
    )
    assert mine.adapter_dir
    with pytest.raises(UserError, match="it was trained on another initialisation"):
        export(mine.init_dir, tmp_path / "exported", mine.adapter_dir)
    shutil.rmtree(mine.init_dir)
    shutil.move(tmp_path / "aside", mine.init_dir)
    export(mine.init_dir, tmp_path / "exported", mine.adapter_dir)
    assert list(manifest.faults(tmp_path / "exported")) == []


# cache verify ---------------------------------------------------------------------------------------------------------


def test_cache_verify_counts_all_that_is_stored(
    again: Callable[..., RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again()
    model = tmp_path / "out" / "cache" / "models" / "tiny-1"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    manifest.complete(model)
    capsys.readouterr()
    arguments = ["verify", "--cache-dir", str(tmp_path / "out" / "cache")]
    assert manage_cache.main(arguments) == 0
    assert capsys.readouterr().out.endswith(
        "1 converted model, 0 damaged\n1 initialised checkpoint, 0 damaged\n1 run, 0 damaged\n"
    )
    damaged = [one(tmp_path / "out", name) for name in ("cache/models/*/config.json", "inits/[!.]*/loftq_init/adapter_model.safetensors",
                                                        "runs/*/adapter/adapter_config.json")]  # fmt: skip
    for path in damaged:
        flipped(path)
    assert manage_cache.main(arguments) == 1
    out = capsys.readouterr().out
    assert all(f"damaged: {path} was changed: " in out for path in damaged)
    assert "1 converted model, 1 damaged\n1 initialised checkpoint, 1 damaged\n1 run, 1 damaged\n" in out
