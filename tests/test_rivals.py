"""The rival methods: their searches against enumeration, their tuning against least squares written out, and end to end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import logits
from data import collate, normal, rows
from models import shallow, slow_unless_in
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hf_kprune import BudgetError, KPruneArguments, KPrunePruner
from hf_kprune.methods import METHODS
from hf_kprune.methods.base import Method, Statistics
from hf_kprune.methods.baselines import FLAP
from hf_kprune.methods.least_squares import NormalEquations
from hf_kprune.methods.mask_tuning import (
    FIRST,
    KCM,
    Kwon,
    count_search,
    rearrange,
    representative,
    scale_units,
)
from hf_kprune.methods.search import TOLERANCE, group_sizes, threshold_search


RIVALS = [name for name in METHODS if name not in ("surgeon", "kprune")]


TOKENS, WIDTH = 90, 5


def make(name: str, **options: Any) -> Method:
    return METHODS[name](KPruneArguments(**options))


def statistics(
    kind: str = "ffn", units: int = 8, width: int = 1, cost: float = 1.0, seed: int = 0
) -> Statistics:
    """What would be measured of random features and random gradients."""
    a, g = normal(TOKENS, units * width, seed=seed) + 0.3, normal(12, units, seed=seed + 1)
    weight = normal(WIDTH, units * width, seed=seed + 2)
    magnitude = weight.square().sum(0).view(units, width).sum(1)
    result = Statistics(
        kind != "ffn", width, cost, weight, True, magnitude, a.square().sum(0), a.sum(0), TOKENS, len(g)
    )
    result.fisher, result.absolute = g.T @ g, g.abs().sum(0)
    return result


def encoder(seed: int = 0) -> list[Statistics]:
    """Two layers of 3 heads and 8 neurons."""
    heads, neurons = [{"kind": "attention", "units": 3, "width": 4, "cost": 5.0}, {"units": 8, "cost": 1.0}]
    return [statistics(**heads if i % 2 == 0 else neurons, seed=seed + 10 * i) for i in range(4)]


def uneven(seed: int = 0) -> list[Statistics]:
    """An encoder and a decoder whose units cost different amounts."""
    kinds = [
        ("attention", 4, 3, 7.0),
        ("ffn", 9, 1, 1.1),
        ("attention", 5, 3, 6.1),
        ("cross_attention", 5, 3, 4.3),
    ]
    kinds.append(("ffn", 7, 1, 0.7))
    return [statistics(*kind, seed=seed + 10 * i) for i, kind in enumerate(kinds)]


def spent(masks: Sequence[Tensor], measured: Sequence[Statistics]) -> float:
    return sum(s.cost * int(mask.sum()) for mask, s in zip(masks, measured, strict=True))


def total_cost(measured: Sequence[Statistics]) -> float:
    return sum(s.cost * len(s.magnitude) for s in measured)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("share", [0.6, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("make_model", [encoder, uneven])
def test_budget_minimum_and_multiple_hold(name: str, share: float, make_model: Any) -> None:
    method, measured = make(name), make_model()
    if name == "kcm":  # attention alone is most of these models
        share = 0.9 + share / 10
    budget = share * total_cost(measured)
    minimum, multiple = (
        [1 + i % 2 for i in range(len(measured))],
        [1 if s.has_heads else 3 for s in measured],
    )
    masks = method.search(measured, [method.score(s) for s in measured], budget, minimum, multiple)
    assert spent(masks, measured) <= budget * (1 + TOLERANCE)
    for mask, s, low, m in zip(masks, measured, minimum, multiple, strict=True):
        kept = int(mask.sum())
        assert len(mask) == len(s.magnitude)
        assert kept >= low
        assert kept % m == 0 or kept == len(mask)
        if kept < len(mask):  # what is left is not enough for more
            more = group_sizes(len(mask), kept, m)[1]
            assert spent(masks, measured) + s.cost * more > budget
    if share == 1:
        assert all(bool(mask.all()) for mask in masks)


@pytest.mark.parametrize("name", RIVALS)
def test_given_numbers_of_units_are_kept(name: str) -> None:
    """As in a uniform plan: the minimum of each sublayer is all that the budget pays for."""
    method, measured = make(name), encoder()
    counts = [3, 2, 3, 5]
    budget = sum(n * s.cost for n, s in zip(counts, measured, strict=True))
    masks = method.search(measured, [method.score(s) for s in measured], budget, counts, [1] * 4)
    assert [int(mask.sum()) for mask in masks] == counts


@pytest.mark.parametrize("name", RIVALS)
def test_scores_do_not_depend_on_how_often_the_data_are_seen(name: str) -> None:
    once, twice = statistics("ffn", 9), statistics("ffn", 9)
    for field in ("energy", "feature_sum", "tokens", "samples", "fisher", "absolute"):
        setattr(twice, field, 2 * getattr(twice, field))
    torch.testing.assert_close(make(name).score(once), make(name).score(twice))


@pytest.mark.parametrize("name", sorted({*RIVALS} - {"random"}))
@pytest.mark.parametrize(("kind", "width"), [("ffn", 1), ("attention", 3)])
def test_scores_follow_their_units(name: str, kind: str, width: int) -> None:
    s, moved = statistics(kind, 7, width), statistics(kind, 7, width)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    columns = (order[:, None] * width + torch.arange(width)).flatten()
    moved.weight, moved.energy, moved.feature_sum = (
        s.weight[:, columns],
        s.energy[columns],
        s.feature_sum[columns],
    )
    assert s.fisher is not None
    assert s.absolute is not None
    moved.magnitude, moved.absolute, moved.fisher = (
        s.magnitude[order],
        s.absolute[order],
        s.fisher[order][:, order],
    )
    torch.testing.assert_close(make(name).score(moved), make(name).score(s)[order], rtol=1e-4, atol=1e-6)


# Kwon et al.


def best_by_enumeration(scores: Sequence[Tensor], costs: Sequence[float], budget: float) -> float:
    """The most importance that any set of units within the budget has."""
    cost = torch.cat([torch.full_like(s, c) for s, c in zip(scores, costs, strict=True)])
    importance = torch.cat(list(scores)) * cost
    sets = (torch.arange(2 ** len(cost))[:, None] >> torch.arange(len(cost))) & 1
    return float((sets.double() @ importance)[sets.double() @ cost <= budget].max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.0, 4.0, 11.5, 17.0, 26.0])
def test_kwon_finds_the_best_set_of_all(seed: int, budget: float) -> None:
    kinds = [("attention", 2, 2, 5.0), ("ffn", 5, 1, 1.0), ("attention", 2, 2, 5.0), ("ffn", 5, 1, 1.0)]
    measured = [statistics(*kind, seed=seed + 10 * i) for i, kind in enumerate(kinds)]
    for s in measured:
        assert s.fisher is not None
        s.fisher = s.fisher.diagonal().diag()  # nothing to rearrange
    method = Kwon(KPruneArguments())
    scores = [method.score(s) for s in measured]
    masks = method.search(measured, scores, budget, [0] * 4, [1] * 4)
    total = sum(
        s.cost * float(score[mask].sum()) for s, score, mask in zip(measured, scores, masks, strict=True)
    )
    assert total == pytest.approx(best_by_enumeration(scores, [s.cost for s in measured], budget))


@pytest.mark.parametrize("seed", range(5))
def test_kwon_holds_more_than_any_threshold_where_costs_differ(seed: int) -> None:
    method, measured = Kwon(KPruneArguments()), uneven(seed)
    scores, costs = [method.score(s) for s in measured], [s.cost for s in measured]
    worth = [score * cost for score, cost in zip(scores, costs, strict=True)]
    budget = 0.4 * total_cost(measured)
    counts = count_search(scores, costs, budget, [0] * 5, [1] * 5, [not s.has_heads for s in measured])
    total = sum(float(w.sort(descending=True).values[:n].sum()) for w, n in zip(worth, counts, strict=True))
    for threshold in torch.cat(scores):
        above = [score >= threshold for score in scores]
        if spent(above, measured) <= budget:
            assert sum(float(w[mask].sum()) for w, mask in zip(worth, above, strict=True)) <= total * (
                1 + 1e-12
            )


def test_kwon_tries_no_heads_and_does_not_overspend_on_them() -> None:
    neurons = torch.arange(6, dtype=torch.float64) + 1
    for heads, expected in ((torch.full((3,), 0.1), [0, 6]), (torch.full((3,), 1e6), [1, 2])):
        assert (
            count_search([heads.double(), neurons], [4.0, 1.0], 6.0, [0, 0], [1, 1], [False, True])
            == expected
        )


def test_kwon_with_one_kind_only_is_the_threshold() -> None:
    scores, costs = [normal(7, seed=i).square() for i in range(3)], [2.0] * 3
    for neurons in (True, False):
        counts = count_search(scores, costs, 21.0, [0, 1, 0], [2, 1, 1], [neurons] * 3)
        assert counts == [
            int(mask.sum()) for mask in threshold_search(scores, costs, 21.0, [0, 1, 0], [2, 1, 1])
        ]


def rearrange_by_vectors(mask: list[bool], gradients: Tensor) -> list[bool]:
    """The published procedure: one pass over the units that stay, with the vectors of gradients themselves."""
    order = gradients.square().sum(0).argsort(stable=True).tolist()
    gone = [u for u in order if not mask[u]]
    for unit in [u for u in order if mask[u]]:
        gone.append(unit)
        costs = [float(gradients[:, [v for v in gone if v != u]].sum(1).square().sum()) for u in gone]
        gone.pop(costs.index(min(costs)))
    return [u not in gone for u in range(len(mask))]


@pytest.mark.parametrize("seed", range(6))
def test_rearrangement_is_that_of_vectors_and_never_raises_the_cost(seed: int) -> None:
    gradients = normal(15, 3, seed=seed) @ normal(3, 11, seed=seed + 1) + 0.1 * normal(15, 11, seed=seed + 2)
    fisher = gradients.T @ gradients
    mask = torch.ones(11, dtype=torch.bool)
    mask[fisher.diagonal().argsort()[: 2 + seed]] = False
    result = rearrange(mask, fisher)
    assert result.tolist() == rearrange_by_vectors(mask.tolist(), gradients)
    assert int(result.sum()) == int(mask.sum())

    def cost(keep: Tensor) -> float:
        return float(gradients[:, ~keep].sum(1).square().sum())

    assert cost(result) <= cost(mask) * (1 + 1e-12)


def test_rearrangement_lets_units_go_that_cancel() -> None:
    gradients = torch.tensor([[1.0, 1.1, -2.2, 2.2]])
    mask = torch.tensor([False, False, True, True])  # the cheapest one by one
    assert rearrange(mask, gradients.T @ gradients).tolist() == [True, True, False, False]
    for same in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert torch.equal(rearrange(same, gradients.T @ gradients), same)


def problem(units: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, NormalEquations]:
    """Features, output weights and bias, and a target that other factors of the units would meet but for some noise."""
    a, w, b = normal(TOKENS, units * width) + 0.4, normal(WIDTH, units * width, seed=1), normal(WIDTH, seed=2)
    factors = (1 + 0.5 * normal(units, seed=3)).repeat_interleave(width)
    y = (a * factors) @ w.T + b + 0.6 + 0.5 * normal(TOKENS, WIDTH, seed=4)
    equations = NormalEquations.zeros(units * width, WIDTH, a.device)
    equations.add(a, y)
    return a, w, b, y, equations


@pytest.mark.parametrize(("units", "width"), [(6, 1), (4, 3), (1, 3)])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("damp", [1e-6, 1.0, 1e3])
def test_factors_are_those_of_least_squares_over_features(
    units: int, width: int, intercept: bool, damp: float
) -> None:
    a, w, b, y, equations = problem(units, width)
    fit = scale_units(equations, w, b, width, damp=damp, intercept=intercept)
    parts = [a[:, u * width : (u + 1) * width] @ w[:, u * width : (u + 1) * width].T for u in range(units)]
    columns = torch.stack([p.flatten() for p in [*parts, *[torch.ones_like(y)] * intercept]], 1)
    g, r = columns.T @ columns, columns.T @ (y - b).flatten()
    stacked = torch.cat([g, damp * torch.eye(len(g), dtype=g.dtype)])
    change = torch.linalg.lstsq(stacked, torch.cat([r - g.sum(1), torch.zeros_like(r)])[:, None]).solution[
        :, 0
    ]
    x = 1 + change[:units]
    torch.testing.assert_close(fit.weight, w * x.repeat_interleave(width), rtol=1e-7, atol=1e-7)
    if damp < 1e-3:
        direct = torch.linalg.lstsq(columns, (y - b).flatten()[:, None]).solution[:units, 0]
        torch.testing.assert_close(x, direct, rtol=1e-6, atol=1e-6)
    assert fit.bias is not None
    assert torch.equal(fit.bias, b)
    if not intercept:
        assert (y - a @ fit.weight.T - b).norm() < (y - a @ w.T - b).norm()


def test_factors_beyond_the_limit_leave_all_at_one() -> None:
    a, w, _, _, _ = problem(4, 2)
    far = torch.tensor([1.0, 1.0, 30.0, 1.0], dtype=torch.float64).repeat_interleave(2)
    y = (a * far) @ w.T
    equations = NormalEquations.zeros(8, WIDTH, a.device)
    equations.add(a, y)
    assert torch.equal(scale_units(equations, w, None, 2).weight, w)
    torch.testing.assert_close(
        scale_units(equations, w, None, 2, limit=31.0).weight, w * far, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("width", [1, 3])
def test_emptied_and_dead_sublayers_can_be_tuned(name: str, width: int) -> None:
    for units, weight in ((0, torch.zeros(WIDTH, 0)), (3, normal(WIDTH, 3 * width))):
        equations = NormalEquations.zeros(units * width, WIDTH, weight.device)
        equations.add(torch.zeros(9, units * width), normal(9, WIDTH))
        fit = make(name).tune(equations, weight, torch.zeros(WIDTH), width)
        assert torch.equal(fit.weight, weight.double())
        assert fit.bias is not None
        assert bool(torch.isfinite(fit.bias).all())


# KCM


def test_kernel_factorisation_goes_towards_what_represents_the_filters() -> None:
    filters = 0.5 * normal(12, 6)
    kernel = (-(filters[:, None] - filters).square().sum(-1)).exp()
    rest = []
    for alpha in (1.0, 0.1, 1e-2, 1e-4, 1e-8):
        c = representative(filters, alpha=alpha)
        assert bool((c >= 0).all())
        rest.append(float((kernel - 2 * kernel @ c + c.T @ kernel @ c).trace()))  # ||Phi - Phi C||^2
    assert rest == sorted(rest, reverse=True)
    torch.testing.assert_close(kernel @ c, kernel, rtol=0, atol=1e-3)
    torch.testing.assert_close(c * (kernel / (kernel @ c)).sqrt(), c, rtol=0, atol=1e-3)  # its fixed point


def test_filters_that_others_resemble_represent_themselves_less() -> None:
    filters = normal(8, 6)
    filters[5:] = filters[4] + 1e-3 * normal(3, 6, seed=1)
    alone, alike = representative(filters).diagonal().split(4)
    assert float(alike.max()) < float(alone.min())


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_filters_are_near_by_a_gaussian_of_their_distance(sigma: float) -> None:
    """One step from C = 1/2 on, for two filters at distance 1: C_ij = 1/2 sqrt(K_ij / mean_j K_ij)."""
    kernel = torch.tensor([[1.0, math.exp(-1 / sigma**2)], [math.exp(-1 / sigma**2), 1.0]])
    result = representative(torch.tensor([[0.0], [1.0]]), sigma, alpha=1e9)
    torch.testing.assert_close(result, (kernel / kernel.mean(1, keepdim=True)).sqrt() / 2)


def test_kcm_keeps_all_heads_and_says_how_far_it_goes() -> None:
    method, measured = KCM(KPruneArguments()), encoder()
    scores = [method.score(s) for s in measured]
    heads = sum(s.cost * len(s.magnitude) for s in measured if s.has_heads)
    assert min(float(score.min()) for score, s in zip(scores, measured, strict=True) if s.has_heads) == FIRST
    masks = method.search(measured, scores, heads + 5, [0] * 4, [1] * 4)
    assert [int(mask.sum()) for mask in masks[::2]] == [3, 3]
    assert sum(int(mask.sum()) for mask in masks[1::2]) == 5
    reach = 1 - (heads + 4) / total_cost(measured)  # two of each FFN stay
    with pytest.raises(BudgetError, match=rf"can reach 0 to {int(1e4 * reach) / 1e4:.4f}"):
        method.search(measured, scores, heads + 3, [0, 2, 0, 2], [1] * 4)


def test_kcm_leaves_attention_as_it_is() -> None:
    _, w, b, _, equations = problem(3, 4)
    assert torch.equal(KCM(KPruneArguments()).tune(equations, w, b, 4).weight, w)
    _, w, b, _, equations = problem(12, 1)
    assert not torch.equal(KCM(KPruneArguments()).tune(equations, w, b, 1).weight, w)


# baselines


@pytest.mark.parametrize("name", ["magnitude", "taylor", "kwon"])
def test_two_units_as_one_have_the_score_of_each(name: str) -> None:
    one, two = statistics("attention", 4, 2), statistics("attention", 4, 2, cost=2.0)
    for field in ("magnitude", "absolute", "fisher"):
        setattr(two, field, 2 * getattr(two, field))
    torch.testing.assert_close(make(name).score(one), make(name).score(two))


def test_random_follows_its_seed_and_is_fair_to_heads() -> None:
    measured = [statistics("attention", 400, 2, cost=4.0), statistics("ffn", 400)]
    methods = [make("random", seed=seed) for seed in (0, 0, 1)]
    (heads, neurons), again, other = ([method.score(s) for s in measured] for method in methods)
    assert torch.equal(heads, again[0])
    assert torch.equal(neurons, again[1])
    assert not torch.equal(heads, other[0])
    assert not torch.equal(heads, neurons)
    masks = methods[0].search(measured, [heads, neurons], 0.5 * total_cost(measured), [0, 0], [1, 1])
    assert [float(mask.double().mean()) for mask in masks] == pytest.approx([0.5, 0.5], abs=0.08)


# FLAP, Wanda-sp


def test_flap_scores_fluctuation_and_no_offset() -> None:
    s, shifted = statistics("attention", 5, 3), statistics("attention", 5, 3)
    a = normal(TOKENS, 15) + 0.3  # the features of `statistics`
    metric = a.var(0, correction=0) * s.weight.square().sum(0)
    expected = ((metric - metric.mean()) / metric.std(correction=0)).view(5, 3).mean(1)
    torch.testing.assert_close(FLAP(KPruneArguments()).score(s), expected)
    shifted.energy, shifted.feature_sum, shifted.cost = (a + 4).square().sum(0), (a + 4).sum(0), 9.0
    shifted.weight = -7 * s.weight
    torch.testing.assert_close(FLAP(KPruneArguments()).score(shifted), expected)


def test_flap_bias_takes_over_the_mean_of_what_has_gone() -> None:
    a, w, b = normal(TOKENS, 8) + 0.5, normal(WIDTH, 8, seed=1), normal(WIDTH, seed=2)
    y = a @ w.T + b
    equations = NormalEquations.zeros(5, WIDTH, a.device)
    equations.add(a[:, :5], y)
    fit = FLAP(KPruneArguments()).tune(equations, w[:, :5], b, 1)
    assert fit.bias is not None
    assert torch.equal(fit.weight, w[:, :5])
    torch.testing.assert_close((y - a[:, :5] @ fit.weight.T - fit.bias).mean(0), torch.zeros_like(b))
    torch.testing.assert_close(fit.bias, b + w[:, 5:] @ a[:, 5:].mean(0))
    assert FLAP(KPruneArguments()).tune(equations, w[:, :5], None, 1).bias is None


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_wanda_sp_keeps_the_best_of_each_sublayer_in_equal_shares(share: float) -> None:
    method, measured = make("wanda_sp"), [statistics("ffn", units, seed=units) for units in (20, 40, 60)]
    measured[0].weight *= 100  # of no account to the others
    scores = [method.score(s) for s in measured]
    masks = method.search(measured, scores, share * 120, [0] * 3, [1] * 3)
    for mask, s in zip(masks, measured, strict=True):
        assert abs(int(mask.sum()) - share * len(mask)) <= 1
        importance = s.weight.abs().sum(0) * s.energy.sqrt()
        assert float(importance[mask].min()) > float(importance[~mask].max())


# end to end


@pytest.mark.parametrize(
    ("name", "uniform"),
    slow_unless_in([("kwon", False), ("flap", False)], itertools.product(RIVALS, (False, True))),
)
def test_prunes_to_the_budget_and_saves_what_loads(name: str, uniform: bool, tmp_path: Path) -> None:
    model = shallow(intermediate_size=64)
    options: dict[str, Any] = {
        "method": name,
        "sparsity": 0.4,
        "uniform": uniform,
        "prune_heads": not uniform,
    }
    pruner = KPrunePruner(
        model, KPruneArguments(**options, disable_tqdm=True, use_cpu=True), rows(24), collate
    )
    report = pruner.prune()
    assert 0.4 * (1 - 1e-9) <= report.sparsity < (0.7 if uniform else 0.45)
    tuned = [s for s in report.sublayers if s.error_after is not None]
    assert bool(tuned) == METHODS[name].tunes
    heads = [len(s.kept) for s in report.sublayers if s.kind == "attention"]
    assert set(heads) == {4} or name != "kcm"
    if uniform:
        assert all(
            len({len(s.kept) for s in report.sublayers if s.kind == kind}) == 1
            for kind in ("attention", "ffn")
        )
    pruner.save_model(str(tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
