"""What trainer checkpoints and adapters were made from: keys in a small file beside the weights, by content.

Without it, training would go on from a checkpoint of other rows, or an adapter would be scored on a backbone that it was
not trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "made_from.json"
"""In the folder of the checkpoints and in that of the adapter. PEFT and the hub's tools leave it alone."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Origin:
    """The keys of what something was trained from."""

    finetune: str
    """Of all that shapes the adapter: initialisation, rows, settings."""
    initialisation: str

    def write(self, folder: Path) -> None:
        """Leaves the keys in `folder`."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_origin(folder: Path) -> Origin | None:
    """The keys that were left in `folder`; None where there are none, or none that can be read."""
    try:
        return Origin(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def adapter_digest(folder: Path) -> str | None:
    """A digest of the adapter in `folder`, of its config and weights; None where it is not there or not whole."""
    try:
        return "+".join(file_digest(folder / name) for name in _ADAPTER_FILES)
    except OSError:
        return None


def file_digest(path: Path) -> str:
    """A hex digest of a file's bytes; raises OSError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def rows_digest(rows: Iterable[dict[str, Any]]) -> str:
    """A hex digest of rows as they are used, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
