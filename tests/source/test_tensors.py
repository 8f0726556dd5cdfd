"""Reading checkpoints: every layout that transformers writes, every kind of damage, and memory that stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from zoo import llama

from loftq_exp.errors import UserError
from loftq_exp.source.tensors import find_weights, open_tensors


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(hidden_size=32).bfloat16()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> list[str]:
    """A sharded .bin checkpoint as transformers 4 wrote it."""
    names = list(tensors)
    shards = [f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin" for i in range(count)]
    for i, shard in enumerate(shards):
        torch.save({name: tensors[name] for name in names[i::count]}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shards[i % count] for i, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return shards


def write_safetensors(folder: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(folder)


def write_sharded_safetensors(folder: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def write_bin(folder: Path, model: LlamaForCausalLM) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_old_bin(folder: Path, model: LlamaForCausalLM) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(folder: Path, model: LlamaForCausalLM) -> None:
    write_shards(folder, model.state_dict())


@pytest.mark.parametrize(
    "write", [write_safetensors, write_sharded_safetensors, write_bin, write_old_bin, write_sharded_bin]
)
def test_every_layout_gives_the_tensors_that_were_saved(
    tmp_path: Path, model: LlamaForCausalLM, write: Callable[[Path, LlamaForCausalLM], None]
) -> None:
    write(tmp_path, model)
    expected = model.state_dict()
    with open_tensors(tmp_path) as tensors:
        assert set(tensors.names) == set(expected)
        assert len(tensors.names) == len(expected)
        for name in tensors.names:
            assert torch.equal(tensors.read(name), expected[name])
            assert tensors.shape(name) == tuple(expected[name].shape)
            assert tensors.dtype(name) == torch.bfloat16
        held = tensors.read(tensors.names[0])
    assert torch.equal(held, expected[tensors.names[0]]), "a tensor that is held outlives the files"


def test_safetensors_is_taken_before_bin(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path) == tmp_path / "pytorch_model.bin"
    save_file({"new": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as tensors:
        assert tensors.names == ("new",)


def test_names_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    # safetensors puts wide types first: the data's order is not that of the names
    save_file({"a": torch.ones(2, dtype=torch.int8), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as tensors:
        assert tensors.names == ("b", "a")


def test_tied_names_of_a_bin_are_both_there_and_known_as_tied(tmp_path: Path) -> None:
    embedding = torch.randn(8, 4)
    saved = {"embed": embedding, "norm": torch.ones(4), "head": embedding, "part": embedding[1:], "turned": embedding.T}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as tensors:
        assert tensors.names == ("embed", "norm", "head", "part", "turned")
        assert tensors.tied() == {"head": "embed"}
        assert torch.equal(tensors.read("turned"), embedding.T)


def test_tensors_of_separate_storage_and_empty_ones_are_not_tied(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(0), "d": torch.ones(0)}, tmp_path / "model.safetensors"
    )
    with open_tensors(tmp_path) as tensors:
        assert tensors.tied() == {}


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(lambda raw: raw[:-100], r"cut short: \d+ of \d+ bytes are there", id="data cut"),
        pytest.param(lambda raw: raw[:60], r"cut short: 60 bytes do not hold its header", id="header cut"),
        pytest.param(lambda raw: raw[:5], r"cut short: 5 bytes", id="length cut"),
        pytest.param(lambda raw: b"", r"is empty", id="empty"),
        pytest.param(lambda raw: raw + b"more", r"is damaged", id="too long"),
        pytest.param(lambda raw: raw[:8] + b"?" * (len(raw) - 8), r"is not a safetensors file", id="header garbage"),
        pytest.param(lambda raw: b"\xff" * 5000, r"is not a safetensors file", id="all garbage"),
        pytest.param(lambda raw: b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull", id="git-lfs"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_when_opened(
    tmp_path: Path, change: Callable[[bytes], bytes], fault: str
) -> None:
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    path = damaged(tmp_path / "model.safetensors", change)
    with pytest.raises(UserError, match=fault) as caught:
        open_tensors(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw[:-10], id="last bytes cut"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half"),
        pytest.param(lambda raw: raw[:50], id="start only"),
        pytest.param(lambda raw: b"?" * 5000, id="garbage"),
        pytest.param(lambda raw: b"", id="empty"),
    ],
)
def test_a_damaged_bin_is_refused_when_opened(tmp_path: Path, change: Callable[[bytes], bytes], zipped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.randn(64, 64)}, path, _use_new_zipfile_serialization=zipped)
    damaged(path, change)
    with pytest.raises(UserError, match="download it again") as caught:
        open_tensors(tmp_path)
    assert str(path) in str(caught.value)


class Intruder:
    """Pickles to a call; loading it with code allowed would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("intruder-was-here",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = {"weight": torch.ones(2), "trap": Intruder()}
    torch.save(saved, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"needs code to load .*mkdir.*safetensors"):
        open_tensors(tmp_path)
    assert not (tmp_path / "intruder-was-here").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, [torch.ones(2)]])
