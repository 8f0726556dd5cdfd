"""Files and folders that are whole or absent: each is written beside its place and renamed into it.

What is half-written has the place's name, a dot before it, and one of the ends below. Nothing is synced to the disk here: a
rename stands between a killed process and a half file, not between a power cut and one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DAY = 24 * 3600.0
_OWNED = re.compile(r"\..+\.(?P<host>[^/]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
"""Name of a file that one of many processes is writing: for what place, on what machine, by what process."""


@contextmanager
def whole_file(place: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `place` when the block ends; it is removed where the block fails.

    Args:
        place: of the file. Its folder must be there.
        shared: whether several processes may write it at once. Each then has a path of its own, see `is_abandoned`.
    """
    owner = f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}" if shared else ""
    beside = place.with_name(f".{place.name}{owner}.tmp")
    try:
        yield beside
        beside.replace(place)
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written, nothing is there
            beside.unlink()


def write_whole(place: Path, text: str) -> None:
    """Writes `text` to the file `place`."""
    with whole_file(place) as beside:
        beside.write_text(text)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `place` when the block ends; it is removed where the block fails.

    One process at a time. What a killed one left is removed first.
    """
    with workspace_beside(place) as folder:
        yield folder
        put_folder(folder, place)


@contextmanager
def workspace_beside(place: Path) -> Iterator[Path]:
    """An empty folder on the file system of `place`, which is removed at the end. One process at a time.

    What a killed process left of it is removed first.
    """
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_folder(folder: Path, place: Path) -> None:
    """Renames `folder` to `place`, whose content, if any, is moved aside first and then removed."""
    replaced = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        place.rename(replaced)
    folder.rename(place)
    shutil.rmtree(replaced, ignore_errors=True)


def is_abandoned(path: Path) -> bool:
    """Whether nobody is writing a `shared` file any more: its process ended on this machine, or it is more than a day old.

    Raises FileNotFoundError where it was renamed into its place meanwhile.
    """
    writer = _OWNED.fullmatch(path.name)
    dead = writer and writer["host"] == socket.gethostname() and not _alive(int(writer["pid"]))
    return bool(dead) or time.time() - path.stat().st_mtime > _DAY


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
