"""Digests of a checkpoint's content, independent of the location and dates of its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loftq_exp.config import digest_of
from loftq_exp.errors import UserError
from loftq_exp.source.digests import FileDigests
from loftq_exp.source.files import carried_files
from loftq_exp.source.tensors import find_weights

Content = dict[str, str]
"""Digests by group of files, see CONTENT. A group without files is absent."""
CONTENT = {
    "weights": "weights",
    "config": "settings in config.json",
    "files": "tokenizer or other files",
    "adapter": "factors",
}
"""The groups that are digested, as messages name them. `files` are the small files copied with a checkpoint."""


def content_of(folder: Path, given: str, trust_remote_code: bool, cache: Path, adapter: Sequence[Path] = ()) -> Content:
    """The content digests of the checkpoint in `folder` and of the `adapter` files, if any.

    Only files that shape an initialised checkpoint count; a README does not. Digests of large files are cached in
    `cache`. Raises UserError, prefixed with the setting `given`, if a file cannot be read.
    """
    groups = {
        "weights": _weight_files(folder),
        "config": [folder / "config.json"],
        "files": carried_files(folder, trust_remote_code),
        "adapter": list(adapter),
    }
    files = [path for group in groups.values() for path in group]
    try:
        digests = dict(zip(files, FileDigests(cache).of(files), strict=True))
    except OSError as error:
        raise UserError(f"{given}: {error.filename} cannot be read ({error.strerror}); "
                        "download it again, or change its permissions") from error  # fmt: skip
    return {name: digest_of([[path.name, digests[path]] for path in group]) for name, group in groups.items() if group}


def _weight_files(folder: Path) -> list[Path]:
    """The weight files, an index first. `open_tensors` refuses a damaged index."""
    weights = find_weights(folder)
    if weights is None or weights.suffix != ".json":
        return [weights] if weights else []
    try:
        shards = set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values())
        found = [folder / Path(shard).name for shard in sorted(shards)]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    return [weights, *(path for path in found if path.is_file())]
