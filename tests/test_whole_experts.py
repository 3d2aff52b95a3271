"""Whole experts: cut equals a router that cannot choose them; groups; scores and fits by hand; checkpoints; budgets."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import calibration
from data import collate, normal, rows
from models import MIXTURES, slow_unless_in
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from zoo import ZOO, make, outputs_of

from hf_kprune import (
    BudgetError,
    BudgetWarning,
    KPruneArguments,
    KPruneCallback,
    KPrunePruner,
    PruningReport,
)
from hf_kprune.calibration.equations import Reference, normal_equations
from hf_kprune.errors import ArgumentError, UnsupportedArchitectureError
from hf_kprune.methods import METHODS
from hf_kprune.methods.base import Statistics
from hf_kprune.methods.surgeon import Surgeon
from hf_kprune.structure.experts import features_of, fisher_by_token, weight_of
from hf_kprune.structure.families import FAMILIES
from hf_kprune.structure.sublayers import Sublayer, find_sublayers
from hf_kprune.structure.surgery import cut_twin
from hf_kprune.structure.units import Expert


KINDS = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe", "phimoe"]
"""Mixtures of which no two choose, hold and name their experts alike."""


IDS = {"input_ids": torch.randint(4, 60, (3, 11), generator=torch.Generator().manual_seed(0))}


class Deaf(TorchFunctionMode):
    """A model in which no router can choose some experts: their logits are -inf.

    Args:
        routers: The weight of each router, and which of its experts cannot be chosen, (E,).
    """

    def __init__(self, routers: Sequence[tuple[Tensor, Tensor]]):
        super().__init__()
        self.routers = routers

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is linear:
            for weight, gone in self.routers:
                if args[1].shape == weight.shape and torch.equal(args[1], weight):
                    return result.masked_fill(gone, float("-inf"))
        return result


@contextmanager
def deaf(model: PreTrainedModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Within this context the routers of a model choose none but the experts in `masks`."""
    routers = []
    for s, keep in zip(mixtures_of(model), masks, strict=True):
        tensors = {**dict(s.layer.named_parameters()), **dict(s.layer.named_buffers())}
        for path in s.block.router.keys() & tensors.keys():
            if path.endswith("weight"):
                routers.append((tensors[path], ~keep))
            elif (
                "correction" in path or "expert_bias" in path
            ):  # what is added to a logit that is one no longer
                tensors[path].data[..., ~keep] = float("-inf")
    with Deaf(routers):
        yield


def mixtures_of(model: PreTrainedModel) -> list[Sublayer]:
    return [s for s in find_sublayers(model, expert_unit="expert") if s.is_mixture]


def without(model: PreTrainedModel, gone: Sequence[int] = (2, 0, 3)) -> tuple[PreTrainedModel, list[Tensor]]:
    """A copy that has lost one expert of each mixture, of the lowest two, and which it kept."""
    masks, of_experts = list[Tensor](), list[Tensor]()
    for sublayer in find_sublayers(model, expert_unit="expert"):
        keep = torch.ones(sublayer.num_units, dtype=torch.bool)
        if sublayer.is_mixture:
            keep[gone[len(of_experts) % 3]] = False
            keep[1] = bool(of_experts)
            of_experts.append(keep)
        masks.append(keep)
    return cut_twin(model, masks, expert_unit="expert"), of_experts


