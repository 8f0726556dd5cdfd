"""The calibration of a quantize stage: the norm in which each weight is decomposed, from statistics cached by content."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loftq_exp.calibration.cache import StatisticsCache, StoredStatistics, statistics_key
from loftq_exp.calibration.samples import batches_of, calibration_origin, calibration_samples, tokens_of
from loftq_exp.calibration.spill import Spill
from loftq_exp.calibration.streaming import BlockRunner
from loftq_exp.config import RunConfig, digest_of
from loftq_exp.device import compute_device
from loftq_exp.loftq import Metric, metric_of
from loftq_exp.progress import progress
from loftq_exp.source.layout import Layout
from loftq_exp.source.locate import Source
from loftq_exp.source.tensors import CheckpointTensors

log = logging.getLogger(__name__)

METRICS_HELD = 3
"""Roots of second moments in memory: layers that share an input follow each other, with others in between."""

EXPERTS_BYTES = 4 << 30
"""The most bytes of the running sums of a block's experts at a time. The block reads the text once for each such part."""

Initialiser = Callable[[str, "Calibration"], Mapping[str, torch.Tensor]]
"""f(block, calibration) -> the values Q + s B A of the block's targets by module, for quant.order=sequential."""


class Calibration:
    """The second moments of the targets' inputs: their digests, and their norms when a weight is decomposed."""

    def __init__(self) -> None:
        self._stored: dict[str, StoredStatistics] = {}
        self._metrics: OrderedDict[str, Metric] = OrderedDict()
        self._lock = threading.Lock()
        self.tokens = 0
        """Tokens that the statistics are of, the most of any layer."""
        self.seconds = 0.0
        """Seconds that collecting them took; 0 if all were in the cache."""

    def experts(self, layout: Layout) -> dict[str, int]:
        """The number of experts' `matrices`, of those `filled` because they read fewer tokens than they have inputs, and of
        those `unread` by any token. Empty without experts.
        """
        tokens = {target: self._stored[target.module].tokens[target.module]
                  for target in layout.targets if target.expert is not None}  # fmt: skip
        if not tokens:
            return {}
        filled = sum(found < target.shape[1] for target, found in tokens.items())
        return {"matrices": len(tokens), "filled": filled, "unread": sum(not found for found in tokens.values())}

    def add(self, stored: StoredStatistics) -> None:
        """Add the statistics of a block."""
        self._stored |= dict.fromkeys(stored.tensors, stored)
        self.tokens = max(self.tokens, *stored.tokens.values())

    def digest(self, module: str) -> str:
        """The digest of the statistics of a module's inputs, for cache keys."""
        return self._stored[module].digests[module]

    def metric(self, module: str, device: torch.device) -> Metric:
        """The norm of a module's outputs. The last few are kept, for modules that share their input."""
        digest = self.digest(module)
        with self._lock:
            found = self._metrics.pop(digest, None)
            if found is None:
                while len(self._metrics) >= METRICS_HELD:
                    self._metrics.popitem(last=False)
                found = metric_of(self._stored[module].read(module).hessian.to(device))
            self._metrics[digest] = found
            return found


def calibrate(
    source: Source,
    content: Any,
    config: RunConfig,
    tensors: CheckpointTensors,
    layout: Layout,
    initialiser: Initialiser | None = None,
    prefix: Any = None,
) -> Calibration:
    """Collect the statistics of every target's inputs over the calibration text, or find them in the cache.

    Args:
        source: the model.
        content: digests of the model's content, for cache keys.
        config: the run's settings.
        tensors: the model's tensors.
        layout: the model's targets.
        initialiser: gives the initialised values of a block, with which later blocks are calibrated; None: the
            pre-trained model's.
        prefix: what shapes these values, for cache keys.

    Raises:
        UserError: if the text cannot be read, or does not reach a target.
    """
    cache, calibration = StatisticsCache(config.cache_path), Calibration()
    shaping = {"model": content, "kind": config.model.kind, "text": calibration_origin(config),
               "statistics": config.quant.calibration, "prefix": prefix}  # fmt: skip
    parts = {block: _parts(layout, block, config.quant.calibration) for block in layout.blocks}
    # The names of a part are in its key if it is not all linear layers of its block.
    named = bool(layout.excluded) or any(target.expert is not None for target in layout.targets)
    keys = {part: statistics_key(block=block, **shaping, **({"targets": part} if named else {}))
            for block in parts for part in parts[block]}  # fmt: skip
    found = {part: stored for part, key in keys.items() if (stored := cache.find(key))}
    if len(found) == len(keys):
        for stored in found.values():
            calibration.add(stored)
        log.info("calibrate: %d tokens, from the cache", calibration.tokens)
        _warn_of_filled(calibration.experts(layout))
        return calibration
    began = time.perf_counter()
    samples = calibration_samples(source, config)
    _warn_of_few(tokens_of(samples), layout)
    runner = BlockRunner(source, layout, config.model.kind, config.model.trust_remote_code, tensors, batches_of(samples),
                         compute_device(config.device), Spill(config.cache_path))  # fmt: skip
    with progress("calibrate") as advance:
        for number, block in enumerate(runner.blocks, start=1):
            with runner.loaded(block):
                missing = [part for part in parts[block] if part not in found]
                for part in missing:
                    passing = initialiser is None and part is missing[-1]
                    found[part] = cache.put(keys[part], runner.collect(block, config.quant.calibration, passing, part))
                if initialiser is None and not missing:
                    runner.advance(block)
                for part in parts[block]:
                    calibration.add(found[part])
                if initialiser is not None:
                    runner.set_weights(initialiser(block, calibration))
                    runner.advance(block)
            advance(number, len(parts), block)
    calibration.seconds = time.perf_counter() - began
    log.info("calibrate: %d samples, %d tokens, %.1f s", len(samples), calibration.tokens, calibration.seconds)
    _warn_of_filled(calibration.experts(layout))
    return calibration


def _parts(layout: Layout, block: str, kind: str) -> list[tuple[str, ...]]:
    """The names of a block's targets, in parts that are collected and stored together, see `EXPERTS_BYTES`."""
    inside = [target for target in layout.targets if target.block == block]
    parts, held = [[target.module for target in inside if target.expert is None]], 0
    for target in inside:
        if target.expert is None:
            continue
        size = 8 * target.shape[1] ** (2 if kind == "full" else 1)
        if held and held + size > EXPERTS_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(target.module)
        held += size
    return [tuple(part) for part in parts]


def prefix_digest(*shaping: Any) -> str:
    """A digest of what shapes the initialised blocks before a block."""
    return digest_of(list(shaping))


def _warn_of_few(tokens: int, layout: Layout) -> None:
    widest = max(target.shape[1] for target in layout.targets)
    if tokens < widest:
        log.warning("calibrate: %d tokens are fewer than the %d inputs of the widest layer, so that its statistics are rough; "
                    "raise calibration.samples or calibration.length", tokens, widest)  # fmt: skip


def _warn_of_filled(experts: Mapping[str, int]) -> None:
    if experts.get("filled"):
        log.warning("calibrate: %d of the %d matrices of experts read fewer tokens than they have inputs, %d of them none: their "
                    "statistics are filled, see docs/calibration.md; raise calibration.samples or calibration.length",
                    experts["filled"], experts["matrices"], experts["unread"])  # fmt: skip
