"""Recovery: what a pruned model learns from the dense one, and that it is never worse for it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data import Padding, calibration_rows, rows
from models import shallow
from zoo import ZOO, make

from hf_kprune import ArgumentError, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.cli.commands import DataArguments, RecoverArguments, ResumeArguments
from hf_kprune.cli.commands import prune as prune_command
from hf_kprune.distillation import LOST, STEP_BACK, Watch


def pruner_of(model: Any, sparsity: float = 0.6, count: int = 40, **options: Any) -> KPrunePruner:
    settings = {"method": "magnitude", "num_tokens": 10_000, "tune": False, "disable_tqdm": True}
    args = KPruneArguments(sparsity=sparsity, per_device_batch_size=8, **{**settings, **options})
    pad = {"input_ids": 1, "attention_mask": 0}

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {key: [torch.tensor(row[key]) for row in batch] for key in pad}
        return {
            key: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=pad[key])
            for key, column in columns.items()
        }

    return KPrunePruner(model, args, rows(count), collate)


def test_a_pruned_model_learns_from_the_dense_one_and_only_its_layers_change() -> None:
    dense = shallow()
    before = copy.deepcopy(dense.state_dict())
    pruner = pruner_of(dense)
    report = pruner.prune(inplace=False)
    assert id(pruner.dense_model) == id(dense)
    pruned = copy.deepcopy(pruner.model.state_dict())
    recovery = pruner.recover(minutes=5, max_steps=12, learning_rate=1e-2)
    assert recovery.steps == 12
    assert recovery.distance_after == min(distance for _, distance in recovery.looks if distance is not None)
    assert recovery.distance_after < 0.7 * recovery.distance_before
    assert report.recovery is recovery
    after = pruner.model.state_dict()
    changed = {name for name in pruned if not torch.equal(pruned[name], after[name])}
    assert changed
    assert all(name.startswith("bert.encoder.layer.") for name in changed)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not pruner.model.training
    assert all(p.requires_grad for p in pruner.model.parameters())
    assert PruningReport.from_json(report.to_json()) == report
    assert str(recovery) in report.summary()
    assert "Recovered afterwards" in str(report)


@pytest.mark.parametrize("rate", [100.0, 1e20])
def test_what_was_learnt_wrongly_is_left_out(rate: float) -> None:
    pruner = pruner_of(shallow(num_hidden_layers=1))
    pruner.prune(inplace=False)
    pruned = copy.deepcopy(pruner.model.state_dict())
    recovery = pruner.recover(minutes=5, max_steps=2, learning_rate=rate, per_device_train_batch_size=40)
    assert all(distance is None or distance > recovery.distance_before for _, distance in recovery.looks)
    assert any(distance is None for _, distance in recovery.looks) == (rate > 1e6)
    assert recovery.distance_after == recovery.distance_before
    assert all(torch.equal(pruned[name], value) for name, value in pruner.model.state_dict().items())


def test_a_student_that_is_lost_goes_back_and_learns_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = pruner_of(shallow(num_hidden_layers=1))
    pruner.prune(inplace=False)
    pruned, go_back = copy.deepcopy(pruner.model.state_dict()), Watch.go_back
    factors = []

    def watched(self: Watch, optimizer: torch.optim.Optimizer) -> None:
        assert (self.recovery.looks[-1][1] or 0) > LOST * self.recovery.distance_before
        go_back(self, optimizer)
        student = self.lesson.student.state_dict()
        assert all(torch.equal(student[name], value) for name, value in pruned.items())
        factors.append(self.factor)

    monkeypatch.setattr(Watch, "go_back", watched)
    pruner.recover(minutes=5, max_steps=3, learning_rate=1e6)
    assert factors == [STEP_BACK, STEP_BACK**2]


def test_the_dense_model_is_kept_loaded_again_or_asked_for(tmp_path: Path) -> None:
    shallow(num_hidden_layers=1).save_pretrained(tmp_path)
    pruner = pruner_of(str(tmp_path))
    pruner.prune()
    assert pruner.dense_model is None
    assert pruner.recover(minutes=5, max_steps=1).steps == 1
    pruner.source = None
    with pytest.raises(ArgumentError, match=r"prune\(inplace=False\), .* or pass dense_model"):
        pruner.recover()
    with pytest.raises(ArgumentError, match="the pruned one itself"):
        pruner.recover(dense_model=pruner.model)
    with pytest.raises(ArgumentError, match="of other layers than the pruned"):
        pruner.recover(dense_model=shallow())


def test_options_that_cannot_be_are_refused_before_anything_runs() -> None:
    pruner = pruner_of(shallow(num_hidden_layers=1))
    with pytest.raises(ArgumentError, match="minutes is 0, expected a number over 0"):
        pruner.recover(minutes=0)
    with pytest.raises(ArgumentError, match="no options learning, expected options of transformers.Training"):
        pruner.recover(learning=1.0)


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (2, "recovery runs in one process, and there are 2"),
        (1, "layers of BertForSequenceClassification wait"),
    ],
)
def test_the_command_line_refuses_what_cannot_recover_before_it_prunes(
    processes: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = pruner_of(shallow(num_hidden_layers=1))
    monkeypatch.setattr("hf_kprune.cli.commands.make_pruner", lambda *_: pruner)
    monkeypatch.setattr("hf_kprune.recovery.is_dispatched", lambda _: processes == 1)
    monkeypatch.setattr(type(pruner.accelerator), "num_processes", processes)
    monkeypatch.setattr(KPrunePruner, "prune", lambda *_, **__: pytest.fail("it has begun to prune"))
    data, args = (
        DataArguments("model", dataset_file="texts.txt"),
        KPruneArguments(output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ArgumentError, match=message):
        prune_command(data, args, ResumeArguments(), RecoverArguments(recover_minutes=1))


class Counter:
    """Counts the runs of a module, as callers may who watch a model."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self, *_: object) -> None:
        self.calls += 1


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_of_a_caller_call_its_own_object_after_pruning_and_recovery(inplace: bool) -> None:
    counter, model = Counter(), shallow(num_hidden_layers=1)
    model.bert.encoder.layer[0].register_forward_hook(counter.count)
    pruner = pruner_of(model)
    pruner.prune(inplace=inplace)
    for step in ("pruned", "recovered"):
        if step == "recovered":
            pruner.recover(1, dense_model=shallow(num_hidden_layers=1), max_steps=2)
        before = counter.calls
        pruner.model(input_ids=torch.tensor([[4, 5]]))
        assert counter.calls == before + 1


