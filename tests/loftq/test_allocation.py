"""The integer programme compared with an exhaustive search."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loftq_exp.loftq.allocation import GAP, Option, allocate

costs = st.floats(0, 1e6, allow_subnormal=False) | st.floats(1e-3, 1)
options = st.builds(Option, costs, st.tuples(st.integers(0, 40), st.integers(0, 10**9)))
items = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def totals(items: list[list[Option]], choice: tuple[int, ...]) -> tuple[float, int, int]:
    picked = [options[index] for options, index in zip(items, choice, strict=True)]
    return sum(o.cost for o in picked), sum(o.sizes[0] for o in picked), sum(o.sizes[1] for o in picked)


@settings(max_examples=60)
@given(items, st.fractions(0, 1), st.fractions(0, 1))
def test_nothing_within_the_budgets_costs_less(items: list[list[Option]], first: Fraction, second: Fraction) -> None:
    choices = list(itertools.product(*(range(len(options)) for options in items)))
    budgets = [share * max(totals(items, choice)[place] for choice in choices)
               for place, share in ((1, first), (2, second))]  # fmt: skip
    within = [t for t in (totals(items, choice) for choice in choices) if t[1] <= budgets[0] and t[2] <= budgets[1]]
    if not within:
        with pytest.raises(ValueError, match="no choice of options is within the budgets"):
            allocate(items, budgets)
        return
    cost, *sizes = totals(items, tuple(allocate(items, budgets)))
    assert all(size <= budget for size, budget in zip(sizes, budgets, strict=True))
    largest = max(option.cost for options in items for option in options)
    assert cost <= min(within)[0] + GAP * len(items) * largest


@given(items)
def test_without_a_budget_each_item_gets_its_cheapest(items: list[list[Option]]) -> None:
    spread = [sorted({option.cost for option in options}) for options in items]
    largest = max(costs[-1] for costs in spread)
    assume(all(later - cost > 1e-3 * largest for costs in spread for cost, later in itertools.pairwise(costs)))
    chosen = allocate(items, [])
    assert [options[index].cost for options, index in zip(items, chosen, strict=True)] == [c[0] for c in spread]


def test_a_budget_holds_to_the_last_value_of_a_large_model() -> None:
    """80 layers of Llama-2-70B's projections: one value less than four of them at 4 bits leaves three."""
    values = 8192 * 28672
    item = [Option(1.0, (2 * values,)), Option(0.1, (4 * values,))]
    budget = 80 * 2 * values + 4 * 2 * values
    assert sum(allocate([item] * 80, [budget])) == 4
    assert sum(allocate([item] * 80, [budget - 1])) == 3
    assert sum(allocate([item] * 80, [budget + Fraction(1, 2)])) == 4
