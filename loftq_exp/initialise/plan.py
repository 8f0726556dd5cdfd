"""Assign bits and a rank to each weight, by the paper's mixed precision, explicit patterns or a budget.

A plan follows from the layout and the settings. With a budget it also depends on the measured error of every choice.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from loftq_exp.config.quant import PAPER_WIDTHS, QuantConfig
from loftq_exp.errors import UserError
from loftq_exp.loftq.allocation import Option, Precision, allocate
from loftq_exp.source.layout import Layout
from loftq_exp.source.selection import expression, numbers_in
from loftq_exp.source.target import Target

log = logging.getLogger(__name__)

VERSION = 1
"""Increment it when the same errors lead to another plan."""


Plan = dict[str, Precision]
"""The precision of each target by its module, in the layout's order."""
Errors = Mapping[Precision, float]
"""Relative errors ||W - Q - s B A|| / ||W|| of one weight at each candidate precision."""


def is_measured(quant: QuantConfig) -> bool:
    """Whether the plan depends on measured errors."""
    return quant.rule in ("error", "error+rank")


def candidates(target: Target, quant: QuantConfig) -> list[Precision]:
    """The precisions that a budget may assign to a weight: every width with every rank that its shape allows.

    A weight too small for all of them has its largest possible rank alone.
    """
    ranks = [rank for rank in quant.ranks if rank <= min(target.shape)] or [min(target.shape)]
    return [Precision(bits, rank) for bits in quant.widths for rank in ranks]


def make_plan(layout: Layout, quant: QuantConfig, errors: Mapping[str, Errors] | None = None) -> Plan:
    """The plan of the settings. If `is_measured`, `errors` must give each module's errors at all its `candidates`.

    A weight too small for `quant.rank` gets its largest possible rank. Raises UserError if a pattern matches no weight, or
    no pattern matches a weight.
    """
    if quant.bits_per_layer is not None:
        bits = _by_pattern(layout, quant.bits_per_layer)
    elif quant.rule == "paper":
        bits = _by_paper(layout, quant)
    elif is_measured(quant):
        if errors is None:
            raise ValueError("the plan of a budget follows from measured errors")
        return _by_error(layout, quant, errors)
    else:
        bits = {target.module: int(quant.bits) for target in layout.targets}
    return {t.module: Precision(bits[t.module], min(quant.rank, *t.shape)) for t in layout.targets}


def _by_paper(layout: Layout, quant: QuantConfig) -> dict[str, int]:
    """Give the first k = floor(L (bits - 2) / 2) of L layers 4 bits and the others 2.

    Of 32 layers, k is 16, 8 and 4 at 3, 2.5 and 2.25 bits.
    """
    low, high = PAPER_WIDTHS
    count = math.floor(len(layout.blocks) * (quant.exact_bits - low) / (high - low))
    first = set(layout.blocks[:count])
    return {target.module: high if target.block in first else low for target in layout.targets}


def _by_pattern(layout: Layout, patterns: Mapping[str, int]) -> dict[str, int]:
    numbers = numbers_in(target.module for target in layout.targets)
    matchers = {pattern: re.compile(expression(pattern, numbers)) for pattern in patterns}
    bits: dict[str, int] = {}
    used: set[str] = set()
    for target in layout.targets:
        pattern = next((name for name, matcher in matchers.items() if matcher.fullmatch(target.module)), None)
        if pattern is None:
            raise UserError(f"quant.bits_per_layer: no pattern matches {target.module}; add one that does, or *:BITS for all "
                            "other weights")  # fmt: skip
        used.add(pattern)
        bits[target.module] = patterns[pattern]
    for pattern, matcher in matchers.items():
        if pattern not in used:
            names = [target.module for target in layout.targets]
            taken = any(matcher.fullmatch(name) for name in names)
            why = "that an earlier pattern does not, and the first one counts" if taken else f"({names[0]} is one)"
            raise UserError(f"quant.bits_per_layer.{pattern}: matches no weight {why}; correct or remove it")
    return bits


