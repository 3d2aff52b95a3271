"""Methods by name: those of others beside ours, and names of earlier releases."""

from __future__ import annotations

import doctest
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from data import ROOT, collate, rows
from models import shallow, tiny
from torch import Tensor

import hf_kprune
from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, Method, Statistics, register_method
from hf_kprune.methods import METHODS
from hf_kprune.options import option, over
from hf_kprune.structure import families


class Largest(Method):
    """Keeps the units of largest features."""

    def score(self, statistics: Statistics) -> Tensor:
        return statistics.energy.view(-1, statistics.unit_width).mean(1) / statistics.cost


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(METHODS)
    register_method("largest", Largest)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_a_registered_method_prunes_by_its_own_scores(registered: None) -> None:
    model = shallow()
    report = KPrunePruner(
        model, KPruneArguments(method="largest", sparsity=0.4, disable_tqdm=True), rows(24), collate
    ).prune()
    assert report.method == "largest"
    assert report.sparsity >= 0.4
    ffn = [entry for entry in report.sublayers if entry.kind == "ffn" and 0 < len(entry.kept) < entry.units]
    assert ffn, "nothing was cut"
    for entry in ffn:
        scores = torch.tensor(entry.scores)
        rest = scores[[unit for unit in range(entry.units) if unit not in entry.kept]]
        assert float(scores[entry.kept].min()) >= float(rest.max())


def test_a_name_that_is_taken_and_a_class_that_is_no_method_are_refused(registered: None) -> None:
    register_method("largest", Largest)  # again is no other
    with pytest.raises(ArgumentError, match="'kprune' is KPrune already; choose another name"):
        register_method("kprune", Largest)
    with pytest.raises(ArgumentError, match="derived from hf_kprune.Method"):
        register_method("anything", object)  # type: ignore[arg-type]


def test_the_default_is_known_by_its_earlier_name() -> None:
    assert KPruneArguments(method="obs").method == KPruneArguments().method == "surgeon"


@dataclass
class Power:
    """How units of a method of a test are scored."""

    power: Annotated[float, over(0)] = option(1.0, "Raise features to this power.")
    signed: bool = option(False, "Keep their sign.")


class Powerful(Largest):
    """Takes options."""

    kwargs_class = Power


@pytest.fixture
def powerful(registered: None) -> None:
    register_method("powerful", Powerful)


@pytest.mark.parametrize("kwargs", [{"power": 2}, {"power": np.float32(2)}, '{"power": 2}'])
def test_a_method_has_its_options_from_a_dict_or_from_json(powerful: None, kwargs: Any) -> None:
    args = KPruneArguments(method="powerful", method_kwargs=kwargs)
    assert args.method_kwargs == {"power": 2.0}
    assert json.dumps(args.to_dict()["method_kwargs"]) in ('{"power": 2}', '{"power": 2.0}')
    assert METHODS["powerful"](args).kwargs == Power(2.0, False)
    assert replace(args, method_kwargs={}).method_kwargs is None
    assert METHODS["powerful"](KPruneArguments(method="powerful")).kwargs == Power()


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        (
            "powerful",
            {"powr": 2},
            "'powr', .* 'powerful' does not take: it takes power, signed; did you mean power?",
        ),
        ("powerful", {1: 2}, "names 1, which method 'powerful' does not take: it takes power, signed"),
        ("powerful", {"mu": 2}, "names 'mu', .* it takes power, signed; 'kprune' does"),
        (
            "surgeon",
            {"mu": 2},
            "names 'mu', which method 'surgeon' does not take: it takes none; 'kprune' does",
        ),
        ("powerful", {"power": 0}, "^power is 0, expected over 0"),
        ("powerful", {"power": "2"}, "^power is '2', expected a number: 2, without quotes"),
        ("powerful", {"signed": 1}, "^signed is 1, expected True or False"),
        (
            "powerful",
            "{power: 2}",
            "^method_kwargs is '{power: 2}', expected a dict, or one as JSON, such as",
        ),
        ("powerful", "[2]", "^method_kwargs is '\\[2\\]', expected a dict"),
        (
            "kprune",
            {"lambda_rep": 0.0},
            "^lambda_rep is 0.0, expected over 0: the first sublayer, below which",
        ),
        ("kprune", {"lambda_pred": -1.0}, "^lambda_pred is -1.0, expected at least 0$"),
        ("kprune", {"mu": 0.0}, "^mu is 0.0, expected over 0, or None for the head size$"),
    ],
)
def test_options_that_the_method_does_not_take_are_refused(
    powerful: None, method: str, kwargs: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message.replace("mean power?", "mean power\\?")):
        KPruneArguments(method=method, method_kwargs=kwargs)


