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
    keys = {block: statistics_key(block=block, **shaping) for block in layout.blocks}
    found = {block: stored for block, key in keys.items() if (stored := cache.find(key))}
    if len(found) == len(keys):
        for stored in found.values():
            calibration.add(stored)
        log.info("calibrate: %d tokens, from the cache", calibration.tokens)
        return calibration
    began = time.perf_counter()
    samples = calibration_samples(source, config)
    _warn_of_few(tokens_of(samples), layout)
    runner = BlockRunner(source, layout, config.model.kind, config.model.trust_remote_code, tensors, batches_of(samples),
                         compute_device(config.device), Spill(config.cache_path))  # fmt: skip
    with progress("calibrate") as advance:
        for number, block in enumerate(runner.blocks, start=1):
            with runner.loaded(block):
                if block not in found:
                    statistics = runner.collect(block, config.quant.calibration, advance=initialiser is None)
                    found[block] = cache.put(keys[block], statistics)
                elif initialiser is None:
                    runner.advance(block)
                calibration.add(found[block])
                if initialiser is not None:
                    runner.set_weights(initialiser(block, calibration))
                    runner.advance(block)
            advance(number, len(keys), block)
    calibration.seconds = time.perf_counter() - began
    log.info("calibrate: %d samples, %d tokens, %.1f s", len(samples), calibration.tokens, calibration.seconds)
    return calibration


def prefix_digest(*shaping: Any) -> str:
    """A digest of what shapes the initialised blocks before a block."""
    return digest_of(list(shaping))


def _warn_of_few(tokens: int, layout: Layout) -> None:
    widest = max(target.shape[1] for target in layout.targets)
    if tokens < widest:
        log.warning("calibrate: %d tokens are fewer than the %d inputs of the widest layer, so that its statistics are rough; "
                    "raise calibration.samples or calibration.length", tokens, widest)  # fmt: skip
