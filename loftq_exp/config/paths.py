"""Paths as users type them."""

from __future__ import annotations

from pathlib import Path

from loftq_exp.errors import UserError


def local_path(path: str) -> Path:
    """Return `path` with a leading ~ expanded. Many shells expand it only at the start of an argument."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user's home folder; write the path out") from None
