"""Packing: several short rows in one training sequence, each with its own positions and without attention to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_exp.tasks.encode import IGNORED, Collator, Features

if TYPE_CHECKING:
    import torch


def pack(features: Sequence[Features], length: int) -> list[Features]:
    """Return `features` joined to sequences of at most `length` tokens, longest first into the first that has room.

    Positions start at 0 in each row. A row's first label is ignored, since no token of the row predicts it.
    """
    bins: list[tuple[int, list[Features]]] = []
    for feature in sorted(features, key=lambda one: -len(one["input_ids"])):
        size = len(feature["input_ids"])
        place = next((number for number, (room, _) in enumerate(bins) if room >= size), None)
        if place is None:
            bins.append((length - size, [feature]))
        else:
            room, members = bins[place]
            bins[place] = (room - size, [*members, feature])
    return [_joined(members) for _, members in bins]


def _joined(members: Sequence[Features]) -> Features:
    return {
        "input_ids": [token for one in members for token in one["input_ids"]],
        "labels": [label for one in members for label in (IGNORED, *one["labels"][1:])],
        "position_ids": [position for one in members for position in range(len(one["input_ids"]))],
    }


@dataclass(frozen=True)
class PackedCollator(Collator):
    """Pads packed features and stacks them, without an attention mask.

    transformers tells the rows apart where `position_ids` does not go on by 1, but only without an attention mask. A padding
    token has position 0 and is a row of its own.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and `position_ids`: int64 of shape (features, length)."""
        return {name: self._tensor(name, [feature[name] for feature in features]) for name in features[0]}