def test_half_precision_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with instructions for bfloat16, too, where nobody has asked for the CPU."""
    monkeypatch.setattr("hf_kprune.recovery.multiplies_bfloat16", lambda: True)
    pruner = pruner_of(shallow(num_hidden_layers=1).to(torch.bfloat16))
    pruner.prune(inplace=False)
    recovery = pruner.recover(minutes=5, max_steps=6, learning_rate=1e-2)
    assert recovery.distance_after < recovery.distance_before
    assert recovery.arguments["bf16"] == "True"
    assert {p.dtype for p in pruner.model.parameters()} == {torch.bfloat16}


def test_a_model_pruned_out_of_place_shares_nothing_with_the_dense_one() -> None:
    dense = shallow(num_hidden_layers=1)
    pruner = pruner_of(dense)
    pruner.prune(inplace=False)
    assert pruner.model is not dense
    memory = {p.data_ptr() for p in dense.parameters()}
    assert memory.isdisjoint(p.data_ptr() for p in pruner.model.parameters())
    in_place = pruner_of(copy.deepcopy(dense))
    in_place.prune()
    theirs = in_place.model.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in pruner.model.state_dict().items())


def test_figures_are_logged_and_saved_as_by_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruner = pruner_of(shallow(num_hidden_layers=1), output_dir=str(tmp_path / "out"))
    with pytest.raises(ArgumentError, match=r"expected a directory that is there: call save_model\(\)"):
        pruner.save_metrics("eval", {"eval_accuracy": 0.5})
    (tmp_path / "out").mkdir()
    pruner.save_metrics("eval", {"eval_accuracy": 0.5})
    pruner.save_metrics("test", {"test_accuracy": 0.25})
    pruner.log_metrics("eval", {"eval_accuracy": 0.5})
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == {"eval_accuracy": 0.5}
    both = {"eval_accuracy": 0.5, "test_accuracy": 0.25}
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == both
    assert "eval_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "rows_of_step"), [("llama", 2), ("bert", 4)])
def test_a_language_model_learns_from_few_long_rows_at_a_time(
    name: str, rows_of_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a step over a large vocabulary are in memory, and each token of a row teaches something."""
    model = make(name)
    data = calibration_rows(model, ZOO[name][2], 40)
    lengths = [len(row["input_ids"]) for row in data]
    monkeypatch.setattr("hf_kprune.recovery.LEAST_ROWS", 4)
    monkeypatch.setattr("hf_kprune.recovery.TOKENS_OF_STEP", 2 * sum(lengths) / len(lengths))
    args = KPruneArguments(sparsity=0.5, method="magnitude", disable_tqdm=True, use_cpu=True)
    pruner = KPrunePruner(model, args, data, processing_class=Padding())
    pruner.prune(inplace=False)
    recovery = pruner.recover(minutes=5, max_steps=1)
    assert recovery.arguments["per_device_train_batch_size"] == str(rows_of_step)


def test_what_a_run_with_gradients_has_left_in_a_model_is_no_obstacle() -> None:
    """Recurrent layers keep their last state, with the graph that it is of."""
    model = make("recurrent_gemma")
    pruner = KPrunePruner(
        model,
        KPruneArguments(sparsity=0.3, num_tokens=60, method="magnitude", tune=False, disable_tqdm=True),
        calibration_rows(model, ZOO["recurrent_gemma"][2]),
        processing_class=Padding(),
    )
    model(input_ids=torch.tensor([[4, 5, 6]]))
    states = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert any(not tensor.is_leaf for tensor in states)
    assert pruner.prune(inplace=False).sparsity >= 0.3
    pruner.model(input_ids=torch.tensor([[4, 5, 6]]))
    pruner.recover(1, max_steps=1)
