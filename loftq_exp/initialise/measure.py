"""The errors of the weights of an initialised checkpoint, from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loftq_exp.artifact.adapter import default_adapter, open_adapter
from loftq_exp.artifact.backbone import backbone_of
from loftq_exp.artifact.folder import Initialised
from loftq_exp.initialise.calibrate import Calibration
from loftq_exp.source.target import Target
from loftq_exp.source.tensors import CheckpointTensors

Measure = Callable[[Target], tuple[float, float | None]]
"""f(target) -> the relative errors of its weight and of its outputs; the latter is None without calibration."""


@contextmanager
def measuring(
    init: Initialised, tensors: CheckpointTensors, calibration: Calibration | None, device: torch.device
) -> Iterator[Measure]:
    """Yield a function that measures ||W - Q - s B A|| / ||W|| of a target. Files are closed when the block ends.

    `tensors` are those of the pre-trained model, `calibration` has the norms of the outputs.
    """
    with backbone_of(init) as backbone, open_adapter(default_adapter(init.folder), backbone, checked=False) as adapter:

        def errors(target: Target) -> tuple[float, float | None]:
            module, weight = target.module, target.read(tensors.read).to(device, torch.float32)
            difference = weight - adapter.merged(backbone.weights[module], backbone.values(module)).to(device)
            error = _relative(difference, weight)
            if calibration is None:
                return error, None
            metric = calibration.metric(module, device)
            return error, _relative(metric.times_root(difference), metric.times_root(weight))

        yield errors


def _relative(difference: torch.Tensor, weight: torch.Tensor) -> float:
    """||difference|| / ||weight||, summed in float64."""
    return float(difference.double().norm() / weight.double().norm().clamp(min=1e-300))
