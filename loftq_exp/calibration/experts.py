"""The inputs of each expert's matrices: the tokens that the router sends to it, and what the expert makes of them.

The first matrix of an expert (`gate_up_proj`, or `up_proj` without a gate) reads hidden states of the layer, and `down_proj`
the activation between them. Both are taken from the arguments of the experts' module, so they do not depend on the
implementation with which transformers computes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loftq_exp.calibration.moments import (
    Moment,
    Moments,
    Statistics,
    all_finite,
    check_finite,
    counted,
    hooked,
    symmetric_mean,
)
from loftq_exp.errors import UserError
from loftq_exp.source.blocks import is_expert_weight

LAST = "down_proj"
"""The parameter that reads the activation. All others of a module of experts read hidden states of the layer."""


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of a parameter (experts, ., .): the module and the parameter's name in it, and the expert's number."""

    module: str
    parameter: str
    expert: int


def expert_matrix(model: nn.Module, name: str) -> ExpertMatrix | None:
    """The matrix with the name of a target, such as `model.layers.0.mlp.experts.down_proj.3`; None for another module."""
    path, _, number = name.rpartition(".")
    owner, _, parameter = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    value = module._parameters.get(parameter)
    if value is None or not is_expert_weight(module, value) or not number.isdigit() or int(number) >= len(value):
        return None
    return ExpertMatrix(owner, parameter, int(number))


class ExpertCollector:
    """Accumulates the inputs of some experts' matrices while their model runs."""

    def __init__(self, model: nn.Module, matrices: Mapping[str, ExpertMatrix], kind: str) -> None:
        """Prepare to collect from these matrices, by the names of their targets. Raises UserError for unknown parts."""
        self._matrices = matrices
        self._of: dict[str, list[ExpertMatrix]] = {}
        for matrix in matrices.values():
            self._of.setdefault(matrix.module, []).append(matrix)
        self._modules = {owner: model.get_submodule(owner) for owner in self._of}
        for owner, module in self._modules.items():
            _check_form(owner, module)
        self._layers = Moments(kind)
        """Of all tokens that reach a module, if a matrix that reads hidden states is collected."""
        self._own = Moments(kind)
        self._mask: torch.Tensor | None = None

    def collecting(self) -> AbstractContextManager[None]:
        """Collect from every forward inside the block."""
        return hooked(self._modules, self._read)

    def next_batch(self, mask: torch.Tensor | None = None) -> None:
        """Begin a batch. `mask` (batch, length) is 0 for padding, which is not counted; None: there is none."""
        self._mask = mask

    @torch.no_grad()
    def _read(self, owner: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        hidden, chosen = list(given.values())[:2]
        hidden, chosen = counted(owner, hidden.detach(), self._mask), counted(owner, chosen, self._mask)
        check_finite(owner, hidden)
        if any(matrix.parameter != LAST for matrix in self._of[owner]):
            self._layers.add(owner, hidden)
        for matrix in self._of[owner]:
            rows = hidden[torch.where(chosen == matrix.expert)[0]]
            if matrix.parameter == LAST:
                rows = _activation(module, matrix.expert, rows)
                check_finite(f"{owner}.{LAST}.{matrix.expert}", rows)
            self._own.add(matrix, rows)

    def statistics(self) -> dict[str, Statistics]:
        """The statistics of every matrix, see `filled`. The sums are freed meanwhile; collect once.

        Raises UserError if no token reached a layer.
        """
        found: dict[str, Statistics] = {}
        for name, matrix in self._matrices.items():
            own = self._own.pop(matrix, None)
            layer = None if matrix.parameter == LAST else self._layers.get(matrix.module)
            if own is None or (layer is not None and not layer.tokens):
                raise UserError(f"{name}: has read no calibration text ({len(self._matrices)} such matrices); "
                                "give text that reaches it, or name the other layers in `modules`")  # fmt: skip
            found[name] = filled(own, layer)
            if not all_finite(found[name].hessian):
                raise UserError(f"{name}: the squares of its inputs are too large for float32; give other text")
        return found


def filled(own: Moment, layer: Moment | None) -> Statistics:
    """The mean over an expert's tokens. Where they are fewer than its inputs, the missing ones are filled.

    An expert with t tokens and n > t inputs gets H = (sum of x x' + (n - t) F) / n. F is the mean over all tokens of the
    `layer`, whose hidden states all experts read. Without one, for the activation between an expert's own matrices, F is
    the identity times the mean square of its inputs, the plain norm. `tokens` is t.
    """
    width, tokens = own.sum.shape[0], own.tokens
    missing = max(width - tokens, 0)
    total = own.sum
    if missing and layer is not None:
        total = total + layer.sum * (missing / layer.tokens)
    elif missing:
        diagonal = own.sum if own.sum.ndim == 1 else own.sum.diagonal()
        square = float(diagonal.mean()) / tokens if tokens else 1.0
        plain = torch.full_like(diagonal, missing * square)
        total = total + (plain if own.sum.ndim == 1 else plain.diag())
    return Statistics(symmetric_mean(total, tokens + missing), tokens)


def _activation(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What the expert's `down_proj` reads of these hidden states, (tokens, in of down_proj)."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, first)[expert]
    inner = rows.to(weight.dtype) @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        inner = inner + getattr(module, f"{first}_bias")[expert]
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)


def _check_form(owner: str, module: nn.Module) -> None:
    """Raise UserError unless the module computes its experts as transformers' own implementations do."""
    parts = ["has_gate", "has_bias", LAST, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"]
    if lacks := [part for part in parts if not hasattr(module, part)]:
        raise UserError(f"{owner}: its experts have no {lacks[0]}, so that their inputs are not known; leave them out by "
                        "quant.exclude=[experts.*], or use quant.calibration=none")  # fmt: skip
