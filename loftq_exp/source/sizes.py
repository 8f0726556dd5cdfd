"""Bounds on what config.json may ask for, checked before anything is built from it.

A model on the meta device takes no memory, but its modules do, and transformers lists layers and labels while it reads a
config. One digit too many would take hours or all memory before the weights show that the number is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

from loftq_exp.errors import UserError
from loftq_exp.whole import read_object

MOST_LAYERS = 4096
MOST_LABELS = 1_000_000
MOST = 2**31 - 1
"""Of any other whole number. Vocabularies and positions of today have seven digits."""
MOST_MODULES = 200_000
"""Of one model. One with 61 layers of 256 experts each has 50,000."""
_LISTED = re.compile(r"layers?(_|$)|^depth|num_(hidden|heads|attention_heads|key_value_heads|blocks|stages|experts|local)|_heads$|^n_(head|layer)")  # fmt: skip
_LABELS = ("num_labels", "_num_labels")


def check_sizes(folder: Path) -> None:
    """Raise UserError if config.json in `folder` holds a number that no model has. An unreadable file is left to transformers."""
    place = folder / "config.json"
    for name, value in _numbers(read_object(place)):
        last = name.rpartition(".")[2]
        most = MOST_LAYERS if _LISTED.search(last) else MOST_LABELS if last in _LABELS else MOST
        if abs(value) > most:
            raise UserError(
                f"model.path: {name}={value} in {place} is out of range; correct it, at most {most} is allowed"
            )


@contextmanager
def few_modules(folder: Path) -> Iterator[None]:
    """Raise UserError in the block if it builds a model of more than MOST_MODULES modules."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise UserError(f"model.path={folder}: config.json describes a model of over {MOST_MODULES} modules; correct its "
                            "numbers of layers and experts")  # fmt: skip

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _numbers(stated: Any) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in JSON, at any depth, with their dotted names."""
    left: list[tuple[str, Any]] = [("", stated)]
    while left:
        name, found = left.pop()
        if isinstance(found, dict):
            left += [(f"{name}.{key}" if name else str(key), item) for key, item in found.items()]
        elif isinstance(found, list):
            left += [(name, item) for item in found]
        elif isinstance(found, int) and not isinstance(found, bool):
            yield name, found
