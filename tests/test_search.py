"""KPMS: against the paper's Algorithm 1, written out literally, and against a greedy search one unit at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_kprune.methods.search import TOLERANCE, group_sizes, split, threshold_search


def spent(masks: Sequence[Tensor], costs: Sequence[float]) -> float:
    return sum(cost * int(mask.sum()) for mask, cost in zip(masks, costs, strict=True))


def algorithm_1(scores: Sequence[Tensor], costs: Sequence[float], budget: float) -> list[Tensor]:
    """Algorithm 1 of Park et al. 2024: raise the threshold one score at a time until the units that reach it fit."""
    for threshold in [*sorted(torch.cat(list(scores)).tolist()), float("inf")]:
        survivors = [s >= threshold for s in scores]
        if spent(survivors, costs) <= budget:
            return survivors
    raise AssertionError("an infinite threshold leaves nothing")


def one_by_one(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
) -> list[list[bool]]:
    """The minimum of each sublayer, then group after group by mean score, each if it still fits."""
    masks, groups = [], []
    for i, (score, low, m) in enumerate(zip(scores, minimum, multiple, strict=True)):
        order = sorted(range(len(score)), key=lambda u: (-float(score[u]), u))
        masks.append([False] * len(score))
        sizes = group_sizes(len(score), low, m)
        for number, size in enumerate(sizes):
            units, order = order[:size], order[size:]
            mean = sum(float(score[u]) for u in units) / max(size, 1)
            groups.append((number > 0, -mean, i, number, units))
    for _, _, i, number, units in sorted(groups, key=lambda g: g[:4]):
        if number == 0 or costs[i] * len(units) <= budget:
            budget -= costs[i] * len(units)
            for u in units:
                masks[i][u] = True
    return masks


@st.composite
def problems(
    draw: st.DrawFn, distinct: bool = False, free: bool = False, whole: bool = True
) -> dict[str, Any]:
    """A search that can be satisfied. Whole costs and scores make all sums exact."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    if distinct:
        values = draw(st.permutations(range(sum(sizes))))
    else:
        values = draw(st.lists(st.integers(0, 6), min_size=sum(sizes), max_size=sum(sizes)))
    scores = [part / 1.0 for part in torch.tensor(values, dtype=torch.float64).split(sizes)]
    cost = st.integers(1, 12) if whole else st.floats(1e-3, 1e3)
    costs = draw(st.lists(cost, min_size=len(sizes), max_size=len(sizes)))
    # scores whose group means are exact: groups of up to 4 + 3 units, of a common multiple of these sizes
    minimum = [0 if free else draw(st.integers(0, 3)) for _ in sizes]
    multiple = [1 if free else draw(st.integers(1, 4)) for _ in sizes]
    scores = [420 * s for s in scores]
    least = sum(
        c * group_sizes(n, low, m)[0] for c, n, low, m in zip(costs, sizes, minimum, multiple, strict=True)
    )
    full = sum(c * n for c, n in zip(costs, sizes, strict=True))
    budget = least + draw(st.floats(0, 1)) * (full - least)
    return {"scores": scores, "costs": costs, "budget": budget, "minimum": minimum, "multiple": multiple}


@given(problems(distinct=True, free=True))
def test_keeps_what_algorithm_1_keeps_and_fills_up_what_is_left(problem: dict[str, Any]) -> None:
    masks = threshold_search(**problem)
    scores, costs, budget = problem["scores"], problem["costs"], problem["budget"]
    survivors = algorithm_1(scores, costs, budget)
    assert all(bool(mask[survivor].all()) for mask, survivor in zip(masks, survivors, strict=True))
    # nothing is added that the threshold itself would have reached next
    out = torch.cat([s[~survivor] for s, survivor in zip(scores, survivors, strict=True)])
    if len(out):
        assert all(not bool(mask[s == out.max()].any()) for mask, s in zip(masks, scores, strict=True))


@given(problems())
def test_equals_a_greedy_search_one_group_at_a_time(problem: dict[str, Any]) -> None:
    assert [mask.tolist() for mask in threshold_search(**problem)] == one_by_one(**problem)


@given(problems(whole=False))
def test_budget_minimum_and_multiple_hold_and_what_is_left_is_used(problem: dict[str, Any]) -> None:
    masks = threshold_search(**problem)
    budget, total = problem["budget"], spent(masks, problem["costs"])
    assert total <= budget * (1 + TOLERANCE) * (1 + 1e-12)
    rows = zip(
        masks, problem["scores"], problem["costs"], problem["minimum"], problem["multiple"], strict=True
    )
    for mask, score, cost, low, multiple in rows:
        kept, units = int(mask.sum()), len(mask)
        assert mask.dtype == torch.bool
        assert len(score) == units
        assert kept >= min(low, units)
        assert kept % multiple == 0 or kept == units
        if kept < units:  # the next group would not fit, and no unit that is out beats one that is in
            following = multiple if units - kept >= 2 * multiple else units - kept
            assert total + cost * following > budget * (1 - 1e-9)
            assert not kept or float(score[~mask].max()) <= float(score[mask].min())


