"""Tasks from outside the package: those of installed packages, and those of a module that a task's YAML file names."""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path

from loftq_exp.errors import UserError

log = logging.getLogger(__name__)

GROUP = "loftq_exp.tasks"
"""The entry point group of packages with tasks. Each entry point names a module, or a class in one."""


def import_installed() -> None:
    """Import the tasks of installed packages. One that cannot be imported is logged, and is then no choice of `task`."""
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # a defect of one package must not stop runs of other tasks
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("task %s (%s): cannot be imported (%.200s); mend or uninstall its package", point.name, point.value,
                        reason)  # fmt: skip


def import_named(module: str, folder: Path | None = None) -> None:
    """Import `module`, a dotted name, from Python's path, the current folder or `folder`. Raises UserError, one line."""
    places = [str(Path.cwd()), *([str(folder.resolve())] if folder else [])]
    sys.path += [place for place in places if place not in sys.path]
    try:
        importlib.import_module(module)
    except Exception as error:  # the module is the user's own code, and can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"task.module={module}: cannot be imported ({reason:.200}); put its folder into PYTHONPATH, or mend it"
        ) from error
