"""The origin of trainer checkpoints and adapters: keys, by content, in a small file beside the weights.

It prevents training from resuming at a checkpoint of other rows. It also prevents an adapter from being scored on a backbone
that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq_exp.whole import write_whole

FILE = "made_from.json"
"""The file's name, in the checkpoints folder and in the adapter folder. PEFT and the Hub's tools ignore it."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Origin:
    """The keys of what checkpoints or an adapter were trained from."""

    finetune: str
    """Key of everything that shapes the adapter: initialisation, rows, settings."""
    initialisation: str

    def write(self, folder: Path) -> None:
        """Write the keys to `folder`."""
        write_whole(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_origin(folder: Path) -> Origin | None:
    """Return the keys in `folder`, or None if there are none that can be read."""
    try:
        return Origin(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def adapter_digest(folder: Path) -> str | None:
    """Return a digest of the config and weights of the adapter in `folder`, or None if it is missing or incomplete."""
    try:
        return "+".join(file_digest(folder / name) for name in _ADAPTER_FILES)
    except OSError:
        return None


def file_digest(path: Path) -> str:
    """Return a hex digest of a file's bytes. Raises OSError if the file cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def rows_digest(rows: Iterable[dict[str, Any]]) -> str:
    """Return a hex digest of `rows` as they are used, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
