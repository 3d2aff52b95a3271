"""Budgets: one at a time, never silently void, and honest about what they are a share of."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from data import ROOT, collate, rows
from models import shallow, slow_unless_in
from table import never_cut
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from zoo import ZOO, inputs_for, make

from hf_kprune import ArgumentError, BudgetWarning, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.arguments import TARGETS
from hf_kprune.budgets import BUDGETS
from hf_kprune.sizes import model_size
from hf_kprune.structure.probes import matrix_flops
from hf_kprune.structure.runs import run_to_bottom
from hf_kprune.structure.sublayers import find_sublayers


def make_pruner(model: PreTrainedModel, data: Any = None, **options: Any) -> KPrunePruner:
    args = KPruneArguments(**{"disable_tqdm": True, "use_cpu": True, "num_tokens": 2_000, **options})
    return KPrunePruner(model, args, rows() if data is None else data, collate)


# One budget


def test_every_budget_has_a_class_and_an_option() -> None:
    assert BUDGETS.keys() == {"sparsity", *TARGETS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_sparsity_and_a_target_are_two_budgets(target: str, sparsity: float) -> None:
    aim: dict[str, Any] = {target: 2.0}
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given, expected one of them"):
        KPruneArguments(sparsity=sparsity, **aim)
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given"):
        replace(KPruneArguments(sparsity=sparsity), **aim)
    with pytest.raises(ArgumentError, match=f"sparsity and {target} are given"):
        replace(KPruneArguments(**aim), sparsity=sparsity)


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_gives_way_to_a_target(target: str) -> None:
    args, aim, none = KPruneArguments(), dict[str, Any]({target: 2.0}), dict[str, Any]({target: None})
    assert args.sparsity == 0.5
    assert args.budget == ("sparsity", 0.5)
    aimed = replace(args, **aim)
    assert aimed.budget == (target, 2.0)
    assert aimed.sparsity is None
    assert replace(aimed, seed=7).budget == (target, 2.0)
    assert replace(aimed, **none).budget == ("sparsity", 0.5)
    assert replace(KPruneArguments(sparsity=0.7), sparsity=None, **aim).budget == (target, 2.0)
    assert KPruneArguments(**asdict(aimed)) == aimed


# A budget, or an option, that changes nothing


def asks_for_nothing() -> list[dict[str, float]]:
    size = model_size(shallow())
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
    monkeypatch.setattr("hf_kprune.latency.table.cached_assets_path", lambda *_: tmp_path)
    for module in ("budgets.times", "latency.table", "sweeper"):
        monkeypatch.setattr(f"hf_kprune.{module}.compare", lambda models, *_, **__: [1.0] * len(models))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "options", [asks_for_nothing()[0], *slow_unless_in((), asks_for_nothing()[1:])], ids=str
)
def test_a_target_that_the_model_meets_already_warns(options: dict[str, float]) -> None:
    (name,) = options
    model = shallow()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(BudgetWarning, match=f"{name} is .* as it is, so nothing is cut"):
        report = make_pruner(model, **options).prune()
    assert report.sparsity == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sparsity_zero_says_itself_that_nothing_is_cut() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_pruner(shallow(), sparsity=0).prune().sparsity == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_heads": 4}, "min_heads is 4, and no attention has more than 4 heads"),
        ({"min_heads": 99}, "min_heads is 99, and no attention"),
        ({"min_neurons": 12}, "min_neurons is 12, and no FFN has more than 12 neurons"),
        (
            {"round_to": 64},
            "round_to is 64, and encoder.layer.0.ffn has 12 neurons: it is kept whole or goes whole",
        ),
        ({"latency_length": 128}, "latency_length have no effect without target_latency or target_speedup"),
        ({"latency_batch_size": 1}, "latency_batch_size and .* have no effect"),
    ],
)
def test_limits_without_effect_warn(options: dict[str, Any], message: str) -> None:
    with pytest.warns(BudgetWarning, match=message):
        make_pruner(shallow(), sparsity=0.2, method="magnitude", **options).plan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_rep": 1.0}, "lambda_rep is 1.0, but method 'surgeon' does not use it; 'kprune' does"),
        ({"lambda_pred": 0.0}, "lambda_pred is 0.0, but method 'surgeon'"),
        ({"mu": 3.0}, "mu is 3.0, but method 'surgeon'"),
        (
            {"ridge": 0.1, "method": "flap"},
            "ridge is 0.1, but method 'flap' does not use it; 'surgeon', 'kprune' does",
        ),
        ({"tune_bias": True, "method": "kwon"}, "tune_bias is True, but method 'kwon'"),
        ({"tune_inputs": True, "method": "random"}, "tune_inputs is True, but method 'random'"),
        ({"measure_dtype": "bfloat16", "method": "magnitude"}, "method 'magnitude' measures no knowledge"),
        (
            {"statistics_dtype": "float32", "method": "taylor"},
            "statistics_dtype is 'float32', but nothing is tuned",
        ),
        ({"statistics_dtype": "float32", "tune": False}, "nothing is tuned, as tune is False"),
        ({"ridge": 0.1, "method": "kprune", "tune": False}, "ridge is 0.1, but nothing is tuned"),
        ({"min_heads": 1, "prune_heads": False}, "min_heads is 1, but prune_heads is False"),
        (
            {"min_neurons": 1, "prune_ffn": False, "prune_experts": False},
            "min_neurons is 1, but prune_ffn and prune_experts are False",
        ),
        (
            {"round_to": 8, "prune_ffn": False, "prune_experts": False},
            "round_to is 8, but prune_ffn and prune_experts are False",
        ),
    ],
)
def test_options_that_nothing_reads_warn(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        KPruneArguments(**options)


@pytest.mark.parametrize("option", ["tune_bias", "tune_inputs"])
def test_options_that_contradict_each_other_are_refused(option: str) -> None:
    on, off = dict[str, Any]({option: True}), dict[str, Any]({option: False})
    with pytest.raises(ArgumentError, match=f"{option} is True, expected False or None with tune=False"):
        KPruneArguments(tune=False, **on)
    assert not KPruneArguments(tune=False, **off).tune


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
        make_pruner(shallow()).sweep(**options)


def test_a_sweep_says_that_it_does_not_use_the_budget_of_the_arguments() -> None:
    with pytest.warns(BudgetWarning, match="sparsity is 0.7 in the arguments, which a sweep does not use"):
        make_pruner(shallow(), sparsity=0.7, method="magnitude").sweep([0.3])
    with pytest.warns(BudgetWarning, match="target_params is 1e.12, .* so nothing is cut"):
        make_pruner(shallow(), method="magnitude").sweep([{"target_params": 1e12}])


# What a budget is a share of


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "mixtral", "olmoe"])
def test_all_flops_are_those_that_torch_counts(name: str) -> None:
    """But for routers, whose share is small."""
    model, kind = make(name), ZOO[name][2]
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # a loop over experts, of which torch counts each
    inputs = inputs_for(model, kind)
    stacks = {s.stack_name: s for s in find_sublayers(model)}
    lengths = {stack: float(run_to_bottom(model, inputs, s).shape[1]) for stack, s in stacks.items()}
    products = sum(s.num_units * s.unit_products(lengths) for s in find_sublayers(model))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    batch = len(next(iter(inputs.values())))
    counted = matrix_flops(model, inputs) + batch * products
    routers = (
        sum(p.numel() for n, p in model.named_parameters() if "gate.weight" in n)
        * 2
        * batch
        * max(lengths.values())
    )
    assert counter.get_total_flops() == pytest.approx(counted + routers, rel=1e-9)


def test_the_report_says_what_share_of_the_model_is_prunable() -> None:
    """Routers and the head over the vocabulary count as the rest of it."""
    model = make("mixtral")
    before = sum(p.numel() for p in model.parameters())
    report = make_pruner(model, sparsity=0.5).prune()
    inside = ("self_attn", "mlp.experts")
    prunable = sum(
        p.numel() for n, p in make("mixtral").named_parameters() if any(part in n for part in inside)
    )
    assert report.before.prunable_parameters == prunable
    assert report.before.parameters - report.after.parameters == prunable - report.after.prunable_parameters
    assert 0 < prunable / before < 0.9
    parameters, flops = report.shares()
    assert parameters == prunable / before
    assert flops == report.before.flops / report.before.all_flops < 0.9
    assert report.after.all_flops == pytest.approx(
        report.before.all_flops - report.before.flops + report.after.flops
    )
    assert f"Prunable are {parameters:.1%} of all parameters and {flops:.1%} of all FLOPs." in str(report)


def test_reports_of_before_are_still_read() -> None:
    report = make_pruner(shallow(), method="magnitude").prune()
    data = json.loads(report.to_json())
    for part, keys in ((data, ["removed_at"]), (data["before"], NEW), (data["after"], NEW)):
        for key in keys:
            del part[key]
    again = PruningReport.from_json(json.dumps(data))
    assert "Prunable are" not in str(again)
    assert "removed" in str(again)


NEW = ["prunable_parameters", "all_flops"]


# Cuts that leave little


@pytest.mark.parametrize(
    ("name", "sparsity"),
    slow_unless_in([("mixtral", 0.9)], [("bert", 0.9999), ("mixtral", 0.9), ("bart", 0.9)]),
)
def test_a_plan_that_empties_sublayers_or_leaves_little_warns(name: str, sparsity: float) -> None:
    model = shallow() if name == "bert" else make(name)
    data = rows() if name != "bart" else [{**row, "labels": row["input_ids"]} for row in rows()]
    with pytest.warns(
        BudgetWarning, match="attentions are left without heads .* If that is too much: ask for less"
    ):
        report = make_pruner(model, data, sparsity=sparsity).prune()
    assert any(remark.endswith("less than 10%") for remark in report.remarks())
    assert all(f"Note: {remark}." in str(report) for remark in report.remarks())


@pytest.mark.usefixtures("clock")
def test_a_speed_up_that_takes_everything_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, of which the rest takes half of the time: nothing else is twice as fast."""

    def compare(models: list[PreTrainedModel], *_: Any, **__: Any) -> list[float]:
        return [1.0 + sum(s.num_units for s in find_sublayers(model)) / 32 for model in models]

    for module in ("budgets.times", "latency.table", "sweeper"):
        monkeypatch.setattr(f"hf_kprune.{module}.compare", compare)
    with pytest.warns(
        BudgetWarning, match="2 of 2 attentions are left without heads .*; 0.0% of the heads .*; 2 of 2 FFNs"
    ):
        assert make_pruner(shallow(), target_speedup=2.0).prune().sparsity == 1


