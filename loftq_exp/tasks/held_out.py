"""A held-out share of the training rows: the same rows for a seed, whatever the order of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from loftq_exp.errors import UserError
from loftq_exp.tasks.base import PART
from loftq_exp.tasks.data import Row, Split

USUAL_VALIDATION = 0.1
"""Share of the training rows that is held out for validation where neither a size nor rows of their own are given."""


def split_rows(rows: Sequence[Row], units: Sequence[Any], share: float, seed: int, split: Split) -> list[Row]:
    """Return the rows of `split`, in order, if `share` of the distinct units, at least one, is held out for evaluation.

    Rows of equal units are on the same side, so that nothing that is scored was trained on. Raises UserError if either side
    is empty.
    """
    held_out, distinct = _held_out(units, share, seed)
    if all(held_out):
        raise UserError(
            f"task.eval_share={share:g}: {distinct} distinct rows cannot be split into a training and an evaluation "
            "part; give more rows, a smaller share, or task.eval_file=FILE"
        )
    return [row for row, held in zip(rows, held_out, strict=True) if held == (split == "eval")]


def hold_out(rows: Sequence[Row], units: Sequence[Any], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to validate on, each in order.

    Args:
        rows: the training rows.
        units: the unit of each row; rows of equal units are on the same side.
        size: the share of the distinct units that is held out, if below 1; else their number.
        seed: draws the units, by their content.

    Raises:
        UserError: no unit would be left to train on.
    """
    held_out, distinct = _held_out(units, size, seed)
    if all(held_out):
        raise UserError(
            f"task.validation_size={size:g}: there are {distinct} distinct rows, and none would be left to train on; give more "
            "rows, a smaller size, or task.validation_file=FILE"
        )
    kept = [row for row, held in zip(rows, held_out, strict=True) if not held]
    return kept, [row for row, held in zip(rows, held_out, strict=True) if held]


def without_parts(rows: Iterable[Row]) -> set[str]:
    """Return the distinct rows as text, without the names of the files or splits that they come from."""
    return {json.dumps({name: row[name] for name in row if name != PART}, sort_keys=True, default=str) for row in rows}


def _held_out(units: Sequence[Any], size: float, seed: int) -> tuple[list[bool], int]:
    """Return whether each unit is held out, and the number of distinct units. All are if too few are left."""
    keys = [_key(unit, seed) for unit in units]
    distinct = sorted(set(keys))
    count = max(1, round(size * len(distinct))) if size < 1 else int(size)
    held_out = set(distinct[:count])
    return [key in held_out for key in keys], len(distinct)


def _key(row: Any, seed: int) -> bytes:
    text = json.dumps(row, sort_keys=True, default=str)
    return hashlib.blake2b(f"{seed} {text}".encode(errors="backslashreplace"), digest_size=16).digest()
