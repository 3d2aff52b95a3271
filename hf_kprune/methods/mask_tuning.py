"""Kwon et al. (NeurIPS 2022) and KCM (ICML 2023): published methods whose masks scale what stays. Cut once,
to compare with.

Differences from the papers are listed with each. The functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BudgetError
from .base import Method, Statistics
from .least_squares import Fit, NormalEquations
from .search import TOLERANCE, group_sizes


FIRST = 1e30
"""Score of units that are to stay. Finite, as reports are JSON."""


class Kwon(Method):
    """Kwon et al.: A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022, under a budget of
    FLOPs or of time.

    Importance is the diagonal of the Fisher information of the masks. The search tries every number of heads
    with the best neurons for what is left; then units of each sublayer are exchanged for less of the block of
    the Fisher information, and what stays is scaled by one factor per unit (`count_search`, `rearrange`,
    `scale_units`).

    Differences from the paper and its program:

    - No labels: they are drawn from what the dense model predicts, so this is the Fisher information, not the
    empirical one.
    - Gradients are squared sequence by sequence, not as means of batches of 32.
    - No heads at all is tried too, and the budget is never exceeded; minimum and multiple hold; costs may
    differ by sublayer.
    - The teacher of mask tuning is the dense model, not one pruned by the square root of the constraint.
    - The first attention is tuned as well, and the last FFN on all tokens, not on [CLS] alone.
    - The damped equations of mask tuning are solved, not iterated on (`scale_units`).
    - Factors over 10 leave one sublayer untuned, not all above it as well.
    - Factors are folded into the output weights. The search in time is `latency.search_latency`.
    """

    needs = frozenset({"fisher"})
    tunes = True
    in_time = True

    def score(self, statistics: Statistics) -> Tensor:
        assert statistics.fisher is not None
        return statistics.fisher.diagonal() / statistics.samples / statistics.cost

    def search(
        self,
        statistics: Sequence[Statistics],
        scores: Sequence[Tensor],
        budget: float,
        minimum: Sequence[int],
        multiple: Sequence[int],
    ) -> list[Tensor]:
        neurons = [not s.has_heads for s in statistics]
        counts = count_search(scores, [s.cost for s in statistics], budget, minimum, multiple, neurons)
        return self.arrange(statistics, super().search(statistics, scores, budget, counts, multiple))

    def arrange(self, statistics: Sequence[Statistics], masks: list[Tensor]) -> list[Tensor]:
        arranged = []
        for s, mask in zip(statistics, masks, strict=True):
            assert s.fisher is not None
            fishers = s.fisher.view(s.experts, *s.fisher.shape[-2:])
            parts = zip(mask.view(s.experts, -1), fishers, strict=True)
            arranged.append(torch.cat([rearrange(part, fisher) for part, fisher in parts]))
        return arranged

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        return scale_units(equations, weight, bias, unit_width, intercept=unit_width > 1)


class KCM(Method):
    """Nova, Dai, Schuurmans: Gradient-Free Structured Pruning with Unlabeled Data, ICML 2023 (R2D2): neurons
    only.

    R2 is how much a neuron is needed to represent itself among the others' output weights (`representative`),
    D2 how active it is; the best neurons of all layers by R2 * D2 stay, and are scaled as by Kwon et al.

    No program of its authors is known to us, and what we know of the paper leaves open what is our choice
    here: filters are the columns of the output projection; sigma and alpha of `representative`; D2 is the
    root mean square of the activation over tokens that are not padding; both go from 0 to 1 within a sublayer
    and are multiplied; factors are tuned against the dense model. Scores are per cost, which says something
    only where neurons of several stacks do not cost the same. The variant with few labels is left out.
    """

    tunes = True
    in_whole_experts = False

    def score(self, statistics: Statistics) -> Tensor:
        s = statistics
        if s.has_heads:
            return torch.full_like(s.magnitude, FIRST)
        ranking = representative(s.weight.T.float()).diagonal().double()
        return from_0_to_1(ranking) * from_0_to_1((s.energy / s.tokens).sqrt()) / s.cost

    def search(
        self,
        statistics: Sequence[Statistics],
        scores: Sequence[Tensor],
        budget: float,
        minimum: Sequence[int],
        multiple: Sequence[int],
    ) -> list[Tensor]:
        """As `threshold_search`, all heads kept. Raises `BudgetError` if they alone, with the least neurons,
        exceed it."""
        least = [
            len(score) if s.has_heads else low
            for s, score, low in zip(statistics, scores, minimum, strict=True)
        ]
        rows = list(zip(statistics, scores, least, multiple, strict=True))
        total = sum(s.cost * len(score) for s, score, _, _ in rows)
        needed = sum(s.cost * group_sizes(len(score), low, m)[0] for s, score, low, m in rows)
        if needed > budget * (1 + TOLERANCE):
            reach = math.floor(1e4 * (1 - needed / total)) / 1e4  # rounded down, so that it can be asked for
            raise BudgetError(
                f"the budget asks to remove {1 - budget / total:.4f} of what heads and neurons cost; method "
                f"'kcm' removes neurons only and, with those that must stay, can reach 0 to {reach:.4f}. "
                "Ask for less, lower min_neurons or round_to, pass prune_heads=False if uniform, or use "
                "another method"
            )
        return super().search(statistics, scores, budget, least, multiple)

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        if unit_width > 1:
            return Fit(weight.double(), None if bias is None else bias.double())
        return scale_units(equations, weight, bias, unit_width)


def count_search(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
    neurons: Sequence[bool],
) -> list[int]:
    """How many units each sublayer keeps: the numbers of heads and neurons that hold the most importance
    (Kwon et al. 2022).

    Heads and neurons queue by importance per cost. For each number of heads, none to all that fit, the
    neurons at the head of their queue take what is left; the numbers of highest total importance win. Where
    all heads cost the same and all neurons do, nothing within the budget has more. Where costs differ, no one
    threshold for both has more.

    Args:
        scores: As for `threshold_search`, and so are:
        costs: Of a unit;
        budget: Of all;
        minimum: Of each sublayer, kept in any case;
        multiple: Units queue in groups of this size.
        neurons: Whether a sublayer is an FFN.
    """
    groups = [group_sizes(len(s), low, m) for s, low, m in zip(scores, minimum, multiple, strict=True)]
    left = max(budget * (1 + TOLERANCE) - sum(c * g[0] for c, g in zip(costs, groups, strict=True)), 0.0)
    means, prices, sizes, owners = [], [], [], []
    for i, (score, cost, group) in enumerate(zip(scores, costs, groups, strict=True)):
        size = torch.tensor(group[1:], dtype=torch.long)
        ranked = score.cpu().double().sort(descending=True).values[group[0] :]
        mean = torch.segment_reduce(ranked, "mean", lengths=size) if len(size) else ranked
        means.append(mean.cummin(0).values)  # they fall already, but for rounding where scores are equal
        prices.append(cost * size.double())
        sizes.append(size)
        owners.append(torch.full_like(size, i))
    worth, price, size_of, owner = (
        torch.cat(means) * torch.cat(prices),
        torch.cat(prices),
        torch.cat(sizes),
        torch.cat(owners),
    )
    order = torch.cat(means).sort(descending=True, stable=True).indices
    of_neuron = torch.tensor(neurons)[owner[order]]
    queues = order[~of_neuron], order[of_neuron]
    head_worth, neuron_worth = (torch.cat([worth.new_zeros(1), worth[queue].cumsum(0)]) for queue in queues)
    head_price, neuron_price = (torch.cat([price.new_zeros(1), price[queue].cumsum(0)]) for queue in queues)
    head_price = head_price[head_price <= left]
    fitting = torch.searchsorted(neuron_price, left - head_price, right=True) - 1
    heads = int((head_worth[: len(head_price)] + neuron_worth[fitting]).argmax())
    taken = torch.cat([queues[0][:heads], queues[1][: fitting[heads]]])
    more = torch.zeros(len(scores), dtype=torch.long).index_add_(0, owner[taken], size_of[taken])
    return [group[0] + n for group, n in zip(groups, more.tolist(), strict=True)]


def rearrange(mask: Tensor, fisher: Tensor) -> Tensor:
    """Exchange units for ones that cost less to lose *together*, in one greedy pass: a mask (U,) of as many.

    The set P of units that go costs sum_ij F_ij over i, j in P. Each unit that stays, those of lowest F_ii
    first, is put to P, and the one without which P then costs least comes back, which may be the same: the
    cost never rises (Kwon et al. 2022).

    Args:
        mask: Units that stay, (U,), on the CPU.
        fisher: F, (U, U): the sum over samples of g g^T in place of the program's vectors of g.
    """
    f = fisher.double().cpu()
    diagonal, gone = f.diagonal(), ~mask
    if gone.all() or mask.all() or not f.any():
        return mask
    pull = f[:, gone].sum(1)
    for unit in [u for u in diagonal.argsort(stable=True).tolist() if mask[u]]:
        gone[unit] = True
        pull += f[unit]
        back = int(torch.where(gone, diagonal - 2 * pull, torch.inf).argmin())
        gone[back] = False
        pull -= f[back]
    return ~gone


def scale_units(
    equations: NormalEquations,
    weight: Tensor,
    bias: Tensor | None,
    unit_width: int,
    damp: float = 1.0,
    limit: float = 10.0,
    intercept: bool = False,
) -> Fit:
    """Scale the output weights of each unit by one factor x, by least squares to the target (Kwon et al.
    2022, mask tuning).

        G_uv = sum_t <A_u W_u^T, A_v W_v^T> ,  r_u = sum_t <A_u W_u^T, Y - b> ,   A_u, W_u the columns of unit
        u x = 1 + argmin_y ||G y - (r - G 1)||^2 + damp^2 ||y||^2

    that is, their damped solution of the normal equations. They iterate by LSMR until its tolerance holds;
    this is the point that converges to, (G + i damp)^-1 without its imaginary part, whose rounding is that of
    G, not of G^2. Nothing need be stopped early, as G, the elementwise product of two Gram matrices, is
    better conditioned than that of the features.

    Args:
        equations: The sums.
        weight: W, (D, C), unit by unit.
        bias: b, (D,), or None; it stays.
        unit_width: Columns of a unit.
        damp: In the unit of G, a sum over tokens.
        limit: If a factor is beyond it, up or down, all stay 1.
        intercept: Whether one more unknown is added to all entries of the output, and then thrown away, as
            they do for heads.
    """
    e, w = equations, weight.to(torch.float64)
    b = w.new_zeros(len(w)) if bias is None else bias.to(torch.float64)
    units = w.shape[1] // unit_width
    normal = (e.gram * (w.T @ w)).view(units, unit_width, units, unit_width).sum((1, 3))
    right = ((e.cross - torch.outer(e.feature_sum, b)) * w.T).sum(1).view(units, unit_width).sum(1)
    if intercept:
        ones = (e.feature_sum * w.sum(0)).view(units, unit_width).sum(1)
        corner = e.tokens.view(1) * len(w)
        normal = torch.cat([torch.cat([normal, ones[:, None]], 1), torch.cat([ones, corner])[None]])
        right = torch.cat([right, (e.target_sum - e.tokens * b).sum().view(1)])
    rest = (right - normal.sum(1)).to(torch.complex128)
    damped = torch.complex(normal, damp * torch.eye(len(normal)).to(normal))
    x = (
        1 + torch.linalg.solve_ex(damped, rest).result.real[:units]
    )  # not finite where no damping of this size can help
    if not bool((x.abs() <= limit).all()):
        x = torch.ones_like(x)
    return Fit(w * x.repeat_interleave(unit_width), None if bias is None else bias.double())


def representative(filters: Tensor, sigma: float = 1.0, alpha: float = 0.01) -> Tensor:
    """Convex non-negative factorisation of filters in the space of a Gaussian kernel (Nova et al. 2023): C,
    (N, N).

    K_ij = exp(-||w_i - w_j||^2 / sigma^2);  from C = 1/N on,  C <- C * sqrt(K / (K C))  elementwise, as long
    as the sum of C changes by more than `alpha` of itself, which takes few steps. It would end at K C = K,
    that is C = 1; stopped before, C_ii tells how much filter i is needed to represent itself: little where
    others are near.

    Args:
        filters: w, (N, D).
        sigma: Width of the kernel, in the unit of w.
        alpha: Tolerance.
    """
    kernel = (-torch.cdist(filters, filters).square() / sigma**2).exp()
    coefficients = torch.full_like(kernel, 1 / max(len(kernel), 1))
    change = torch.inf
    while change > alpha:
        update = (
            coefficients * (kernel / (kernel @ coefficients).clamp(min=torch.finfo(kernel.dtype).tiny)).sqrt()
        )
        change = float((update - coefficients).sum().abs() / coefficients.sum())
        coefficients = update
    return coefficients


def from_0_to_1(values: Tensor) -> Tensor:
    """Values shifted and scaled to lie from 0 to 1; all 0 if they are equal."""
    low, high = values.aminmax() if len(values) else (0.0, 1.0)
    return (values - low) / (high - low if high > low else 1.0)
