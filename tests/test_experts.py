"""Neurons of experts: features, shares and scores by hand; equal counts; the router; experts without tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_same_state, calibration, kept, plans
from data import collate, normal, rows
from models import MIXTURES, cut_all, slow_unless_in
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import register_parametrization
from transformers import MixtralForCausalLM, PreTrainedModel
from zoo import ZOO, make, outputs_of

from hf_kprune import KPruneArguments, KPruneCallback, KPrunePruner
from hf_kprune.calibration.equations import Reference, normal_equations
from hf_kprune.errors import CalibrationError, UnsupportedArchitectureError
from hf_kprune.methods import METHODS
from hf_kprune.methods.base import without_bias
from hf_kprune.methods.least_squares import NormalEquations
from hf_kprune.methods.search import common_scores, split, threshold_search, uniform_search
from hf_kprune.modeling_kprune import ALIGNED
from hf_kprune.structure.experts import (
    are_experts,
    columns_of,
    features_of,
    magnitude_of,
    output_of,
    shares,
    weight_of,
)
from hf_kprune.structure.families import FAMILIES
from hf_kprune.structure.probes import matrix_flops
from hf_kprune.structure.sublayers import Sublayer, find_sublayers


IDS = {"input_ids": torch.randint(4, 60, (3, 11), generator=torch.Generator().manual_seed(0))}


def pruner(model: PreTrainedModel, data: Any = None, **options: Any) -> KPrunePruner:
    args = KPruneArguments(
        **{"sparsity": 0.5, "num_tokens": 2_000, "disable_tqdm": True, "use_cpu": True, **options}
    )
    quiet = KPrunePruner(model, args, rows(40) if data is None else data, collate)
    quiet.callback_handler.callbacks.clear()
    return quiet


def mixtures(model: PreTrainedModel) -> list[Sublayer]:
    return [s for s in find_sublayers(model) if s.unit.in_experts]


def routed(experts: nn.Module, tokens: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the two experts that each is sent to, and the weights; none is sent to the last expert."""
    count, width = len(experts.get_parameter("down_proj")), mixture_width(experts)
    draws = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(count - 1, generator=draws)[:2] for _ in range(tokens)])
    return normal(tokens, width, seed=seed).float(), index, torch.rand(tokens, 2, generator=draws) + 0.1


def modules(model: PreTrainedModel) -> list[Any]:
    return [s.output for s in mixtures(model)]


def mixture_width(experts: Any) -> int:
    return int(experts.down_proj.shape[2 if experts.is_transposed else 1])


def eagerly(experts: nn.Module, *entry: Tensor) -> Tensor:
    """What the loop of Transformers gives."""
    forward: Any = type(experts).forward
    result: Tensor = forward.__wrapped__(experts, *entry)
    return result


# One module


