"""Choose one option per item so that the total cost is least within budgets: a multiple-choice knapsack, solved by MILP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

GAP = 1e-6
"""Relative gap allowed between the cost found and the least cost. It is far below the accuracy of a measured error."""


@dataclass(frozen=True)
class Precision:
    """Bits per code of one weight, and the rank of its factors."""

    bits: int
    rank: int


@dataclass(frozen=True)
class Option:
    """One choice for an item."""

    cost: float
    """Finite, not negative."""
    sizes: tuple[int, ...]
    """Amount taken from each budget."""


def allocate(items: Sequence[Sequence[Option]], budgets: Sequence[Fraction | int]) -> list[int]:
    """Return the index of the chosen option for each item.

        minimise    sum_i sum_o cost[i, o] x[i, o]
        subject to  sum_o x[i, o] = 1 for each i,   sum_i sum_o size_b[i, o] x[i, o] <= budget_b for each b,   x in {0, 1}

    HiGHS solves this to within `GAP` of the least cost. Budgets hold exactly.

    Raises:
        ValueError: if no choice is within the budgets.
    """
    costs = np.array([option.cost for options in items for option in options])
    owners = np.repeat(np.arange(len(items)), [len(options) for options in items])
    each = np.arange(len(costs))
    one_each = coo_array((np.ones(len(costs)), (owners, each)), shape=(len(items), len(costs)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for number, budget in enumerate(budgets):
        sizes = [option.sizes[number] for options in items for option in options]
        # Dividing by the greatest common divisor gives small integers, which the solver's tolerance cannot blur.
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
