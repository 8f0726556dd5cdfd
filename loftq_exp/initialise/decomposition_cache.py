"""A content-addressed cache of decompositions.

The key of a weight's result is a digest of the weight's bytes and of everything that shapes the result: quantizer, bits,
block size, scale type, rank, steps, solver and its version. Runs, sweeps, revisions or machines that share a weight
therefore share its result, whatever the model's name. alpha is not in the key: factors are stored for s = 1.

An entry is one safetensors file with a checksum of its content. It is written beside its final path and then renamed. A
damaged entry is deleted with a warning and recomputed. Any number of processes may share a folder. Reading an entry
updates its modification time, so that pruning (loftq_exp.commands.manage_cache) knows when it was last used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from filelock import FileLock, Timeout

from loftq_exp.artifact.writer import tensor_bytes
from loftq_exp.errors import UserError
from loftq_exp.initialise.transfer import to_host
from loftq_exp.loftq import METRIC_VERSION, SOLVER_VERSION, Decomposition, Factors, Quantized, Quantizer, first_rank
from loftq_exp.storage.codes import pack_codes, packed_bytes, unpack_codes
from loftq_exp.whole import is_abandoned, whole_file

log = logging.getLogger(__name__)

FORMAT = 5
"""Increment it when the meaning of a key or an entry changes."""


class DamagedEntry(Exception):
    """An entry whose content does not match its checksum."""


def weight_digest(weight: torch.Tensor) -> str:
    """A hex digest of a weight's bytes, type and shape.

    It is 128-bit XXH3, which runs at memory bandwidth. It distinguishes any two weights that were not made to collide.
    Someone who can plant such a weight could also write to the cache.
    """
    digest = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


@dataclass(frozen=True)
class Kept(Factors):
    """A decomposition as the cache stores it, with bit-packed codes, see `loftq_exp.storage.codes`."""

    packed: torch.Tensor
    """uint8, one row of bytes."""
    scales: torch.Tensor
    """float32, (groups, numbers per group)."""
    bits: int
    """Bits per code."""

    @classmethod
    def of(cls, result: Decomposition, bits: int) -> Kept:
        """The same decomposition, packed where it was computed, then copied to the CPU."""
        codes, scales = result.quantized
        packed, scales, lora_A, lora_B = to_host([pack_codes(codes, bits), scales, result.lora_A, result.lora_B])
        return cls(lora_A, lora_B, result.errors, result.norm, result.unit, result.output_errors, result.kept_step,
                   packed, scales, bits)  # fmt: skip

    @property
    def quantized(self) -> Quantized:
        """The codes, one byte each, and the scales."""
        codes = unpack_codes(self.packed, self.bits, math.prod(self.shape))
        return Quantized(codes.reshape(self.shape), self.scales)

    def unpacked(self) -> Decomposition:
        """The decomposition with one byte per code, from which an alternation can continue."""
        return Decomposition(self.lora_A, self.lora_B, self.errors, self.norm, self.unit, self.output_errors, self.kept_step,
                             self.quantized)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a result besides the weight itself."""

    quantizer: Quantizer
    rank: int
    steps: int
    solver: str
    hessian: str | None = None
    """Digest of the second moment of the weight's inputs in whose norm it is solved; None: Frobenius' norm."""
    rounding: str = "nearest"
    principal: bool = False
    """Whether the factors are the leading components of the weight itself (PiSSA)."""

    @property
    def published(self) -> bool:
        """Whether this is the published form, whose last step is kept, and whose first step serves smaller ranks."""
        return self.hessian is None and self.quantizer.published and not self.principal

    def after(self, steps: int, shape: tuple[int, ...]) -> Recipe:
        """The recipe of the entry that holds the result after `steps` steps for a weight of this shape.

        A one-step result of the published form is stored at the rank at which it was solved, see `first_rank`. It serves all smaller ranks.
        """
        shared = steps == 1 and self.published
        rank = first_rank(self.rank, shape, self.solver) if shared else self.rank
        return dataclasses.replace(self, rank=rank, steps=steps)

    def key(self, digest: str) -> str:
        """The address of the result for the weight with this digest."""
        text = json.dumps(self.shaping(digest), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def shaping(self, digest: str) -> dict[str, Any]:
        """The content that a key digests, in plain containers. Each entry also stores it as a description."""
        shaping: dict[str, Any] = {
            "format": FORMAT,
            "weight": digest,
            "steps": self.steps,
            "quantizer": self.quantizer.identity,
        }
        if self.steps:  # quantization alone depends on neither rank nor solver
            shaping |= {"rank": self.rank, "solver": self.solver, "solver_version": SOLVER_VERSION}
        if self.principal:
            shaping |= {"principal": True}
        if self.hessian is not None:
            shaping |= {"hessian": self.hessian, "rounding": self.rounding, "metric_version": METRIC_VERSION}
        return shaping


class DecompositionCache:
    """The entries in one folder. Many processes may call every method concurrently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "decompositions"

    def find(self, recipe: Recipe, digest: str, shape: tuple[int, ...]) -> Kept | None:
        """The result with the most steps up to the recipe's, or None. A shorter one is given only if it can be continued.

        Raises UserError if an entry exists but cannot be read.
        """
        for steps in range(recipe.steps, 0 if recipe.steps else -1, -1):
            path = self.path(recipe.after(steps, shape).key(digest))
            try:
                found = _of_weight(read_entry(path), recipe, shape)
            except FileNotFoundError:
                continue
            except DamagedEntry as damage:
                log.warning("cache: %s is damaged (%s): deleted, to be recomputed", path, damage)
                path.unlink(missing_ok=True)
                continue
            except OSError as error:
                raise UserError(f"cache_dir={self.folder.parent}: {path} cannot be read ({error.strerror}); "
                                "fix that or set another cache_dir") from None  # fmt: skip
            if steps < recipe.steps and not found.continues:
                continue
            with contextlib.suppress(OSError):  # pruned meanwhile, or owned by another user
                os.utime(path)
            return found.truncated(recipe.rank) if len(found.lora_A) > recipe.rank else found
        return None

    def put(self, recipe: Recipe, digest: str, result: Decomposition) -> Kept:
        """Store the result of this recipe and return it as `find` would. Raises UserError if the folder cannot be written."""
        path, kept = self.path(recipe.key(digest)), Kept.of(result, recipe.quantizer.bits)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, shared=True) as beside:
                beside.write_bytes(_encoded(path.stem, recipe, digest, kept))
        except OSError as error:
            raise self._unwritable(error) from None
        return kept

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cache_dir={self.folder.parent}: cannot be written ({error.strerror}); "
                         "free space there or set another cache_dir")  # fmt: skip

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the claim of this name, of one process at a time, and yield True. Yield False if it is taken and `wait` is false.

        A process that dies loses its claims. Raises UserError if the folder cannot be written.
        """
        lock = FileLock(self.folder / "claims" / f"{name}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            yield True
            Path(lock.lock_file).unlink(
                missing_ok=True
            )  # what was claimed is in the cache: who waits for this file finds it
        finally:
            lock.release()

    def path(self, key: str) -> Path:
        """The path of the entry with this key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def entries(self) -> Iterator[Path]:
        """Every entry's path, sorted."""
        yield from sorted(self.folder.glob("??/*.safetensors"))

    def leftovers(self) -> Iterator[Path]:
        """Partly written files whose process is gone: killed on this machine, or on another one more than a day ago."""
        for path in sorted(self.folder.glob("??/.*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if is_abandoned(path):
                    yield path


def read_entry(path: Path) -> Kept:
    """The decomposition in an entry. Raises FileNotFoundError, or DamagedEntry if it is incomplete or corrupt."""
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + length])["__metadata__"]
        entry = json.loads(meta["entry"])
        checksum = meta["checksum"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedEntry(f"not a whole file: {error}") from None
    if checksum != _checksum(tensors, meta["entry"]) or entry["key"] != path.stem:
        raise DamagedEntry("its checksum differs")
    try:
        return Kept(
            lora_A=tensors["lora_A"],
            lora_B=tensors["lora_B"],
            errors=tuple(entry["errors"]),
            norm=entry["norm"],
            unit=entry["unit"],
            output_errors=tuple(entry.get("output_errors", ())),
            kept_step=entry.get("kept_step", len(entry["errors"]) - 1),
            packed=tensors["codes"],
            scales=tensors["scales"],
            bits=entry["bits"],
        )
    except (KeyError, TypeError) as error:
        raise DamagedEntry(f"not all of an entry: {error}") from None


def _of_weight(kept: Kept, recipe: Recipe, shape: tuple[int, ...]) -> Kept:
    """The entry itself. Raises DamagedEntry unless its parts have the types and sizes of this recipe's result for this shape.

    A checksum does not show that: who writes an entry by hand writes its checksum too, and kernels trust the sizes.
    """
    bits, quantizer = recipe.quantizer.bits, recipe.quantizer
    factors = kept.lora_A.ndim == kept.lora_B.ndim == 2 and (len(kept.lora_B), kept.lora_A.shape[1]) == tuple(shape)
    if not factors or len(kept.lora_A) != kept.lora_B.shape[1]:
        raise DamagedEntry("its factors have other shapes than the weight's")
    if kept.bits != bits or tuple(kept.packed.shape) != (packed_bytes(math.prod(shape), bits),):
        raise DamagedEntry("its codes have another size than the weight's")
    if tuple(kept.scales.shape) != quantizer.scales_shape(shape):
        raise DamagedEntry("its scales have another shape than the weight's")
    types = [tensor.dtype for tensor in (kept.packed, kept.scales, kept.lora_A, kept.lora_B)]
    if types != [torch.uint8, torch.float32, torch.float32, torch.float32]:
        raise DamagedEntry("its parts have other types")
    return kept


def describe_entry(path: Path) -> dict[str, Any]:
    """An entry's metadata, such as `recipe` (see Recipe.shaping), `shape` and `errors`. Its tensors are not read or checked.

    Raises FileNotFoundError, or DamagedEntry if it cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described: dict[str, Any] = json.loads(file.metadata()["entry"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntry(f"not a whole file: {error}") from None
    return described


def _encoded(key: str, recipe: Recipe, digest: str, kept: Kept) -> bytes:
    tensors = {"codes": kept.packed, "scales": kept.scales, "lora_A": kept.lora_A, "lora_B": kept.lora_B}
    entry = json.dumps({"key": key, "recipe": recipe.shaping(digest), "shape": list(kept.shape), "bits": kept.bits,
                        "errors": list(kept.errors), "norm": kept.norm, "unit": kept.unit,
                        "output_errors": list(kept.output_errors), "kept_step": kept.kept_step})  # fmt: skip
    return safetensors.torch.save(tensors, metadata={"entry": entry, "checksum": _checksum(tensors, entry)})


def _checksum(tensors: dict[str, torch.Tensor], entry: str) -> str:
    digest = xxhash.xxh3_128(entry.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
