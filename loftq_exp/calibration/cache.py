"""A content-addressed cache of calibration statistics: one file per block, with each distinct second moment once.

A key covers everything that shapes the block's inputs: the model's content, the samples, and what was done to earlier blocks.
Bits, ranks and steps are not in it. Second moments are symmetric, so only the upper triangle is stored.

Files are written beside their final path and renamed. A damaged one is deleted with a warning and collected again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash

from loftq_exp.artifact.writer import tensor_bytes
from loftq_exp.calibration.moments import Statistics
from loftq_exp.errors import UserError
from loftq_exp.whole import is_abandoned, whole_file

log = logging.getLogger(__name__)

FORMAT = 1
"""Increment it when the meaning of a key or a file changes."""


def statistics_key(**shaping: Any) -> str:
    """The address of the statistics that these plain values shape."""
    text = json.dumps({"format": FORMAT, **shaping}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


@dataclass(frozen=True)
class StoredStatistics:
    """The statistics of one block's layers in a file, read one at a time."""

    path: Path
    tensors: Mapping[str, int]
    """For each module the number of its second moment in the file."""
    digests: Mapping[str, str]
    """For each module the digest of its statistics, see `Statistics.digest`."""
    tokens: Mapping[str, int]
    """For each module the number of tokens that it read."""

    def read(self, module: str) -> Statistics:
        """The statistics of a module. Raises UserError if the file is damaged."""
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                stored = file.get_tensor(f"hessian.{self.tensors[module]}")
        except FileNotFoundError:
            raise UserError(f"cache_dir: {self.path} was removed while it was in use; run again") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cache_dir: {self.path} cannot be read ({error}); remove it and run again") from error
        found = Statistics(unpacked(stored), self.tokens[module])
        if found.digest != self.digests[module]:
            raise UserError(f"cache_dir: {self.path} is damaged (its digest differs); remove it and run again")
        return found


class StatisticsCache:
    """The files in one folder. Many processes may call every method concurrently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "statistics"

    def find(self, key: str) -> StoredStatistics | None:
        """The statistics with this key; None if there are none. A damaged file is deleted with a warning."""
        path = self.path(key)
        try:
            described = describe_file(path)
            if described["key"] != key:
                raise ValueError("it has another key")
            check_file(path)
        except FileNotFoundError:
            return None
        except ValueError as damage:
            log.warning("cache: %s is damaged (%s): deleted, to be collected again", path, damage)
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            raise UserError(f"cache_dir={self.folder.parent}: {path} cannot be read ({error.strerror}); "
                            "fix that or set another cache_dir") from None  # fmt: skip
        with contextlib.suppress(OSError):  # pruned meanwhile, or owned by another user
            os.utime(path)
        return StoredStatistics(path, described["modules"], described["digests"], described["tokens"])

    def put(self, key: str, found: Mapping[str, Statistics]) -> StoredStatistics:
        """Store the statistics of a block's modules. Raises UserError if the folder cannot be written."""
        distinct: list[Statistics] = []
        modules: dict[str, int] = {}
        for name, one in found.items():
            if not any(one is other for other in distinct):
                distinct.append(one)
            modules[name] = next(at for at, other in enumerate(distinct) if other is one)
        tensors = {f"hessian.{at}": packed(one.hessian) for at, one in enumerate(distinct)}
        digests = {name: one.digest for name, one in found.items()}
        tokens = {name: one.tokens for name, one in found.items()}
        kind = "full" if distinct[0].hessian.ndim == 2 else "diagonal"
        entry = json.dumps({"key": key, "kind": kind, "modules": modules, "digests": digests, "tokens": tokens})
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, shared=True) as beside:
                safetensors.torch.save_file(tensors, beside, {"entry": entry, "checksum": _checksum(tensors, entry)})
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cache_dir={self.folder.parent}: cannot be written ({reason}); "
                            "free space there or set another cache_dir") from None  # fmt: skip
        return StoredStatistics(path, modules, digests, tokens)

    def path(self, key: str) -> Path:
        """The path of the file with this key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def entries(self) -> Iterator[Path]:
        """Every file's path, sorted."""
        yield from sorted(self.folder.glob("??/*.safetensors"))

    def leftovers(self) -> Iterator[Path]:
        """Partial files of processes that no longer run."""
        for path in sorted(self.folder.glob("??/.*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if is_abandoned(path):
                    yield path


def describe_file(path: Path) -> dict[str, Any]:
    """A file's metadata: `key`, `kind`, `modules`, `digests`, `tokens`.

    Raises FileNotFoundError, or ValueError if it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described: dict[str, Any] = json.loads(file.metadata()["entry"])
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a whole file: {error}") from None
    return described


def check_file(path: Path) -> None:
    """Raise ValueError if the file's content does not match its checksum. All of it is read."""
    described = describe_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata()
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a whole file: {error}") from None
    if meta.get("checksum") != _checksum(stored, meta["entry"]) or not described["modules"]:
        raise ValueError("its checksum differs")


def packed(hessian: torch.Tensor) -> torch.Tensor:
    """The diagonal, or the rows of the upper triangle one after the other: float32, one row."""
    if hessian.ndim == 1:
        return hessian.contiguous().reshape(1, -1)
    return torch.cat([hessian[row, row:] for row in range(len(hessian))])


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """The second moment that `packed` stored; the lower triangle mirrors the upper one."""
    if stored.ndim == 2:
        return stored[0]
    width = round(((8 * stored.numel() + 1) ** 0.5 - 1) / 2)
    hessian, start = stored.new_empty(width, width), 0
    for row in range(width):
        some = stored[start : start + width - row]
        hessian[row, row:] = some
        hessian[row:, row] = some
        start += width - row
    return hessian


def _checksum(tensors: Mapping[str, torch.Tensor], entry: str) -> str:
    digest = xxhash.xxh3_128(entry.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
