"""How many positions a model has a table for: a longer sequence is an index error deep inside of it.

Learned and fixed tables end somewhere; rotary, relative and ALiBi positions do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

_SIZES = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings",
          "max_target_positions")  # fmt: skip
"""What transformers' configs call the number of positions."""
_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe", "pos_encoding")
"""What transformers' classes call a table of positions, as a module or as a buffer."""
_RESERVED = 2
"""Rows that a table has at most beyond the positions that its config names (bart and opt)."""


@dataclass(frozen=True)
class Positions:
    """The positions of a model's tables. None: it has no table, and any length computes."""

    inputs: int | None
    """For `input_ids`: the encoder's where there is one, else the decoder's."""
    labels: int | None
    """For what a decoder with an encoder before it reads and writes; None for any other model."""
    rotary: int | None
    """The positions that a model with rotary embeddings was trained on: more of them compute, but worse."""


def positions_of(model: PreTrainedModel) -> Positions:
    """The positions of `model`, which may be on the meta device: only names and shapes are read."""
    config = model.config
    inputs: list[int] = []
    labels: list[int] = []
    for name, positions in _tables(model):
        in_decoder = config.is_encoder_decoder and "decoder" in name.split(".")
        (labels if in_decoder else inputs).append(positions)
    if config.model_type == "mpt":
        inputs.append(config.max_seq_len)  # the size of its ALiBi bias, which other models compute as they need it
    rotary = any("Rotary" in type(module).__name__ for module in model.modules()) and not getattr(
        config, "alibi", False
    )
    trained = getattr(config.get_text_config(), "max_position_embeddings", None) if rotary else None
    return Positions(min(inputs, default=None), min(labels, default=None), trained)


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Name and positions of each table.

    A table that grows as it is needed (fsmt's, m2m100's) is none. Nor is one whose size the config does not name as a
    number of positions: that of an image encoder beside the text model.
    """
    sizes = _sizes(model.config)
    modules = dict(model.named_modules())
    tables = {
        name: weight for name, module in modules.items() if (weight := getattr(module, "weight", None)) is not None
    }
    for name, table in [*tables.items(), *model.named_buffers()]:
        if name.rpartition(".")[2] not in _TABLES or table.ndim != 2 or hasattr(modules.get(name), "make_weight"):
            continue
        named = [size for size in sizes if size <= len(table) <= size + _RESERVED]
        if named:
            yield name, min(max(named), len(table) - _reserved(modules.get(name)))


def _reserved(table: Any) -> int:
    """The rows that stand for no position: those up to the padding's in roberta's tables, the first ones in bart's."""
    if getattr(table, "padding_idx", None) is not None:
        return int(table.padding_idx) + 1
    return int(getattr(table, "offset", 0))


def _sizes(config: PretrainedConfig) -> set[int]:
    """The numbers of positions that a config names, of its text model where it has several."""
    parts = (config, config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    return {size for part in parts for name in _SIZES if isinstance(size := getattr(part, name, None), int)}