@pytest.mark.parametrize("name", slow_unless_in(["mixtral", "gpt_oss"], MIXTURES))
def test_the_features_and_the_weight_make_what_the_module_gives(name: str) -> None:
    """Also where gates lie between what they open, and where experts have biases, as those of gpt-oss."""
    experts = mixtures(make(name))[0].output
    entry = routed(experts)
    features = features_of(experts, *entry)
    expected = eagerly(experts, *entry)
    torch.testing.assert_close(linear(features, weight_of(experts)), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(output_of(experts, features), expected, rtol=1e-5, atol=2e-6)


def test_what_a_neuron_gives_is_in_its_column_alone() -> None:
    """Without the weights by which it reads, a neuron that its gate keeps shut gives nothing."""
    for name in ("mixtral", "gpt_oss"):
        (mixture, *_) = mixtures(make(name))
        experts: Any = mixture.output
        entry = routed(experts)
        neurons = mixture.num_units // mixture.experts
        expert, neuron = 1, 3
        bank = experts.gate_up_proj.detach()
        row = neuron if experts.is_concatenated else 2 * neuron
        magnitude = magnitude_of(experts)[expert * neurons + neuron]
        assert magnitude > 0
        before = features_of(experts, *entry)
        other = bank.clone()
        (other[expert, :, row] if experts.is_transposed else other[expert, row]).add_(1)
        experts.gate_up_proj = nn.Parameter(other)
        moved = (features_of(experts, *entry) - before).abs().amax(0).nonzero().flatten()
        assert moved.tolist() == [int(columns_of(experts)[expert * neurons + neuron])]


def test_the_shares_of_a_target_add_up_to_it() -> None:
    experts = mixtures(make("gpt_oss"))[0].output
    entry = routed(experts)
    target = normal(20, mixture_width(experts), seed=7).float()
    total, count = torch.zeros_like(target), 0
    for tokens, share in shares(experts, entry, target):
        total.index_add_(0, tokens, share)
        count += len(tokens)
    torch.testing.assert_close(total, target, rtol=1e-4, atol=1e-5)
    assert count == 2 * len(target)
    each = list(shares(experts, entry, eagerly(experts, *entry)))
    part = features_of(experts, *entry).chunk(len(each), 1)[0]
    tokens, share = each[0]  # where nothing lacks, each is to give what it gives
    expected = linear(part[tokens], weight_of(experts).chunk(len(each), 1)[0])
    torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-5)


def test_a_token_whose_routes_weigh_nothing_has_a_share_of_nothing() -> None:
    experts = mixtures(make("mixtral"))[0].output
    hidden, index, weights = routed(experts)
    weights[0] = 0
    target = normal(20, mixture_width(experts), seed=7).float()
    for tokens, share in shares(experts, (hidden, index, weights), target):
        assert share.isfinite().all()
        assert not share[tokens == 0].any()


def test_experts_that_cannot_be_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    register_parametrization(model.model.layers[1].mlp.experts, "down_proj", nn.Identity())
    with pytest.raises(UnsupportedArchitectureError, match="'mlp.experts' are a ParametrizedMixtralExperts"):
        find_sublayers(model)
    (stack,) = FAMILIES["mixtral"]
    blocks = tuple(replace(b, slices={}) if b.kind == "experts" else b for b in stack.blocks)
    monkeypatch.setitem(FAMILIES, "mixtral", (replace(stack, blocks=blocks),))
    with pytest.raises(UnsupportedArchitectureError, match="'mlp.experts' has no slices"):
        find_sublayers(make("mixtral"))
    monkeypatch.setitem(FAMILIES, "mixtral", (replace(stack, routes="experts_of_a_token"),))
    with pytest.raises(UnsupportedArchitectureError, match="MixtralConfig has no 'experts_of_a_token'"):
        find_sublayers(make("mixtral"))


# Cuts


