"""Which tensors of a model are written and which are quantized, counted over all matrices in its blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from loftq_exp.config import RunConfig
from loftq_exp.config.quant import BLOCKLESS_TYPES
from loftq_exp.loftq.scales import SCALES_PER_STEP
from loftq_exp.source.layout import Layout
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors, some

log = logging.getLogger(__name__)


def written_names(tensors: CheckpointTensors, layout: Layout) -> list[str]:
    """The names of the tensors to write, without those that the model class ignores.

    If the model ties its embeddings, a tensor that a .bin holds under several names is written only under the first.
    """
    if layout.foreign:
        log.info("quantize: left out, because the model has no such head: %s", ", ".join(layout.foreign))
    excluded = [weight for weight in layout.not_quantized if weight.name in layout.excluded]
    others = [weight for weight in layout.not_quantized if weight not in excluded]
    for why, weights in (("they are gates, or no linear layers", others), ("the settings leave them out", excluded)):
        if weights:
            log.info("quantize: not quantized, because %s: %s (%d values)", why, some([weight.name for weight in weights]),
                     sum(weight.values for weight in weights))  # fmt: skip
    foreign, targets = set(layout.foreign), {name for target in layout.targets for name in target.tensors}
    tied = tensors.tied() if layout.ties_embeddings else {}
    names: list[str] = []
    stored: set[str] = set()
    for name in tensors.names:
        value = tied.get(name, name)
        if name not in foreign and (value not in stored or name in targets):
            names.append(name)
            stored.add(value)
    return names


def bits_per_weight(config: RunConfig, bits: float) -> float:
    """Bits per quantized value: its code and its share of the block's scales. int8's per-row scales are not counted."""
    quant, scale_bits = config.quant, getattr(torch, config.save_dtype).itemsize * 8
    if quant.type in BLOCKLESS_TYPES:
        return float(bits)
    if quant.double:
        scale_bits = 8 + 32 / SCALES_PER_STEP
    numbers = 2 if quant.type == "uniform" else 1
    return bits + numbers * scale_bits / quant.block_size


def coverage(
    tensors: CheckpointTensors, layout: Layout, bits: float, quant_type: str, kept: Sequence[Target] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The `totals` of the matrices in blocks, and a list of those not quantized with their stored bits per value.

    `bits` is the size of a target's value, scales included. Targets in `kept` keep their stored form in `tensors`.
    """
    dense = [(weight.name, weight.tensor, weight.shape) for weight in layout.not_quantized]
    dense += [(target.module, target.tensor, target.shape) for target in kept]
    left = sum(math.prod(shape) for _, _, shape in dense)
    widths = [_stored_bits(tensors, tensor) for _, tensor, _ in dense]
    not_quantized = [
        {"name": name, "shape": list(shape), "values": math.prod(shape), "bits": width}
        for (name, _, shape), width in zip(dense, widths, strict=True)
    ]
    values = sum(math.prod(target.shape) for target in layout.targets if target not in kept)
    left_bits = sum(math.prod(shape) * width for (_, _, shape), width in zip(dense, widths, strict=True))
    totals = {
        "linear_values": values + left,
        "quantized_values": values if quant_type != "none" else 0,
        "bits_per_weight": (values * bits + left_bits) / (values + left),
    }
    return totals, not_quantized


def _stored_bits(tensors: CheckpointTensors, name: str) -> int:
    # A matrix that loading slices from a larger tensor has no dtype of its own: use the checkpoint's first one.
    return tensors.dtype(name if name in tensors.names else tensors.names[0]).itemsize * 8
