"""A plan is a dry run: what `prune()` would do, for the cost of a few tokens, with the words of something not done."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import unchanged
from data import collate, rows
from models import shallow, slow_unless_in
from transformers import PreTrainedModel
from zoo import make

from hf_kprune import (
    ArgumentError,
    BudgetError,
    CalibrationError,
    KPruneArguments,
    KPrunePruner,
    UnsupportedModelError,
)
from hf_kprune.calibration.batch import Batch
from hf_kprune.entries import Size
from hf_kprune.methods import METHODS
from hf_kprune.preparation import PLAN_TOKENS
from hf_kprune.progress import Work
from hf_kprune.seconds import Pace, seconds_beyond
from hf_kprune.sizes import model_size
from hf_kprune.structure.sublayers import find_sublayers


def make_pruner(model: PreTrainedModel, data: Any = None, **options: Any) -> KPrunePruner:
    args = KPruneArguments(**{"disable_tqdm": True, "use_cpu": True, **options})
    return KPrunePruner(
        model,
        args,
        rows() if data is None else data,
        both_sides if model.config.is_encoder_decoder else collate,
    )


def both_sides(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of an encoder-decoder, whose decoder reads the same."""
    inputs = collate(batch)
    return {
        **inputs,
        "decoder_input_ids": inputs["input_ids"],
        "decoder_attention_mask": inputs["attention_mask"],
    }