def _by_error(layout: Layout, quant: QuantConfig, errors: Mapping[str, Errors]) -> Plan:
    """The plan of least error within two budgets: the code bits of quant.bits and the adapter size of quant.rank.

    The error is the sum of the squared relative errors ||W - Q - s B A||^2 / ||W||^2, in which each weight counts once. The
    small attention projections thus matter as much as large weights, and cost few bits. By perplexity this is better than
    absolute errors, or relative errors times the number of values; see docs/low-bit.md.
    """
    items = [
        [Option(error**2, _sizes(target, precision)) for precision, error in errors[target.module].items()]
        for target in layout.targets
    ]
    values = sum(math.prod(target.shape) for target in layout.targets)
    factors = sum(sum(target.shape) * quant.rank for target in layout.targets)
    chosen = allocate(items, [quant.exact_bits * values, Fraction(factors)])
    return {
        target.module: list(errors[target.module])[option]
        for target, option in zip(layout.targets, chosen, strict=True)
    }


def _sizes(target: Target, precision: Precision) -> tuple[int, int]:
    """The cost of a precision in the two budgets: bits of all codes, and values of both factors."""
    return math.prod(target.shape) * precision.bits, sum(target.shape) * precision.rank


def code_bits(layout: Layout, plan: Plan) -> float:
    """Bits per code, averaged over the values of all targets. Scales are not included; they cost the same at every width."""
    sizes = [_sizes(target, plan[target.module])[0] for target in layout.targets]
    return sum(sizes) / sum(math.prod(target.shape) for target in layout.targets)


def describe_plan(layout: Layout, plan: Plan, quant: QuantConfig) -> dict[str, Any]:
    """A summary of the plan in plain containers: `rule`, mean `code_bits`, `adapter_values` and `kinds`.

    `kinds` counts, for each kind of module, its weights and values by bits and its weights by rank.
    """
    kinds: dict[str, dict[str, Counter[str]]] = {}
    for target in layout.targets:
        precision = plan[target.module]
        counts = kinds.setdefault(target.kind, {"weights": Counter(), "values": Counter(), "ranks": Counter()})
        counts["weights"][str(precision.bits)] += 1
        counts["values"][str(precision.bits)] += math.prod(target.shape)
        counts["ranks"][str(precision.rank)] += 1
    return {
        "rule": quant.rule,
        "code_bits": code_bits(layout, plan),
        "adapter_values": sum(_sizes(target, plan[target.module])[1] for target in layout.targets),
        "kinds": {
            kind: {
                name: dict(sorted(counter.items(), key=lambda item: int(item[0]))) for name, counter in counts.items()
            }
            for kind, counts in kinds.items()
        },
    }


def log_plan(described: dict[str, Any]) -> None:
    """Log the plan, unless all weights have the same precision."""
    kinds = described["kinds"].values()
    widths = sorted({int(bits) for counts in kinds for bits in counts["weights"]})
    ranks = sorted({int(rank) for counts in kinds for rank in counts["ranks"]})
    if len(widths) == len(ranks) == 1:
        return
    log.info("quantize: %.4g bits per value by %s; weights (and millions of values) by bits%s:", described["code_bits"],
             described["rule"], ", weights by rank" if len(ranks) > 1 else "")  # fmt: skip
    headings = [f"{bits} bits" for bits in widths] + [f"rank {rank}" for rank in ranks if len(ranks) > 1]
    rows = [
        [kind, *(f"{counts['weights'].get(str(bits), 0)} ({counts['values'].get(str(bits), 0) / 1e6:.1f})" for bits in widths),
         *(str(counts["ranks"].get(str(rank), 0)) for rank in ranks if len(ranks) > 1)]
        for kind, counts in described["kinds"].items()
    ]  # fmt: skip
    first = max(len(row[0]) for row in rows)
    for row in [["", *headings], *rows]:
        log.info("  %s%s", row[0].ljust(first), "".join(cell.rjust(14) for cell in row[1:]))