def test_a_moderate_cut_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = make_pruner(shallow(), sparsity=0.3, min_heads=1, min_neurons=2).prune()
    assert report.remarks() == []
    assert "Note:" not in str(report)


# Lengths


def removed(report: PruningReport, model: PreTrainedModel, length: float) -> float:
    """By the formulas of the paper."""
    head = 8 * length * 16 * 4 + 4 * length**2 * 4
    costs = {"attention": head, "ffn": 4 * length * 16}
    gone = sum(costs[s.kind] * (s.units - len(s.kept)) for s in report.sublayers)
    return gone / sum(costs[s.kind] * s.units for s in report.sublayers)


@pytest.mark.parametrize("method", slow_unless_in(("kprune",), ("surgeon", "kprune", "magnitude")))
def test_the_budget_holds_at_the_length_asked_for(method: str) -> None:
    model = shallow(max_position_embeddings=512)
    report = make_pruner(model, method=method, sparsity=0.6, flops_length=512).prune()
    assert report.sequence_length == 512
    assert 0.6 <= report.sparsity == pytest.approx(removed(report, model, 512))
    assert report.removed_at == {
        "128": pytest.approx(removed(report, model, 128)),
        "512": pytest.approx(report.sparsity),
    }
    assert f"{report.removed_at['128']:.2%} at 128 tokens, {report.sparsity:.2%} at 512 tokens" in str(report)
    short = make_pruner(shallow(), method=method, sparsity=0.6).prune()
    assert short.sequence_length < 12
    assert short.sparsity == pytest.approx(removed(short, model, short.sequence_length))
    assert short.removed_at == {
        length: pytest.approx(removed(short, model, int(length))) for length in ("128", "512")
    }


