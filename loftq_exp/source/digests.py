"""File digests, cached as in git's index: by path, size, inode and timestamps.

A program can reset a file's modification time but not its ctime, so the ctime reveals a change. A file that changed less
than `_SETTLED_NS` before it was read could change again within the clock's resolution and look the same. Its digest is
not cached, and the file is read again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from loftq_exp.errors import UserError
from loftq_exp.whole import read_object, whole_file

_FORMAT = 1
_SETTLED_NS = 2_000_000_000
"""Two seconds, the coarsest timestamp resolution of a file system (FAT)."""
REMEMBERED_BYTES = 1 << 22
"""Smaller files are read each time, which is as fast as a lookup."""
_THREADS = 2
_PIECE = 1 << 22
_ATTEMPTS = 3


class FileDigests:
    """File digests, cached below the folder `cache`. Any number of processes may share it."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "digests"

    def of(self, paths: Iterable[Path]) -> list[str]:
        """A hex digest of each file's bytes, in order. Raises OSError if a file cannot be read.

        Two threads read files in pieces, so memory use stays constant. The digest is 128-bit XXH3, which distinguishes
        any two files that were not made to collide.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._one, paths))

    def entries(self) -> Iterator[Path]:
        """The paths of all cached digests, sorted."""
        yield from sorted(self.folder.glob("*.json"))

    def verify(self, entry: Path) -> str | None:
        """Recompute the digest of an `entry`. Return what is wrong, or None if the digest is right.

        The entry of a file that is gone or visibly changed is never used, so it is removed.
        """
        found = read_object(entry)
        path = Path(str(found.get("path")))
        try:
            if _dates(path) != found.get("dates"):
                entry.unlink(missing_ok=True)
            elif _digest(path) != found.get("digest"):
                return f"the bytes of {path} changed, but its size and dates are those that were recorded"
        except OSError:
            entry.unlink(missing_ok=True)
        return None

    def _one(self, path: Path) -> str:
        path = path.resolve()
        entry = self.folder / f"{hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()}.json"
        found = read_object(entry)
        if found.get("format") == _FORMAT and found.get("dates") == _dates(path):
            return str(found["digest"])
        for _ in range(_ATTEMPTS):
            began, dates = time.time_ns(), _dates(path)
            digest = _digest(path)
            if _dates(path) == dates:
                break
        else:
            raise UserError(f"{path}: changes while it is read; wait until it is written and run again")
        settled = max(dates["mtime_ns"], dates["ctime_ns"]) < began - _SETTLED_NS
        if settled and dates["size"] >= REMEMBERED_BYTES:
            _write(entry, {"format": _FORMAT, "path": str(path), "dates": dates, "digest": digest})
        return digest


def _digest(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def _dates(path: Path) -> dict[str, int]:
    """The size, inode and timestamps, at least one of which differs after a change."""
    stat = path.stat()
    return {"size": stat.st_size, "inode": stat.st_ino, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _write(entry: Path, value: dict[str, object]) -> None:
    """Store an entry. If that fails, the file is read again next time, which is slower but still correct."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(entry, shared=True) as beside:
            beside.write_text(json.dumps(value))
