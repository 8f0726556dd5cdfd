"""Which weight gets how many bits, and factors of what rank: the paper's mixed precisions, explicit patterns, a budget.

A plan follows from the layout, the settings and, where a budget is spent, from the measured error of every choice.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from loftq_exp.config.quant import PAPER_WIDTHS, QuantConfig
from loftq_exp.errors import UserError
from loftq_exp.loftq.allocation import Option, Precision, allocate
from loftq_exp.source.layout import Layout, Target

log = logging.getLogger(__name__)

VERSION = 1
"""Counted up whenever the plan that the same errors lead to changes."""


Plan = dict[str, Precision]
"""The precision of each target by its module, in the layout's order."""
Errors = Mapping[Precision, float]
"""Relative errors ||W - Q - s B A|| / ||W|| of one weight with each precision that it may get."""


def is_measured(quant: QuantConfig) -> bool:
    """Whether the plan follows from measured errors."""
    return quant.rule in ("error", "error+rank")


def candidates(target: Target, quant: QuantConfig) -> list[Precision]:
    """The precisions that a budget may give to a weight: every width with every rank that its shape allows."""
    return [Precision(bits, rank) for bits in quant.widths for rank in quant.ranks if rank <= min(target.shape)]


def make_plan(layout: Layout, quant: QuantConfig, errors: Mapping[str, Errors] | None = None) -> Plan:
    """The plan of the settings; where `is_measured`, from the `errors` of each module with all of its `candidates`.

    Raises UserError for a pattern that matches no weight, or a weight that no pattern matches.
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
    return {module: Precision(width, quant.rank) for module, width in bits.items()}


def _by_paper(layout: Layout, quant: QuantConfig) -> dict[str, int]:
    """The first k = floor(L (bits - 2) / 2) of the L layers get 4 bits, the others 2: of 32 layers 16, 8, 4 at 3, 2.5, 2.25."""
    low, high = PAPER_WIDTHS
    count = math.floor(len(layout.blocks) * (quant.exact_bits - low) / (high - low))
    first = set(layout.blocks[:count])
    return {target.module: high if target.block in first else low for target in layout.targets}


def _by_pattern(layout: Layout, patterns: Mapping[str, int]) -> dict[str, int]:
    numbers = {part for target in layout.targets for part in target.module.split(".") if part.isdigit()}
    matchers = {pattern: re.compile(_expression(pattern, numbers)) for pattern in patterns}
    bits: dict[str, int] = {}
    used: set[str] = set()
    for target in layout.targets:
        pattern = next((name for name, matcher in matchers.items() if matcher.fullmatch(target.module)), None)
        if pattern is None:
            raise UserError(f"quant.bits_per_layer: leaves out {target.module}; add a pattern that matches it, or *:BITS for all "
                            "that is left")  # fmt: skip
        used.add(pattern)
        bits[target.module] = patterns[pattern]
    for pattern, matcher in matchers.items():
        if pattern not in used:
            names = [target.module for target in layout.targets]
            taken = any(matcher.fullmatch(name) for name in names)
            why = "that an earlier pattern does not, and the first one counts" if taken else f"({names[0]} is one)"
            raise UserError(f"quant.bits_per_layer.{pattern}: matches no weight {why}; mend it or leave it out")
    return bits


def _expression(pattern: str, numbers: Iterable[str]) -> str:
    """A pattern as a regular expression: * is any text, ? any character, and a part N-M those of the `numbers` from N to M."""
    parts = []
    for part in pattern.split("."):
        if bounds := re.fullmatch(r"(\d+)-(\d+)", part):
            inside = [number for number in numbers if int(bounds[1]) <= int(number) <= int(bounds[2])]
            parts.append(f"(?:{'|'.join(inside)})" if inside else "(?!)")
        else:
            parts.append("".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in part))
    return r"\.".join(parts)


def _by_error(layout: Layout, quant: QuantConfig, errors: Mapping[str, Errors]) -> Plan:
    """The plan of least error within the budgets: code bits as of quant.bits, and an adapter as large as of quant.rank.

    The error is the sum of the squared relative errors ||W - Q - s B A||^2 / ||W||^2, in which each weight counts once: the
    small projections of attention matter like the large ones, and cost few bits. By perplexity that is better than absolute
    errors, and than relative ones times the weights' values; docs/low-bit.md has the figures.
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
    """What a precision takes of the two budgets: bits of all codes, and values of both factors."""
    return math.prod(target.shape) * precision.bits, sum(target.shape) * precision.rank


def code_bits(layout: Layout, plan: Plan) -> float:
    """Bits of the codes, averaged over the values of all targets. Scales come on top, the same at every width."""
    sizes = [_sizes(target, plan[target.module])[0] for target in layout.targets]
    return sum(sizes) / sum(math.prod(target.shape) for target in layout.targets)


def describe_plan(layout: Layout, plan: Plan, quant: QuantConfig) -> dict[str, Any]:
    """The plan in short, in plain containers: `rule`, mean `code_bits`, `adapter_values`, and by kind of module how many
    weights and values have which bits, and which ranks."""
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


def tell_plan(described: dict[str, Any]) -> None:
    """Prints the plan, where not all weights get the same."""
    kinds = described["kinds"].values()
    widths = sorted({int(bits) for counts in kinds for bits in counts["weights"]})
    ranks = sorted({int(rank) for counts in kinds for rank in counts["ranks"]})
    if len(widths) == len(ranks) == 1:
        return
    log.info("quantize: %.4g bits a value by %s; weights (and millions of values) by their bits%s:", described["code_bits"],
             described["rule"], ", weights by their rank" if len(ranks) > 1 else "")  # fmt: skip
    headings = [f"{bits} bits" for bits in widths] + [f"rank {rank}" for rank in ranks if len(ranks) > 1]
    rows = [
        [kind, *(f"{counts['weights'].get(str(bits), 0)} ({counts['values'].get(str(bits), 0) / 1e6:.1f})" for bits in widths),
         *(str(counts["ranks"].get(str(rank), 0)) for rank in ranks if len(ranks) > 1)]
        for kind, counts in described["kinds"].items()
    ]  # fmt: skip
    first = max(len(row[0]) for row in rows)
    for row in [["", *headings], *rows]:
        log.info("  %s%s", row[0].ljust(first), "".join(cell.rjust(14) for cell in row[1:]))
