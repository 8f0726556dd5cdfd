"""Calibration statistics: second moments of the inputs of linear layers and experts' matrices while a model reads text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from loftq_exp.calibration.experts import ExpertCollector, expert_matrix
from loftq_exp.calibration.linears import LinearCollector
from loftq_exp.calibration.moments import KINDS, Statistics
from loftq_exp.errors import UserError
from loftq_exp.source.blocks import block_lists, block_of, linear_shape
from loftq_exp.source.experts import expert_parameters


class Collector:
    """Accumulates the inputs of targets, by name, while their model runs."""

    def __init__(self, model: nn.Module, names: Sequence[str], kind: str) -> None:
        """Prepare to collect from linear layers and experts' matrices of the `model`."""
        if kind not in KINDS:
            raise UserError(f"kind={kind}: unknown; choose {' or '.join(KINDS)}")
        experts = {name: matrix for name in names if (matrix := expert_matrix(model, name))}
        linears = {name: model.get_submodule(name) for name in names if name not in experts}
        self._names = names
        self._parts = (LinearCollector(linears, kind), ExpertCollector(model, experts, kind))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from every forward inside the block."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.collecting())
            yield

    def next_batch(self, mask: torch.Tensor | None = None) -> None:
        """Begin a batch. `mask` (batch, length) is 0 for padding, which is not counted; None: there is none."""
        padding = None if mask is None or bool(mask.all()) else mask
        for part in self._parts:
            part.next_batch(padding)

    def statistics(self) -> dict[str, Statistics]:
        """The statistics of every target; layers that share their input share the tensor. Collect once.

        Raises UserError if a target has read nothing.
        """
        found = {name: one for part in self._parts for name, one in part.statistics().items()}
        return {name: found[name] for name in self._names}


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    data: Iterable[Mapping[str, torch.Tensor]],
    kind: str = "full",
    modules: Sequence[str] | None = None,
) -> dict[str, Statistics]:
    """Return the second moment H = E[x x'] of the inputs of linear layers over text, for `loftq_init(..., hessian=H)`.

    All H are in memory at once: 8 n^2 bytes while collecting, 4 n^2 afterwards, for each distinct input of width n, and for
    each matrix of each expert. So are the inputs of all layers over one batch.

    Args:
        model: in memory, on any device. It is set to evaluation while it reads; its parameters are not changed.
        data: batches of keyword arguments of the model's forward, such as input_ids and attention_mask, each (batch, length).
            Tokens with attention_mask 0 are not counted. Encoder-decoders need batches without padding.
        kind: `full`, or `diagonal`: E[x_j^2] of each input alone.
        modules: names of linear layers, and of experts' matrices such as `model.layers.0.mlp.experts.down_proj.3`;
            None: all in the model's blocks.

    Returns:
        By name: `hessian`, float32 (in, in) or (in,), and `tokens`. An expert that read fewer tokens than it has inputs
        is filled, see docs/calibration.md. Two collections of the same text, in other
        batches or on other threads, differ by at most `BOUND` sqrt(h_ii h_jj).

    Raises:
        UserError: if there is no text, a module is no linear layer or reads nothing, or inputs are not finite.
    """
    collector = Collector(model, _names(model, modules), kind)
    batches, training = 0, {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        with collector.collecting():
            for batch in data:
                collector.next_batch(_mask(model, batch))
                model(**batch)
                batches += 1
    finally:
        for name, module in model.named_modules():
            module.training = name in training
    if not batches:
        raise UserError("data: there is no batch; give at least one")
    return collector.statistics()


def _names(model: nn.Module, modules: Sequence[str] | None) -> Sequence[str]:
    """The names of the targets to collect from. Raises UserError for one that is none."""
    named = dict(model.named_modules())
    if modules is None:
        stacks = block_lists(model)
        modules = [name for name, module in named.items() if linear_shape(module) and block_of(name, stacks)]
        for name in expert_parameters(model, stacks):
            modules += [f"{name}.{expert}" for expert in range(len(model.get_parameter(name)))]
        if not modules:
            raise UserError(f"{type(model).__name__}: has no linear layer in a block; name them in `modules`")
    for name in modules:
        if (name not in named or linear_shape(named[name]) is None) and not expert_matrix(model, name):
            raise UserError(
                f"modules: {name} is no linear layer of {type(model).__name__}; give names of nn.Linear layers"
            )
    return modules


def _mask(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the mask of a batch; None without padding. Raise UserError for no batch, or padding in an encoder-decoder."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"data: a {type(batch).__name__} is no batch; give a list of mappings, such as {{'input_ids': IDS}}"
        )
    mask = batch.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return mask if padded else None
    decoder_mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    padded |= decoder_mask is not None and not bool(decoder_mask.all())
    padded |= labels is not None and bool((labels < 0).any())
    if padded:
        raise UserError("data: a batch has padding, and an encoder-decoder's layers read two texts; "
                        "give batches of rows of one length")  # fmt: skip
    return None