@pytest.mark.parametrize("name", slow_unless_in(["mixtral"], MIXTURES))
def test_cut_equals_masked_in_the_logits_of_the_routers_too(name: str) -> None:
    model = make(name)
    if "output_router_logits" not in model.config.to_dict():
        pytest.skip("its routers are not among its outputs")
    with torch.no_grad():
        if "router_logits" not in model(**IDS, output_router_logits=True):
            pytest.skip("nor are they where they are asked for")
    sublayers = find_sublayers(model)
    for plan in ("even", "odd"):
        masks = plans(sublayers)[plan]
        student, masked = cut_all(model, masks), copy.deepcopy(model)
        for s, mask in zip(find_sublayers(masked), masks, strict=True):
            gone = s.columns[~mask].flatten()
            experts: Any = s.output
            if are_experts(experts):
                each = mask.view(s.experts, -1).unsqueeze(2 if experts.is_transposed else 1)
                experts.down_proj = nn.Parameter(experts.down_proj * each)
            else:
                s.weight.data[:, gone] = 0
        with torch.no_grad():
            cut_outputs, outputs = (each(**IDS, output_router_logits=True) for each in (student, masked))
        for one, other in zip(cut_outputs.router_logits, outputs.router_logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_widths_that_kernels_for_all_experts_cannot_take_run_one_by_one(tmp_path: Path) -> None:
    model = make("mixtral")
    assert model.config._experts_implementation != "eager"
    for width in (ALIGNED, ALIGNED - 3, 0):
        masks = [s.numbers < width if s.unit.in_experts else s.numbers >= 0 for s in find_sublayers(model)]
        student = cut_all(model, masks)
        ways = {experts.config._experts_implementation for experts in modules(student)}
        assert ways == {"eager" if width % ALIGNED or not width else model.config._experts_implementation}
        student.save_pretrained(tmp_path / str(width))
        again = type(model).from_pretrained(tmp_path / str(width)).eval()
        assert [s.num_units for s in mixtures(again)] == [4 * width] * 3
        torch.testing.assert_close(outputs_of(again, "text"), outputs_of(student, "text"))


# Scores and searches


def test_each_expert_keeps_its_best_and_as_many_as_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(10, generator=generator) for _ in range(3)]
    scores[1][2:7] = 0.0  # neurons of no worth, whose order decides
    scores[2] = torch.full((10,), 0.5)
    scores_of_all = common_scores(scores, [True] * 3)
    for score, part in zip(scores, scores_of_all.view(3, -1), strict=True):
        ranked = part.argsort(descending=True)
        assert (score[ranked].diff() <= 0).all()
        assert len(part.unique()) == 10
    mean = torch.stack([score.double().sort(descending=True).values for score in scores]).mean(0)
    torch.testing.assert_close(scores_of_all[:10].sort(descending=True).values, mean, rtol=1e-6, atol=1e-6)
    other = torch.rand(8, generator=generator, dtype=torch.float64)
    for exponent in (0.5, 0.7, 1.0):
        worth = split([scores_of_all, other], [2.0, 5.0], exponent)
        for budget in (20.0, 43.0, 71.0):
            mask, rest = threshold_search(worth, [2.0, 5.0], budget, [0, 0], [3, 1])
            counts = mask.view(3, -1).sum(1)
            assert (counts == counts[0]).all()
            assert 2 * int(mask.sum()) + 5 * int(rest.sum()) > budget - 6
            for score, part in zip(scores, mask.view(3, -1), strict=True):
                assert not part.any() or part.all() or score[part].min() >= score[~part].max()


def test_nothing_but_zeros_is_ordered_too() -> None:
    scores_of_all = common_scores([torch.zeros(6)] * 2, [True, True])
    (mask,) = threshold_search(split([scores_of_all], [1e9], 0.5), [1e9], 6.1e9, [0], [2])
    assert mask.view(2, -1).sum(1).tolist() == [3, 3]
    counts = uniform_search(
        [scores_of_all, scores_of_all], [1.0, 1.0], 12.0, [0, 0], [2, 2], ["a", "a"], [None, None]
    )
    assert counts == [6, 6]


def test_an_expert_without_tokens_has_no_say() -> None:
    score, magnitude = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1e9, 3e9, 2e9])
    scores_of_all = common_scores([score, magnitude], [True, False])
    torch.testing.assert_close(scores_of_all, torch.tensor([3.0, 1.0, 2.0, 1.0, 3.0, 2.0]).double())


# Pruning


@pytest.mark.filterwarnings(
    "ignore:no knowledge loss is known", "ignore:.* has no head, so what is preserved"
)
@pytest.mark.parametrize(
    ("name", "method"),
    slow_unless_in(
        [("mixtral", "surgeon"), ("gpt_oss", "kprune")],
        [(name, method) for name in ("mixtral", "gpt_oss") for method in METHODS]
        + [(name, "surgeon") for name in MIXTURES if name not in ("mixtral", "gpt_oss")],
    ),
)
def test_every_expert_of_a_layer_keeps_as_many_neurons(name: str, method: str) -> None:
    model = make(name)
    before = find_sublayers(model)
    report = pruner(model, method=method, sparsity=0.4).prune()
    for s, entry in zip(before, report.sublayers, strict=True):
        if s.unit.in_experts:
            neurons = torch.tensor(entry.kept, dtype=torch.long) // (s.num_units // s.experts)
            assert neurons.bincount(minlength=s.experts).unique().numel() == 1, entry.name


