"""Methods by name: those of others beside ours, and names of earlier releases."""

from __future__ import annotations

import doctest
from collections.abc import Iterator

import pytest
import torch
from data import ROOT, collate, rows
from models import tiny
from torch import Tensor

import hf_kprune
from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, Method, Statistics, register_method
from hf_kprune.methods import METHODS
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
    model = tiny()
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
