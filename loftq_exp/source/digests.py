"""Digests of files, remembered as git's index remembers them: by path, size, inode and dates.

A file whose dates were put back after a change is noticed by its time of change, which no program can set. A file that
changed less than `_SETTLED_NS` before it was read could change again within the clock's resolution and look the same.
Such a digest is not remembered: the file is read again next time.
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
from loftq_exp.whole import whole_file

_FORMAT = 1
_SETTLED_NS = 2_000_000_000
"""Two seconds: the coarsest resolution of a file system's clock (FAT's)."""
REMEMBERED_BYTES = 1 << 22
"""Smaller files are read each time, which takes no longer than looking them up."""
_THREADS = 2
_PIECE = 1 << 22
_ATTEMPTS = 3


class FileDigests:
    """Digests of files, remembered below the folder of a cache. Any number of processes may share it."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "digests"

    def of(self, paths: Iterable[Path]) -> list[str]:
        """A hex digest of each file's bytes, in order. Raises OSError for one that cannot be read.

        Files are read in pieces on two threads, so that memory stays flat. 128 bits by XXH3: they tell apart any two
        files that nobody made to collide.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._one, paths))

    def entries(self) -> Iterator[Path]:
        """The file of every digest that is remembered, sorted."""
        yield from sorted(self.folder.glob("*.json"))

    def verify(self, entry: Path) -> str | None:
        """Reads the file behind an `entry` again; why the digest is wrong, or None where it is right.

        The entry of a file that is gone, or that has changed visibly, is never used: it is removed.
        """
        found = _read(entry)
        path = Path(str(found.get("path")))
        try:
            if _dates(path) != found.get("dates"):
                entry.unlink(missing_ok=True)
            elif _digest(path) != found.get("digest"):
                return f"the bytes of {path} are others, and its size and dates are those that were recorded"
        except OSError:
            entry.unlink(missing_ok=True)
        return None

    def _one(self, path: Path) -> str:
        path = path.resolve()
        entry = self.folder / f"{hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()}.json"
        found = _read(entry)
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
    """What a change of the file changes."""
    stat = path.stat()
    return {"size": stat.st_size, "inode": stat.st_ino, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _read(entry: Path) -> dict[str, object]:
    try:
        found = json.loads(entry.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(entry: Path, value: dict[str, object]) -> None:
    """Keeps an entry. Where that fails the file is read again next time, which is slower and just as right."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(entry, shared=True) as beside:
            beside.write_text(json.dumps(value))
