"""What a checkpoint's files hold, in a few digests: the same wherever they lie, whatever their dates are."""

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
"""Digests by what they are of: see CONTENT. One that has no files is absent."""
CONTENT = {
    "weights": "weights",
    "config": "settings in config.json",
    "files": "tokenizer or other files",
    "adapter": "factors",
}
"""What of a checkpoint is digested, in words; `files` are those that go along with it."""


def content_of(folder: Path, given: str, trust_remote_code: bool, cache: Path, adapter: Sequence[Path] = ()) -> Content:
    """The content of the checkpoint in `folder` and, where one is named, of its `adapter`.

    Only what an initialised checkpoint is made from counts: a README beside it does not. Digests of large files are
    remembered in `cache`. Raises UserError, which begins with the setting `given`, for a file that cannot be read.
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
    """The files that hold the weights, an index first. A damaged index is refused where the tensors are opened."""
    weights = find_weights(folder)
    if weights is None or weights.suffix != ".json":
        return [weights] if weights else []
    try:
        shards = set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values())
        found = [folder / Path(shard).name for shard in sorted(shards)]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    return [weights, *(path for path in found if path.is_file())]