def test_the_old_names_of_options_of_a_method_are_taken_and_said_where_they_are() -> None:
    with pytest.warns(FutureWarning, match="pass mu in method_kwargs: '{\"mu\": 8}'") as caught:
        args = KPruneArguments(method="kprune", method_kwargs={"lambda_rep": 1.0, "mu": 9.0}, mu=8)
    assert caught[0].filename == __file__
    kwargs: dict[str, Any] = {"lambda_rep": 1.0, "mu": 8.0}
    assert args == KPruneArguments(method="kprune", method_kwargs=kwargs)
    assert replace(args, sparsity=0.25).method_kwargs == args.method_kwargs  # without another warning
    with pytest.warns(FutureWarning, match="pass lambda_pred in"):
        assert replace(args, lambda_pred=0.0).method_kwargs == {**kwargs, "lambda_pred": 0.0}
    args.mu = 7.0
    with pytest.warns(FutureWarning):
        args.check()
    assert vars(METHODS["kprune"](args).kwargs)["mu"] == 7.0
    with pytest.raises(ArgumentError, match="^mu is 0.0, expected over 0, or None for the head size$"):
        KPruneArguments(method="kprune", mu=0.0)


def test_options_in_method_kwargs_and_by_their_old_names_prune_alike_and_count() -> None:
    def units(**options: Any) -> list[list[int]]:
        args = KPruneArguments(method="kprune", sparsity=0.5, disable_tqdm=True, use_cpu=True, **options)
        return [entry.kept for entry in KPrunePruner(shallow(), args, rows(24), collate).prune().sublayers]

    with pytest.warns(FutureWarning):
        old = units(mu=1e-3)
    assert old == units(method_kwargs={"mu": 1e-3}) != units()


def test_a_class_of_options_without_defaults_is_refused(registered: None) -> None:
    class Bare(Largest):
        kwargs_class = object

    @dataclass
    class Needed:
        power: float

    class Needy(Largest):
        kwargs_class = Needed

    for method in (Bare, Needy):
        with pytest.raises(
            ArgumentError, match="is no dataclass whose fields have defaults: method 'odd' needs one"
        ):
            register_method("odd", method)


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_each_method_are_in_the_documentation(name: str) -> None:
    text = " ".join((ROOT / "docs/cli.md").read_text(encoding="utf-8").split())
    for each in fields(METHODS[name].kwargs_class):
        default = "" if each.default is None else f"{each.default} "
        assert f"| `{name}` | `{each.name}` | {default}| {each.metadata['help']} |" in text
    assert set(METHODS[name].ranges) <= METHODS[name].options.union(METHODS[name].kwargs_names())


@pytest.mark.parametrize("name", [name for name in hf_kprune.__all__ if name != "__version__"])
def test_examples_in_docstrings_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    before = dict(METHODS)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    try:
        for example in finder.find(getattr(hf_kprune, name), name, globs={}):
            assert example.examples or issubclass(getattr(hf_kprune, name), Exception), f"{name} has none"
            runner.run(example)
    finally:
        METHODS.clear()
        METHODS.update(before)
    assert runner.summarize(verbose=False).failed == 0


class Both(Largest):
    """Needs two kinds of Fisher information."""

    needs = frozenset({"curvature", "fisher"})

    def score(self, statistics: Statistics) -> Tensor:
        assert statistics.metric is not None
        assert statistics.gram is not None
        assert statistics.fisher is not None
        assert statistics.absolute is not None
        return super().score(statistics)


def test_a_method_has_all_that_it_needs(registered: None) -> None:
    register_method("both", Both)
    args = KPruneArguments(method="both", sparsity=0.4, disable_tqdm=True)
    assert KPrunePruner(shallow(), args, rows(24), collate).prune().sparsity >= 0.4


@pytest.mark.parametrize(
    ("one_shot", "needs", "there_is"),
    [(True, "knowledge", "curvature and fisher"), (False, "curvature", "knowledge"), (True, "luck", "curv")],
)
def test_a_method_that_needs_what_is_not_measured_for_it_is_refused(
    registered: None, one_shot: bool, needs: str, there_is: str
) -> None:
    method = type("Needy", (Largest,), {"one_shot": one_shot, "needs": frozenset({needs})})
    with pytest.raises(
        ArgumentError, match=rf"needs {needs}; with one_shot = {one_shot} it can have {there_is}"
    ):
        register_method("needy", method)


@pytest.mark.parametrize(
    ("every", "most", "expected"),
    [
        (1, 24, [0, 1, 2, 3, 4, 5]),
        (4, 24, [0, 4]),
        (6, 24, [0]),
        (None, 24, [0, 1, 2, 3, 4, 5]),
        (None, 3, [0, 2, 4]),
    ],
)
def test_a_student_is_measured_as_often_as_its_schedule_says(
    every: int | None, most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, measured = sys.modules["hf_kprune.algorithm"], list[int]()
    measure = algorithm.measure_knowledge

    def counted(*args: Any) -> Any:
        measured.append(args[1].position)
        return measure(*args)

    monkeypatch.setattr(algorithm, "measure_knowledge", counted)
    monkeypatch.setattr(algorithm, "MEASUREMENTS", most)
    kwargs = {"measure_every": every}
    args = KPruneArguments(
        sparsity=0.5, method="kprune", method_kwargs=kwargs, num_tokens=100, disable_tqdm=True, use_cpu=True
    )
    report = KPrunePruner(tiny(), args, rows(24), collate).prune()
    assert measured == expected
    assert report.sparsity == pytest.approx(0.5, abs=0.05)