@contextmanager
def tokens_run(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens that pass the first layer, also of copies of the model."""
    counts: list[int] = []
    layer = model.base_model.encoder.layer[0]
    hook = layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[0] * args[0].shape[1]))
    yield counts
    hook.remove()


@pytest.mark.parametrize("method", slow_unless_in(("surgeon",), METHODS))
def test_a_plan_costs_a_few_tokens_and_tunes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    for amount in (400, 800):
        model = shallow()
        with tokens_run(model) as counts:
            report = make_pruner(model, rows(amount), method=method, sparsity=0.2).plan()
        totals.append(sum(counts))
        assert report.calibration["rows"] == amount
        assert PLAN_TOKENS - 12 < report.calibration["tokens_measured"] <= PLAN_TOKENS
        assert report.calibration["tokens"] > PLAN_TOKENS
    assert max(totals) < 1.1 * min(totals)  # whatever there is to calibrate with, but for padding
    monkeypatch.setattr("hf_kprune.algorithm.tune", None)
    make_pruner(shallow(), method=method, sparsity=0.2).plan()


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless_in(
        [("t5", torch.float32), ("llama", torch.bfloat16)],
        itertools.product(
            ["bert", "t5", "llama", "gpt2", "mixtral", "bart", "deberta-v2"], [torch.float32, torch.bfloat16]
        ),
    ),
)
def test_sizes_of_a_plan_are_those_of_such_a_model(name: str, dtype: torch.dtype) -> None:
    """Parameters, bytes and cache, of the plan that was made, counted on a model that is cut so."""
    data = rows() if name not in ("t5", "bart") else [{**row, "labels": row["input_ids"]} for row in rows()]
    model = (shallow() if name == "bert" else make(name)).to(dtype)
    options = {"min_heads": 1, "min_neurons": 1, "sparsity": 0.3, "method": "magnitude"}
    with unchanged(model):
        planned = make_pruner(model, data, **options).plan()
    pruned = make_pruner(model, data, **options).prune()  # which decides by the weights alone
    assert [s.kept for s in planned.sublayers] == [s.kept for s in pruned.sublayers]
    assert planned.after == pruned.after
    assert planned.before == pruned.before
    assert planned.removed_at == pruned.removed_at
    assert planned.after.parameters == model_size(model).parameters


@functools.cache
def dense_size() -> Size:
    return make_pruner(shallow(), sparsity=0).plan().before


@pytest.mark.parametrize(
    ("method", "name", "share"),
    slow_unless_in(
        [("surgeon", "sparsity", 0.2), ("kprune", "target_params", 0.95), ("flap", "target_flops", 0.85)],
        [
            (method, *budget)
            for method in METHODS
            for budget in (("sparsity", 0.2), ("target_params", 0.95), ("target_flops", 0.85))
        ],
    ),
)
def test_totals_of_a_plan_are_as_asked(method: str, name: str, share: float) -> None:
    totals = {"target_params": dense_size().parameters, "target_flops": dense_size().flops}
    asked = totals.get(name, 1.0) * share
    report = make_pruner(shallow(), method=method, **{name: asked}).plan()
    if name == "sparsity":
        assert asked <= report.sparsity < asked + 0.1
    else:
        assert 0.9 * asked < report.achieved <= asked


@pytest.mark.parametrize("method", ["surgeon", "kprune"])
def test_uniform_plans_are_uniform(method: str) -> None:
    report = make_pruner(make("llama"), sparsity=0.4, uniform=True, method=method).plan()
    for kind in ("attention", "ffn"):
        assert len({len(s.kept) for s in report.sublayers if s.kind == kind}) == 1


def test_a_plan_in_time_reads_the_table_and_times_no_cut_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def compare(models: list[PreTrainedModel], *_: Any, **__: Any) -> list[float]:
        return [10.0 + sum(s.num_units for s in find_sublayers(model)) for model in models]

    monkeypatch.setattr("hf_kprune.latency.table.cached_assets_path", lambda *_: tmp_path)
    monkeypatch.setattr("hf_kprune.budgets.times.compare", compare)
    monkeypatch.setattr("hf_kprune.latency.table.compare", compare)
    report = make_pruner(shallow(), target_speedup=1.5).plan()
    assert report.achieved == pytest.approx(1.5, rel=0.1)
    assert "Times are those of the look-up table" in str(report)


def test_the_words_of_a_plan_say_would_be() -> None:
    for method, words in (("surgeon", "would be pruned by surgeon"), ("kprune", "would be K-pruned")):
        text = str(make_pruner(shallow(), method=method, sparsity=0.9).plan())
        first = text.splitlines()[0]
        assert first.startswith("Plan: ")
        assert words in first
        assert "of the prunable FLOPs would be removed" in first
        assert "would be left without" in text
        assert "Estimated from" in text
        assert "prune() " in text
        assert " are removed" not in text
        assert " are left" not in text
    pruned = str(make_pruner(shallow(), sparsity=0.9).prune())
    assert "would be" not in pruned
    assert "Plan" not in pruned


@pytest.mark.several_splits
def test_a_plan_refuses_what_prune_refuses(tmp_path: Any) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArgumentError, match="is not empty"):
        make_pruner(shallow(), output_dir=str(tmp_path)).plan()
    for data in ([], [*rows(), {"input_ids": [2, 60]}], rows(1)):
        with pytest.raises(CalibrationError):
            make_pruner(shallow(), data).plan()
    with pytest.raises(BudgetError):
        make_pruner(shallow(), target_params=10).plan()
    with pytest.raises(BudgetError, match="method 'kcm' removes neurons only"):
        make_pruner(shallow(), method="kcm", sparsity=0.95).plan()
    with pytest.warns(UserWarning, match="3 calibration rows are measured on, too few"):
        make_pruner(shallow(), rows(3)).plan()
    model = shallow()
    model.base_model.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"output\.dense\.weight"):
        make_pruner(model).plan()


def test_memory_is_said_before_pruning_and_too_little_of_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruner = KPrunePruner(
        shallow(),
        KPruneArguments(sparsity=0.5, disable_tqdm=True, use_cpu=True, num_tokens=200),
        rows(40),
        collate,
    )
    report = pruner.plan()
    assert " It takes about " in report.estimate
    free = SimpleNamespace(available=1024)
    monkeypatch.setattr("hf_kprune.memory.psutil", SimpleNamespace(virtual_memory=lambda: free))
    assert " It takes about " in pruner.plan().estimate
    message = r"pruning takes about \d+ MiB of memory beyond the model, .* and 0 MiB are free on cpu; lower"
    with unchanged(pruner.model), pytest.raises(CalibrationError, match=message):
        pruner.prune()


@pytest.mark.several_splits
@pytest.mark.parametrize("method", slow_unless_in(("surgeon", "kprune"), METHODS))
def test_a_plan_tells_how_long_pruning_takes(method: str) -> None:
    pruner = make_pruner(shallow(), rows(200), method=method, sparsity=0.2)
    report = pruner.plan()
    seconds = report.expected_seconds
    assert list(seconds) == ["prepare", "measure", "search", "tune", "total"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2)
    assert f", and about {seconds['total']:,.0f} s on this device, most of them to " in report.estimate
    assert (seconds["tune"] > 0) == METHODS[method].tunes
    assert (seconds["search"] > 2 * report.seconds["search"]) == (method == "surgeon")
    assert pruner.prune().expected_seconds == {}


def test_seconds_are_those_of_the_plan_in_proportion_to_what_there_is_to_do() -> None:
    """Of 3 sublayers: a plan that measures 10 tokens in 2 s, of 100 that prune() measures and 1,000 in all."""

    def tokens(count: int, **roles: Any) -> Batch:
        return Batch({}, {"layers": torch.ones(1, count)}, torch.ones(1, count), **roles)

    batches = [
        tokens(10, measured=True, sampled=True, tried=True),
        tokens(40, measured=True, tried=True),
        tokens(30, measured=True),
        tokens(20, measured=True, held_out=True),
        tokens(900),
    ]
    data: Any = SimpleNamespace(batches=batches, sublayers=[None] * 3)
    pace = Pace(forward=0.1, sums=0.2, fits=7.0, quick_fits=3.0, judging=0.4)
    magnitude, kwon, kprune, surgeon = (
        METHODS[name](KPruneArguments(method=name, method_kwargs=kwargs))
        for name, kwargs in (
            ("magnitude", None),
            ("kwon", None),
            ("kprune", {"measure_every": 2}),
            ("surgeon", None),
        )
    )
    assert seconds_beyond(data, magnitude, None, 2.0, 0.5, False) == {"measure": pytest.approx(18.0)}
    student = 0.1 * (0.5 + 0.5 * 0.5)
    fitting = 1.5 * student + 0.2
    more = seconds_beyond(data, kwon, pace, 2.0, 0.5, False)
    assert more == pytest.approx({"measure": 18.0, "tune": 1000 * (0.1 + fitting) + 7})
    more = seconds_beyond(data, kprune, pace, 2.0, 0.5, False)
    # passes over 3 sublayers for the teacher and the student, and one forward and backward over the third
    assert more["measure"] == pytest.approx(2 * (10 * (3 + 3 + 3) / 3 - 1))
    assert "search" not in more
    surgeon.exponents = (0.5, 1.0)  # type: ignore[misc]
    fitting += 0.25 * 0.1
    for alone in (False, True):
        more = seconds_beyond(data, surgeon, pace, 2.0, 0.5, alone)
        assert more["tune"] == pytest.approx(1000 * (0.1 + fitting) + 7)
        teacher = (2 if alone else 1) * 0.1 * 70 + 0.1 * 20
        each = 50 * fitting + 20 * (student + 0.4) + 3
        assert more["search"] == pytest.approx(teacher + 2 * each)


@pytest.mark.several_splits
@pytest.mark.parametrize("method", slow_unless_in(("surgeon", "kprune"), METHODS))
def test_the_steps_that_are_foretold_are_those_that_are_taken(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_of_work, forecasts = [0.0], [0.0]
    monkeypatch.setattr(Work, "step", lambda _, steps=1.0: steps_of_work.append(steps))
    monkeypatch.setattr(Work, "begin", lambda _, steps, later: forecasts.append(steps))
    monkeypatch.setattr(Work, "end_student", lambda _: None)
    reached = 0.2 if method == "kcm" else 0.5  # it removes neurons only
    pruner = make_pruner(shallow(), rows(80), method=method, sparsity=reached, per_device_batch_size=8)
    for work in (pruner.plan, pruner.prune):
        steps_of_work.clear()
        work()
        assert sum(steps_of_work) == pytest.approx(forecasts[-1], rel=0.25)
