"""KPMS, knowledge-preserving mask search (K-prune, part b): which units are worth their cost. Pure
functions."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


TOLERANCE = 1e-9
"""Relative rounding error allowed when costs are added up."""

FAINT = 1e-150
"""What tells units of no worth from each other, where their order counts."""


def threshold_search(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
) -> list[Tensor]:
    """Keep the units of highest score per cost within `budget`: Algorithm 1 of Park et al. by one sort.

    The paper raises a threshold until the units above it fit. Here they are sorted (equal scores: lower
    sublayer, then lower unit first) and taken as long as their cumulative cost fits; what is left of the
    budget then goes to the best units that still fit, so that it is used up and never exceeded.

    Args:
        scores: Importance per cost, one (U_i,) per sublayer.
        costs: Cost of one unit of each sublayer.
        budget: What the kept units may cost together, in the unit of `costs`.
        minimum: Units of each sublayer that are kept in any case, the best ones.
        multiple: The number kept in a sublayer is a multiple of this, or all. Units then compete in groups of
            this size, in order of score, by their mean score.

    Returns:
        One boolean mask (U_i,) per sublayer.

    Raises:
        ValueError: If the minimum alone exceeds the budget.
    """
    orders = [torch.sort(s, descending=True, stable=True).indices.cpu() for s in scores]
    groups = [group_sizes(len(s), low, m) for s, low, m in zip(scores, minimum, multiple, strict=True)]
    left = budget * (1 + TOLERANCE) - sum(c * g[0] for c, g in zip(costs, groups, strict=True))
    if left < 0:
        raise ValueError(f"keeping the minimum costs {budget - left:.6g}, over the budget of {budget:.6g}")

    values, prices, owners = [], [], []
    for owner, (score, order, sizes, cost) in enumerate(zip(scores, orders, groups, costs, strict=True)):
        lengths = torch.tensor(sizes[1:])
        ranked = score.cpu().double()[order][sizes[0] :]
        means = torch.segment_reduce(ranked, "mean", lengths=lengths) if len(lengths) else ranked
        values.append(means.cummin(0).values)  # they fall already, but for rounding where scores are equal
        prices.append(cost * lengths.double())
        owners.append(torch.full_like(lengths, owner))
    price, owner_of = torch.cat(prices), torch.cat(owners).long()
    queue = torch.sort(torch.cat(values), descending=True, stable=True).indices
    taken = torch.zeros(len(queue), dtype=torch.bool)
    while len(queue):
        spent = price[queue].cumsum(0)
        fits = int((spent <= left).sum())
        taken[queue[:fits]] = True
        left -= float(spent[fits - 1]) if fits else 0.0
        queue = queue[fits:]
        queue = queue[price[queue] <= left]
    kept = 1 + torch.bincount(owner_of[taken], minlength=len(scores))  # groups; the first one is the minimum
    masks = []
    for score, order, sizes, count in zip(scores, orders, groups, kept, strict=True):
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[order[: sum(sizes[:count])]] = True
        masks.append(mask)
    return masks


def split(scores: Sequence[Tensor], costs: Sequence[float], exponent: float) -> list[Tensor]:
    """Scores per cost, one (U_i,) per sublayer, with which `threshold_search` minimises the sum of loss **
    exponent.

    The loss of a sublayer is the sum of cost * score over its units that go, lowest scores first. Under 1 the
    exponent takes more from sublayers that are cut deeply already, over 1 it spreads the loss. The curve of
    the loss over what goes is replaced by its lower convex hull, as no threshold stops above it; the order of
    units within a sublayer stays.
    """
    result = []
    for score, cost in zip(scores, costs, strict=True):
        values, order = torch.sort(score.double().cpu().clamp(min=0), stable=True)
        curve = (cost * values).cumsum(0) ** exponent
        slopes = convex_slopes(torch.cat([curve.new_zeros(1), curve])) / cost
        result.append(torch.empty_like(slopes).index_copy_(0, order, slopes))
    return result


def convex_slopes(curve: Tensor) -> Tensor:
    """Slopes, (n,), of the lower convex hull of the points (i, curve[i]), i = 0 .. n: each a little over the
    one before, also within an edge of the hull, so that they keep the order of the points."""
    values, hull = curve.tolist(), [0]
    for i in range(1, len(values)):
        while len(hull) > 1 and (values[i] - values[hull[-1]]) * (hull[-1] - hull[-2]) <= (
            values[hull[-1]] - values[hull[-2]]
        ) * (i - hull[-1]):
            hull.pop()
        hull.append(i)
    slopes = curve.new_empty(len(values) - 1)
    for start, stop in itertools.pairwise(hull):
        slopes[start:stop] = (values[stop] - values[start]) / (stop - start)
    return slopes * (1 + TOLERANCE * torch.arange(len(slopes), dtype=slopes.dtype))


def uniform_search(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
    alike: Sequence[Hashable],
    allowed: Sequence[Sequence[int] | None],
) -> list[int]:
    """How many units each sublayer keeps if those named alike keep equally many: the best such plan within
    `budget`.

    The n-th best units of alike sublayers stand or fall together, so they compete as one unit, whose cost is
    the sum of theirs and whose score per cost is their mean, weighted by cost.

    Args:
        scores: As for `threshold_search`, and so are:
        costs: equal in alike sublayers;
        budget: of all of them;
        minimum: equal in alike sublayers;
        multiple: equal in alike sublayers.
        alike: A name for each sublayer.
        allowed: Numbers that a sublayer may keep; None: any.

    Raises:
        ValueError: If no allowed plan is within the budget.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(alike):
        members.setdefault(name, []).append(i)
    joint_scores, joint_costs = joint(scores, costs, list(members.values()))
    first = [same[0] for same in members.values()]
    bound = {
        g: [n for n in numbers if n >= minimum[i]]
        for g, i in enumerate(first)
        if (numbers := allowed[i]) is not None
    }
    free = [g for g in range(len(first)) if g not in bound]
    best, most = None, -1.0
    for counts in itertools.product(*bound.values()):
        plan = dict(zip(bound, counts, strict=True))
        left = budget * (1 + TOLERANCE) - sum(joint_costs[g] * n for g, n in plan.items())
        if left < sum(joint_costs[g] * minimum[first[g]] for g in free):
            continue
        if free:
            masks = threshold_search(
                [joint_scores[g] for g in free],
                [joint_costs[g] for g in free],
                left,
                [minimum[first[g]] for g in free],
                [multiple[first[g]] for g in free],
            )
            plan |= {g: int(mask.sum()) for g, mask in zip(free, masks, strict=True)}
        worth = sum(joint_costs[g] * float(joint_scores[g][:n].sum()) for g, n in plan.items())
        if worth > most:
            best, most = plan, worth
    if best is None:
        raise ValueError(f"no uniform plan costs at most {budget:.6g}")
    kept = {name: best[g] for g, name in enumerate(members)}
    return [kept[name] for name in alike]


