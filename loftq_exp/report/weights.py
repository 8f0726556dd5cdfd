"""The error of every weight after every step, from the report of the initialisation that a run starts from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loftq_exp.report.collect import CONFIG, Found
from loftq_exp.report.summary import Row
from loftq_exp.whole import read_object

REPORT = "init_report.json"
"""As loftq_exp.artifact.folder.REPORT, whose import takes seconds."""
_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Errors:
    """Relative weight errors, averaged over the runs of one row.

    Attributes:
        steps: (run, step), mean over the weights after quantization alone and after each alternating step.
        layers: names of the layers, from first to last.
        modules: names of the modules of a layer.
        kept: (layer, module), error of the factors that are kept. NaN where a layer has no such module.
    """

    steps: np.ndarray
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    kept: np.ndarray


def errors_of(row: Row) -> Errors | None:
    """Return the errors of a row's weights. None if no initialisation of its runs is on this machine, or none has errors."""
    return averaged([weights for run in row.runs if (weights := _weights(run))])


def averaged(reports: Sequence[list[dict[str, Any]]]) -> Errors | None:
    """Return the errors of the weights of initialisations, averaged. None for none, or for those of different models."""
    if not reports or any(_names(weights) != _names(reports[0]) for weights in reports):
        return None
    layers, modules = _axes(_names(reports[0]))
    length = max(len(weight["errors"]) for weights in reports for weight in weights)
    steps = np.array(
        [np.mean([_padded(weight["errors"], length) for weight in weights], axis=0) for weights in reports]
    )
    total, count = np.zeros((2, len(layers), len(modules)))
    for weights in reports:
        for weight in weights:
            prefix, index, module = _parts(weight["name"])
            cell = list(layers).index((prefix, index)), list(modules).index(module)
            total[cell] += _kept(weight)
            count[cell] += 1
    kept = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return Errors(steps, _labels(layers), tuple(modules), kept)


def _weights(run: Found) -> list[dict[str, Any]]:
    """Return the weights of the initialisation that a run names. Empty if it was replaced by another, or has no errors."""
    start = read_object(run.path.with_name(CONFIG)).get("initialisation")
    if not isinstance(start, dict):
        return []
    report = read_object(Path(str(start.get("folder"))) / REPORT)
    weights = report.get("weights")
    if report.get("key") != start.get("key") or not isinstance(weights, list):
        return []
    return weights if all(isinstance(weight, dict) and _finite(weight.get("errors")) for weight in weights) else []


def _finite(errors: Any) -> bool:
    return (
        bool(errors)
        and isinstance(errors, list)
        and all(isinstance(error, (int, float)) and math.isfinite(error) for error in errors)
    )


def _names(weights: Sequence[dict[str, Any]]) -> list[str]:
    return [weight["name"] for weight in weights]


def _padded(errors: Sequence[float], length: int) -> list[float]:
    """Return the errors of `length` steps. A weight that takes no further step keeps its error."""
    return [*errors, *[errors[-1]] * (length - len(errors))]


def _kept(weight: dict[str, Any]) -> float:
    errors = weight["errors"]
    return float(weight.get("polished_error", errors[weight.get("kept_step", len(errors) - 1)]))


def _parts(name: str) -> tuple[str, int, str]:
    """Return a weight's stack, its layer in it, and its module. All experts of a layer are one module."""
    match = _BLOCK.fullmatch(name)
    stack, layer, module = match.groups() if match else ("", "0", name)
    return stack, int(layer), re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


def _axes(names: Sequence[str]) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    parts = [_parts(name) for name in names]
    stacks = list(dict.fromkeys(stack for stack, _, _ in parts))
    layers = sorted({(stack, layer) for stack, layer, _ in parts}, key=lambda each: (stacks.index(each[0]), each[1]))
    return tuple(layers), tuple(dict.fromkeys(module for _, _, module in parts))


def _labels(layers: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return the layers' numbers, after the part of the stack's name that tells several stacks apart."""
    stacks = {stack: stack.split(".") for stack, _ in layers}
    if len(stacks) == 1:
        return tuple(str(layer) for _, layer in layers)
    short = {
        stack: next(
            (part for part, *others in zip(parts, *stacks.values(), strict=False) if len(set(others)) > 1), stack
        )
        for stack, parts in stacks.items()
    }
    return tuple(f"{short[stack]} {layer}" for stack, layer in layers)
