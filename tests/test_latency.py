"""Measured latency: fits, tables, cache and search, on made-up clocks. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import cut_all, slow_unless_in, tiny
from torch import Tensor
from transformers import PreTrainedModel
from zoo import ZOO, make

from hf_kprune.calibration.tasks import text_inputs
from hf_kprune.errors import ArgumentError, BudgetError
from hf_kprune.latency import timing
from hf_kprune.latency.search import STEPS, search_latency
from hf_kprune.latency.table import AT_ONCE, FAINT, Curve, LatencyTable, counts_to_measure
from hf_kprune.latency.timing import compare, cut_to, time_model
from hf_kprune.methods.search import group_sizes, threshold_search
from hf_kprune.structure.sublayers import find_sublayers


def seconds(curves: Sequence[Curve], counts: Sequence[int]) -> float:
    return sum(float(curve(torch.tensor(n))) for curve, n in zip(curves, counts, strict=True))


# Timing


class Clock:
    """Time that passes only while a model runs, as much as `cost` says, and `slowdown` times that in each round."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, costs: dict[PreTrainedModel, float], slowdown: Sequence[float]
    ):
        self.now, self.turns = 0.0, dict.fromkeys(costs, 0)
        self.order: list[PreTrainedModel] = []
        for model, cost in costs.items():
            model.register_forward_pre_hook(lambda m, _, cost=cost: self.tick(m, cost, slowdown))
        monkeypatch.setattr(timing, "_now", lambda device: self.now)

    def tick(self, model: PreTrainedModel, cost: float, slowdown: Sequence[float]) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.now += cost * slowdown[self.turns[model] // 2]
        self.turns[model] += 1
        self.order.append(model)


def test_models_take_turns_and_their_ratios_survive_a_machine_that_slows_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [tiny(seed=seed).train() for seed in range(3)]
    models[1].eval()
    costs, slowdown = [2 / 1024, 1 / 1024, 6 / 1024], [9, 7, 1, 1, 5, 1, 8]
    clock = Clock(monkeypatch, dict(zip(models, costs, strict=True)), slowdown)
    assert compare(models, text_inputs(models[0], 2, 5), rounds=5) == costs
    rounds = timing.WARM_UP + 5
    assert clock.order == [m for _ in range(rounds) for m in models for _ in range(2)]
    assert [m.training for m in models] == [True, False, True]


def test_the_median_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    Clock(monkeypatch, {model: 1 / 1024}, [50, 4, 2, 30])
    assert time_model(model, text_inputs(model, 2, 5), repeats=3) == 4 / 1024


def test_where_nobody_says_how_many_passes_are_as_many_as_there_is_patience_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 10.0)
    for cost, passes in ((10.0, 1 + 3), (10.0 / 8, 1 + 8), (timing.SHORT / 8, 2 * (1 + 20))):
        model = tiny()
        clock = Clock(monkeypatch, {model: cost}, [1] * 30)
        assert time_model(model, text_inputs(model, 2, 5)) == pytest.approx(cost)
        assert len(clock.order) == passes


def test_the_real_clock_runs_forward() -> None:
    model = tiny()
    assert 0 < time_model(model, text_inputs(model, 1, 3), repeats=1) < float("inf")


# Inputs


TEXT = "bert roberta longformer modernbert deberta-v2 nomic_bert gpt2 opt llama bloom gemma2 t5 bart pegasus clip_text_model"


@pytest.mark.parametrize("name", TEXT.split())
def test_made_up_inputs_run(name: str) -> None:
    model = make(name) if name in ZOO else tiny(name)
    inputs = text_inputs(model, 3, 7)
    with torch.no_grad():
        model(**inputs)
    decoder = "decoder_input_ids" in inputs
    assert decoder == (name in ("t5", "bart", "pegasus"))
    for prefix in ("", "decoder_") if decoder else ("",):
        ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
        assert ids.shape == mask.shape == (3, 7)
        assert bool(mask.all())
        assert not bool((ids == model.config.pad_token_id).any())


@pytest.mark.parametrize("head", ["", "MULTIPLE_CHOICE", "QUESTION_ANSWERING", "MASKED_LM"])
def test_made_up_inputs_run_with_any_head(head: str) -> None:
    model = tiny(head=head)
    inputs = text_inputs(model, 3, 7)
    with torch.no_grad():
        outputs = model(**inputs)
    assert inputs["input_ids"].shape == ((3, 1, 7) if head == "MULTIPLE_CHOICE" else (3, 7))
    assert len(outputs[0]) == 3