def test_the_budget_counts_what_a_mixture_computes_for_a_token() -> None:
    """Each token passes two of the four experts."""
    model = make("mixtral")
    dense = matrix_flops(model, IDS)
    subject = pruner(model, sparsity=0.5, prune_heads=False, flops_length=11)
    report = subject.prune()
    removed = len(IDS["input_ids"]) * (report.before.flops - report.after.flops)
    assert removed == pytest.approx(dense - matrix_flops(subject.model, IDS), rel=1e-9)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


def test_experts_can_be_spared() -> None:
    model = make("qwen2_moe")
    report = pruner(model, prune_experts=False, sparsity=0.3).prune()
    for entry in report.sublayers:
        if entry.kind == "experts":
            assert len(entry.kept) == entry.units
    with pytest.raises(ValueError, match="this model can reach"):
        pruner(make("mixtral"), prune_experts=False, sparsity=0.9).prune()


def test_min_neurons_and_round_to_are_of_each_expert() -> None:
    report = pruner(make("mixtral"), min_neurons=3, round_to=2, sparsity=0.4).prune()
    counts = {len(entry.kept) for entry in report.sublayers if entry.kind == "experts"}
    assert counts <= {16, 24, 32, 40, 48}
    assert counts != {48}


def test_wide_experts_keep_what_kernels_for_all_experts_take() -> None:
    model = make("mixtral")
    config = type(model.config).from_dict({**model.config.to_dict(), "intermediate_size": 16 * ALIGNED})
    torch.manual_seed(0)
    report = pruner(type(model)(config), sparsity=0.4).prune()
    counts = {len(entry.kept) // 4 for entry in report.sublayers if entry.kind == "experts"}
    assert counts != {16 * ALIGNED}
    assert all(count % ALIGNED == 0 for count in counts)


def test_experts_are_tuned_by_least_squares_on_their_tokens() -> None:
    """By hand: the share of each, and the smallest change of its weights that fits it."""
    model = make("gpt_oss")
    teacher_model, student_model = copy.deepcopy(model), copy.deepcopy(model)
    data = calibration(model, rows(30))
    teacher, student = data.walk(teacher_model), data.walk(student_model)
    below = [s.numbers % 2 == 0 if not s.unit.in_experts else s.numbers >= 0 for s in student.sublayers]
    student.cut(below[0])
    data.advance(student)
    data.advance(teacher)
    dense = teacher.sublayer.output
    student.cut(student.sublayer.numbers % 3 != 0)
    by_hand: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(student.sublayer.experts)]
    for i, batch in enumerate(data.batches):
        goal, tap = teacher.tap(i), student.tap(i)
        valid = batch.tokens(student.sublayer, tap.features).flatten()
        target = (goal.stream + goal.output - tap.stream).flatten(0, 1)
        hidden, index, weights = tap.entry
        uncut = [linear(x, w) for x, w in zip(*parts(dense, tap.entry), strict=True)]
        rest = target - torch.stack(uncut).sum(0)
        for expert, share in enumerate(by_hand):
            routes = index == expert
            rate = (weights * routes).sum(1) / weights.sum(1)
            at = valid & routes.any(1)
            features = features_of(student.sublayer.output, *tap.entry).chunk(len(by_hand), 1)[expert]
            share.append((features[at], (uncut[expert] + rate[:, None] * rest)[at]))
    equations = normal_equations(data, student, Reference(teacher))
    for each, share in zip(equations, by_hand, strict=True):
        a, y = (torch.cat(tensors).double() for tensors in zip(*share, strict=True))
        assert int(each.tokens) == len(a)
        torch.testing.assert_close(each.gram, a.T @ a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each.cross, a.T @ y, rtol=1e-4, atol=1e-5)


