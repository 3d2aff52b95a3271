"""What a model was before: reports and cards name the dense model, every cut and the total; no dense one is called pruned."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data import collate, rows
from models import pruned, shallow
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_kprune import KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.checkpoint.card import model_card
from hf_kprune.checkpoint.lineage import earlier_cuts
from hf_kprune.cli.terminal import main


ARGUMENTS = KPruneArguments(sparsity=0.4, num_tokens=200, disable_tqdm=True, method="magnitude")


def make(model: PreTrainedModel | str, **options: Any) -> KPrunePruner:
    return KPrunePruner(model, replace(ARGUMENTS, **options), rows(), data_collator=collate)


def check(report: PruningReport, once: PruningReport, dense: PreTrainedModel | None = None) -> None:
    """That `report` is of the second of two cuts, of which `once` was the first."""
    (cut,) = report.lineage
    assert cut == once.cut()
    text = report.to_markdown()
    assert "The dense model is " in text
    assert f"({once.before.parameters:,} to {once.after.parameters:,} parameters)" in text
    assert f"({report.before.parameters:,} to {report.after.parameters:,} parameters)" in text
    removed = 1 - (1 - once.sparsity) * (1 - report.sparsity)
    parameters = 1 - report.after.parameters / once.before.parameters
    assert (
        f"In total {removed:.2%} of the prunable FLOPs and {parameters:.2%} of the parameters are removed"
        in text
    )
    assert PruningReport.from_json(report.to_json()) == report


def test_a_second_cut_knows_the_first(tmp_path: Path) -> None:
    """Of the same pruner, of another one in memory, and of what was saved and loaded in between."""
    dense = shallow()
    dense.save_pretrained(tmp_path / "dense")
    pruner = make(str(tmp_path / "dense"))
    once = pruner.prune()
    assert once.lineage == []
    assert "The dense model" not in once.to_markdown()
    pruner.save_model(str(tmp_path / "once"))
    check(make(str(tmp_path / "once"), sparsity=0.3).plan(), once)
    second = make(str(tmp_path / "once"), sparsity=0.3)
    twice = second.prune()
    check(twice, once)
    second.save_model(str(tmp_path / "twice"))
    card = (tmp_path / "twice" / "README.md").read_text()
    assert "The dense model is dense (BertForSequenceClassification): 2 cuts: " in card
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    assert [cut["sparsity"] for cut in earlier_cuts(again)] == [once.sparsity, twice.sparsity]
    assert str(tmp_path) not in json.dumps(again.config.kprune)
    again.save_pretrained(tmp_path / "saved by itself")
    assert earlier_cuts(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved by itself")
    ) == earlier_cuts(again)
    assert "2 cuts: " in model_card(again, None)
    pruner.args = replace(ARGUMENTS, sparsity=0.3)
    check(pruner.prune(), once)


def test_a_stock_checkpoint_is_known_by_the_report_beside_it(tmp_path: Path) -> None:
    shallow().save_pretrained(tmp_path / "dense")
    pruner = make(str(tmp_path / "dense"), sparsity=0.2, prune_heads=False, uniform=True)
    once = pruner.prune()
    pruner.save_model(str(tmp_path / "once"))
    assert "kprune" not in json.loads((tmp_path / "once" / "config.json").read_text())
    card = (tmp_path / "once" / "README.md").read_text()
    assert "- pruned" in card
    assert ", pruned" in card
    check(make(str(tmp_path / "once"), sparsity=0.3).prune(), once)
    larger = shallow(intermediate_size=20)
    larger.config.name_or_path = str(tmp_path / "once")
    assert earlier_cuts(larger) == []  # it is not the model of that report
    (tmp_path / "once" / "kprune_report.json").write_text('{"of": "somebody else"}')
    assert make(str(tmp_path / "once"), sparsity=0.3).prune().lineage == []


def test_a_cut_without_a_record_is_said_to_be_one() -> None:
    model = pruned()
    report = make(model, sparsity=0.2).prune()
    assert report.lineage == [{}]
    assert "2 cuts: a cut of which no record is left; then " in report.to_markdown()
    assert "The dense model is" not in report.to_markdown()
    assert "pruned before, by a run of which no record is left" in model_card(pruned(), None)


def test_the_card_of_a_dense_model_does_not_call_it_pruned(tmp_path: Path) -> None:
    """Also where a run found nothing to cut."""
    pruner = make(shallow())
    pruner.save_model(str(tmp_path / "1"))
    pruner.args = replace(ARGUMENTS, sparsity=None, target_params=1e12)
    with pytest.warns(UserWarning, match="nothing"):
        pruner.prune()
    pruner.save_model(str(tmp_path / "2"))
    for folder in ("1", "2"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "# BertForSequenceClassification\n" in card
        assert not re.search("pruned", card, re.IGNORECASE), card


def test_there_is_nothing_to_convert_in_a_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow().save_pretrained(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "new")]) == 2
    output = capsys.readouterr()
    assert "has all heads and neurons that its config says: there is nothing in it to convert" in output.err
    assert "The pruned model is in" not in output.out
    assert not (tmp_path / "new").exists()
