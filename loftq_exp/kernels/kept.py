"""Machine code of the kernels on disk, so that a machine compiles each once, and the time that compiling takes.

numba's own cache=True does not serve kernels that are made by functions: its key has the pickled closure, which holds other
kernels and differs in every process, and it notices changes of one file only. Here a kernel's name contains a digest of its
code and of all that it closes over. The folder's name is a digest of the sources and versions. A file carries its checksum.

The folder is NUMBA_CACHE_DIR if that is set, else loftq_exp/kernels in the user's cache folder. It may be removed at any time.

The files are pickles, which is how numba writes machine code. A plain format would be no safer: whoever can write a file of
machine code runs code in any format. A file is therefore read only from a folder that no other user can write, see `is_private`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba.core import event
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps
from numba.extending import _Intrinsic

from loftq_exp.whole import whole_file

log = logging.getLogger(__name__)

_DIGEST_BYTES = 32


class Kept(NullCache):
    """A kernel's machine code in `folder`, one file per signature and CPU. numba's dispatcher calls it under its compiler lock."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for the signature, or None if it is not kept or its file is damaged."""
        target_context.refresh()
        place = self._place(sig, target_context.codegen())
        if place is None:
            return None
        with clock.running():
            try:
                content = _own_bytes(place)
            except OSError:
                return None
            if content is None:
                return None
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                log.warning("%s: damaged; the kernel is compiled again", place)
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled function. A folder that cannot be written costs only the next process's time."""
        if data.lifted or data.library.has_dynamic_globals:  # holds addresses of this process
            return
        place = self._place(sig, data.codegen)
        if place is None:
            return
        with clock.running():
            payload = dumps(data._reduce())
            try:
                place.parent.parent.mkdir(parents=True, exist_ok=True)
                place.parent.mkdir(mode=0o700, exist_ok=True)
                with whole_file(place, shared=True) as beside:
                    beside.write_bytes(hashlib.sha256(payload).digest() + payload)
            except OSError as error:
                log.debug("%s: not written (%s)", place, error.strerror)

    def _place(self, signature: Any, codegen: Any) -> Path | None:
        folder = kernels_folder()
        key = repr((self.name, sorted(self.options.items(), key=str), str(signature), codegen.magic_tuple()))
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin" if folder else None


def _own_bytes(place: Path) -> bytes | None:
    """Return the content of a file of machine code. None if another user could have written it: it is not run."""
    descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        if hasattr(os, "getuid") and os.fstat(descriptor).st_uid != os.getuid():
            return None
        return file.read() if is_private(place.parent) else None


@functools.cache
def is_private(folder: Path) -> bool:
    """Return whether this user alone can put files into `folder`. Logs a warning if not.

    It must be the user's own, without write permission for others. A folder above may belong to root, and may be one for all
    users if they cannot rename each other's files there (as in /tmp).
    """
    if not hasattr(os, "getuid"):
        return True
    own = folder.stat()
    fault = own.st_uid != os.getuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    for above in folder.resolve().parents:
        found = above.stat()
        shared = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        fault = fault or found.st_uid not in (0, os.getuid()) or shared
    if fault:
        log.warning("%s: other users can write there, so that its machine code is not used; remove it, or set NUMBA_CACHE_DIR to a "
                    "folder of your own", folder)  # fmt: skip
    return not fault


@functools.cache
def kernels_folder() -> Path | None:
    """Return the folder of the machine code of these sources and versions. None if the user has no home folder."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    config: Any = numba.config
    top = Path(config.CACHE_DIR) if config.CACHE_DIR else caches / "loftq_exp" / "kernels"
    digest = hashlib.sha256(
        repr((sys.version, numba.__version__, llvmlite.__version__, np.__version__, config.OPT)).encode()
    )
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return top / digest.hexdigest()[:16]


def named_by_content(function: FunctionType) -> str:
    """Append a digest of the function's code and closure to its qualified name, and return the name.

    numba derives symbols from that name. Different kernels of one name would otherwise share symbols between processes.
    """
    digest = hashlib.sha256(repr(_content(function)).encode()).hexdigest()[:16]
    function.__qualname__ = f"{function.__qualname__}_{digest}"
    return function.__qualname__


def _content(value: Any) -> Any:
    """Return what identifies a value that a kernel closes over, in text that is the same in every process."""
    if isinstance(value, FunctionType):
        return _content(value.__code__), [_content(cell.cell_contents) for cell in value.__closure__ or ()]
    if isinstance(value, CodeType):
        return value.co_code.hex(), value.co_names, value.co_varnames, [_content(item) for item in value.co_consts]
    if isinstance(value, Dispatcher):
        return value.py_func.__qualname__
    if isinstance(value, _Intrinsic):
        return _content(value._defn)
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes().hex()
    if isinstance(value, (tuple, list)):
        return [_content(item) for item in value]
    if isinstance(value, (int, float, str, np.number, ir.Type)) or value is None:
        return type(value).__name__, str(value)
    raise TypeError(f"a kernel closes over a {type(value).__name__}, whose content is unknown here")


class _Clock(event.Listener):
    """Adds up the time that the process spends in compiling or loading kernels. It happens under one lock, so never twice at once."""

    def __init__(self) -> None:
        self._total, self._depth, self._began = 0.0, 0, 0.0

    @property
    def seconds(self) -> float:
        """The time so far, including a compilation that is running in another thread."""
        return self._total + (time.perf_counter() - self._began if self._depth else 0.0)

    def on_start(self, event: Any) -> None:
        """Start unless a compilation that needs this one is running."""
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Stop if no compilation is running any more."""
        if self._depth == 1:
            self._total += time.perf_counter() - self._began
        self._depth -= 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        self.on_start(None)
        try:
            yield
        finally:
            self.on_end(None)


clock = _Clock()
event.register("numba:compile", clock)