@given(problems(free=True))
def test_ties_go_to_the_lower_sublayer_and_the_lower_unit(problem: dict[str, Any]) -> None:
    """With one cost, a unit that is out has a lower score than all that are in, or comes after them."""
    problem["costs"] = [1.0] * len(problem["costs"])
    problem["budget"] = min(problem["budget"], sum(map(len, problem["scores"])))
    masks = threshold_search(**problem)
    places = [(-float(x), i, u) for i, s in enumerate(problem["scores"]) for u, x in enumerate(s)]
    kept = [p for p in places if masks[p[1]][p[2]]]
    assert sorted(kept) == sorted(places)[: len(kept)]


def test_rounding_of_group_means_wastes_no_budget() -> None:
    """All scores equal but groups of different size: their computed means may differ in the last bit."""
    for value in torch.linspace(0.1, 0.9, 50, dtype=torch.float64).tolist():
        scores = [
            torch.full((19,), value, dtype=torch.float64),
            torch.full((9,), value / 2, dtype=torch.float64),
        ]
        masks = threshold_search(scores, [1.0, 1.0], 17.0, [0, 0], [8, 1])
        assert [int(m.sum()) for m in masks] == [8, 9]


def test_equal_scores_fill_from_the_bottom() -> None:
    masks = threshold_search([torch.ones(4)] * 3, [1.0] * 3, 6, [0] * 3, [1] * 3)
    assert [m.tolist() for m in masks] == [[True] * 4, [True, True, False, False], [False] * 4]


def test_the_whole_budget_keeps_all_and_none_keeps_nothing() -> None:
    scores = [torch.zeros(3), torch.rand(5), torch.rand(0)]
    costs = [0.1, 0.7, 0.3]  # not exact in binary: the full cost must fit its own sum
    full = sum(c * len(s) for c, s in zip(costs, scores, strict=True))
    assert all(bool(m.all()) for m in threshold_search(scores, costs, full, [0] * 3, [1, 2, 1]))
    assert not any(bool(m.any()) for m in threshold_search(scores, costs, 0.0, [0] * 3, [1, 2, 1]))


def test_sublayers_without_units_are_left_out() -> None:
    empty = torch.zeros(0)
    masks = threshold_search([empty, torch.tensor([1.0, 2.0]), empty], [1.0] * 3, 1.0, [2, 0, 0], [4, 1, 1])
    assert [m.tolist() for m in masks] == [[], [False, True], []]
    assert [len(m) for m in threshold_search([empty], [1.0], 1.0, [0], [1])] == [0]


def test_a_minimum_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="keeping the minimum costs 6, over the budget of 5"):
        threshold_search([torch.rand(4), torch.rand(4)], [1.0, 2.0], 5.0, [2, 2], [1, 1])
    with pytest.raises(
        ValueError, match="keeping the minimum costs 8, over the budget of 5"
    ):  # rounded up to 4 units
        threshold_search([torch.rand(8)], [2.0], 5.0, [2], [4])


def test_half_precision_scores_and_scores_on_any_scale() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
    for scaled in (scores.half(), scores.bfloat16(), scores * 1e-30, scores * 1e30):
        assert threshold_search([scaled], [1.0], 2.0, [0], [1])[0].tolist() == [True, False, False, True]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_group_sizes_add_up_and_end_on_multiples(units: int, minimum: int, multiple: int) -> None:
    sizes = group_sizes(units, minimum, multiple)
    assert sum(sizes) == units
    assert min(minimum, units) <= sizes[0] <= minimum + multiple - 1
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert all(end % multiple == 0 for end in ends[:-1])
    assert all(a < b for a, b in pairwise(ends))


@pytest.mark.parametrize("exponent", [0.5, 0.7, 1.0, 2.0])
def test_what_a_split_weighs_adds_up_to_the_loss_to_its_power(exponent: float) -> None:
    """Scores per cost, times the cost, of all units that a sublayer has: its whole loss ** exponent, whatever a unit costs."""
    generator = torch.Generator().manual_seed(0)
    scores, costs = [torch.rand(n, generator=generator).double() for n in (4, 12, 1)], [7.0, 2.0, 0.3]
    for slopes, score, cost in zip(split(scores, costs, exponent), scores, costs, strict=True):
        torch.testing.assert_close(cost * slopes.sum(), (cost * score.sum()) ** exponent)
        assert torch.equal(slopes.argsort(), score.argsort())
