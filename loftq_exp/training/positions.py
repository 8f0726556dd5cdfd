"""How many tokens a model can tell apart by their positions: more than that is an error of indexing deep inside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loftq_exp.errors import UserError

_NAMES = ("position_embeddings", "embed_positions")
"""What transformers' classes call a learned table of positions. Models with rotary or relative positions have none."""


def check_positions(model: nn.Module, features: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where a feature is longer than the smallest table of learned positions in `model`."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES
    ]
    if not tables:
        return
    positions = min(map(_positions, tables))
    lists = (value for feature in features for value in feature.values() if isinstance(value, list))
    longest = max(map(len, lists), default=0)
    if longest > positions:
        raise UserError(
            f"task.max_source_length: there are examples of {longest} tokens, and the model reads {positions} at most; lower "
            "task.max_source_length and task.max_target_length, or task.block_size"
        )


def _positions(table: nn.Embedding) -> int:
    """The rows of a table that stand for positions: roberta's and bart's first ones do not."""
    if table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    return table.num_embeddings - int(getattr(table, "offset", 0))