def test_encoder_decoders_count_on_both_sides() -> None:
    data = [{**row, "labels": row["input_ids"][:3]} for row in rows()]
    report = make_pruner(make("bart"), data, sparsity=0.5, flops_length=20).plan()
    assert report.sequence_length == 20


@pytest.mark.parametrize("name", ["vit", "wav2vec2"])
def test_a_length_means_nothing_to_images_and_sound(name: str) -> None:
    model = make(name)
    key = model.main_input_name
    value = inputs_for(model, ZOO[name][2])[key]
    data = [
        {key: torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(i))} for i in range(12)
    ]

    def stacked(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in batch])}

    pruner = KPrunePruner(
        model, KPruneArguments(disable_tqdm=True, use_cpu=True, flops_length=128), data, stacked
    )
    with pytest.raises(ArgumentError, match="flops_length is 128, but .* reads no token ids"):
        pruner.plan()
    args = KPruneArguments(disable_tqdm=True, use_cpu=True, num_tokens=2_000, method="magnitude")
    assert KPrunePruner(model, args, data, stacked).prune().removed_at == {}


def test_a_length_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="flops_length is 41, BertForSequenceClassification takes at most 40 tokens"
    ):
        make_pruner(shallow(), flops_length=41).plan()


# Words


@pytest.mark.parametrize(
    ("method", "words"),
    [("surgeon", "pruned by surgeon: "), ("kprune", "K-pruned a model"), ("flap", "by flap")],
)
def test_only_what_k_prune_made_is_called_k_pruned(method: str, words: str) -> None:
    first = str(make_pruner(shallow(), method=method, tune=False).prune()).splitlines()[0]
    assert words in first
    assert ("K-pruned" in first) == (method == "kprune")


@pytest.mark.parametrize(("name", "parts"), [("bert", "-"), ("mixtral", "gate"), ("gpt_oss", "router")])
def test_the_table_of_models_says_what_is_never_cut(name: str, parts: str) -> None:
    table = (ROOT / "docs" / "supported_models.md").read_text(encoding="utf-8")
    assert never_cut(find_sublayers(make(name))) == parts
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    assert row.endswith(f"| {parts} |")