def test_the_bias_of_an_expert_stays_where_biases_do() -> None:
    """And its neurons are fitted to what it leaves of the target, with or without the halves of the rows."""
    features, weight = normal(60, 5, seed=1), normal(3, 5, seed=2)
    target = normal(60, 3, seed=3)
    rest = target - features[:, -1:] * weight[:, -1]
    sums, expected = [NormalEquations.zeros(c, 3, torch.device("cpu")) for c in (5, 5)], []
    for each, rows_of in zip(sums, (slice(30), slice(30, 60)), strict=True):
        each.add(features[rows_of], target[rows_of])
        left = NormalEquations.zeros(4, 3, torch.device("cpu"))
        left.add(features[rows_of, :-1], rest[rows_of])
        expected.append(left)
    joint, reduced_sums = sums[1].join(sums[0]), expected[1].join(expected[0])
    reduced = without_bias(joint, weight[:, -1])
    assert reduced.first is not None
    for one, other in ((reduced, reduced_sums), (reduced.first, expected[0])):
        torch.testing.assert_close(one.tensors(), other.tensors())
    for tune_bias in (False, True):
        method = METHODS["kprune"](KPruneArguments(method="kprune", sparsity=0.5, tune_bias=tune_bias))
        tuned = method.fit([joint], weight, None, 1, True).weight
        assert torch.equal(tuned[:, -1], weight[:, -1]) == (not tune_bias)
        columns, goal = (features, target) if tune_bias else (features[:, :-1], rest)
        explicit = torch.linalg.lstsq(columns, goal).solution.T
        torch.testing.assert_close(tuned[:, : explicit.shape[1]], explicit, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    slow_unless_in(
        [{"method": "kprune"}],
        [{"method": "kprune"}, {"tune_bias": False}, {"method": "kwon"}, {"method": "kcm"}],
    ),
    ids=str,
)
def test_biases_of_experts_stay_unless_they_are_tuned(options: dict[str, Any]) -> None:
    subject = pruner(make("gpt_oss"), sparsity=0.3, **options)
    subject.prune()
    pairs = list(zip(modules(make("gpt_oss")), modules(subject.model), strict=True))
    assert any(after.down_proj.shape != before.down_proj.shape for before, after in pairs)
    assert all(torch.equal(after.down_proj_bias, before.down_proj_bias) for before, after in pairs)


def test_tokens_are_those_that_reach_an_expert() -> None:
    """Each token passes two of four experts."""
    with pytest.raises(CalibrationError, match="21 calibration tokens.* 10 reach an expert.* the 12 columns"):
        pruner(make("mixtral"), num_tokens=16).prune()


