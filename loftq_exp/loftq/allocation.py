"""One option for each item, of least cost in sum within budgets: a multiple-choice knapsack, solved as an integer programme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

GAP = 1e-6
"""How far, relative to itself, the cost found may be from the least one: far below what an error can be told from."""


@dataclass(frozen=True)
class Precision:
    """What one weight gets: bits a code, and the rank of its factors."""

    bits: int
    rank: int


@dataclass(frozen=True)
class Option:
    """What an item may be given."""

    cost: float
    """What it costs: finite, not negative."""
    sizes: tuple[int, ...]
    """How much of each budget it takes."""


def allocate(items: Sequence[Sequence[Option]], budgets: Sequence[Fraction | int]) -> list[int]:
    """Which option each item gets: the index into its options.

        minimise  sum_i sum_o cost[i, o] x[i, o]
        so that   sum_o x[i, o] = 1 for each i,   sum_i sum_o size_b[i, o] x[i, o] <= budget_b for each b,   x in {0, 1}

    by HiGHS, to within `GAP` of the least cost; budgets hold exactly.

    Raises:
        ValueError: where no choice is within the budgets.
    """
    costs = np.array([option.cost for options in items for option in options])
    owners = np.repeat(np.arange(len(items)), [len(options) for options in items])
    each = np.arange(len(costs))
    one_each = coo_array((np.ones(len(costs)), (owners, each)), shape=(len(items), len(costs)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for number, budget in enumerate(budgets):
        sizes = [option.sizes[number] for options in items for option in options]
        # In units of their greatest common divisor sizes are small whole numbers, which the solver's tolerance cannot blur.
        unit = math.gcd(*sizes) or 1
        row = np.array([[size // unit for size in sizes]], dtype=np.float64)
        constraints.append(LinearConstraint(row, -np.inf, math.floor(Fraction(budget) / unit)))
    found = milp(
        costs / (costs.max(initial=0.0) or 1.0),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise ValueError(f"no choice of options is within the budgets: {found.message}")
    firsts = np.searchsorted(owners, np.arange(len(items)))
    return [int(found.x[first : first + len(options)].argmax()) for first, options in zip(firsts, items, strict=True)]
