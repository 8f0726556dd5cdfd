"""Files written one tensor at a time read back equal to those that safetensors writes."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from zoo import llama

from loftq_exp.artifact import writer as module
from loftq_exp.artifact.writer import SafetensorsWriter, tensor_bytes
from loftq_exp.storage.specs import TensorSpec

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
)  # fmt: skip


def some(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, NaNs of all kinds included."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if spec.dtype == torch.bool else 256
    raw = torch.randint(high, (spec.nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(spec.dtype).reshape(spec.shape)


def written(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> None:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder, specs, **options) as writer:
        for name in reversed(tensors):  # the order does not matter
            writer.write(name, tensors[name])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in type, shape and bytes; NaNs too."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and bytes(tensor_bytes(found)) == bytes(tensor_bytes(expected))
    )


SPECS = st.builds(TensorSpec, st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple))


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"), SPECS, max_size=6))
def test_any_types_and_shapes_read_back_equal_and_aligned(specs: dict[str, TensorSpec]) -> None:
    tensors = {name: some(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), tensors)
        found = load_file(Path(folder) / "model.safetensors")
        raw = (Path(folder) / "model.safetensors").read_bytes()
    assert set(found) == set(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert sum(spec.nbytes for spec in specs.values()) == len(raw) - 8 - length
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % min(8, specs[name].dtype.itemsize) == 0, "a reader may map it in place"


@settings(deadline=None, max_examples=50)
@given(st.lists(SPECS, min_size=1, max_size=8), st.integers(1, 600))
def test_shards_hold_each_tensor_once_and_keep_to_their_size(specs: list[TensorSpec], limit: int) -> None:
    tensors = {f"t{i}": some(spec, i) for i, spec in enumerate(specs)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, tensors, max_shard_bytes=limit)
        files = sorted(folder.glob("*.safetensors"))
        contents = {file.name: load_file(file) for file in files}
        index = folder / "model.safetensors.index.json"
        if len(files) > 1:
            index_content = json.loads(index.read_text())
            assert index_content["weight_map"] == {name: file for file, held in contents.items() for name in held}
            assert index_content["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
            count = f"{len(files):05d}"
            assert [file.name for file in files] == [
                f"model-{i + 1:05d}-of-{count}.safetensors" for i in range(len(files))
            ]
        else:
            assert files == [folder / "model.safetensors"]
            assert not index.exists()
    found = {name: tensor for held in contents.values() for name, tensor in held.items()}
    assert sum(map(len, contents.values())) == len(found) == len(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)
    for held in contents.values():
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit


def test_transformers_loads_shards_by_the_index(tmp_path: Path) -> None:
    model = llama(hidden_size=32)
    model.config.save_pretrained(tmp_path)
    written(tmp_path, dict(model.state_dict()), max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(same(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": base.T, "column": base[:, 2], "expanded": torch.ones(1).expand(3, 3), "grad": base * 2}
    tensors["grad"].requires_grad_()
    written(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0  # noqa: PTH208


@pytest.mark.parametrize("limit", [10**9, 40])
def test_a_tensor_that_was_never_written_is_an_error_and_nothing_is_left(tmp_path: Path, limit: int) -> None:
    specs = {"a": TensorSpec(torch.float32, (8,)), "b": TensorSpec(torch.float32, (8,))}
    before = descriptors()
    with (
        pytest.raises(ValueError, match=r"never written: \['b'\]"),
        SafetensorsWriter(tmp_path, specs, max_shard_bytes=limit) as writer,
    ):
        writer.write("a", torch.ones(8))
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    specs = {"a": TensorSpec(torch.float32, (8,)), "b": TensorSpec(torch.float32, (8,))}
    before = descriptors()

    def interrupted() -> None:
        with SafetensorsWriter(tmp_path, specs, max_shard_bytes=40) as writer:
            writer.write("a", torch.ones(8))
            assert len(list(tmp_path.iterdir())) == 3
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_a_file_that_is_there_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    specs = {name: TensorSpec(torch.float32, (8,)) for name in "abc"}
    there = tmp_path / "model-00002-of-00003.safetensors"
    there.write_text("mine")
    before = descriptors()
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path, specs, max_shard_bytes=32)
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "mine"
    assert descriptors() == before


@pytest.mark.parametrize(
    "tensor", [torch.ones(7), torch.ones(8, dtype=torch.float64), torch.ones(8, 1), torch.ones(())]
)
def test_another_type_or_shape_than_announced_is_an_error(tmp_path: Path, tensor: torch.Tensor) -> None:
    specs = {"a": TensorSpec(torch.float32, (8,))}
    with pytest.raises(ValueError, match="announced"), SafetensorsWriter(tmp_path, specs) as writer:
        writer.write("a", tensor)
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path, specs) as writer:
        writer.write("b", torch.ones(8))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        SafetensorsWriter(tmp_path, {"a": TensorSpec(torch.float32, (8,))})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_brought_to_the_disk_meanwhile_is_an_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def failing(descriptor: int) -> None:
        synced.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    monkeypatch.setattr(module, "SYNC_BYTES", 100)
    with pytest.raises(OSError, match="Input/output error"):
        written(tmp_path, {name: torch.ones(20) for name in "abcde"})
    assert synced, "each time that two of the five tensors were written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "count"), [((), 1), ((0, 3), 0), ((2, 3), 6)], ids=["a number", "nothing", "a matrix"]
)
def test_sizes(shape: tuple[int, ...], count: int) -> None:
    assert TensorSpec(torch.bfloat16, shape).nbytes == 2 * count
    assert len(tensor_bytes(torch.zeros(shape, dtype=torch.bfloat16))) == 2 * math.prod(shape)


def test_a_system_without_linuxs_calls_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("posix_fallocate", "fdatasync"):  # macOS has neither
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(module, "SYNC_BYTES", 100)
    tensors = {name: torch.full((20,), float(number)) for number, name in enumerate("abcde")}
    written(tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