def joint(
    scores: Sequence[Tensor], costs: Sequence[float], groups: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[float]]:
    """Scores per cost, best first, and costs of the units that the n-th best of each sublayer of a group make
    together."""
    joint_costs = [sum(costs[i] for i in group) for group in groups]
    joint_scores = []
    for group, cost in zip(groups, joint_costs, strict=True):
        ranked = (costs[i] * scores[i].cpu().double().sort(descending=True).values for i in group)
        joint_scores.append(torch.stack(list(ranked)).sum(0) / cost)
    return joint_scores, joint_costs


def common_scores(scores: Sequence[Tensor], known: Sequence[bool]) -> Tensor:
    """One score for the n-th best units of all experts, which go or stay together, so that each keeps as
    many: the mean of theirs. It falls with n, so that units of one n stand side by side when all are sorted.

    Args:
        scores: Those of the units of each expert, (F,).
        known: Whether they compare with those of others; else they only order units.

    Returns:
        The scores of all units, expert by expert, (E F,), float64.
    """
    orders = [torch.sort(score, descending=True, stable=True).indices for score in scores]
    ranked = [score.double()[order] for score, order in zip(scores, orders, strict=True)]
    of_known = [each for each, one in zip(ranked, known, strict=True) if one]
    level = torch.stack(of_known).mean(0) if of_known else torch.zeros_like(ranked[0])
    steps = torch.arange(len(level), 0, -1, dtype=level.dtype, device=level.device) / max(len(level), 1)
    level = level.cummin(0).values if len(level) else level
    level = level + steps * (TOLERANCE * level.abs() + FAINT)
    return torch.cat([torch.empty_like(level).index_copy_(0, order, level) for order in orders])


def group_sizes(num_units: int, minimum: int, multiple: int) -> list[int]:
    """Sizes of the groups in which units are kept, best first: the first holds the minimum, the last what is
    over."""
    first = min(-(-minimum // multiple) * multiple, num_units)
    rest = num_units - first
    sizes = [multiple] * (rest // multiple) or ([rest] if rest else [])
    if sizes:
        sizes[-1] += rest - sum(sizes)
    return [first, *sizes]