def test_every_row_ends_with_one_end_of_sequence() -> None:
    import transformers

    model = make("bart")
    classifier = transformers.BartForSequenceClassification(model.config).eval()
    inputs = text_inputs(classifier, 4, 6)
    assert list(inputs) == ["input_ids", "attention_mask"]
    ends = inputs["input_ids"] == model.config.eos_token_id
    assert ends.nonzero()[:, 1].tolist() == [5] * 4
    with torch.no_grad():
        assert len(classifier(**inputs).logits) == 4


def test_special_tokens_outside_of_the_vocabulary_are_not_used() -> None:
    model = tiny()
    model.config.eos_token_id = [model.config.vocab_size + 7, 3]
    assert int(text_inputs(model, 8, 9)["input_ids"].max()) < model.config.vocab_size


@pytest.mark.parametrize("name", ["vit", "clip", "wav2vec2", "whisper"])
def test_inputs_that_cannot_be_made_up(name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot be made up, it takes .*; pass inputs"):
        text_inputs(make(name), 2, 4)


@pytest.mark.parametrize(("shape", "limit"), [((0, 4), ""), ((2, 0), ""), ((2, 41), "at most 40 tokens")])
def test_inputs_of_a_shape_that_cannot_be(shape: tuple[int, int], limit: str) -> None:
    with pytest.raises(ArgumentError, match=f"asked for inputs of {shape[0]} x {shape[1]} tokens.*{limit}"):
        text_inputs(tiny(), *shape)


def test_cut_to_keeps_so_many_and_leaves_the_model() -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    units = [s.num_units for s in find_sublayers(model)]
    counts = [0, *range(1, len(units))]
    assert [s.num_units for s in find_sublayers(cut_to(model, counts))] == counts
    assert [s.num_units for s in find_sublayers(model)] == units
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# Fits


@given(st.floats(0, 5), st.floats(0.01, 5), st.integers(0, 8))
def test_fit_recovers_exact_curves(c: float, a: float, theta: int) -> None:
    true, units = Curve(c, a, theta), torch.arange(1, 11)
    fit = Curve.fit(units, true(units))
    torch.testing.assert_close(fit(units), true(units), rtol=1e-6, atol=1e-6 * a)
    if theta >= 2:  # lower ones make the same times
        assert fit.theta == theta
        assert fit.c == pytest.approx(c, abs=1e-6 * a)
        assert fit.a == pytest.approx(a)
    assert float(fit(torch.tensor(0))) == 0


@given(st.floats(0, 5), st.floats(0.01, 5), st.integers(0, 1000))
def test_fit_recovers_the_knee_between_few_points(c: float, a: float, theta: int) -> None:
    true, units = Curve(c, a, theta), torch.tensor(counts_to_measure(1536))
    fit = Curve.fit(units, true(units))
    torch.testing.assert_close(fit(units), true(units), rtol=1e-6, atol=1e-6 * a)


def test_fit_of_sublayers_of_different_width() -> None:
    true, limits = Curve(3.0, 0.5, 4), torch.tensor([1, 2, 5, 7, 9, 12])
    units = torch.stack([limits.clamp(max=width) for width in (12, 6, 3)], 1)
    fit = Curve.fit(units, true(units).mean(1))
    assert [fit.c, fit.a, fit.theta] == pytest.approx([3.0, 0.5, 4])


@pytest.mark.parametrize(
    ("times", "level"),
    [
        ([2.0] * 6, 2.0),
        ([7.0], 7.0),
        ([0.0] * 4, 0.0),
        ([2.0, 1.0], 1.2),
        ([6.0, 3.0, 2.0], 18 / 7),
        ([-1.0, -2.0], 0.0),
    ],
)
def test_without_a_slope_all_units_are_free(times: list[float], level: float) -> None:
    fit = Curve.fit(torch.arange(1, len(times) + 1), torch.tensor(times))
    assert fit.c == pytest.approx(level)
    assert (fit.a, fit.theta) == (0.0, len(times))


def test_a_line_through_zero_or_below_has_no_negative_times() -> None:
    units = torch.arange(1, 9)
    fit = Curve.fit(units, 2.0 * units)
    assert (fit.c, fit.theta) == (0.0, 0)
    assert fit.a == pytest.approx(2.0)
    late = Curve.fit(units, (2.0 * units - 6).clamp(min=0))
    assert [late.c, late.a, late.theta] == pytest.approx([0.0, 2.0, 3], abs=1e-9)


@given(st.lists(st.floats(-1, 5), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_no_curve_fits_better(times: list[float], random: Any) -> None:
    units, observed = torch.arange(1, len(times) + 1), torch.tensor(times, dtype=torch.float64)
    fit = Curve.fit(units, observed)

    def error_of(curve: Curve) -> float:
        size = observed.clamp(min=FAINT * max(float(observed.max()), 1e-12))
        return float(((curve(units) - observed) * size.min() / size).square().sum())

    error = error_of(fit)
    assert fit.c >= 0
    assert fit.a >= 0
    for near in (0.0, 1e-3, 0.1, 1.0, 5.0):
        for theta in range(len(times) + 1):
            other = Curve(
                max(fit.c + random.uniform(-near, near), 0),
                max(fit.a + random.uniform(-near, near), 0),
                theta,
            )
            assert error <= error_of(other) * (1 + 1e-6) + 1e-7


def test_the_lower_end_counts_as_much_as_the_upper() -> None:
    """Where time grows faster than units, as with caches that fill, what is left of a cut sublayer is predicted well."""
    units = torch.tensor(counts_to_measure(1536))
    observed = units.double() ** 1.5
    few = units <= 384
    assert ((Curve.fit(units, observed)(units) / observed)[few] - 1).abs().max() < 0.5


@given(st.integers(1, 20_000))
def test_what_is_measured_goes_from_one_to_all(units: int) -> None:
    counts = counts_to_measure(units)
    assert counts == sorted(set(counts))
    assert 1 <= counts[0] <= max(1, units / 8)
    assert counts[-1] == units
    assert len(counts) <= 10
    assert units > 8 or counts == list(range(1, units + 1))


# Tables

REST = 0.7


def law(name: str) -> Curve:
    """Times of a made-up machine: the sublayers of each kind have a curve of their own."""
    cross = "encoder_attn" in name or "cross" in name or "EncDec" in name
    return Curve(0.5, 0.03, 5) if name.endswith("ffn") else Curve(0.2, 0.3, 1 + cross)


def by_law(models: Sequence[PreTrainedModel], *_: Any, **__: Any) -> list[float]:
    made = []
    for model in models:
        sublayers = find_sublayers(model)
        made.append(REST + seconds([law(s.name) for s in sublayers], [s.num_units for s in sublayers]))
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`compare` follows the law; how many models it was given each time."""
    calls: list[int] = []

    def counted(models: Sequence[PreTrainedModel], *args: Any, **kwargs: Any) -> list[float]:
        calls.append(len(models))
        return by_law(models)

    monkeypatch.setattr("hf_kprune.latency.table.compare", counted)
    return calls


def plans(units: Sequence[int], count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[int(torch.randint(u + 1, (1,), generator=generator)) for u in units] for _ in range(count)]


@pytest.mark.parametrize("name", slow_unless_in(["llama"], ["bert", "llama", "t5"]))
def test_table_predicts_every_plan(name: str, machine: list[int]) -> None:
    model = make(name) if name in ZOO else tiny(name)
    table = LatencyTable.measure(model, text_inputs(model, 2, 5))
    sublayers = find_sublayers(model)
    assert table.units == [s.num_units for s in sublayers]
    assert (
        len(set(table.kinds)) == len({(s.stack_name, s.block.output) for s in sublayers}) == len(table.points)
    )
    for counts in plans(table.units):
        [expected] = by_law([cut_to(model, counts)])
        assert table.predict(counts) == pytest.approx(expected)
    assert table.predict(table.units) == pytest.approx(table.dense)
    assert table.predict([0] * len(table.units)) == pytest.approx(table.emptied) == table.rest
    assert max(machine) <= 2 + AT_ONCE


def test_table_of_a_model_that_is_pruned_already(machine: list[int]) -> None:
    model = tiny()
    units = [s.num_units for s in find_sublayers(model)]
    masks = [torch.arange(u) < n for u, n in zip(units, [3, 12, 0, 7, 4, 0], strict=True)]
    pruned = cut_all(model, masks)
    table = LatencyTable.measure(pruned, text_inputs(pruned, 2, 5))
    assert table.units == [3, 12, 0, 7, 4, 0]
    for counts in plans(table.units):
        [expected] = by_law([cut_to(pruned, counts)])
        assert table.predict(counts) == pytest.approx(expected)


def test_ends_of_the_table_hold_where_times_are_no_straight_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def bent(models: Sequence[PreTrainedModel], *_: Any) -> list[float]:
        return [REST + sum(s.num_units**0.7 for s in find_sublayers(model)) for model in models]

    monkeypatch.setattr("hf_kprune.latency.table.compare", bent)
    model = tiny()
    table = LatencyTable.measure(model, {}, rounds=1)
    for counts in (table.units, [0] * len(table.units)):
        [expected] = bent([cut_to(model, counts)])
        assert table.predict(counts) == pytest.approx(expected)


def test_table_is_saved_and_loaded(tmp_path: Path, machine: list[int]) -> None:
    model = tiny()
    table = LatencyTable.measure(model, text_inputs(model, 2, 5))
    path = tmp_path / "new" / "table.json"
    table.save(path)
    again = LatencyTable.load(path)
    assert again == table
    assert again.curves == table.curves
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[]", '{"dense": 1.0}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=r"table\.json holds no latency table .*; delete it"):
        LatencyTable.load(path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[LatencyTable]:
    """The tables that `LatencyTable.measure` gave, each another one."""
    tables: list[LatencyTable] = []

    def measure(*_: Any) -> LatencyTable:
        tables.append(
            LatencyTable(1.0 + len(tables), 0.5, [4], ["a kind"], {"a kind": [(1, 0.1), (4, 0.25)]})
        )
        return tables[-1]

    monkeypatch.setattr(LatencyTable, "measure", measure)
    return tables


def test_a_table_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[LatencyTable]
) -> None:
    model, other = tiny(seed=0), tiny(seed=1)
    inputs = text_inputs(model, 2, 5)
    first = LatencyTable.cached(model, inputs, tmp_path)
    assert LatencyTable.cached(model, inputs, tmp_path) == first
    assert (
        LatencyTable.cached(other, text_inputs(other, 2, 5), tmp_path) == first
    )  # other weights of the same shapes
    assert measured == [first]
    assert len(list(tmp_path.iterdir())) == 1

    for changed, taken in (
        (model, text_inputs(model, 3, 5)),
        (model, text_inputs(model, 2, 6)),
        (tiny().to(torch.bfloat16), inputs),
        (cut_to(model, [1] * 6), inputs),
        (tiny(hidden_act="relu"), inputs),
    ):
        assert LatencyTable.cached(changed, taken, tmp_path) == measured[-1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert LatencyTable.cached(model, inputs, tmp_path) == measured[-1]
    assert len(measured) == 7
    assert LatencyTable.cached(model, inputs, tmp_path) != first


def test_tables_lie_where_hugging_face_libraries_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[LatencyTable]
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    model = tiny()
    table = LatencyTable.cached(model, text_inputs(model, 2, 5))
    [path] = tmp_path.rglob("*.json")
    assert path.relative_to(tmp_path).parts[:2] == ("hf_kprune", "latency")
    assert LatencyTable.load(path) == table


def test_where_no_table_can_be_kept_it_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[LatencyTable]
) -> None:
    model = tiny()
    inputs = text_inputs(model, 2, 5)
    (tmp_path / "file").write_text("")
    cache = "huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "file" / "nowhere"))
    with pytest.warns(UserWarning, match="not kept.*cannot be written .*nowhere.*let HF_ASSETS_CACHE name"):
        assert LatencyTable.cached(model, inputs) == measured[-1]

    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(cache, str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.warns(UserWarning, match=f"cannot be written .*Read-only.*{tmp_path}.*let HF"):
        assert LatencyTable.cached(model, inputs) == measured[-1]
    assert len(measured) == 2


# Search


def options(units: int, low: int, multiple: int) -> list[int]:
    return list(itertools.accumulate(group_sizes(units, low, multiple)))


def worth(scores: Sequence[Tensor], counts: Sequence[int]) -> float:
    return sum(float(s.sort(descending=True).values[:n].sum()) for s, n in zip(scores, counts, strict=True))


def brute_force(
    scores: Sequence[Tensor],
    curves: Sequence[Curve],
    budget: float,
    minimum: Sequence[int],
    multiple: Sequence[int],
) -> float:
    """The most importance there is within the budget, -1 if there is no plan."""
    every = itertools.product(
        *(options(len(s), low, m) for s, low, m in zip(scores, minimum, multiple, strict=True))
    )
    return max((worth(scores, n) for n in every if seconds(curves, n) <= budget * (1 + 1e-9)), default=-1.0)


@st.composite
def problems(draw: st.DrawFn, whole: bool = False, one_slope: bool = False) -> dict[str, Any]:
    """A search that can be satisfied; `whole`: times are whole and the budget divides into thousandths that are too."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    values = draw(st.lists(st.integers(0, 20), min_size=sum(sizes), max_size=sum(sizes)))
    scores = list(torch.tensor(values, dtype=torch.float64).split(sizes))
    number = st.integers(0, 6) if whole else st.integers(0, 600).map(lambda n: n / 97)
    slope = draw(number)
    curves = [
        Curve(draw(number), slope if one_slope else draw(number), draw(st.integers(0, 4))) for _ in sizes
    ]
    minimum = [1 if one_slope else draw(st.integers(0, 2)) for _ in sizes]
    multiple = [1 if one_slope else draw(st.integers(1, 3)) for _ in sizes]
    least = seconds(
        curves, [group_sizes(*sizes_of)[0] for sizes_of in zip(sizes, minimum, multiple, strict=True)]
    )
    if whole:
        budget = float(draw(st.sampled_from([b for b in (5, 8, 10, 20, 25, 40, 50, 100) if b >= least])))
    else:
        budget = least + draw(st.floats(0, 1)) * (seconds(curves, sizes) - least)
    return {"scores": scores, "curves": curves, "budget": budget, "minimum": minimum, "multiple": multiple}


def kept(masks: Sequence[Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks]


@given(problems())
def test_search_is_within_the_budget_and_near_the_best(problem: dict[str, Any]) -> None:
    masks = search_latency(**problem)
    scores, curves, budget, minimum, multiple = problem.values()
    counts = kept(masks)
    assert seconds(curves, counts) <= budget * (1 + 1e-8)
    for score, mask, n, low, m in zip(scores, masks, counts, minimum, multiple, strict=True):
        assert mask.dtype == torch.bool
        assert n in options(len(score), low, m)
        assert float(score[mask].sum()) == worth([score], [n])  # the best ones
    assert worth(scores, counts) >= brute_force(**{**problem, "budget": budget * (1 - len(scores) / STEPS)})


@given(problems(whole=True))
def test_search_finds_the_best_where_times_are_whole_thousandths(problem: dict[str, Any]) -> None:
    assert worth(problem["scores"], kept(search_latency(**problem))) == brute_force(**problem)


@given(problems(one_slope=True))
def test_search_finds_the_best_where_all_stay_and_units_cost_the_same(problem: dict[str, Any]) -> None:
    assert worth(problem["scores"], kept(search_latency(**problem))) == brute_force(**problem)


def test_search_is_no_worse_than_by_threshold_where_every_unit_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) for n in (12, 400, 12, 300)]
    slopes = [30.0, 1.0, 40.0, 1.5]
    curves = [Curve(0.0, a, 0) for a in slopes]
    for share in (0.2, 0.5, 0.8):
        budget = share * seconds(curves, [len(s) for s in scores])
        rest = budget, [0] * 4, [1, 8, 1, 1]
        by_threshold = threshold_search([s / a for s, a in zip(scores, slopes, strict=True)], slopes, *rest)
        counts = kept(search_latency(scores, curves, *rest))
        assert worth(scores, counts) >= worth(scores, kept(by_threshold)) - 1e-6
        assert budget - 8 < seconds(curves, counts) <= budget  # used up, but for less than a group


def test_a_sublayer_that_is_not_worth_its_fixed_time_is_emptied() -> None:
    scores = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 9.0, 9.0])]
    curves = [Curve(6.0, 1.0, 1), Curve(5.0, 1.0, 2)]
    masks = search_latency(scores, curves, 6.0, [0, 0], [1, 1])
    assert [mask.tolist() for mask in masks] == [[False, False], [True, True, True]]
    masks = search_latency(scores, curves, 5.5, [0, 0], [1, 1])  # the two best are free once c is paid
    assert [mask.tolist() for mask in masks] == [[False, False], [False, True, True]]


def test_all_of_the_time_keeps_all_and_none_of_it_nothing() -> None:
    scores = [torch.zeros(3), torch.rand(5), torch.rand(0)]
    curves = [Curve(0.1, 0.7, 2), Curve(0.3, 0.0, 5), Curve(0.1, 0.1, 1)]
    rest = [0] * 3, [1, 2, 1]
    full = seconds(curves, [3, 5, 0])
    assert all(bool(mask.all()) for mask in search_latency(scores, curves, full, *rest))
    assert not any(bool(mask.any()) for mask in search_latency(scores, curves, 0.0, *rest))


def test_a_minimum_over_the_budget_is_refused() -> None:
    scores, curves = [torch.rand(4), torch.rand(4)], [Curve(1.0, 1.0, 1)] * 2
    rest = [2, 0], [1, 1]
    assert kept(search_latency(scores, curves, 2.0, *rest)) == [2, 0]
    with pytest.raises(BudgetError, match=r"take 2 s, over the 1\.9 s .*allow more time"):
        search_latency(scores, curves, 1.9, *rest)
