"""Manifests: the size and digest of each file of a folder, written with the files and checked when they are read.

A folder's `manifest.json` lists the files that lie directly in it, and the manifests of its subfolders. A file is digested
in pieces, so that a writer that fills it out of order, tensor by tensor, can digest what it writes. The digest is 128-bit
XXH3, which runs at memory bandwidth. It reveals damage and swapped files, not a forger, who could write a manifest too.
transformers, PEFT and the Hub ignore the file. A folder without one, of an older version, is read unchecked.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash

from loftq_exp.errors import UserError
from loftq_exp.whole import read_object, write_whole

log = logging.getLogger(__name__)

FILE = "manifest.json"
FORMAT = 1
_BUFFER = 1 << 22
_SETTLED_NS = 2_000_000_000
"""As in loftq_exp.source.digests: a file that changed less than this before it was read is read again next time."""
SMALL = 1 << 22
"""Files up to this many bytes are checked whenever the folder is looked at, larger ones only when they are loaded."""
_LOADED = ("*.safetensors", "*.bin", "*.index.json", "*.py", "config.json", "generation_config.json", "tokenizer*", "vocab*",
           "added_tokens.json", "special_tokens_map.json", "chat_template*", "adapter_*")  # fmt: skip
"""Names of files that a load would read, so that one that the manifest lacks is a fault."""

Pieces = Sequence[tuple[int, str]]
"""The length in bytes and digest of each piece of a file, in order."""

_checked: dict[Path, tuple[Any, tuple[int, ...]]] = {}
"""Files that this process found right: what was expected, and the file's size, inode and timestamps."""
_unlisted: set[Path] = set()
"""Folders without a manifest that were logged."""


def digest(data: bytes | memoryview) -> str:
    """A hex digest of `data`."""
    return xxhash.xxh3_128(data).hexdigest()


