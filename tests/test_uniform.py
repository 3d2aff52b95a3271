"""uniform=True: a stock config, a stock checkpoint, the best plan of equal layers."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data import collate, rows
from models import slow_unless_in
from transformers import PreTrainedModel
from zoo import ZOO, make, outputs_of

from hf_kprune import KPruneArguments, KPruneCallback, KPrunePruner, UnsupportedArchitectureError
from hf_kprune.budgets import budget_of
from hf_kprune.entries import Size
from hf_kprune.methods.search import uniform_search
from hf_kprune.structure.sublayers import find_sublayers


Record = Callable[[str, object], None]
STOCK = [
    name
    for name in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo",
        "smollm3",
        "granite",
    )
    if name in ZOO
]
SAVED = ["llama", "gemma2", "phi3"]
LOAD_ELSEWHERE = """
import json, sys
sys.modules["hf_kprune"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))
    assert "kprune" not in config and "auto_map" not in config, folder
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    ids = load_file(folder + "/ids.safetensors")["ids"]
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, folder + "/logits.safetensors")
"""


def prune(name: str, **options: Any) -> KPrunePruner:
    args = KPruneArguments(
        **{"sparsity": 0.4, "disable_tqdm": True, "use_cpu": True, "uniform": True, **options}
    )
    pruner = KPrunePruner(make(name), args, rows(40, longest=12), data_collator=collate)
    pruner.callback_handler.callbacks.clear()
    pruner.prune()
    return pruner


@pytest.mark.slow
def test_stock_transformers_loads_it_where_hf_kprune_is_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = {}
    for name in STOCK:
        pruner = prune(name)
        assert pruner.report is not None
        assert 0.4 <= pruner.report.sparsity < 0.75
        model, folder = pruner.model, tmp_path / name
        sizes = {
            kind: {s.num_units for s in find_sublayers(model) if s.kind == kind}
            for kind in ("attention", "ffn")
        }
        assert all(len(found) == 1 for found in sizes.values()), f"{name}: {sizes}"
        pruner.save_model(str(folder))
        ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids}, folder / "ids.safetensors")
        with torch.no_grad():
            expected[folder] = model(ids).logits
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *map(str, expected)], check=True)
    for folder, logits in expected.items():
        torch.testing.assert_close(
            load_file(folder / "logits.safetensors")["logits"], logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", slow_unless_in(SAVED, STOCK))
def test_the_config_says_it_all(name: str, record_property: Record) -> None:
    record_property("family", (name, "uniform"))
    pruner = prune(name)
    model = pruner.model
    again = type(model)(type(model.config).from_dict(json.loads(model.config.to_json_string()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(again, "text"), outputs_of(model, "text"))


def test_a_query_head_of_every_group_leaves_the_keys(tmp_path: Path) -> None:
    pruner = prune("llama", head_unit="query", sparsity=0.3)
    config = pruner.model.config
    assert config.num_key_value_heads == 2
    assert config.num_attention_heads in (2, 4)
    pruner.save_model(str(tmp_path / "saved"))


def test_what_the_config_cannot_say_is_refused_and_ffn_alone_is_offered(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"BertConfig cannot say fewer heads.*prune_heads=False"
    ):
        prune("bert")
    pruner = prune("bert", prune_heads=False, sparsity=0.2)
    pruner.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "kprune" not in config
    assert config["intermediate_size"] < 12
    assert config["num_attention_heads"] == 4
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs_of(loaded, "text"), outputs_of(pruner.model, "text"))


@pytest.mark.parametrize("neuron", [7.0, 2.0], ids=["units of one cost", "of two costs"])
@pytest.mark.parametrize("allowed", [None, [1, 2, 4]], ids=["any number of heads", "1, 2 or 4 heads"])
def test_the_uniform_plan_is_the_best_one(neuron: float, allowed: list[int] | None) -> None:
    """Of every pair of head and neuron counts. If heads and neurons that compete cost differently, one unit may not fit."""
    generator = torch.Generator().manual_seed(0)
    costs, alike = [7.0, neuron, 7.0, neuron], ["heads", "ffn", "heads", "ffn"]
    for _ in range(20):
        scores = [torch.rand(n, generator=generator).double() for n in (4, 12, 4, 12)]
        worths = [
            cost * (scores[i].sort(descending=True).values + scores[i + 2].sort(descending=True).values)
            for i, cost in ((0, 7.0), (1, neuron))
        ]
        least, most = 14 + 2 * neuron, 56 + 24 * neuron
        budget = least + float(torch.rand(1, generator=generator)) * (most - least)
        plan = uniform_search(scores, costs, budget, [1] * 4, [1] * 4, alike, [allowed, None, allowed, None])
        assert plan == [plan[0], plan[1]] * 2
        assert allowed is None or plan[0] in allowed
        assert 14 * plan[0] + 2 * neuron * plan[1] <= budget
        worth = {
            (heads, neurons): float(worths[0][:heads].sum() + worths[1][:neurons].sum())
            for heads, neurons in itertools.product(allowed or range(1, 5), range(1, 13))
            if 14 * heads + 2 * neuron * neurons <= budget
        }
        best = max(worth.values())
        does_not_fit = 0.0
        if allowed is None and neuron != 7:
            does_not_fit = max(
                (float(w[n]) for w, n in zip(worths, plan[:2], strict=True) if n < len(w)), default=0.0
            )
        assert worth[plan[0], plan[1]] >= best - does_not_fit - 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# How many heads
# ---------------------------------------------------------------------------------------------------------------------


def grouped(heads: int = 6, groups: int = 3) -> PreTrainedModel:
    """A tiny Llama of two layers with grouped queries."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    return transformers.LlamaForCausalLM(config).eval()


