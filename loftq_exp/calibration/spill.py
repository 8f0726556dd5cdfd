"""Tensors in files without a name, for what is too large to be held in memory while a model reads text block by block."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from loftq_exp.errors import UserError

HELD = 2**28
"""Bytes that stay in memory."""


class Spill:
    """Keeps tensors of the CPU: the first `HELD` bytes in memory, all others each in a file without a name in a folder.

    The kernel reads and writes the files' pages as it needs memory. A file is gone when its tensor is, also if the process
    is killed. Tensors of other devices are kept as they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[tuple[Any, ...], int] = {}

    def kept(self, value: Any, *place: Any) -> Any:
        """The tensor, or the tensors within tuples and lists, to be held for long.

        Args:
            value: what to keep; anything that is no tensor, tuple or list is returned as it is.
            place: a name. An earlier value of that name no longer counts as held.

        Raises:
            UserError: if the folder has no space.
        """
        if type(value) in (tuple, list):
            return type(value)(self.kept(one, *place, at) for at, one in enumerate(value))
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or not value.numel():
            return value
        self._held.pop(place, None)
        if sum(self._held.values()) + value.nbytes <= HELD:
            self._held[place] = value.nbytes
            return value
        return self._mapped(value.nbytes).view(value.dtype).view(value.shape).copy_(value)

    def _mapped(self, size: int) -> torch.Tensor:
        """An uninitialised tensor of this many bytes in a file of its own."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, prefix=".spill-") as file:
                if hasattr(os, "posix_fallocate"):  # without space a later write would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                # Python's mmap keeps a descriptor for each mapping, and a process may have but a thousand; torch's keeps none.
                return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cache_dir={self._folder}: {size} bytes for the activations between blocks cannot be written "
                            f"({reason}); free space there or set another cache_dir") from None  # fmt: skip
