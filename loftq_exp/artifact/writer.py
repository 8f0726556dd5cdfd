"""Write safetensors files one tensor at a time, so that memory does not grow with the checkpoint.

`safetensors` itself needs all tensors in memory. Here names, types and shapes are known beforehand. The header is written
first and the file's space is reserved, so that a full disk is detected before hours of work. Tensors are then written to
their offsets in any order. Each is digested on its way, for the folder's manifest.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from loftq_exp import manifest
from loftq_exp.storage.specs import TensorSpec

MAX_SHARD_BYTES = 5_000_000_000

SYNC_BYTES = 64 << 20
"""Bytes written between syncs to disk. Syncing during the work shortens the final wait."""

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


class SafetensorsWriter:
    """Writes `{stem}.safetensors`, or shards with an index, to an existing folder.

    Use it as a context manager. On success it checks that every tensor was written, syncs the files, and lists them in the
    folder's manifest. On an error, in its block or its own, it removes them.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], stem: str = "model", max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder, self._specs = folder, dict(specs)
        self._missing: dict[str, set[int] | None] = dict.fromkeys(specs)
        """Names not yet written, with the matrices of them that were."""
        self._places: dict[str, tuple[int, int]] = {}
        self._digests: dict[tuple[str, int | None], str] = {}
        """Those of tensors, or of their entries along the first dimension."""
        self._headers: dict[str, tuple[int, str, list[str]]] = {}
        """The length and digest of each file's header, and the tensors after it in order."""
        self._descriptors: list[int] = []
        self._files: list[Path] = []
        self._unsynced, self._counting = 0, threading.Lock()
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._syncs: list[Future[None]] = []
        shards = _shards(self._specs, max_shard_bytes)
        files = [f"{stem}.safetensors"]
        if len(shards) > 1:
            files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        try:
            for file, names in zip(files, shards, strict=True):
                self._create(folder / file, names)
            if len(shards) > 1:
                weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
                self._create_index(folder / f"{stem}.safetensors.index.json", weight_map)
        except BaseException:
            self._remove()
            raise

    def _create(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first, as in safetensors itself, so that each value is aligned to its size.
        names = sorted(names, key=lambda name: -self._specs[name].dtype.itemsize)
        for name in names:
            spec = self._specs[name]
            header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape),
                            "data_offsets": [offset, offset + spec.nbytes]}  # fmt: skip
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        start = 8 + len(text)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        self._files.append(path)
        _reserve(descriptor, start + offset)
        head = len(text).to_bytes(8, "little") + text
        _write_at(descriptor, head, 0)
        self._headers[path.name] = start, manifest.digest(head), names
        for name in names:
            self._places[name] = (descriptor, start)
            start += self._specs[name].nbytes

    def _create_index(self, path: Path, weight_map: dict[str, str]) -> None:
        total = sum(spec.nbytes for spec in self._specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self._files.append(path)
        path.write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: torch.Tensor, index: int | None = None) -> None:
        """Write a tensor, whose type and shape must match its spec, to its offset. Threads may write concurrently.

        With `index`, write one entry along the first dimension of the spec.
        """
        spec = self._specs[name]
        shape = spec.shape if index is None else spec.shape[1:]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced {spec.dtype} {shape}")
        descriptor, offset = self._places[name]
        data = tensor_bytes(tensor)
        _write_at(descriptor, data, offset + len(data) * (index or 0))
        digest = manifest.digest(data)
        with self._counting:
            self._digests[name, index] = digest
            self._count(name, index)
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES:
                self._unsynced = 0
                self._syncs.append(self._syncer.submit(_sync_data, descriptor))

    def _count(self, name: str, index: int | None) -> None:
        """Note that a tensor, or one entry of it, is written."""
        if index is None:
            self._missing.pop(name, None)
        elif name in self._missing:
            entries = self._missing[name] or set()
            entries.add(index)
            self._missing[name] = entries
            if len(entries) == self._specs[name].shape[0]:
                del self._missing[name]

    def _pieces(self, file: str) -> manifest.Pieces:
        start, digest, names = self._headers[file]
        return [(start, digest), *(piece for name in names for piece in self._pieces_of(name))]

    def _pieces_of(self, name: str) -> manifest.Pieces:
        spec = self._specs[name]
        if (name, None) in self._digests:
            return [(spec.nbytes, self._digests[name, None])]
        return [(spec.nbytes // spec.shape[0], self._digests[name, index]) for index in range(spec.shape[0])]

    def close(self) -> None:
        """Close the files without checking or removing them."""
        self._syncer.shutdown(cancel_futures=True)
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _remove(self) -> None:
        self.close()
        while self._files:
            self._files.pop().unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"never written: {sorted(self._missing)[:3]}")
                for sync in self._syncs:
                    sync.result()  # raises its error, which no later sync would report
                for descriptor in self._descriptors:
                    os.fsync(descriptor)
                manifest.add(self._folder, {file: self._pieces(file) for file in self._headers})
                self._files.clear()  # complete, so not to be removed
        finally:
            self._remove()


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the file's space if the system supports it (Linux). Otherwise only set its size: a full disk shows later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _sync_data(descriptor: int) -> None:
    """Sync the file's data to disk, without its timestamps if the system supports that (macOS does not)."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values in row-major order as bytes. A contiguous CPU tensor is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
