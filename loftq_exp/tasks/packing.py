"""Packing: several short rows in one training sequence, each with its own positions and without attention to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.tasks.encode import IGNORED, Collator, Features

if TYPE_CHECKING:
    import torch


def pack(features: Sequence[Features], length: int) -> list[Features]:
    """Return `features` joined to sequences of at most `length` tokens, longest first, each into the first sequence with enough free tokens.

    Positions start at 0 in each row. A row's first label is ignored, since no token of the row predicts it.
    """
    sequences: list[list[Features]] = []
    free: list[int] = []
    for feature in sorted(features, key=lambda one: -len(one["input_ids"])):
        size = len(feature["input_ids"])
        place = next((number for number, tokens in enumerate(free) if tokens >= size), len(free))
        if place == len(free):
            sequences.append([])
            free.append(length)
        sequences[place].append(feature)
        free[place] -= size
    return [_joined(members) for members in sequences]


def _joined(members: Sequence[Features]) -> Features:
    return {
        "input_ids": [token for one in members for token in one["input_ids"]],
        "labels": [label for one in members for label in (IGNORED, *one["labels"][1:])],
        "position_ids": [position for one in members for position in range(len(one["input_ids"]))],
    }


@dataclass(frozen=True)
class PackedCollator(Collator):
    """Pads packed features and stacks them, without an attention mask.

    transformers separates the rows where `position_ids` does not go on by 1, but only without an attention mask. A padding
    token has position 0 and is a row of its own.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`: int64 of shape (features, length)."""
        return {name: self._tensor(name, [feature[name] for feature in features]) for name in features[0]}
