"""Refuse settings that do not fit a model's weights, before any is quantized."""

from __future__ import annotations

import math

from loftq_exp.config import QuantConfig, RunConfig
from loftq_exp.errors import UserError
from loftq_exp.schemes import FORMATS
from loftq_exp.source.layout import Layout
from loftq_exp.source.target import Target
from loftq_exp.storage.format import storage_format


def check_fit(layout: Layout, config: RunConfig) -> None:
    """Raise UserError if rank, block size or storage do not fit a target's shape or class, or a setting its adapter."""
    check_shapes(layout, config.quant)
    wrapped = _wrapped(layout)
    for option, form in (("save_format", config.save_format), ("train.backbone", config.train.backbone)):
        if wrapped and form in FORMATS and not storage_format(form).holds_parameters:
            raise UserError(f"{option}={form}: {FORMATS[form].layers} replace linear layers alone, and PEFT adapts {wrapped.parameter} "
                            f"as a parameter; use {option}=dense")  # fmt: skip
    if layout.left_dense and storage_format(config.save_format).needs_plain_linears:
        raise UserError(f"save_format={config.save_format}: transformers loads {layout.left_dense[0]} only as a dense layer; "
                        "use save_format=dense")  # fmt: skip


def check_shapes(layout: Layout, quant: QuantConfig) -> None:
    """Raise UserError if rank or block size do not fit a target's shape, or dropout or ranks its adapter."""
    if wrapped := _wrapped(layout):
        _check_parameter(wrapped.parameter, quant)
    largest = max(layout.targets, key=lambda target: min(target.shape))
    if quant.rank > min(largest.shape):  # a smaller weight gets its largest possible rank, see `make_plan`
        raise UserError(f"quant.rank={quant.rank}: no weight has such a rank, {largest.module} is {largest.shape[0]} x "
                        f"{largest.shape[1]}; choose a rank of at most {min(largest.shape)}")  # fmt: skip
    for target in layout.targets:
        if quant.type.startswith(("nf", "uniform")) and math.prod(target.shape) % quant.block_size:
            raise UserError(f"quant.block_size={quant.block_size}: does not divide the {math.prod(target.shape)} values of "
                            f"{target.module} ({target.shape[0]} x {target.shape[1]}); choose a smaller power of two")  # fmt: skip


def _wrapped(layout: Layout) -> Target | None:
    """The first target that PEFT adapts as a parameter."""
    return next(filter(layout.as_parameter, layout.targets), None)


def _check_parameter(name: str, quant: QuantConfig) -> None:
    """Raise UserError for settings that PEFT does not have for the adapter of a parameter."""
    if quant.dropout:
        raise UserError(f"quant.dropout={quant.dropout:g}: PEFT has no dropout for {name}, which it adapts as a parameter; "
                        "use quant.dropout=0")  # fmt: skip
    if quant.rule == "error+rank":
        raise UserError(
            f"quant.allocation=error+rank: PEFT has one rank for all matrices of {name}; use quant.allocation=error"
        )
