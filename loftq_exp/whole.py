"""Atomic writes of files and folders: write to a temporary path beside the target, then rename it.

A temporary path is a dot, the target's name, and a suffix defined below. Nothing is synced to disk here: the rename
protects against a killed process, not against a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loftq_exp.errors import UserError

log = logging.getLogger(__name__)

_DAY = 24 * 3600.0
_OWNED = re.compile(r"\..+\.(?P<host>[^/]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
"""Name of a temporary file of a shared target, with the host and the process id of its writer."""


@contextmanager
def whole_file(place: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to. It is renamed to `place` when the block ends, and removed if the block raises.

    Args:
        place: path of the file. Its folder must exist.
        shared: whether several processes may write it at once. Each then has its own path, see `is_abandoned`.
    """
    owner = f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}" if shared else ""
    beside = place.with_name(f".{place.name}{owner}.tmp")
    if shared:
        _remove_abandoned(place)
    try:
        yield beside
        beside.replace(place)
    finally:
        with contextlib.suppress(OSError):  # absent if nothing could be written
            beside.unlink()


def write_whole(place: Path, text: str) -> None:
    """Write `text` to the file `place`."""
    with whole_file(place) as beside:
        beside.write_text(text, encoding="utf-8")


def read_object(place: Path) -> dict[str, Any]:
    """Return the JSON object in the file `place`; an empty one if the file is absent, unreadable or holds something else."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder. It is renamed to `place` when the block ends, and removed if the block raises.

    For one process at a time. Remains of a killed process are removed first.
    """
    with workspace_beside(place) as folder:
        yield folder
        put_folder(folder, place)


@contextmanager
def workspace_beside(place: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `place`, and remove it at the end.

    For one process at a time. Remains of a killed process are removed first.
    """
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_folder(folder: Path, place: Path) -> None:
    """Rename `folder` to `place`. An existing folder there is moved aside first, and removed afterwards."""
    replaced = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        place.rename(replaced)
    folder.rename(place)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(place: Path) -> None:
    """Remove a folder, if it is there. For other processes it is whole until it is gone."""
    aside = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files and folders directly in `folder`. Only under the lock of their writers."""
    for path in folder.glob(".*"):
        if path.suffix in (".partial", ".replaced"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".tmp":
            path.unlink(missing_ok=True)


@contextmanager
def locked(place: Path, doing: str, setting: str) -> Iterator[None]:
    """Hold the lock file `place` of one process at a time, whose folder must exist. The system frees it when a process dies.

    Where another process holds it, that is logged: it is waiting for one that is `doing` this. Raises UserError, which names
    the `setting` of the path, if the folder cannot be written or its file system has no locks.
    """
    lock = FileLock(place)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is %s (it holds %s)", doing, place)
            lock.acquire()
    except OSError as error:
        locks = error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
        what, where = ("locked", ", on a file system with file locks") if locks else ("written", "")
        raise UserError(
            f"{setting}={place.parent}: cannot be {what} ({error.strerror}); set another {setting}{where}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _remove_abandoned(place: Path) -> None:
    """Remove the temporary files of `place` whose writers died."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # renamed meanwhile, or another user's
            if is_abandoned(path):
                path.unlink()


def is_abandoned(path: Path) -> bool:
    """Return whether a `shared` temporary file has no writer: its process ended on this host, or it is over a day old.

    Raise FileNotFoundError if it was renamed in the meantime.
    """
    writer = _OWNED.fullmatch(path.name)
    dead = writer and writer["host"] == socket.gethostname() and not _alive(int(writer["pid"]))
    return bool(dead) or time.time() - path.stat().st_mtime > _DAY


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