@torch.no_grad()
def routes(model: PreTrainedModel, kind: str, kept: Sequence[Tensor] | None = None) -> list[Tensor]:
    """With which weight each token is sent to each expert of each mixture, (N, E), those that were cut by their place before."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        index, weights = args[1:]
        seen.append(weights.new_zeros(len(index), 4).scatter_(1, names[len(seen)][index], weights))

    count = len(mixtures_of(model))
    names = [torch.arange(4)] * count if kept is None else [mask.nonzero().flatten() for mask in kept]
    with ExitStack() as hooks:
        for mixture in mixtures_of(model):
            hooks.callback(mixture.output.register_forward_pre_hook(note).remove)
        outputs_of(model, kind)
    assert len(seen) == count
    return seen


def pruner(model: PreTrainedModel, share: float = 0.3, data: Any = None, **options: Any) -> KPrunePruner:
    """A pruner that takes a share of the experts' parameters."""
    of_experts = sum(s.num_units * s.unit_parameters for s in mixtures_of(model))
    default = {"target_params": int(model.num_parameters() - share * of_experts), "expert_unit": "expert"}
    args = KPruneArguments(
        **{**default, "num_tokens": 2_000, "disable_tqdm": True, "use_cpu": True, **options}
    )
    quiet = KPrunePruner(model, args, rows(40) if data is None else data, collate)
    quiet.callback_handler.callbacks.clear()
    return quiet


def counts(report: PruningReport) -> list[int]:
    return [len(entry.kept) for entry in report.sublayers if entry.kind == "whole experts"]


# Cuts


