"""The parts of a document that a script writes: everything between `<!-- NAME: by SCRIPT -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def filled(text: str, name: str, content: str) -> str:
    """`text` with the region of this name holding `content`. ValueError unless the region is there exactly once."""
    region = re.compile(rf"(<!-- {re.escape(name)}: by [^>]+ -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    text, times = region.subn(lambda found: f"{found[1]}\n{content.strip()}\n\n{found[2]}", text)
    if times != 1:
        raise ValueError(f"{name}: {times} regions of this name, there must be 1")
    return text


def names_in(text: str, script: str) -> list[str]:
    """The names of the regions of a document that `script` writes."""
    return re.findall(rf"<!-- (\S+): by {re.escape(script)} -->", text)


def settle(documents: Mapping[Path, str], check: bool) -> None:
    """Write the documents, or with `check` exit with the names of those that are not up to date."""
    stale = [path for path, text in documents.items() if not path.exists() or path.read_text() != text]
    if check and stale:
        sys.exit("\n".join(f"{path.relative_to(ROOT)} is not up to date: run make docs" for path in stale))
    for path in stale:
        path.write_text(documents[path])
