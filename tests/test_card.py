"""The model card: metadata carried over and given, figures, ways to load, and a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checks import assert_same, report
from data import rows, tokenizer
from huggingface_hub import ModelCard, ModelCardData
from models import pruned_layer, shallow

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, SublayerReport, compare
from hf_kprune.checkpoint.card import PICTURE, model_card, task_of


DENSE_CARD = """---
license: mit
language: en
tags: [sentiment, generated_from_trainer]
datasets: [glue, /home/jane/private]
base_model: google-bert/bert-base-uncased
model-index: [{name: dense, results: []}]
---
# A dense model
"""


def dense_folder(path: Path) -> Path:
    shallow().save_pretrained(path)
    (path / "README.md").write_text(DENSE_CARD)
    return path


def test_metadata_of_the_dense_model_are_carried_over(tmp_path: Path) -> None:
    model = pruned_layer()
    model.config._name_or_path = str(dense_folder(tmp_path / "dense"))
    metadata = ModelCard(model_card(model, report())).data.to_dict()
    assert metadata == {
        "license": "mit",
        "language": "en",
        "tags": ["hf_kprune", "pruned", "sentiment", "generated_from_trainer"],
        "datasets": ["glue"],
        "base_model": "google-bert/bert-base-uncased",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
    }
    mine: dict[str, Any] = {"license": "apache-2.0", "tags": ["mine"], "datasets": ["imdb"]}
    metadata = ModelCard(model_card(model, report(), license="cc0-1.0", metadata=mine)).data.to_dict()
    assert (metadata["license"], metadata["datasets"], metadata["language"]) == ("cc0-1.0", ["imdb"], "en")
    assert metadata["tags"] == ["hf_kprune", "pruned", "sentiment", "generated_from_trainer", "mine"]


def test_figures_are_in_the_index_of_models_and_in_the_table() -> None:
    done = report()
    done.metrics = {"before": {"accuracy": 0.9}, "after": {"accuracy": 0.875}}
    card = ModelCard(model_card(pruned_layer(), done))
    assert isinstance(card.data, ModelCardData)
    results = [
        (r.metric_type, r.metric_name, r.metric_value, r.task_type) for r in card.data.eval_results or []
    ]
    assert results == [
        ("accuracy", "accuracy before pruning", 0.9, "text-classification"),
        ("accuracy", "accuracy", 0.875, "text-classification"),
    ]
    assert "| accuracy | 0.9000 | 0.8750 |" in card.text


def test_every_way_to_load_that_is_shown_loads(tmp_path: Path) -> None:
    model = pruned_layer()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    codes = [part.split("```")[0] for part in model_card(model, None).split("```python\n")[1:]]
    assert len(codes) == 3
    for code in codes:
        names: dict[str, Any] = {"path": str(tmp_path)}
        exec(code, names)
        loaded = names["model"] if "model" in names else names["pipe"].model
        assert_same(loaded, model)
        assert "outputs" not in names or names["outputs"].logits.shape[0] == 1


def test_without_a_tokenizer_no_example_takes_one() -> None:
    card = model_card(pruned_layer(), None, processor=False)
    assert card.count("from_pretrained(path") == 2
    assert "Tokenizer" not in card
    assert "pipeline(" not in card


def test_the_task_follows_from_the_class() -> None:
    assert task_of(shallow()) == "text-classification"
    assert task_of(shallow().bert) == "feature-extraction"


def test_what_was_evaluated_is_in_report_and_card(tmp_path: Path) -> None:
    labelled = [{**row, "labels": i % 2} for i, row in enumerate(rows()[:4])]
    args = KPruneArguments(
        method="magnitude",
        tune=False,
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        disable_tqdm=True,
        card_metadata='{"license": "mit"}',
    )
    options: dict[str, Any] = {"processing_class": tokenizer(), "eval_dataset": labelled}
    pruner = KPrunePruner(shallow(), args, rows(), **options)
    before = pruner.evaluate()["eval_accuracy"]
    done = pruner.prune()
    assert done.metrics == {"before": done.metrics["before"]}
    after = pruner.evaluate()["eval_accuracy"]
    pruner.evaluate(labelled[:1])  # of other data: kept nowhere
    pruner.save_model()
    assert (done.metrics["before"]["accuracy"], done.metrics["after"]["accuracy"]) == (before, after)
    assert not any("second" in name or "time" in name for name in done.metrics["after"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "mit"
    assert after in [r.metric_value for r in card.data.eval_results or []]
    assert not (tmp_path / "out" / PICTURE).exists()


def test_the_card_shows_measured_times_and_no_paths(tmp_path: Path) -> None:
    dense, pruned = shallow(num_hidden_layers=1), pruned_layer()
    comparison = compare(dense, pruned, batch_sizes=[2], lengths=[5], rounds=2)
    comparison.names = ["/home/jane/dense", "/home/jane/pruned"]
    pruner = KPrunePruner(pruned, KPruneArguments(output_dir=str(tmp_path)))
    pruner.create_model_card(comparison=comparison)
    card = (tmp_path / "README.md").read_text()
    assert "## Beside the dense model" in card
    assert f"| 2 x 5 | {comparison.timings[0].flops[0] / 1e9:.4g} |" in card
    assert f" {comparison.timings[0].speedup:.2f}x |" in card
    assert "jane" not in card
    with pytest.raises(ArgumentError, match="comparison is a str, expected what hf_kprune.compare gives"):
        pruner.create_model_card(comparison="fast")


@pytest.mark.pictures
def test_the_card_shows_what_is_left_of_each_layer(tmp_path: Path) -> None:
    args = KPruneArguments(output_dir=str(tmp_path), use_cpu=True, html_report=True)
    pruner = KPrunePruner(pruned_layer(), args, processing_class=tokenizer())
    pruner.report = replace(report(), sublayers=[SublayerReport("bert.0.ffn", "ffn", 4, [0])])
    pruner.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"({PICTURE})" in (tmp_path / "out" / "README.md").read_text()
    assert "<svg" in (tmp_path / "out" / "kprune_report.html").read_text()


def test_metadata_that_are_no_dict_are_refused() -> None:
    with pytest.raises(ArgumentError, match="card_metadata is 'mit', expected a dict"):
        KPruneArguments(card_metadata="mit")
