"""Which units to keep in a given time, by a look-up table. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import BudgetError
from ..methods.search import TOLERANCE, group_sizes, threshold_search
from .table import Curve, seconds_of


STEPS = 1000
"""Parts into which `search_latency` divides the budget to choose which sublayers stay."""


def search_latency(
    scores: Sequence[Tensor],
    curves: Sequence[Curve],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
) -> list[Tensor]:
    """Keep the units of highest total importance whose sublayers together take at most `budget` seconds.

    After Kwon et al. (2022): a sublayer that is kept costs c, its theta best units are free then, and units
    beyond that compete over what is left at a seconds each. They try every number of emptied sublayers. Which
    to empty is here a knapsack of whole sublayers, solved by dynamic programming over the budget in
    thousandths; `threshold_search` then spends the exact budget on the sublayers that stay.

    The result is at least as good as any that leaves a thousandth of the budget per sublayer unused.

    Args:
        scores: Importance of each unit (not per cost), at least 0, one (U_i,) per sublayer.
        curves: What each sublayer takes.
        budget: Seconds for all of them (`LatencyTable.rest` is not in it).
        minimum: As for `threshold_search`.
        multiple: As for `threshold_search`.

    Returns:
        One boolean mask (U_i,) per sublayer.

    Raises:
        BudgetError: If the minimum alone exceeds the budget.
    """
    numbers, worths, costs = choices(scores, curves, minimum, multiple)
    free = [int(n[cost <= cost[(n > 0).long().argmax()]][-1]) for n, cost in zip(numbers, costs, strict=True)]

    def freely(counts: Sequence[int]) -> list[int]:
        """The units that cost no more than one, in the same sublayers."""
        return [f if n else 0 for f, n in zip(free, counts, strict=True)]

    def fits(counts: Sequence[int]) -> bool:
        return seconds_of(curves, counts) <= budget * (1 + TOLERANCE)

    fewest = freely([int(n[0]) for n in numbers])
    if not fits(fewest):
        raise BudgetError(
            f"the units that must stay take {seconds_of(curves, fewest):.6g} s, over the {budget:.6g} s that "
            "there are for sublayers; allow more time, or lower min_heads and min_neurons"
        )
    starts = [counts for counts in ([len(score) for score in scores], fewest) if fits(counts)]
    for plan in _knapsack(worths, costs, budget):
        kept = [int(n[option]) for n, option in zip(numbers, plan, strict=True)]
        starts += [counts for counts in (freely(kept), kept) if fits(counts) and counts not in starts]
        if fits(kept):
            break
    return max(
        (spend(scores, curves, budget, counts, multiple) for counts in starts),
        key=lambda masks: sum(float(s.double().cpu()[m].sum()) for s, m in zip(scores, masks, strict=True)),
    )


def choices(
    scores: Sequence[Tensor], curves: Sequence[Curve], minimum: Sequence[int], multiple: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each sublayer, how many units it may keep, the importance of so many, and their seconds, (N_i,)
    each."""
    numbers, worths, costs = [], [], []
    for score, curve, low, m in zip(scores, curves, minimum, multiple, strict=True):
        total = score.double().cpu().sort(descending=True).values.cumsum(0)
        numbers.append(torch.tensor(group_sizes(len(score), low, m)).cumsum(0))
        worths.append(torch.cat([total.new_zeros(1), total])[numbers[-1]])
        costs.append(curve(numbers[-1]))
    return numbers, worths, costs


def spend(
    scores: Sequence[Tensor],
    curves: Sequence[Curve],
    budget: float,
    counts: Sequence[int],
    multiple: Sequence[int],
) -> list[Tensor]:
    """The best masks (U_i,) with at least `counts` units, and none in sublayers where that is 0."""
    live = [i for i, n in enumerate(counts) if n]
    masks = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    if live:
        slopes, least = [curves[i].a for i in live], [counts[i] for i in live]
        left = max(budget - seconds_of(curves, counts), 0.0)
        left += sum(a * n for a, n in zip(slopes, least, strict=True))
        densities = [scores[i].double() / (curves[i].a or 1) for i in live]
        best = threshold_search(densities, slopes, left, least, [multiple[i] for i in live])
        for i, mask in zip(live, best, strict=True):
            masks[i] = mask
    return masks


def _knapsack(worths: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> Iterator[list[int]]:
    """Of the options of each sublayer, by worth and by cost, both rising, the ones of most total worth within
    the budget.

    Costs are rounded up to thousandths of the budget. The first answer is for a budget that is larger by the
    most that this can add up to, the last for the budget itself.
    """
    size = STEPS + len(costs) + 1
    best, taken = (
        torch.zeros(size, dtype=torch.float64),
        [],
    )  # of the sublayers so far, within 0, 1, ... steps
    for worth, cost in zip(worths, costs, strict=True):
        steps = (cost * (1 - TOLERANCE / 2) * (STEPS / max(budget, 1e-300))).ceil()
        option = torch.searchsorted(steps, torch.arange(size, dtype=torch.float64), right=True) - 1
        gain = worth[option].where(option >= 0, -math.inf)
        before = torch.cat([torch.full((size - 1,), -math.inf, dtype=torch.float64), best]).unfold(0, size, 1)
        best, place = (before + gain.flip(0)).max(1)
        taken.append((option, size - 1 - place))
    for within in range(size - 1, STEPS - 1, -1):
        if best[within].isfinite():
            plan, left = [], within
            for option, spent in reversed(taken):
                plan.append(int(option[spent[left]]))
                left -= int(spent[left])
            yield plan[::-1]