def test_a_bin_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a plain state_dict"):
        open_tensors(tmp_path)


def test_missing_shards_are_named(tmp_path: Path, model: LlamaForCausalLM) -> None:
    shards = write_shards(tmp_path, model.state_dict())
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"lacks {shards[1]} \(1 of 3 shards\); download"):
        open_tensors(tmp_path)
    (tmp_path / shards[0]).unlink()
    with pytest.raises(UserError, match=rf"lacks {shards[0]} and 1 more \(2 of 3 shards\)"):
        open_tensors(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_sharded_safetensors(tmp_path, model)
    last = max(tmp_path.glob("model-*.safetensors"))
    damaged(last, lambda raw: raw[:-2])
    with pytest.raises(UserError, match=f"{last.name} is cut short"):
        open_tensors(tmp_path)


def test_an_index_that_names_what_a_shard_lacks_is_refused(tmp_path: Path, model: LlamaForCausalLM) -> None:
    shards = write_shards(tmp_path, model.state_dict())
    index = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = shards[2]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"places ghost.weight in {shards[2]}, which lacks it"):
        open_tensors(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_there(tmp_path: Path) -> None:
    """transformers, too, loads all that a shard holds."""
    one, two = {"a": torch.ones(2), "extra": torch.arange(3.0)}, {"b": torch.zeros(2)}
    index_of(
        tmp_path, {"one.safetensors": one, "two.safetensors": two}, {"a": "one.safetensors", "b": "two.safetensors"}
    )
    with open_tensors(tmp_path) as tensors:
        assert set(tensors.names) == {"a", "b", "extra"}
        assert torch.equal(tensors.read("extra"), torch.arange(3.0))


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_in_two_shards_must_have_the_same_values_in_both(tmp_path: Path, same: bool) -> None:
    one, two = {"a": torch.ones(2), "b": torch.tensor([0.0])}, {"b": torch.tensor([0.0 if same else -0.0])}
    index_of(
        tmp_path, {"one.safetensors": one, "two.safetensors": two}, {"a": "one.safetensors", "b": "two.safetensors"}
    )
    if same:
        with open_tensors(tmp_path) as tensors:
            assert set(tensors.names) == {"a", "b"}
        return
    with pytest.raises(UserError, match=r"two\.safetensors and another shard hold b with different values"):
        open_tensors(tmp_path)


def index_of(folder: Path, shards: dict[str, dict[str, torch.Tensor]], places: dict[str, str]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {"w": 3}}', "not an index"),
        ('{"weight_map": {"w": ["a"]}}', "not an index"),
        ('{"weight_map": {}}', "names no shard"),
        ('{"weight_map": {"w": "../elsewhere.safetensors"}}', "not beside it"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=fault):
        open_tensors(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None
    with pytest.raises(UserError, match=r"holds no weights; give a folder with model\.safetensors"):
        open_tensors(tmp_path)


MEMORY = """
import sys
from pathlib import Path
import torch
from loftq_exp.source.tensors import open_tensors

def anonymous_kilobytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.ones(1 << 16).sum()  # threads and allocator exist before the first measurement
before = anonymous_kilobytes()
with open_tensors(Path(sys.argv[1])) as tensors:
    peak = 0
    for name in tensors.names:
        weight = tensors.read(name)
        assert weight.sum() == weight.numel()
        peak = max(peak, anonymous_kilobytes())
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_anonymous_memory_stays_flat(tmp_path: Path, file: str) -> None:
    layers = {f"layers.{i}.weight": torch.ones(1024, 2048) for i in range(16)}  # 8 MiB each
    if file.endswith(".bin"):
        torch.save(layers, tmp_path / file)
    else:
        save_file(layers, tmp_path / file)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(grown) < 4096, "reading 128 MiB must not take as much anonymous memory as half a tensor"