def pieces_of(path: Path) -> Pieces:
    """The file as one piece. Raises OSError if it cannot be read."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        return [(size, _read_digest(file, size))]


def add(folder: Path, files: Mapping[str, Pieces]) -> None:
    """List `files` of `folder`, by name, as their writer digested them."""
    _write(folder, _listed(folder) | {name: [_state(pieces)] for name, pieces in files.items()})


def forget(folder: Path, name: str) -> None:
    """Remove a file that was written again from the manifest of `folder`; `complete` lists it again."""
    _write(folder, {other: states for other, states in _listed(folder).items() if other != name})


def complete(folder: Path) -> None:
    """List every file of `folder` that is not listed yet, and the manifests of its subfolders."""
    listed = _listed(folder)
    found = {name: listed[name] if name in listed else [_state(pieces_of(folder / name))] for name in _names(folder)}
    _write(folder, found)


def write_listed(place: Path, text: str) -> None:
    """Write `text` to the file `place`, which is listed in its folder.

    The manifest is written first, and keeps the former state beside the new one: a process killed between the two writes
    leaves a file that is right.
    """
    listed = _listed(place.parent)
    data = text.encode()
    state = _state([(len(data), digest(data))])
    former = [other for other in listed.get(place.name, [])[-1:] if other != state]
    _write(place.parent, listed | {place.name: [*former, state]})
    write_whole(place, text)


def copy_listed(source: Path, place: Path) -> None:
    """Copy the text file `source` to `place`, as `write_listed`."""
    write_listed(place, source.read_bytes().decode())


def faults(folder: Path, most: float = math.inf) -> Iterator[str]:
    """What is wrong with the files of `folder` of at most `most` bytes, a line each. Nothing without a manifest.

    A file that this process found right is not read again as long as its size and timestamps stay.
    """
    place = folder / FILE
    if not place.is_file():
        return
    found = read_object(place)
    files = found.get("files")
    if found.get("format") != FORMAT or not isinstance(files, dict):
        yield f"{place} is damaged"
        return
    for name, states in files.items():
        if _size(states) <= most and (fault := _fault(folder / name, states)):
            yield fault
    for name in _names(folder):
        if name not in files and any(fnmatch(name, pattern) for pattern in _LOADED):
            yield f"{folder / name} was added: {FILE} does not list it"


def check(folder: Path, advice: str, most: float = math.inf) -> None:
    """Raise UserError, which names the file and ends with `advice`, if one of at most `most` bytes is not as it is listed.

    A folder without a manifest is logged, once.
    """
    for fault in faults(folder, most):
        raise UserError(f"{fault}; {advice}")
    if not (folder / FILE).is_file() and folder.is_dir() and folder not in _unlisted:
        _unlisted.add(folder)
        log.info("%s: without %s, as older versions and other tools write it: its files are not verified", folder, FILE)


def fault_of(place: Path) -> str | None:
    """What is wrong with one file. None also if its folder has no manifest that lists it."""
    states = _listed(place.parent).get(place.name)
    return _fault(place, states) if states else None


def replaced(folder: Path, contents: Mapping[str, bytes]) -> bytes | None:
    """The manifest of `folder` as it is with other `contents` of some files; None if it has none."""
    if not (folder / FILE).is_file():
        return None
    new = {name: [_state([(len(data), digest(data))])] for name, data in contents.items()}
    return _text(_listed(folder) | new).encode()


def _fault(path: Path, states: Any) -> str | None:
    try:
        stat = path.stat()
        dates = (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        if _checked.get(path) == (states, dates):
            return None
        began = time.time_ns()
        problem = _difference(path, states, stat.st_size)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return f"{path.parent / FILE} is damaged"
    if problem is None and max(stat.st_mtime_ns, stat.st_ctime_ns) < began - _SETTLED_NS:
        _checked[path] = (states, dates)
    return problem


def _difference(path: Path, states: Sequence[Mapping[str, Any]], size: int) -> str | None:
    """Compare a file with each of its states. The last one is what it should be."""
    if not any(state["bytes"] == size for state in states):
        return f"{path} was changed: it has {size} bytes, {FILE} says {states[-1]['bytes']}"
    wrong = None
    for state in states:
        if state["bytes"] == size:
            wrong = _wrong_piece(path, state["pieces"])
            if wrong is None:
                return None
    return f"{path} was changed: bytes {wrong} are not those that were written"


def _wrong_piece(path: Path, pieces: Pieces) -> str | None:
    start = 0
    with path.open("rb", buffering=0) as file:
        for length, expected in pieces:
            if _read_digest(file, length) != expected:
                return f"{start} to {start + length}"
            start += length
    return None


def _read_digest(file: Any, length: int) -> str:
    """The digest of the next `length` bytes, or of those that are left."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_BUFFER, max(length, 1))))
    while length > 0 and (read := file.readinto(buffer[: min(length, len(buffer))])):
        found.update(buffer[:read])
        length -= read
    return found.hexdigest()


def _size(states: Any) -> float:
    """The size that a file should have, in bytes; 0 if the entry is damaged."""
    try:
        return float(states[-1]["bytes"])
    except (TypeError, ValueError, KeyError, IndexError):
        return 0.0


def _state(pieces: Pieces) -> dict[str, Any]:
    return {"bytes": sum(length for length, _ in pieces), "pieces": [list(piece) for piece in pieces]}


def _listed(folder: Path) -> dict[str, Any]:
    files = read_object(folder / FILE).get("files")
    return files if isinstance(files, dict) else {}


def _names(folder: Path) -> Iterator[str]:
    """The files of `folder`, without temporary ones, and the manifests of its subfolders."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == FILE:
            continue
        if path.is_file():
            yield path.name
        elif (path / FILE).is_file():
            yield f"{path.name}/{FILE}"


def _text(files: Mapping[str, Any]) -> str:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
    return f'{{"format": {FORMAT}, "files": {{\n{lines}\n}}}}\n'


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    write_whole(folder / FILE, _text(files))