def parts(experts: nn.Module, entry: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Features and columns of each expert."""
    count = len(experts.get_parameter("down_proj"))
    return features_of(experts, *entry).chunk(count, 1), weight_of(experts).chunk(count, 1)


@pytest.mark.parametrize("method", slow_unless_in(["surgeon", "kwon"], ["surgeon", "kprune", "kwon", "kcm"]))
def test_experts_without_tokens_are_named_and_keep_their_largest_weights(method: str) -> None:
    config = type(make("mixtral").config)(**{**ZOO["mixtral"][1], "num_local_experts": 6})
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    for layer in model.model.layers:  # whichever side of zero, two are over the last two
        gate = layer.mlp.gate.weight.data
        gate[:] = gate[0] * torch.tensor([3.0, 2.0, -2.0, -3.0, 0.0, 0.1]).unsqueeze(1)
    (first, *_) = mixtures(model)
    dense: Any = copy.deepcopy(first.output)
    hits = torch.zeros(6)

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hits.index_add_(0, args[1].flatten(), torch.ones(args[1].numel()))

    first.output.register_forward_pre_hook(count)
    neurons, magnitude = first.num_units // 6, first.magnitude.view(6, -1)
    subject = pruner(model, method=method, sparsity=0.4)
    with pytest.warns(UserWarning, match="no token that was measured is sent to expert"):
        report = subject.prune()
    assert (hits == 0).any()
    idle = int((hits == 0).nonzero()[0])
    (entry,) = [e for e in report.sublayers if e.name == first.name]
    mine = torch.tensor([unit - idle * neurons for unit in entry.kept if unit // neurons == idle])
    assert 0 < len(mine) < neurons
    assert set(mine.tolist()) == set(magnitude[idle].topk(len(mine)).indices.tolist())
    (student, *_) = modules(subject.model)
    assert torch.equal(student.down_proj[idle], dense.down_proj[idle][:, mine])


def test_no_warning_where_all_have_tokens() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no token")
        pruner(make("mixtral"), sparsity=0.2).prune()


def test_a_uniform_mixture_is_a_stock_model(tmp_path: Path) -> None:
    model = make("mixtral")
    config = type(model.config).from_dict({**model.config.to_dict(), "intermediate_size": 4 * ALIGNED})
    torch.manual_seed(0)
    subject = pruner(type(model)(config), uniform=True, prune_heads=False, sparsity=0.3)
    subject.prune()
    width = subject.model.config.intermediate_size
    assert width in (ALIGNED, 2 * ALIGNED)
    assert [s.num_units for s in mixtures(subject.model)] == [4 * width] * 3
    subject.save_model(str(tmp_path))
    assert not hasattr(subject.model.config, "kprune")
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs_of(again, "text"), outputs_of(subject.model, "text"))


def test_a_uniform_mixture_keeps_a_width_that_is_no_multiple() -> None:
    subject = pruner(make("mixtral"), uniform=True, sparsity=0.0)
    subject.prune()
    assert subject.model.config.intermediate_size == 12 != ALIGNED


class Interrupt(KPruneCallback):
    """Ctrl-C when a sublayer has been done."""

    def __init__(self, name: str):
        self.name = name

    def on_sublayer_end(self, args: Any, report: Any, sublayer: Any, **kwargs: Any) -> None:
        if sublayer.name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", slow_unless_in(["surgeon"], ["surgeon", "kprune"]))
def test_resumed_equals_uninterrupted(method: str, tmp_path: Path) -> None:
    whole, part = (pruner(make("mixtral"), method=method, output_dir=str(tmp_path)) for _ in range(2))
    part.add_callback(Interrupt("layers.1.experts"))
    with pytest.raises(KeyboardInterrupt):
        part.prune(resume_from_checkpoint=True)
    again = pruner(make("mixtral"), method=method, output_dir=str(tmp_path))
    assert kept(again.prune(resume_from_checkpoint=True)) == kept(whole.prune())
    assert_same_state(again.model.state_dict(), whole.model.state_dict())


def test_what_was_pruned_is_pruned_again(tmp_path: Path) -> None:
    first = pruner(make("mixtral"), sparsity=0.2)
    first.prune()
    first.save_model(str(tmp_path))
    model = type(first.model).from_pretrained(tmp_path).eval()
    second = pruner(model, sparsity=0.3)
    report = second.prune()
    assert report.sparsity >= 0.3
    assert [s.num_units for s in find_sublayers(second.model)] == [len(e.kept) for e in report.sublayers]


def test_a_mixture_without_neurons_is_pruned_again(tmp_path: Path) -> None:
    model = make("mixtral")
    masks = [s.numbers < 0 if s.unit.in_experts else s.numbers >= 0 for s in find_sublayers(model)]
    cut_all(model, masks).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    report = pruner(again, sparsity=0.3).prune()
    assert [len(e.kept) for e in report.sublayers if e.kind == "experts"] == [0, 0, 0]
    assert report.sparsity >= 0.3
