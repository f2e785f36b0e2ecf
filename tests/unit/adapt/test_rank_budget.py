"""Ranks that cost exactly the budget, against all possible ranks of small problems (SPEC F2)."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.adapt.rank_budget import allocate_ranks
from vlmtune.types import VlmtuneError

IMPORTANCE = st.floats(0.0, 1e6, allow_nan=False).map(lambda value: float(f"{value:.3g}"))
COSTS = st.sampled_from([1, 7, 128, 577, 2112])


@st.composite
def problems(draw, largest: int = 30, costs=COSTS):
    """(importance, costs, a budget that some ranks cost)."""
    size = draw(st.integers(1, largest))
    names = [f"m{n}" for n in range(size)]
    importance = dict(zip(names, draw(st.lists(IMPORTANCE, min_size=size, max_size=size)), strict=True))
    if max(importance.values()) == 0:
        importance["m0"] = 1.0
    cost = dict(zip(names, draw(st.lists(costs, min_size=size, max_size=size)), strict=True))
    some = draw(st.lists(st.integers(1, 16), min_size=size, max_size=size))
    return importance, cost, sum(4 * n * c for n, c in zip(some, cost.values(), strict=True))


def spent(ranks: dict[str, int], costs: dict[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from([0.0, 0.5, 1.0]))
def test_exact_within_bounds_and_monotone(problem, power):
    importance, costs, budget = problem
    ranks = allocate_ranks(importance, costs, budget, power=power)
    assert list(ranks) == list(importance)
    assert spent(ranks, costs) == budget
    assert all(rank % 4 == 0 and 4 <= rank <= 64 for rank in ranks.values())
    for one, other in itertools.permutations(ranks, 2):
        if costs[one] == costs[other] and importance[one] > importance[other]:
            assert ranks[one] >= ranks[other]


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(1e-9, 1e9))
def test_the_unit_of_importance_does_not_matter(problem, scale):
    importance, costs, budget = problem
    scaled = {name: value * scale for name, value in importance.items()}
    assert allocate_ranks(scaled, costs, budget) == allocate_ranks(importance, costs, budget)


def distance(ranks: list[int], importance: dict[str, float], costs: dict[str, int], budget: int) -> float:
    """Squared distance to the target of power 1, which is found by bisection here."""
    share = [max(value / max(importance.values()), 1e-12) for value in importance.values()]

    def target(c: float) -> list[float]:
        return [min(max(c * s, 4.0), 64.0) for s in share]

    low, high = 0.0, 1e15
    for _ in range(200):
        middle = (low + high) / 2
        above = sum(t * c for t, c in zip(target(middle), costs.values(), strict=True)) > budget
        low, high = (low, middle) if above else (middle, high)
    return sum((r - t) ** 2 for r, t in zip(ranks, target(low), strict=True))


@settings(deadline=None, max_examples=25)
@given(problems(largest=3, costs=st.sampled_from([1, 3, 10])))
def test_no_other_ranks_are_nearer_to_the_target(problem):
    importance, costs, budget = problem
    found = list(allocate_ranks(importance, costs, budget, power=1.0).values())
    every = [
        list(ranks)
        for ranks in itertools.product(range(4, 65, 4), repeat=len(costs))
        if spent(dict(zip(costs, ranks, strict=True)), costs) == budget
    ]
    best = min(distance(ranks, importance, costs, budget) for ranks in every)
    assert distance(found, importance, costs, budget) <= best + 1e-3  # bisection ends before the last digit


SHAPES_7B = {
    "q": (3584, 3584), "k": (3584, 512), "v": (3584, 512), "o": (3584, 3584),
    "gate": (3584, 18944), "up": (3584, 18944), "down": (18944, 3584),
}  # fmt: skip
ODD_TOWER = {"qkv": (1153, 3457), "proj": (1152, 1152), "fc1": (1152, 4304), "fc2": (4304, 1151)}


@pytest.mark.parametrize("shapes", [SHAPES_7B, SHAPES_7B | ODD_TOWER])
def test_a_large_model(shapes):
    """28 layers of a 7B model, alone and beside matrices whose costs have no common divisor; well below a second."""
    names = {f"layers.{n}.{kind}": kind for n in range(28) for kind in shapes}
    importance = {name: (1 + 0.37 * index) ** 2 % 97 for index, name in enumerate(names)}
    costs = {name: sum(shapes[kind]) for name, kind in names.items()}
    budget = 16 * sum(costs.values())
    ranks = allocate_ranks(importance, costs, budget)
    assert spent(ranks, costs) == budget and len(set(ranks.values())) > 5
    assert ranks == allocate_ranks(importance, costs, budget)


def test_a_budget_of_ranks():
    ranks = allocate_ranks({"a": 1.0, "b": 4.0, "c": 9.0}, None, 48)
    assert ranks == {"a": 8, "b": 16, "c": 24}  # proportional to the square root


def test_power_says_how_much_importance_matters():
    importance = {"a": 1.0, "b": 9.0}
    assert allocate_ranks(importance, None, 48, power=0.0) == {"a": 24, "b": 24}
    assert allocate_ranks(importance, None, 48, power=0.5) == {"a": 12, "b": 36}
    assert allocate_ranks(importance, None, 48, power=1.0) == {"a": 4, "b": 44}  # 4.8 and 43.2
    assert allocate_ranks(importance, None, 40, power=0.5) == {"a": 8, "b": 32}  # 10 and 30: a tie goes to b


def test_what_bounds_keep_from_one_goes_to_the_others():
    ranks = allocate_ranks({"a": 1e9, "b": 2.0, "c": 1.0, "d": 0.0}, None, 64 + 16 + 8 + 4, power=1.0)
    assert ranks == {"a": 64, "b": 16, "c": 8, "d": 4}
    limits = {"a": 13, "b": 64, "c": 64, "d": 64}
    ranks = allocate_ranks({"a": 1e9, "b": 2.0, "c": 1.0, "d": 0.0}, None, 64, power=1.0, limits=limits)
    assert ranks == {"a": 12, "b": 32, "c": 16, "d": 4}


def test_the_ends():
    importance, costs = {"a": 1.0, "b": 2.0}, {"a": 3, "b": 5}
    assert allocate_ranks(importance, costs, 4 * 8) == {"a": 4, "b": 4}
    assert allocate_ranks(importance, costs, 64 * 8) == {"a": 64, "b": 64}


@pytest.mark.parametrize(
    "budget, nearest",
    [
        (0, "budget is 32."),
        (31, "budget is 32."),
        (45, "budgets are 44 and 52."),
        (46, "budgets are 44 and 52."),
        (36, "budgets are 32 and 44."),
        (513, "budget is 512."),
        (10**9, "budget is 512."),
    ],
)
def test_an_impossible_budget_names_the_nearest(budget, nearest):
    """With costs 3 and 5: 32, 44, 52, 56 …"""
    importance, costs = {"a": 1.0, "b": 2.0}, {"a": 3, "b": 5}
    with pytest.raises(VlmtuneError, match=f"exactly {budget}; the nearest possible {re.escape(nearest)}") as caught:
        allocate_ranks(importance, costs, budget)
    for number in re.findall(r"\d+", str(caught.value).split("nearest")[1]):
        assert spent(allocate_ranks(importance, costs, int(number)), costs) == int(number)


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"importance": {}}, "no module"),
        ({"importance": {"a": float("nan")}}, "importance of a is nan"),
        ({"importance": {"a": -1.0}}, "importance of a is -1.0"),
        ({"importance": {"a": 0.0}}, "every importance is 0"),
        ({"costs": {}}, "a has an importance but no cost"),
        ({"costs": {"a": 0}}, "cost of a is 0"),
        ({"limits": {}}, "a has an importance but no limit"),
        ({"limits": {"a": 3}}, "no multiple of 4 from 4 to 3 can be the rank of a"),
        ({"lowest": 65}, "make no sense"),
        ({"multiple": 0}, "make no sense"),
        ({"power": -0.5}, "make no sense"),
    ],
)
def test_bad_input(wish, message):
    with pytest.raises(VlmtuneError, match=message):
        allocate_ranks(**{"importance": {"a": 1.0}, "costs": {"a": 2}, "budget": 32, **wish})
