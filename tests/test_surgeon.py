"""Our own method: elimination against explicit least squares, the split over depth, drift, and what is measured for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from checks import calibration
from data import collate, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shallow, slow_unless_in, tiny
from torch import Tensor

import hf_kprune.methods.surgeon
from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.calibration.knowledge import Draws
from hf_kprune.calibration.measure import measure_dense
from hf_kprune.calibration.tasks import knowledge_loss
from hf_kprune.methods.base import Statistics
from hf_kprune.methods.least_squares import DAMPING, NormalEquations, correct_drift
from hf_kprune.methods.search import convex_slopes, split, threshold_search
from hf_kprune.methods.surgeon import eliminate, inverse_covariance, root_of
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import correct_inputs


def problem(columns: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features' moments, output weights, and the metric of the output, all of full rank."""
    generator = torch.Generator().manual_seed(seed)
    features, root, weight = (
        torch.randn(n, m, generator=generator, dtype=torch.float64)
        for n, m in ((3 * columns, columns), (width, width), (width, columns))
    )
    return features.T @ features / len(features), weight, root.T @ root


def least_loss(moments: Tensor, weight: Tensor, metric: Tensor, gone: list[int]) -> float:
    """Of all weights that are zero at `gone`, the least 1/2 tr(F dW S dW^T), explicitly."""
    stay = [c for c in range(len(moments)) if c not in gone]
    change = -weight
    if stay:
        change = torch.zeros_like(weight)
        solved = torch.linalg.solve(moments[stay][:, stay], moments[stay][:, gone] @ weight[:, gone].T)
        change[:, gone], change[:, stay] = -weight[:, gone], solved.T
    return float((metric @ change @ moments @ change.T).trace()) / 2


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_eliminated_units_cost_what_explicit_least_squares_leaves(
    width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when neurons go several at a time. The costs are the slopes of the convex hull of the explicit losses."""
    columns, residual = 12, 5
    moments, weight, metric = problem(columns, residual, seed)
    for share in (0.03, 0.4):
        monkeypatch.setattr(hf_kprune.methods.surgeon, "SHARE", share)
        losses = eliminate(moments.inverse(), weight, root_of(metric), width)
        order = losses.argsort().tolist()
        gone = [[unit * width + c for unit in order[:n] for c in range(width)] for n in range(len(order) + 1)]
        explicit = torch.tensor([least_loss(moments, weight, metric, g) for g in gone], dtype=torch.float64)
        if share == 0.03:  # one by one
            torch.testing.assert_close(losses[order], convex_slopes(explicit), rtol=1e-6, atol=1e-9)
            alone = [
                least_loss(moments, weight, metric, [u * width + c for c in range(width)])
                for u in range(len(order))
            ]
            assert order[0] == min(range(len(order)), key=alone.__getitem__)
        torch.testing.assert_close(losses.sum(), explicit[-1], rtol=1e-6, atol=1e-9)


def test_what_an_intercept_takes_over_costs_nothing() -> None:
    features = torch.randn(50, 4, dtype=torch.float64)
    features[:, 2] = 7.0
    sums = features.T @ features, features.sum(0), 50
    weight, metric = torch.randn(3, 4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with_bias, without = (
        eliminate(inverse_covariance(*sums, centred, 0.0)[0], weight, root_of(metric), 1)
        for centred in (True, False)
    )
    assert int(with_bias.argmin()) == 2
    assert float(with_bias[2]) < 1e-6 < float(without[2])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_slopes_are_of_the_lower_convex_hull(steps: list[float]) -> None:
    curve = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)
    slopes = convex_slopes(curve)
    hull = torch.cat([curve[:1], slopes.cumsum(0)])
    assert bool((slopes.diff() >= 0).all())
    assert bool((hull <= curve * (1 + 1e-6) + 1e-6).all())
    torch.testing.assert_close(hull[-1], curve[-1], rtol=1e-6, atol=1e-6)
    for i, j, k in itertools.combinations(range(len(curve)), 3):  # no chord of the curve is below it
        chord = curve[i] + (curve[k] - curve[i]) * (j - i) / (k - i)
        assert float(hull[j]) <= float(chord) * (1 + 1e-6) + 1e-6


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.7, 1.0, 1.4]))
def test_a_threshold_on_split_scores_minimises_the_sum_of_powers(seed: int, exponent: float) -> None:
    """Among all plans that cost no more, for losses whose powers are convex."""
    generator = torch.Generator().manual_seed(seed)
    costs = [1.0, 2.0, 1.0]
    # convex once raised to the exponent: powers of a convex curve's 1 / exponent
    curves = [torch.rand(5, generator=generator, dtype=torch.float64).sort().values.cumsum(0) for _ in costs]
    steps = [torch.cat([c[:1], c.diff()]) for c in (curve ** (1 / exponent) for curve in curves)]
    if any(bool((step.diff() < 0).any()) for step in steps):
        return
    scores = [step / cost for step, cost in zip(steps, costs, strict=True)]
    budget = float(torch.randint(3, 17, (1,), generator=generator))
    masks = threshold_search(split(scores, costs, exponent), costs, budget, [0] * 3, [1] * 3)

    def total(kept: tuple[int, ...]) -> float:
        return sum(float(curve[4 - k]) if k < 5 else 0.0 for curve, k in zip(curves, kept, strict=True))

    counts = tuple(int(mask.sum()) for mask in masks)
    spent = sum(c * k for c, k in zip(costs, counts, strict=True))
    as_cheap = [
        k
        for k in itertools.product(range(6), repeat=3)
        if sum(c * n for c, n in zip(costs, k, strict=True)) <= spent
    ]
    # a greedy fill of the last unit aside, which may be too dear for what is left
    assert total(counts) <= min(map(total, as_cheap)) + max(float(step.max()) for step in steps) ** exponent


def test_split_keeps_the_order_within_a_sublayer() -> None:
    scores = [torch.rand(9), torch.tensor([0.2, 0.1, 0.3])]
    for exponent in (0.5, 1.0, 2.0):
        for before, after in zip(scores, split(scores, [1.0, 3.0], exponent), strict=True):
            assert before.argsort().tolist() == after.argsort().tolist()


def test_drift_is_corrected_by_the_affine_map_that_undoes_it() -> None:
    torch.manual_seed(0)
    taught = torch.randn(60, 4, dtype=torch.float64)
    matrix, shift = (
        torch.eye(4, dtype=torch.float64) + 0.1 * torch.randn(4, 4, dtype=torch.float64),
        torch.randn(4).double(),
    )
    read = (taught - shift) @ torch.linalg.inv(matrix).T
    equations = NormalEquations.zeros(4, 4, torch.device("cpu"))
    equations.add(read, taught)
    fit = correct_drift(equations, 0.0, True)
    torch.testing.assert_close(fit.weight, matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.bias, shift, rtol=1e-5, atol=1e-6)
    same = NormalEquations.zeros(4, 4, torch.device("cpu"))
    same.add(taught, taught)
    for tune_bias in (True, False):
        fit = correct_drift(same, 0.01, tune_bias)
        torch.testing.assert_close(fit.weight, torch.eye(4, dtype=torch.float64))
        assert fit.bias is not None
        assert float(fit.bias.abs().max()) < 1e-12


def test_corrected_inputs_read_what_the_map_makes_of_theirs() -> None:
    """A projection of x is then what it was of  M x + c."""
    (sublayer, *_) = find_sublayers(shallow().double())
    query = sublayer.layer.get_submodule("attention.self.query")
    generator = torch.Generator().manual_seed(0)
    x, matrix, shift = (torch.randn(*s, generator=generator).double() for s in ((5, 16), (16, 16), (16,)))
    expected = query(x @ matrix.T + shift)
    correct_inputs(sublayer, ["attention.self.query"], matrix, shift)
    torch.testing.assert_close(query(x), expected)


def dense_statistics(
    model: Any, data: list[dict[str, Any]], needs: set[str], **options: Any
) -> list[Statistics]:
    rows_ = calibration(model, data, **options)
    walk, loss = rows_.walk(model), knowledge_loss(model, 2.0, "mean")
    costs = [s.unit_flops(rows_.flops_lengths) for s in walk.sublayers]
    return [s for _, s in sorted(measure_dense(rows_, walk, needs, loss, costs), key=lambda pair: pair[0])]


@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", "SEQUENCE_CLASSIFICATION"), ("mpnet", ""), ("roberta", "MASKED_LM")]
)
def test_what_is_measured_of_the_dense_model_is_so_row_by_row(model_type: str, head: str) -> None:
    """Without padding, through the whole model, with real masks."""
    model, data = shallow(model_type, head).requires_grad_(False), rows(6)
    sublayers, loss = find_sublayers(model), knowledge_loss(model, 2.0, "mean")
    curved, fisher = (
        dense_statistics(model, data, {needs}, per_device_batch_size=4) for needs in ("curvature", "fisher")
    )
    curvature, by_unit = ("gram", "weighted_sum", "metric"), ("fisher", "absolute")
    zeros = dict.fromkeys(("energy", "feature_sum", *curvature, *by_unit), 0.0)
    expected: list[dict[str, Any]] = [dict(zeros) for _ in sublayers]
    masks: list[Tensor] = []
    features: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for i, s in enumerate(sublayers):

        def before(_: Any, args: Any, i: int = i, width: int = s.unit_width) -> Any:
            features[i] = args[0].detach()[0].double()
            return (args[0] * masks[i].repeat_interleave(width),)

        def after(_: Any, args: Any, output: Tensor, i: int = i) -> None:
            outputs[i] = output

        handles += [s.output.register_forward_pre_hook(before), s.output.register_forward_hook(after)]
    for number, row in enumerate(data):
        masks[:] = [torch.ones(s.num_units, requires_grad=True) for s in sublayers]
        inputs = collate([row])
        made = model(**inputs)
        valid = inputs["attention_mask"].bool()
        drawn = loss.draw(made, loss.noise(made, Draws(42, [number], valid)), valid)
        wanted = [*masks, *outputs.values()]
        gradients = torch.autograd.grad(loss(made, drawn, valid).sum(), wanted)
        for i, sums in enumerate(expected):
            g, t = gradients[i].double(), gradients[len(masks) + i][0].double()
            sums["energy"] += features[i].square().sum(0)
            weights = t.square().sum(1, keepdim=True)
            sums["gram"] += features[i].T @ (weights * features[i])
            sums["weighted_sum"] += (weights * features[i]).sum(0)
            sums["feature_sum"] += features[i].sum(0)
            sums["metric"] += t.T @ t
            sums["fisher"] += torch.outer(g, g)
            sums["absolute"] += g.abs()
    for made_of, names in ((curved, ("energy", "feature_sum", *curvature)), (fisher, ("energy", *by_unit))):
        for statistics, sums in zip(made_of, expected, strict=True):
            for name in names:
                scale = float(sums[name].abs().max())
                torch.testing.assert_close(
                    getattr(statistics, name), sums[name], rtol=1e-3, atol=1e-3 * scale
                )
            assert (statistics.samples, statistics.tokens) == (6, sum(len(row["input_ids"]) for row in data))


def test_more_ways_to_split_are_tried_and_the_nearest_student_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(*exponents: float) -> Any:
        monkeypatch.setattr("hf_kprune.methods.surgeon.Surgeon.exponents", exponents)
        model = shallow()
        args = KPruneArguments(sparsity=0.6, disable_tqdm=True, use_cpu=True)
        return KPrunePruner(model, args, rows(24), collate).prune(), model

    report, model = pruned(0.3, 1.0, 3.0)
    assert set(report.trials) == {"0.3", "1.0", "3.0"}
    best = min(report.trials, key=report.trials.__getitem__)
    alone, other = pruned(float(best))
    assert not alone.trials
    assert [s.kept for s in alone.sublayers] == [s.kept for s in report.sublayers]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.several_splits
def test_too_few_rows_to_hold_some_out_are_told() -> None:
    args = KPruneArguments(sparsity=0.5, disable_tqdm=True, use_cpu=True, tune=False)
    with pytest.warns(UserWarning, match="3 calibration rows are measured on, too few to hold some out"):
        KPrunePruner(shallow(), args, rows(3), collate).prune()


def massive(model: Any) -> None:
    model.bert.encoder.layer[1].intermediate.dense.bias.data[3] = 1000.0


def constant_values(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        layer.attention.self.value.weight.data.zero_()
        layer.attention.self.value.bias.data += 3


def duplicate_and_dead_neurons(model: Any) -> None:
    dense = model.bert.encoder.layer[1].intermediate.dense
    dense.weight.data[1], dense.bias.data[1] = dense.weight.data[0], dense.bias.data[0]
    dense.weight.data[4:], dense.bias.data[4:] = 0.0, -20.0


def huge_and_tiny_neurons(model: Any) -> None:
    dense = model.bert.encoder.layer[1].intermediate.dense
    for place, scale in ((0, 1e6), (1, 1e-12)):
        dense.weight.data[place] *= scale
        dense.bias.data[place] *= scale


DEGENERATE = {
    "one neuron of 1,000": massive,
    "values that are constant": constant_values,
    "neurons alike and dead": duplicate_and_dead_neurons,
    "huge and tiny ones": huge_and_tiny_neurons,
    "rows that repeat": None,
}


@pytest.mark.parametrize(
    ("case", "ridge"),
    slow_unless_in(
        [(case, 0.0) for case in list(DEGENERATE)[:3]], itertools.product(DEGENERATE, (None, 0.0))
    ),
)
def test_features_that_are_constant_alike_or_of_all_sizes_are_pruned(case: str, ridge: float | None) -> None:
    model, spoil = tiny(), DEGENERATE[case]
    data = rows(24)
    if spoil is None:
        data = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}] * 24
    else:
        spoil(model)
    args = KPruneArguments(sparsity=0.6, ridge=ridge, disable_tqdm=True, use_cpu=True)
    report = KPrunePruner(model, args, data, collate).prune()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    for s in report.sublayers:
        if s.error_before is not None and s.error_after is not None:
            assert s.error_after <= 1.1 * s.error_before + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_about_a_large_mean_are_those_of_what_varies(dtype: torch.dtype) -> None:
    """The features of language models have means of a thousand and more; float32 holds seven digits."""
    varying = torch.randn(600, 6, dtype=torch.float64)
    features = (varying + torch.tensor([0.0, 1.0, 1e3, 1e4, -1e3, 0.0])).float()
    exact = features.double() - features.double().mean(0)
    equations = NormalEquations.zeros(6, 6, torch.device("cpu"))
    for batch in features.split(64):
        equations.add(batch, batch, dtype)
    inverse, _ = inverse_covariance(equations.gram, equations.feature_sum, 600, True, 0.0)
    torch.testing.assert_close(inverse.inverse(), exact.T @ exact / 600, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(equations.cross, equations.gram)
    torch.testing.assert_close(equations.feature_sum, features.double().sum(0), rtol=1e-6, atol=1e-4)


def test_damping_that_rounding_asks_for_is_no_more_than_that_and_is_reported() -> None:
    features = torch.randn(30, 4).repeat(1, 3).float()  # each column three times
    centred = NormalEquations.zeros(12, 12, torch.device("cpu"))
    centred.add(1e3 * features, features, torch.float32)
    before = centred.gram.clone()
    inverse, damping = inverse_covariance(centred.gram, centred.feature_sum, 30, True, 0.0)
    assert torch.equal(centred.gram, before)
    assert bool((torch.linalg.eigvalsh(inverse) > 0).all())
    assert 0 < damping < 1e-4
    _, ordinary = inverse_covariance(
        torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 5, True, 0.0
    )
    assert ordinary == DAMPING