@pytest.mark.parametrize("name", slow_unless_in(["mixtral"], MIXTURES))
def test_cut_equals_a_router_that_cannot_choose_them(name: str, tmp_path: Path) -> None:
    """Where tokens are sent to, with which weights, what comes of it, and all of that once it was saved."""
    model, kind = make(name), ZOO[name][2]
    dense = outputs_of(model, kind)
    student, kept = without(model)
    masked = copy.deepcopy(model)
    with deaf(masked, kept):
        expected, sent = outputs_of(masked, kind), routes(masked, kind)
    assert float((expected - dense).abs().max()) > 1e-3
    torch.testing.assert_close(outputs_of(student, kind), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(routes(student, kind, kept), sent, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs_of(again, kind), outputs_of(student, kind))
    assert [s.num_units for s in mixtures_of(again)] == [int(mask.sum()) for mask in kept]


@pytest.mark.parametrize("name", slow_unless_in(["mixtral"], KINDS))
def test_logits_of_what_has_gone_are_minus_infinity_so_that_layers_compare(name: str) -> None:
    model = make(name)
    student, kept = without(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        outputs = student(**IDS, labels=IDS["input_ids"], output_router_logits=True)
        with deaf(masked, kept):
            expected = masked(**IDS, labels=IDS["input_ids"], output_router_logits=True)
    for logits, other, keep in zip(outputs.router_logits, expected.router_logits, kept, strict=True):
        torch.testing.assert_close(logits[:, : int(keep.sum())], other[:, keep], rtol=1e-5, atol=1e-6)
        assert torch.isneginf(logits[:, int(keep.sum()) :]).all()
    if expected.get("aux_loss") is not None:  # it adds up experts of one number over layers
        assert outputs.aux_loss.isfinite()


def groups_of_two() -> PreTrainedModel:
    """A DeepSeek-V3 of eight experts in two groups, of which a router chooses one, and three experts in it."""
    model = make("deepseek_v3")
    grouped = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    config = {**model.config.to_dict(), **grouped}
    torch.manual_seed(0)
    model = type(model)(type(model.config).from_dict(config)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_as_many_stay_as_a_token_is_sent_to() -> None:
    """Two in any case, and in each group as many as one group must have."""
    leasts = [mixtures_of(model)[0].unit.least(None) for model in (make("mixtral"), groups_of_two())]
    assert leasts == [2, 3]
    (stack,) = FAMILIES["mixtral"]
    config = type(make("mixtral").config)(num_experts_per_tok=1)
    assert Expert.of(config, stack).least(None) == 2


@pytest.mark.slow
def test_groups_of_a_router_keep_equally_many() -> None:
    model = groups_of_two()
    with pytest.raises(BudgetError, match="this model, of which 6 experts of a layer must stay, can reach"):
        pruner(copy.deepcopy(model), 0.3, prune_heads=False, prune_ffn=False).prune()
    subject = pruner(copy.deepcopy(model), 0.2, prune_heads=False, prune_ffn=False, tune=False)
    report = subject.prune()
    kept = []
    for entry in (entry for entry in report.sublayers if entry.kind == "whole experts"):
        numbers = torch.tensor(entry.kept)
        assert (numbers < 4).sum() == (numbers >= 4).sum() >= 3
        kept.append(torch.zeros(8, dtype=torch.bool).index_fill(0, numbers, True))
    assert min(counts(report)) < 8
    with deaf(model, kept):
        expected = outputs_of(model, "text")
    torch.testing.assert_close(outputs_of(subject.model, "text"), expected, rtol=1e-5, atol=1e-6)


# Scores and fits


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_loss_of_an_expert_is_that_of_what_it_gives_token_by_token(name: str) -> None:
    """By autograd: the gradient to a mask of each expert at each token."""
    experts = mixtures_of(make(name))[0].output
    hidden, weights = normal(20, 16).float(), torch.rand(20, 2) + 0.1
    index = torch.stack(
        [torch.randperm(3, generator=torch.Generator().manual_seed(i))[:2] for i in range(20)]
    )
    features, gradient = features_of(experts, hidden, index, weights), normal(20, 16, seed=1).float()
    mask = torch.ones(20, 4, requires_grad=True)
    masked = features.unflatten(1, (4, -1)) * mask.unsqueeze(2)
    (linear(masked.flatten(1), weight_of(experts)) * gradient).sum().backward()
    assert mask.grad is not None
    expected = mask.grad.double().square().sum(0)
    assert expected[3] == 0
    torch.testing.assert_close(fisher_by_token(experts, features, gradient), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        routed = Statistics(
            *(False, features.shape[1] // 4, 5.0, weight_of(experts), False),
            *(torch.ones(4), torch.ones(features.shape[1]), torch.ones(features.shape[1])),
            tokens=20,
            samples=2,
            fisher_by_token=expected,
        )
    torch.testing.assert_close(Surgeon(KPruneArguments()).worth(routed), expected / 2 / 2 / 5)


@pytest.mark.parametrize("name", slow_unless_in(["mixtral"], ["mixtral", "gpt_oss"]))
def test_those_that_stay_are_fitted_to_the_tokens_that_they_get_now(name: str) -> None:
    """By hand: what each gives with the routes of the student, and its share of what all of them lack."""
    model = make(name)
    data = calibration(model, rows(30))
    data.args.expert_unit = "expert"
    teacher, student = data.walk(copy.deepcopy(model)), data.walk(copy.deepcopy(model))
    for walk in (teacher, student):
        data.advance(walk)
    student.cut(torch.tensor([True, False, True, True]))
    weight, by_hand = weight_of(student.sublayer.output), [[] for _ in range(3)]  # type: ignore[var-annotated]
    for i, batch in enumerate(data.batches):
        goal, tap = teacher.tap(i), student.tap(i)
        valid = batch.tokens(student.sublayer, tap.features).flatten()
        x, target = tap.features.flatten(0, 1), (goal.stream + goal.output - tap.stream).flatten(0, 1)
        _, index, shares = tap.entry
        lack = target - x @ weight.T
        for expert, part in enumerate(x.chunk(3, 1)):
            share = (shares * (index == expert)).sum(1) / shares.sum(1)
            of_it = part @ weight.chunk(3, 1)[expert].T + share[:, None] * lack
            there = valid & (index == expert).any(1)
            by_hand[expert].append((part[there], of_it[there]))
    sums = normal_equations(data, student, Reference(teacher))
    assert len(sums) == 3
    for each, parts in zip(sums, by_hand, strict=True):
        a, y = (torch.cat(column).double() for column in zip(*parts, strict=True))
        assert each.tokens == len(a) > 0
        torch.testing.assert_close(each.gram, a.T @ a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(each.cross, a.T @ y, rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_reaches_is_named_and_goes_first() -> None:
    model = make("gpt_oss")
    model.model.layers[1].mlp.router.bias.data[3] = -1e3
    options = {"prune_heads": False, "prune_ffn": False, "tune": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = pruner(model, 0.08, **options).prune()
    assert any("is sent to expert 3 of layers.1.experts: methods that" in str(w.message) for w in caught)
    assert report.sublayers[3].kept == [0, 1, 2]
    assert counts(report) == [4, 3, 4]


# Pruning


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no token that was measured")
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "surgeon") for name in KINDS]
    + [("mixtral", method) for method in METHODS if method not in ("surgeon", "kprune", "kwon")]
    + [("gpt_oss", method) for method in ("kprune", "kwon")],
)
def test_pruned_again_and_again(name: str, method: str, tmp_path: Path) -> None:
    """The budget is kept, what is saved is loaded and generates the same, and goes on being pruned."""
    if not METHODS[method].in_whole_experts:
        with pytest.raises(ArgumentError, match=f"method is {method!r}, expected with expert_unit='expert'"):
            pruner(make(name), method=method)
        return
    model = make(name)
    total = len(mixtures_of(model)) * 4
    for step in range(2):
        subject = pruner(model, 0.2, method=method)
        report = subject.prune()
        model = subject.model
        assert report.after.parameters <= (subject.args.target_params or 0)
        assert report.after.parameters == model.num_parameters()
        share = 1 - report.after.parameters / report.before.parameters
        assert f"{share:.2%} of the parameters and {report.sparsity:.2%} of the prunable FLOPs" in str(report)
        assert all(count >= 2 for count in counts(report))
        assert any(" experts | " in str(entry) for entry in report.sublayers)
        assert sum(counts(report)) <= total
        total = sum(counts(report))
        model.save_pretrained(tmp_path / str(step))
        again = type(model).from_pretrained(tmp_path / str(step)).eval()
        torch.testing.assert_close(outputs_of(again, "text"), outputs_of(model, "text"))
        prompt = {"input_ids": IDS["input_ids"], "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(again.generate(**prompt), model.generate(**prompt))
        model = again
    with pytest.raises(UnsupportedArchitectureError, match="were pruned by 'expert' before; keep to that"):
        pruner(model, sparsity=0.3, target_params=None, expert_unit="neuron").prune()


LOAD_ELSEWHERE = """
import json, sys
sys.modules["hf_kprune"] = None
import torch, transformers
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))
    if "kprune" in config:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    else:
        assert "auto_map" not in config, folder
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    facts = torch.load(folder + "/facts.pt")
    with torch.no_grad():
        logits = model.eval()(facts["input_ids"]).logits
    assert torch.allclose(logits, facts["logits"], rtol=1e-5, atol=1e-6), folder
"""


@pytest.mark.slow
def test_it_loads_elsewhere_and_uniform_is_a_stock_checkpoint(tmp_path: Path) -> None:
    """Where hf_kprune is not: by the code that travels, and, if all layers have as many experts, without any."""
    folders = []
    for name in KINDS:
        for uniform in (False, True):
            options = {"prune_heads": False, "prune_ffn": False} if uniform else {}
            folder = tmp_path / f"{name}-{uniform}"
            subject = pruner(make(name), uniform=uniform, method="magnitude", **options)
            report = subject.prune()
            subject.save_model(str(folder))
            if uniform:
                config = json.loads((folder / "config.json").read_text())
                assert "kprune" not in config
                (count,) = set(counts(report))
                assert count < 4
                assert count in {config.get(n) for s in FAMILIES[name] for n in s.experts}
                with torch.no_grad():
                    outputs = subject.model(**IDS, output_router_logits=True)
                assert {logits.shape[1] for logits in outputs.router_logits} == {count}
            with torch.no_grad():
                facts = {**IDS, "logits": subject.model(**IDS).logits}
            torch.save(facts, folder / "facts.pt")
            folders.append(str(folder))
    command = [sys.executable, "-c", LOAD_ELSEWHERE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_saves_no_time_is_refused_and_what_has_no_effect_is_said() -> None:
    with pytest.raises(ArgumentError, match="expert_unit is 'expert', expected neuron with target_speedup"):
        KPruneArguments(expert_unit="expert", target_speedup=2)
    idle = pruner(make("llama"), sparsity=0.3, target_params=None, method="magnitude")
    with pytest.warns(BudgetWarning, match="the model has no experts: it has no effect"):
        idle.prune()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_from_disk_or_after_an_interruption_it_is_the_same(name: str, tmp_path: Path) -> None:
    """Also with buffers of a router, which stay in memory."""

    class Interrupt(KPruneCallback):
        seen = 0

        def on_sublayer_end(self, *_: Any, **__: Any) -> None:
            self.seen += 1
            if self.seen == 5:
                raise KeyboardInterrupt

    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    at_once, stopped, again = (pruner(copy.deepcopy(model)) for _ in range(3))
    report = at_once.prune()
    stopped.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        stopped.prune(resume_from_checkpoint=str(tmp_path / "states"))
    again.prune(resume_from_checkpoint=str(tmp_path / "states"))
    expected = outputs_of(at_once.model, "text")
    torch.testing.assert_close(outputs_of(again.model, "text"), expected)
    on_disk = KPrunePruner(str(tmp_path / "dense"), at_once.args, rows(40), collate, offload="disk")
    on_disk.callback_handler.callbacks.clear()
    assert [entry.kept for entry in on_disk.prune().sublayers] == [entry.kept for entry in report.sublayers]
    on_disk.save_model(str(tmp_path / "pruned"))
    loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(outputs_of(loaded, "text"), expected)


def test_keeping_all_is_the_dense_model() -> None:
    model = make("gpt_oss")
    dense = outputs_of(model, "text")
    subject = pruner(model, sparsity=0.0, target_params=None)
    report = subject.prune()
    assert counts(report) == [4, 4, 4]
    assert torch.equal(outputs_of(subject.model, "text"), dense)


def test_a_budget_of_flops_is_refused_with_the_way_out() -> None:
    """Whole experts take no FLOPs of a token with them; of a model that keeps its experts any budget holds."""
    with pytest.raises(BudgetError, match="whole experts save nothing: .* Give target_params"):
        pruner(make("mixtral"), target_params=None, sparsity=0.3).prune()
    options: dict[str, Any] = {"sparsity": 0.1, "prune_experts": False, "method": "magnitude"}
    assert counts(pruner(make("mixtral"), target_params=None, **options).prune()) == [4, 4, 4]
    before, after = (
        sum(s.num_units * s.unit_flops({"layers": 1.0, "model.layers": 1.0}) for s in mixtures_of(model))
        for model in (make("mixtral"), without(make("mixtral"))[0])
    )
    assert before == pytest.approx(after)


def test_a_family_without_a_router_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    (stack,) = FAMILIES["mixtral"]
    blocks = tuple(replace(block, router={}) for block in stack.blocks)
    monkeypatch.setitem(FAMILIES, "mixtral", (replace(stack, blocks=blocks),))
    assert any(s.is_mixture for s in find_sublayers(make("mixtral")))
    with pytest.raises(UnsupportedArchitectureError, match="names no weights of a router"):
        mixtures_of(make("mixtral"))


def test_what_a_family_forgets_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to the logits of a DeepSeek-V3."""
    (stack,) = FAMILIES["deepseek_v3"]
    blocks = tuple(
        replace(b, router={"mlp.gate.weight": 0}) if b.kind == "experts" else b for b in stack.blocks
    )
    subject = pruner(make("deepseek_v3"), method="magnitude")
    monkeypatch.setitem(FAMILIES, "deepseek_v3", (replace(stack, blocks=blocks),))
    with pytest.raises(
        UnsupportedArchitectureError, match="without some experts of layers.1.experts: it does"
    ):
        subject.prune()
