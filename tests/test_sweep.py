"""Sweeps: the same models as one by one, the smallest that is good enough, and a search over options."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from data import collate, rows
from hypothesis import given
from hypothesis import strategies as st
from models import shallow, slow_unless_in
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_kprune import ArgumentError, BudgetError, KPruneArguments, KPrunePruner
from hf_kprune.sizes import model_size
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.sweep import Sweep, SweepPoint, smallest_within


def make_pruner(model: PreTrainedModel, **options: Any) -> KPrunePruner:
    args = KPruneArguments(disable_tqdm=True, use_cpu=True, **options)
    data = [{**row, "label": i % 2} for i, row in enumerate(rows(24))]

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return KPrunePruner(model, args, rows(24), with_labels, data, compute_metrics=accuracy)


def with_labels(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    labels = {"labels": torch.tensor([row["label"] for row in batch])} if "label" in batch[0] else {}
    return {**collate(batch), **labels}


@pytest.mark.parametrize("method", slow_unless_in(("surgeon",), ("surgeon", "kprune")))
def test_a_sweep_makes_the_models_that_prune_makes(method: str, tmp_path: Path) -> None:
    model = shallow()
    before = {name: p.clone() for name, p in model.named_parameters()}
    pruner = make_pruner(model, method=method)
    swept = pruner.sweep([0.3, 0.6], metric="accuracy", output_dir=str(tmp_path))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert pruner.report is None
    for point, sparsity in zip(swept.points[1:], (0.3, 0.6), strict=True):
        alone = shallow()
        report = make_pruner(alone, method=method, sparsity=sparsity).prune()
        loaded = AutoModelForSequenceClassification.from_pretrained(point.path)
        for a, b in zip(alone.parameters(), loaded.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        assert (point.sparsity, point.parameters) == (report.sparsity, report.after.parameters)
    assert swept.points[0].distance == 0 < min(point.distance for point in swept.points[1:])
    assert str(swept).count("\n") == 2 + 3


def test_with_max_drop_the_model_becomes_the_smallest_good_enough() -> None:
    pruner = make_pruner(shallow(), method="magnitude")
    swept = pruner.sweep([0.2, 0.8], max_drop=1e9, refine=1)  # all are good enough
    assert swept.best == len(swept.points) - 1
    assert pruner.report is not None
    assert pruner.report.sparsity == swept.points[-1].sparsity >= 0.8
    untouched = shallow()
    pruner = make_pruner(untouched, method="magnitude")
    before = copy.deepcopy(untouched.state_dict())
    swept = pruner.sweep([0.2, 0.8], max_drop=0.0, refine=2)  # none is
    assert swept.best == 0
    assert all(torch.equal(before[name], value) for name, value in untouched.state_dict().items())
    assert len(swept.points) == 1 + 2 + 2
    pruner.sweep([0.8], max_drop=1e9, refine=0, inplace=False)
    assert id(pruner.dense_model) == id(untouched)
    assert pruner.model.num_parameters() < untouched.num_parameters()
    assert all(torch.equal(before[name], value) for name, value in untouched.state_dict().items())


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5, unique=True),
    st.floats(0.0, 1.0),
    st.integers(0, 6),
)
def test_refining_closes_in_on_the_last_good_sparsity(
    sparsities: list[float], cliff: float, refine: int
) -> None:
    """Quality falls from 1 to 0 where sparsity passes the cliff."""

    def point(sparsity: float) -> SweepPoint:
        return SweepPoint({}, sparsity, 1 - sparsity, 1, float(sparsity > cliff), 1.0)

    swept = Sweep([point(0.0)])
    smallest_within(point, swept, sparsities, 0.5, refine)
    assert swept.best is not None
    best = swept.points[swept.best].sparsity
    assert best <= cliff
    assert best == max(p.sparsity for p in swept.points if p.sparsity <= cliff)
    over = [p.sparsity for p in swept.points if p.sparsity > cliff]
    first = min([s for s in sparsities if s > cliff], default=None)
    if first is not None:
        assert min(over) - best <= first * 0.5**refine + 1e-9


def test_pareto_points_are_those_that_nothing_dominates() -> None:
    points = [
        SweepPoint({}, 0.1 * i, flops, 1, distance, 1.0)
        for i, (flops, distance) in enumerate([(3, 0), (2, 5), (1, 4)])
    ]
    assert Sweep(points).pareto() == [True, False, True]


def test_what_cannot_be_swept_is_refused() -> None:
    model = shallow()
    without = KPrunePruner(model, KPruneArguments(disable_tqdm=True, use_cpu=True), rows(24), collate)
    for options, message in (
        ({"metric": "accuracy"}, "metric is 'accuracy', but there is no eval_dataset"),
        ({"budgets": []}, r"budgets are \[\], expected at least one"),
        ({"budgets": [{"target_params": 10}], "max_drop": 1}, "expected at least 0, and fractions to remove"),
        ({"budgets": [0.5], "max_drop": -0.1}, "max_drop is -0.1 and"),
        ({"budgets": [{"method": "flap"}]}, "each a fraction or a dict of one budget"),
    ):
        with pytest.raises(ArgumentError, match=message):
            without.sweep(**options)
    with pytest.raises(ArgumentError, match=r"metric is 'f1', expected a number among .*eval_accuracy"):
        make_pruner(shallow()).sweep([0.5], metric="f1")


def test_targets_are_kept_to() -> None:
    """In parameters, bytes or FLOPs: never over, and used up to less than one unit of any sublayer."""
    full = model_size(shallow())
    for name, dense in (("target_params", full.parameters), ("target_bytes", full.bytes)):
        target = 0.8 * dense
        model = shallow()
        report = make_pruner(model, tune=False, **{name: target}).prune()
        size = model_size(model)
        reached = {"target_params": size.parameters, "target_bytes": size.bytes}[name]
        assert 0.9 * target < reached <= target
        assert report.asked == {name: target}
        assert reached <= report.achieved <= target
        assert f"{name} " in str(report)
        with pytest.raises(BudgetError, match=rf"{name} is 10, .* can reach [\d,]+ and more"):
            make_pruner(shallow(), **{name: 10}).prune()
    half = make_pruner(shallow(), sparsity=0.5).plan()
    again = make_pruner(shallow(), target_flops=0.5 * half.before.flops).plan()
    assert [s.kept for s in again.sublayers] == [s.kept for s in half.sublayers]
    with pytest.raises(ArgumentError, match="target_flops and target_bytes are given, expected one"):
        KPruneArguments(target_flops=1.0, target_bytes=1.0)
    with pytest.raises(ArgumentError, match="target_params is 0, expected over 0"):
        KPruneArguments(target_params=0)


def units(model: PreTrainedModel) -> float:
    """What a model takes on a clock that counts its units in place of seconds."""
    return 10.0 + sum(s.num_units * (5 if s.kind == "attention" else 1) for s in find_sublayers(model))


@pytest.fixture
def clock_of_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compare(models: list[PreTrainedModel], *_: Any, **__: Any) -> list[float]:
        return [units(model) for model in models]

    for module in ("budgets.times", "latency.table", "sweeper"):
        monkeypatch.setattr(f"hf_kprune.{module}.compare", compare)
    monkeypatch.setattr("hf_kprune.latency.table.cached_assets_path", lambda *_: tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("clock_of_units")
def test_budgets_of_all_kinds_in_one_sweep_are_those_of_single_runs() -> None:
    size = model_size(shallow())
    asked = [
        {"sparsity": 0.5},
        {"target_params": 0.8 * size.parameters},
        {"target_bytes": 0.7 * size.bytes},
        {"target_speedup": 1.5},
        {"target_latency": units(shallow()) / 2},
    ]
    swept = make_pruner(shallow(), tune=False, target_bytes=0.9 * size.bytes).sweep(
        asked
    )  # which options of its own do not overrule
    assert [p.sparsity for p in swept.points] == sorted(p.sparsity for p in swept.points)
    for options in asked:
        (point,) = [p for p in swept.points if p.asked == options]
        assert point.sparsity == make_pruner(shallow(), tune=False, **options).prune().sparsity > 0


@pytest.mark.usefixtures("clock_of_units")
def test_a_time_that_no_cut_model_is_measured_to_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_kprune.budgets.times.compare", lambda models, *_: [1.0, 0.9])
    model = shallow()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        BudgetError, match=r"target_speedup is 1.5, of which the fastest .* takes 1\.35 times the time"
    ):
        make_pruner(model, target_speedup=1.5).prune()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["surgeon", "kprune"])
def test_what_only_compares_models_does_not_fit_them(method: str, tmp_path: Path) -> None:
    """Without an evaluation dataset, what the held-out rows say changes the distance and, of K-prune, nothing else."""
    results = []
    for other in (False, True):
        data = rows(24)
        if other:
            data[-6:] = rows(30, seed=5)[-6:]
        stream = datasets.Dataset.from_list(data).to_iterable_dataset()
        args = KPruneArguments(disable_tqdm=True, use_cpu=True, method=method)
        pruner = KPrunePruner(shallow(), args, stream, collate)
        swept = pruner.sweep([0.5], output_dir=str(tmp_path / str(other)))
        results.append(
            (
                swept.points[1],
                AutoModelForSequenceClassification.from_pretrained(swept.points[1].path).state_dict(),
            )
        )
    (first, weights), (second, same) = results
    assert first.distance != second.distance
    if method == "kprune":  # ours tries splits on them
        assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_compared_in_evaluation_mode(dtype: torch.dtype) -> None:
    def dropping() -> PreTrainedModel:
        model = shallow().to(dtype).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        return model

    def sweep(model: PreTrainedModel) -> list[float]:
        args = KPruneArguments(disable_tqdm=True, use_cpu=True)
        return [p.distance for p in KPrunePruner(model, args, rows(24), collate).sweep([0.5]).points]

    model = dropping()
    distances = sweep(model)
    assert model.training
    assert distances == sweep(dropping().eval())
    assert distances[0] < 0.1 * distances[1]


@pytest.mark.usefixtures("clock_of_units")
def test_a_target_of_time_is_kept_to_by_what_is_measured() -> None:
    dense = units(shallow())
    for options in ({"target_speedup": 1.5}, {"target_latency": dense / 1.5}):
        model = shallow()
        report = make_pruner(model, tune=False, **options).prune()
        assert units(model) <= dense / 1.5 * 1.01
        assert units(model) > dense / 1.5 - 6  # less than a head is left over
        assert report.achieved == (dense / units(model) if "target_speedup" in options else units(model))
    for value, name in ((1000.0, "target_speedup"), (1.0, "target_latency")):
        with pytest.raises(
            BudgetError, match=f"{name} is {value}, .* the model takes .* s as it is and 10 s with the least"
        ):
            make_pruner(shallow(), **{name: value}).prune()
    with pytest.raises(
        ArgumentError, match="method is 'kprune', expected with target_speedup, one of surgeon, kwon"
    ):
        KPruneArguments(target_speedup=2.0, method="kprune")


def test_each_method_has_options_worth_searching_or_says_that_it_has_none() -> None:
    pytest.importorskip("optuna")
    best = make_pruner(shallow(), sparsity=0.6).hyperparameter_search(n_trials=1)
    assert best.hyperparameters.keys() == {"ridge"}
    pruner = make_pruner(shallow(), method="kprune", method_kwargs={"lambda_pred": 2.0}, sparsity=0.6)
    best = pruner.hyperparameter_search(n_trials=1)
    assert best.hyperparameters.keys() == {"method_kwargs"}
    assert best.hyperparameters["method_kwargs"].keys() == {"lambda_pred", "lambda_rep", "mu"}
    assert best.hyperparameters["method_kwargs"]["lambda_pred"] == 2.0
    assert replace(pruner.args, **best.hyperparameters).method_kwargs == best.hyperparameters["method_kwargs"]
    with pytest.raises(ArgumentError, match="no hp_space, and method 'flap' has none"):
        make_pruner(shallow(), method="flap").hyperparameter_search(n_trials=1)


def test_search_over_options_finds_the_best_of_its_trials() -> None:
    pytest.importorskip("optuna")
    pruner = make_pruner(shallow(), method="kprune", sparsity=0.6)
    args = pruner.args
    tried = []

    def space(trial: Any) -> dict[str, Any]:
        return {"method_kwargs": {"lambda_rep": trial.suggest_float("lambda_rep", 1e-6, 1.0, log=True)}}

    def objective(metrics: dict[str, float]) -> float:
        tried.append(metrics["distance"])
        assert "eval_accuracy" in metrics
        return metrics["distance"]

    best = pruner.hyperparameter_search(space, objective, n_trials=2)
    assert best.objective == min(tried)
    assert len(tried) == 2
    assert pruner.args is args
    replace(args, **best.hyperparameters)
