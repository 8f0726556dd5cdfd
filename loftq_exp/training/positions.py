"""The number of positions in a model's position tables. A longer sequence raises an index error inside the model.

Learned and fixed tables have a size. Rotary, relative and ALiBi positions have no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

_SIZES = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings",
          "max_target_positions")  # fmt: skip
"""Names of the number of positions in transformers configs."""
_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe", "pos_encoding")
"""Names of position tables, modules or buffers, in transformers classes."""
_RESERVED = 2
"""Maximum number of rows in a table beyond the positions that its config names (bart and opt)."""


@dataclass(frozen=True)
class Positions:
    """The sizes of a model's position tables. None: there is no table and no limit."""

    inputs: int | None
    """For `input_ids`: the encoder's table if there is one, else the decoder's."""
    labels: int | None
    """For the decoder of an encoder-decoder; None for any other model."""
    rotary: int | None
    """Positions that a model with rotary embeddings was trained on. Longer sequences are possible, with worse results."""


def positions_of(model: PreTrainedModel) -> Positions:
    """Return the positions of `model`. Only names and shapes are read, so it may be on the meta device."""
    config = model.config
    inputs: list[int] = []
    labels: list[int] = []
    for name, positions in _tables(model):
        in_decoder = config.is_encoder_decoder and "decoder" in name.split(".")
        (labels if in_decoder else inputs).append(positions)
    if config.model_type == "mpt":
        inputs.append(config.max_seq_len)  # the size of its ALiBi bias; other models compute the bias as needed
    rotary = any("Rotary" in type(module).__name__ for module in model.modules()) and not getattr(
        config, "alibi", False
    )
    trained = getattr(config.get_text_config(), "max_position_embeddings", None) if rotary else None
    return Positions(min(inputs, default=None), min(labels, default=None), trained)


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield the name and number of positions of each table.

    Tables that grow on demand (fsmt, m2m100) are skipped. So are tables whose size the config does not name as a number of
    positions, such as those of an image encoder beside the text model.
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
    """The number of rows without a position: up to the padding row in roberta's tables, the first ones in bart's."""
    if getattr(table, "padding_idx", None) is not None:
        return int(table.padding_idx) + 1
    return int(getattr(table, "offset", 0))


def _sizes(config: PretrainedConfig) -> set[int]:
    """The numbers of positions that a config names. For a model with several parts: those of its text model."""
    parts = (config, config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    return {size for part in parts for name in _SIZES if isinstance(size := getattr(part, name, None), int)}
