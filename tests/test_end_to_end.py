"""KPrunePruner on models of every kind of input: budget met, errors lowered by tuning, saved == loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data import Padding, calibration_rows, collator_for
from models import cut_all, slow_unless_in
from zoo import COUNTED, DISTINCT, PACKED, ZOO, make, outputs_of

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.calibration.backward import backward, descend
from hf_kprune.calibration.batches import Calibration
from hf_kprune.calibration.knowledge import Knowledge
from hf_kprune.calibration.measure import measure_dense
from hf_kprune.run import Run
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.walk import Walk


WALKED = ["bert", "t5", "llama", "mixtral", "whisper", "vit", "clip"]
"""Measured by default in both ways: one for each kind of inputs."""


def boxes_and_classes(student: Any, teacher: Any, _: torch.Tensor) -> torch.Tensor:
    """The loss of a detector, which has none by its head, (B,)."""
    keys = ("logits", "pred_boxes")
    return torch.stack([(student[key] - teacher[key]).square().mean((1, 2)) for key in keys]).sum(0)


def as_a_whole(rows_: Calibration, walk: Walk, loss: Knowledge, points: Any) -> Any:
    """In place of `descend`: the graph of the whole model, for all sublayers together."""
    yield list(range(len(walk.sublayers))), backward(rows_, walk, loss, points)


@pytest.mark.parametrize(
    "name",
    slow_unless_in(
        WALKED,
        [
            *DISTINCT,
            "albert",
            "gemma3n_text",
            "gemma4_text:shared",
            *PACKED,
            "lfm3_vl",
            "qwen3_omni_moe_thinker",
            *(name for name in COUNTED if name != "llava"),
        ],
    ),
)
def test_measured_layer_by_layer_is_measured_as_a_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = make(name), ZOO[name][2]
    args = KPruneArguments(sparsity=0.3, num_tokens=60, tune=False, disable_tqdm=True, use_cpu=True)
    data, collator = calibration_rows(model, kind, 8), collator_for(name)
    pruner = KPrunePruner(model, args, data, collator, processing_class=Padding())
    sides = []
    with Run(pruner, None, [args]).open() as run:
        pruning = run.pruning
        teacher, rows_ = pruning.teacher.requires_grad_(False), pruning.calibration
        for each in (descend, as_a_whole):
            monkeypatch.setattr("hf_kprune.calibration.measure.descend", each)
            walk = rows_.walk(teacher, pruning.references)
            costs = [1.0] * len(walk.sublayers)
            sides.append(dict(measure_dense(rows_, walk, ("curvature", "fisher"), pruning.loss, costs)))
    layers, at_once = sides
    assert layers.keys() == at_once.keys()
    for position, one in layers.items():
        for field in ("energy", "feature_sum", "gram", "weighted_sum", "metric", "fisher", "absolute"):
            a, b = getattr(one, field), getattr(at_once[position], field)
            assert bool(b.any()) or field not in ("energy", "metric")
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bert", marks=pytest.mark.several_splits),
        *(
            pytest.param(
                name, marks=[pytest.mark.several_splits, pytest.mark.slow], id=f"{name} by several splits"
            )
            for name in ("t5", "gemma3n_text", "recurrent_gemma")
        ),
        *slow_unless_in(["t5", "llama", "vit"], [name for name in ZOO if name != WALKED[0]]),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:no knowledge loss is known",
    "ignore:.* has no head, so what is preserved",
    "ignore:the knowledge loss .* of RadioModel",
)
def test_prunes_end_to_end(name: str, tmp_path: Path) -> None:
    model, kind = make(name), ZOO[name][2]
    dense = outputs_of(model, kind)
    args = KPruneArguments(sparsity=0.3, num_tokens=150, disable_tqdm=True, use_cpu=True, seed=1)
    loss = {"yolos": boxes_and_classes}.get(name)
    data = calibration_rows(model, kind, 40)
    collator = collator_for(name)
    pruner = KPrunePruner(model, args, data, collator, processing_class=Padding(), compute_loss=loss)
    pruner.callback_handler.callbacks.clear()
    report = pruner.prune()
    assert 0.3 <= report.sparsity < 0.6
    assert report.after.parameters < report.before.parameters
    for entry in report.sublayers:
        if entry.error_before is not None:
            assert entry.error_after is not None
            # the fit is of all tokens together, what is reported is of each by itself
            assert entry.error_after <= 1.1 * entry.error_before + 1e-6, entry.name
    outputs = outputs_of(pruner.model, kind)
    assert torch.isfinite(outputs).all()
    assert (outputs - dense).abs().max() > 1e-6
    assert [len(entry.kept) for entry in report.sublayers] == [
        s.num_units for s in find_sublayers(pruner.model)
    ]
    pruner.save_model(str(tmp_path / "pruned"))
    again = type(model).from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(outputs_of(again, kind), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_unless_in(("bert",), ("llama", "clip", "bart", "qwen2_vl")))
def test_a_model_with_an_empty_attention_is_pruned_again(name: str) -> None:
    model, kind = make(name), ZOO[name][2]
    first = next(i for i, s in enumerate(find_sublayers(model)) if s.unit.has_heads)
    student = cut_all(model, [s.numbers >= (i == first) * 99 for i, s in enumerate(find_sublayers(model))])
    args = KPruneArguments(sparsity=0.3, num_tokens=100, disable_tqdm=True, use_cpu=True)
    data, collator = calibration_rows(model, kind), collator_for(name)
    report = KPrunePruner(student, args, data, collator, processing_class=Padding()).prune()
    assert 0.3 <= report.sparsity < 0.6
    assert report.sublayers[first].kept == []
