"""Sharing out the weights of one initialisation among processes, on any machines with the same cache folder.

There is no coordinator. Each process claims a weight by a lock on its cache entry, computes it, and takes the next one. The
operating system releases the lock of a process that dies, and another one computes that weight.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from loftq_exp.config import RunConfig, digest_of
from loftq_exp.initialise.calibrate import calibrate
from loftq_exp.initialise.decomposer import Decomposed, Decomposer
from loftq_exp.initialise.fit import check_fit
from loftq_exp.initialise.key import MadeFrom, done_before, init_dir, made_from
from loftq_exp.initialise.plan import candidates, is_measured, make_plan
from loftq_exp.initialise.prequantized import check_types
from loftq_exp.initialise.workers import side_by_side
from loftq_exp.loftq.allocation import Precision
from loftq_exp.progress import progress
from loftq_exp.source.dequantized import open_values
from loftq_exp.source.finite import check_finite
from loftq_exp.source.layout import Layout, find_layout
from loftq_exp.source.locate import Source
from loftq_exp.source.selection import Selection
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors

log = logging.getLogger(__name__)

Item = tuple[Target, Precision]
"""A weight and a precision at which the initialisation needs it."""


def share(source: Source, config: RunConfig) -> None:
    """Compute decompositions of `source` together with the other shards, until the cache has all that its initialisation needs.

    Raises UserError if the checkpoint does not fit the settings, or the cache cannot be written.
    """
    wanted = made_from(source, config)
    if done_before(init_dir(config, digest_of(wanted)), wanted, config):
        return
    with open_values(source.folder) as tensors:
        check_types(tensors, source.folder)
        layout = find_layout(source.folder, config.model.kind, tensors.shapes(), config.model.trust_remote_code,
                             Selection.of(config.quant))  # fmt: skip
        check_fit(layout, config)
        items = in_order(_needed(layout, config), config.initialise.shard, config.initialise.shards)
        check_finite(
            tensors,
            dict.fromkeys(
                name for target, _ in items[: len(items) // config.initialise.shards] for name in target.tensors
            ),
        )
        decomposer = Decomposer(config)
        _calibrate(decomposer, source, wanted, config, tensors, layout)
        _compute(decomposer, tensors, items, config)


def in_order(items: Sequence[Item], shard: int, shards: int) -> list[Item]:
    """Return the items of this shard, every `shards`-th one, then those of the others from the end, which they reach last."""
    own = items[shard::shards]
    others = [item for position, item in enumerate(items) if position % shards != shard]
    return [*own, *reversed(others)]


def _needed(layout: Layout, config: RunConfig) -> list[Item]:
    """Return every weight at its precision or, if the precisions follow from measured errors, at all candidates."""
    if is_measured(config.quant):
        return [(target, each) for target in layout.targets for each in candidates(target, config.quant)]
    plan = make_plan(layout, config.quant)
    return [(target, plan[target.module]) for target in layout.targets]


def _calibrate(
    decomposer: Decomposer,
    source: Source,
    wanted: MadeFrom,
    config: RunConfig,
    tensors: CheckpointTensors,
    layout: Layout,
) -> None:
    """Collect the statistics in one process, or find them in the cache."""
    if config.quant.calibration == "none":
        return
    with decomposer.cache.claim(f"calibration-{digest_of(wanted)}"):
        decomposer.calibration = calibrate(source, wanted["source"], config, tensors, layout)


def _compute(decomposer: Decomposer, tensors: CheckpointTensors, items: Sequence[Item], config: RunConfig) -> None:
    """Compute the items that no process has; then wait for those that another process held, or compute them if it died."""
    held: list[Item] = []
    computed = ready = 0

    def unless_taken(item: Item) -> tuple[Item, Decomposed | None]:
        return item, decomposer.claimed(item[0], item[0].read(tensors.read), item[1], wait=False)

    def in_turn(item: Item) -> tuple[Item, Decomposed | None]:
        return item, decomposer.claimed(item[0], item[0].read(tensors.read), item[1], wait=True)

    with progress(f"shard {config.initialise.shard} of {config.initialise.shards}") as advance:
        for attempt, left in ((unless_taken, items), (in_turn, held)):  # `held` is filled by the first
            for item, found in side_by_side(attempt, left, decomposer.device):
                if found is None:
                    held.append(item)
                    continue
                computed += not found.cache_hit
                ready += 1
                advance(ready, len(items), f"{computed} computed here")
    log.info("share: shard %d of %d computed %d of %d, the others are in the cache", config.initialise.shard,
             config.initialise.shards, computed, len(items))  # fmt: skip
