"""A held-out share of the training rows: the same rows for a seed, whatever the order of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from loftq_exp.errors import UserError
from loftq_exp.tasks.data import Row, Split


def split_rows(rows: Sequence[Row], share: float, seed: int, split: Split) -> list[Row]:
    """Return the rows of `split`, in order, if `share` of the distinct rows, at least one, is held out for evaluation.

    Equal rows are on the same side, so that nothing that is scored was trained on. Raises UserError if either side is empty.
    """
    keys = [_key(row, seed) for row in rows]
    distinct = sorted(set(keys))
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise UserError(
            f"task.eval_share={share:g}: {len(distinct)} distinct rows cannot be split into a training and an evaluation "
            "part; give more rows, a smaller share, or task.eval_file=FILE"
        )
    held_out = set(distinct[:count])
    return [row for row, key in zip(rows, keys, strict=True) if (key in held_out) == (split == "eval")]


def _key(row: Row, seed: int) -> bytes:
    text = json.dumps(row, sort_keys=True, default=str)
    return hashlib.blake2b(f"{seed} {text}".encode(errors="backslashreplace"), digest_size=16).digest()
