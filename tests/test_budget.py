"""Budgets: one at a time, never silently void, and honest about what they are a share of."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from conftest import collate, rows, tiny
from transformers import PreTrainedModel

from hf_kprune import ArgumentError, BudgetWarning, KPruneArguments, KPrunePruner
from hf_kprune.arguments import TARGETS
from hf_kprune.cost import model_size


def make_pruner(model: PreTrainedModel, data: Any = None, **options: Any) -> KPrunePruner:
    args = KPruneArguments(**{"disable_tqdm": True, "use_cpu": True, "num_tokens": 2_000, **options})
    return KPrunePruner(model, args, rows() if data is None else data, collate)


# One budget


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_sparsity_and_a_target_are_two_budgets(target: str, sparsity: float) -> None:
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given, expected one of them"):
        KPruneArguments(**{"sparsity": sparsity, target: 2.0})
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given"):
        replace(KPruneArguments(sparsity=sparsity), **{target: 2.0})
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given"):
        replace(KPruneArguments(**{target: 2.0}), sparsity=sparsity)


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_gives_way_to_a_target(target: str) -> None:
    args = KPruneArguments()
    assert args.sparsity == 0.5
    assert args.budget == ("sparsity", 0.5)
    aimed = replace(args, **{target: 2.0})
    assert aimed.budget == (target, 2.0)
    assert aimed.sparsity is None
    assert replace(aimed, seed=7).budget == (target, 2.0)
    assert replace(aimed, **{target: None}).budget == ("sparsity", 0.5)
    assert replace(KPruneArguments(sparsity=0.7), sparsity=None, **{target: 2.0}).budget == (target, 2.0)
    assert KPruneArguments(**asdict(aimed)) == aimed


# A budget, or an option, that changes nothing


def asks_for_nothing() -> list[dict[str, float]]:
    size = model_size(tiny())
    return [
        {"target_params": 1e12},
        {"target_params": size.parameters},
        {"target_bytes": 1e12},
        {"target_flops": 1e12},
        {"target_speedup": 1.0},
        {"target_speedup": 0.5},
        {"target_latency": 1e6},
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("hf_kprune.latency.cached_assets_path", lambda *_: tmp_path)
    for module in ("algorithm", "latency", "pruner"):
        monkeypatch.setattr(f"hf_kprune.{module}.compare", lambda models, *_, **__: [1.0] * len(models))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("options", asks_for_nothing(), ids=str)
def test_a_target_that_the_model_meets_already_warns(options: dict[str, float]) -> None:
    (name,) = options
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(BudgetWarning, match=f"{name} is .* as it is, so nothing is cut"):
        report = make_pruner(model, **options).prune()
    assert report.sparsity == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sparsity_zero_says_itself_that_nothing_is_cut() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_pruner(tiny(), sparsity=0).prune().sparsity == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_heads": 4}, "min_heads is 4, and no attention has more than 4 heads"),
        ({"min_heads": 99}, "min_heads is 99, and no attention"),
        ({"min_neurons": 12}, "min_neurons is 12, and no FFN has more than 12 neurons"),
        ({"round_to": 64}, "round_to is 64, and encoder.layer.0.ffn has 12 neurons: it is kept whole or goes whole"),
        ({"latency_length": 128}, "latency_length have no effect without target_latency or target_speedup"),
        ({"latency_batch_size": 1}, "latency_batch_size and .* have no effect"),
    ],
)
def test_limits_without_effect_warn(options: dict[str, Any], message: str) -> None:
    with pytest.warns(BudgetWarning, match=message):
        make_pruner(tiny(), sparsity=0.2, **options).plan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_rep": 1.0}, "lambda_rep is 1.0, but method 'obs' does not use it; 'kprune' does"),
        ({"lambda_pred": 0.0}, "lambda_pred is 0.0, but method 'obs'"),
        ({"mu": 3.0}, "mu is 3.0, but method 'obs'"),
        ({"ridge": 0.1, "method": "flap"}, "ridge is 0.1, but method 'flap' does not use it; 'obs', 'kprune' does"),
        ({"tune_bias": True, "method": "kwon"}, "tune_bias is True, but method 'kwon'"),
        ({"tune_inputs": True, "method": "random"}, "tune_inputs is True, but method 'random'"),
        ({"measure_dtype": "bfloat16", "method": "magnitude"}, "method 'magnitude' measures no knowledge"),
        ({"statistics_dtype": "float32", "method": "taylor"}, "statistics_dtype is 'float32', but nothing is tuned"),
        ({"statistics_dtype": "float32", "tune": False}, "nothing is tuned, as tune is False"),
        ({"ridge": 0.1, "method": "kprune", "tune": False}, "ridge is 0.1, but nothing is tuned"),
        ({"min_heads": 1, "prune_heads": False}, "min_heads is 1, but prune_heads is False"),
        ({"min_neurons": 1, "prune_ffn": False}, "min_neurons is 1, but prune_ffn is False"),
        ({"round_to": 8, "prune_ffn": False}, "round_to is 8, but prune_ffn is False"),
    ],
)
def test_options_that_nothing_reads_warn(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        KPruneArguments(**options)


@pytest.mark.parametrize("option", ["tune_bias", "tune_inputs"])
def test_options_that_contradict_each_other_are_refused(option: str) -> None:
    with pytest.raises(ArgumentError, match=f"{option} is True, expected False or None with tune=False"):
        KPruneArguments(tune=False, **{option: True})
    assert not KPruneArguments(tune=False, **{option: False}).tune


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.5, {"sparsity": 0.5}]}, "expected each of them once"),
        ({"greater_is_better": False}, "greater_is_better is False, but there is no metric"),
        ({"max_drop": 0.1, "refine": -1}, "refine is -1, expected at least 0"),
        ({"budgets": [{"sparsity": 0.5, "target_params": 1e3}]}, "a dict of one budget"),
        ({"budgets": [1.0]}, re.escape("sparsity is 1.0, expected the fraction")),
    ],
)
def test_sweeps_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_pruner(tiny()).sweep(**options)


def test_a_sweep_says_that_it_does_not_use_the_budget_of_the_arguments() -> None:
    with pytest.warns(BudgetWarning, match="sparsity is 0.7 in the arguments, which a sweep does not use"):
        make_pruner(tiny(), sparsity=0.7).sweep([0.3])
    with pytest.warns(BudgetWarning, match="target_params is 1e.12, .* so nothing is cut"):
        make_pruner(tiny()).sweep([{"target_params": 1e12}])