def pruner_of(model: PreTrainedModel, **options: Any) -> KPrunePruner:
    args = {"sparsity": 0.3, "disable_tqdm": True, "use_cpu": True, "uniform": True, **options}
    pruner = KPrunePruner(model, KPruneArguments(**args), rows(24, longest=12), data_collator=collate)
    pruner.callback_handler.callbacks.clear()
    return pruner


@pytest.mark.several_splits
def test_numbers_of_heads_are_tried_and_the_nearest_student_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = pruner_of(grouped())
    report = pruner.prune()
    assert set(report.trials) == {"2 heads", "3 heads"}  # one leaves more than all neurons cost
    best = min(report.trials, key=report.trials.__getitem__)
    by_kind = [{len(s.kept) for s in report.sublayers if s.kind == kind} for kind in ("attention", "ffn")]
    assert by_kind[0] == {int(best.split()[0])}
    assert len(by_kind[1]) == 1
    assert 0.3 <= report.sparsity < 0.34

    class Interrupt(KPruneCallback):
        def on_sublayer_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    out = str(tmp_path / "out")
    again = pruner_of(grouped(), output_dir=out)
    again.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        again.prune(resume_from_checkpoint=True)
    again.callback_handler.callbacks.clear()
    monkeypatch.setattr("hf_kprune.pruning.choose", None)  # as it was decided
    resumed = again.prune(resume_from_checkpoint=True)
    assert resumed.trials == report.trials
    assert [(s.kept, s.error_after) for s in resumed.sublayers] == [
        (s.kept, s.error_after) for s in report.sublayers
    ]
    for a, b in zip(pruner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.several_splits
def test_one_number_of_heads_is_not_tried() -> None:
    assert not pruner_of(make("bert"), prune_heads=False, sparsity=0.2).prune().trials
    assert not pruner_of(grouped(), method="magnitude").prune().trials
    assert " and tries up to 3 numbers of heads: " in pruner_of(grouped()).plan().estimate


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_ways_to_end_alike_are_within_the_budget_and_differ_in_heads(sparsity: float) -> None:
    sublayers = find_sublayers(grouped(12, 12))
    args = KPruneArguments(sparsity=sparsity, uniform=True)
    lengths = {sublayers[0].stack_name: 9.0}
    budget = budget_of(sublayers, args, lengths, Size(), None)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(s.num_units, generator=generator).double() for s in sublayers]
    best, ways = budget.alike_counts(scores), budget.ways_alike(scores, 4)
    assert next(iter(ways.values())) == best
    for name, (heads, neurons, *rest) in ways.items():
        assert rest == [heads, neurons]
        assert name == (f"{heads} heads" if heads > 1 else "1 head")
        spent = sum(cost * n for cost, n in zip(budget.costs, (heads, neurons) * 2, strict=True))
        assert spent <= budget.limit * (1 + 1e-9)
        left = budget.limit - spent
        assert neurons == 32 or left < 2 * budget.costs[1]  # which are used up
    fits = [
        n
        for n in budget.allowed[0] or ()
        if 2 * (n * budget.costs[0] + budget.minimum[1] * budget.costs[1]) <= budget.limit
    ]
    tried = [counts[0] for counts in ways.values()]
    assert max(tried) == max(fits)
    assert all(min(tried[:2]) < n < max(tried) for n in tried[2:3] if n > best[0])
    assert list(budget.ways_alike(scores, 2)) == list(ways)[:2]
