"""The tensors of a checkpoint by name, memory-mapped from its files.

A mapped tensor lives in the page cache, whose pages the kernel drops when memory is short. Anonymous memory thus stays
constant for checkpoints of any size. Damaged files are detected when they are opened, before hours of work.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from loftq_exp.errors import UserError
from loftq_exp.foreign import reason_of

log = logging.getLogger(__name__)

SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_AGAIN = "download it again"
_SHOWN = 300
"""Characters of a name in a message."""
_HEADER_LIMIT = 100_000_000
"""The longest header that safetensors accepts, in bytes."""


def find_weights(folder: Path) -> Path | None:
    """The weights in `folder`: one file or an index of shards, safetensors before .bin; None if there are none."""
    return next((folder / name for name in SAFETENSORS_FILES + TORCH_FILES if (folder / name).is_file()), None)


def absent_shards(folder: Path) -> list[str]:
    """The shards that the index in `folder` names and that are not there; none if it has no readable index."""
    index = find_weights(folder)
    if index is None or index.suffix != ".json":
        return []
    try:
        named = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # refused when it is opened
    return sorted(shard for shard in named if not (folder / shard).is_file())


def open_tensors(folder: Path) -> CheckpointTensors:
    """The tensors of the transformers checkpoint in `folder`: one file or shards, safetensors or .bin.

    Tensors of a shard that the index does not list are included, as transformers loads them too. Raises UserError for an
    empty folder, a missing or damaged file, a shard that lacks a tensor of the index, a tensor that two shards hold with
    different values, and a pickle that needs code to load.
    """
    weights = find_weights(folder)
    if weights is None:
        known = " or ".join(SAFETENSORS_FILES + TORCH_FILES)
        raise UserError(f"model.path: {folder} holds no weights; give a folder with {known}")
    shards = _read_index(weights) if weights.suffix == ".json" else {weights.name: None}
    owners: dict[str, _TensorFile] = {}
    with ExitStack() as opened:
        for shard, expected in shards.items():
            file = _open_file(folder / shard)
            opened.callback(file.close)
            if expected is not None and (absent := sorted(expected.difference(file.names))):
                raise UserError(f"model.path: {weights} places {some(absent)} in {shard}, which lacks it; "
                                f"{_AGAIN}, index and shards alike")  # fmt: skip
            for name in file.names:
                if (other := owners.get(name)) and not same_values(other.read(name), file.read(name)):
                    raise UserError(f"model.path: {folder / shard} and another shard hold {name} with different values, and "
                                    f"transformers would take the last one; {_AGAIN}, index and shards alike")  # fmt: skip
                owners[name] = file
        return CheckpointTensors(owners, opened.pop_all())


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


class CheckpointTensors:
    """Named tensors of one checkpoint. As a context manager it closes the files; tensors still held stay valid."""

    dequantized: Any = None
    """For a checkpoint that is quantized already: what was dequantized, see `loftq_exp.source.dequantized`."""

    def __init__(self, owners: Mapping[str, _TensorFile], opened: ExitStack) -> None:
        self._owners = owners
        self._opened = opened
        self.names: tuple[str, ...] = tuple(owners)
        """Every tensor's name, in the order of the files."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of its file, without a copy. Do not write to it, and release it after use.

        In a .bin the view may be transposed or a slice of another tensor. Use `.contiguous()` where the layout matters.
        """
        return self._owners[name].read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`; no value is read."""
        return tuple(self.read(name).shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: self.shape(name) for name in self.names}

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor `name` as stored; no value is read."""
        return self.read(name).dtype

    def tied(self) -> dict[str, str]:
        """Map each name that shares its memory with an earlier name to that name.

        Only a .bin can share memory. In safetensors a tied tensor is stored once and its other names are absent.
        """
        first: dict[tuple[Any, ...], str] = {}
        tied = {}
        for name in self.names:
            tensor = self.read(name)
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and (earlier := first.setdefault(place, name)) != name:
                tied[name] = earlier
        return tied

    def close(self) -> None:
        """Close the files. Nothing can be read afterwards."""
        self._opened.close()

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TensorFile(Protocol):
    """One open file of tensors."""

    names: tuple[str, ...]

    def read(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
        except SafetensorError as error:
            raise UserError(f"model.path: {path} {_safetensors_fault(path, error)}; {_AGAIN}") from error
        self.names = tuple(self._file.offset_keys())

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self._tensors = _load_pickle(path)
        self.names = tuple(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors.clear()


def _open_file(path: Path) -> _TensorFile:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"model.path: {path} is a git-lfs pointer, no weights; run `git lfs pull` in {path.parent}")
    if not start:
        raise UserError(f"model.path: {path} is empty; {_AGAIN}")
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


def _safetensors_fault(path: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors refused, with sizes if its header is readable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + length <= _HEADER_LIMIT:
            return f"is cut short: {size} bytes do not hold its header"
        try:
            header = json.loads(file.read(length) if length <= _HEADER_LIMIT else b"")
            end = 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return f"is not a safetensors file ({reason_of(error)})"
    return f"is cut short: {size} of {end} bytes are there" if size < end else f"is damaged ({reason_of(error)})"


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin by name, memory-mapped if its format allows. Code in the file is never run."""
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    if not mapped:  # written before torch 1.6, or not by torch at all
        gigabytes = path.stat().st_size / 1e9
        log.warning(
            "%s is in torch's old format, which cannot be mapped: all %.1f GB are read into memory", path, gigabytes
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if needed := re.search(r"GLOBAL (\S+)|unrecognized function (\S+)", str(error)):
            code = next(filter(None, needed.groups()))
            raise UserError(f"model.path: {path} needs code to load ({code}), which is refused; use a checkpoint in "
                            "safetensors, or one saved as a plain state_dict") from error  # fmt: skip
        raise UserError(f"model.path: {path} is not a torch checkpoint, or damaged; {_AGAIN}") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"model.path: {path} is cut short or damaged; {_AGAIN}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"model.path: {path} is not a plain state_dict; save the model again with save_pretrained")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _read_index(index: Path) -> dict[str, set[str]]:
    """The tensor names that each shard must hold, by shard in order. Raises UserError for an invalid index or missing shard."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        shards: dict[str, set[str]] = {shard: set() for shard in sorted({shard for _, shard in places})}
        for name, shard in places:
            shards[shard].add(name)
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.path: {index} is not an index of shards; {_AGAIN}") from error
    if not shards:
        raise UserError(f"model.path: {index} names no shard; {_AGAIN}")
    if outside:
        raise UserError(f"model.path: {index} names {some(outside)}, which is not beside it; put all shards beside it")
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    if missing := [shard for shard in shards if shard not in there]:
        count = f"{len(missing)} of {len(shards)} shards"
        raise UserError(f"model.path: {index.parent} lacks {some(missing)} ({count}); download what is missing")
    return shards


def some(names: Sequence[str]) -> str:
    """The first of `names` and the number of others."""
    first = names[0] if len(names[0]) <= _SHOWN else f"{names[0][:_SHOWN]} ..."
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
