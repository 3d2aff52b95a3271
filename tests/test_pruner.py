"""`KPrunePruner` on tiny models: it did what it reports, its options hold, bad input leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import torch
from checks import kept, logits, state, unchanged
from data import collate, rows
from models import shallow, slow_unless_in
from transformers import (
    BertForSequenceClassification,
    BertTokenizer,
    MambaConfig,
    MambaModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils
from transformers.quantizers import HfQuantizer

from hf_kprune import (
    ArgumentError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    KPruneArguments,
    KPruneCallback,
    KPruneError,
    KPrunePruner,
    PruningReport,
    UnsupportedArchitectureError,
    UnsupportedModelError,
)
from hf_kprune.budgets import budget_of
from hf_kprune.callbacks import PrinterCallback, ProgressCallback, ReportingCallback
from hf_kprune.cli.commands import save
from hf_kprune.entries import Size
from hf_kprune.methods.search import threshold_search
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut


LAYERS, HEADS, NEURONS, WIDTH, HEAD_SIZE = 2, 4, 12, 16, 4


LENGTHS = {"encoder.layer": 7.3}


def make_pruner(model: Any, data: Any = None, **options: Any) -> KPrunePruner:
    """A pruner; options that are not in `KPruneArguments` go to `KPrunePruner`."""
    names = {field.name for field in dataclasses.fields(KPruneArguments)}
    more = {key: value for key, value in options.items() if key not in names}
    args = KPruneArguments(**{"disable_tqdm": True, **{k: v for k, v in options.items() if k in names}})
    more.setdefault("data_collator", collate)
    return KPrunePruner(model, args, rows() if data is None else data, **more)


def prune(model: Any, data: Any = None, **options: Any) -> PruningReport:
    return make_pruner(model, data, **options).prune()


def unit_costs(report: PruningReport) -> dict[str, float]:
    """FLOPs of a head and of a neuron by the formulas of the paper."""
    s = report.sequence_length
    return {"attention": 8 * s * WIDTH * HEAD_SIZE + 4 * s**2 * HEAD_SIZE, "ffn": 4 * s * WIDTH}


def cost(report: PruningReport) -> float:
    """FLOPs of what is kept."""
    return sum(unit_costs(report)[s.kind] * len(s.kept) for s in report.sublayers)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def test_report_survives_json_and_its_markdown_tells_asked_and_achieved() -> None:
    report = prune(shallow(), sparsity=0.6, method="magnitude")
    assert PruningReport.from_json(report.to_json()) == report
    assert f"{report.sparsity:.2%} of the prunable FLOPs removed (60.00% asked)" in str(report)
    for s in report.sublayers:
        assert f"| {s.name} | {len(s.kept)} | {s.units} |" in str(report)


@pytest.mark.parametrize("model_type", slow_unless_in(("bert", "mpnet"), ("bert", "distilbert", "mpnet")))
def test_kept_indices_are_the_rows_kept(model_type: str) -> None:
    """Without tuning, every surviving weight is one of the dense model's, at the reported place."""
    dense, pruned = shallow(model_type), shallow(model_type)
    report = prune(pruned, sparsity=0.5, tune=False)
    paths = {
        "bert": ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"),
        "distilbert": ("attention.q_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
        "mpnet": ("attention.attn.q", "attention.attn.o", "intermediate.dense", "output.dense"),
    }[model_type]
    for s in report.sublayers:
        layer = s.name.rpartition(".")[0]
        reads, writes = paths[:2] if s.kind == "attention" else paths[2:]
        width = HEAD_SIZE if s.kind == "attention" else 1
        index = [unit * width + i for unit in s.kept for i in range(width)]
        if not s.kept:
            continue
        old, new = (m.base_model.get_submodule(f"{layer}.{reads}") for m in (dense, pruned))
        assert torch.equal(new.weight, old.weight[index])
        assert torch.equal(new.bias, old.bias[index])
        old, new = (m.base_model.get_submodule(f"{layer}.{writes}") for m in (dense, pruned))
        assert torch.equal(new.weight, old.weight[:, index])
        assert torch.equal(new.bias, old.bias)
    assert any(0 < len(s.kept) < s.units for s in report.sublayers)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_sizes_are_what_can_be_counted(dtype: torch.dtype, size: int) -> None:
    model = shallow().to(dtype)
    report = prune(model, sparsity=0.6)
    tables = 60 * WIDTH + 40 * WIDTH + 2 * WIDTH  # words, positions, segments
    per_head = 3 * (HEAD_SIZE * WIDTH + HEAD_SIZE) + HEAD_SIZE * WIDTH
    gone = {"attention": per_head, "ffn": WIDTH + 1 + WIDTH}
    removed = sum(gone[s.kind] * (s.units - len(s.kept)) for s in report.sublayers)
    assert report.after.parameters == sum(p.numel() for p in model.parameters())
    assert report.before.parameters - report.after.parameters == removed > 0
    for sizes in (report.before, report.after):
        assert sizes.parameters - sizes.parameters_without_embeddings == tables
        assert sizes.bytes == size * sizes.parameters
        assert sizes.bytes_without_embeddings == size * sizes.parameters_without_embeddings
    costs = unit_costs(report)
    assert report.before.flops == pytest.approx(
        LAYERS * (HEADS * costs["attention"] + NEURONS * costs["ffn"])
    )
    assert report.after.flops == pytest.approx(cost(report))
    assert report.sublayers[-1].flops_left == pytest.approx(report.after.flops)
    assert report.sparsity == pytest.approx(1 - report.after.flops / report.before.flops)


def test_tied_weights_count_once() -> None:
    model = shallow(head="MASKED_LM")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    storages = {p.data_ptr(): p.numel() for _, p in model.named_parameters(remove_duplicate=False)}
    assert prune(model, sparsity=0.3, method="magnitude").before.parameters == sum(storages.values())


def test_fingerprint_tells_the_data_and_the_seed() -> None:
    data = rows(24)
    tokens = sum(len(row["input_ids"]) for row in data)
    first = make_pruner(shallow(), data).plan().calibration
    assert (first["rows"], first["tokens"], first["seed"], first["dataset"]) == (24, tokens, 42, "list")
    assert make_pruner(shallow(seed=1), data).plan().calibration == first
    other = make_pruner(shallow(), data, seed=7).plan().calibration
    assert {**other, "sha256": "", "seed": 42} == {**first, "sha256": ""}
    assert other["sha256"] != first["sha256"]
    assert make_pruner(shallow(), rows(24, seed=1)).plan().calibration["sha256"] != first["sha256"]
    few = (
        make_pruner(shallow(), data, num_tokens=50, num_measure_tokens=20, method="kprune").plan().calibration
    )
    assert 50 <= few["tokens"] < 50 + 12
    assert 0 < few["rows_measured"] < few["rows"] < 24


@pytest.mark.slow
def test_labels_in_the_calibration_data_are_ignored() -> None:
    def with_labels(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**collate(batch), "labels": torch.tensor([row["label"] for row in batch])}

    plain, labelled, collated = (shallow() for _ in range(3))
    first = prune(plain, rows(), sparsity=0.6)
    wrong = [{**row, "label": i % 2} for i, row in enumerate(rows())]
    second = prune(labelled, wrong, sparsity=0.6)
    third = prune(collated, wrong, sparsity=0.6, data_collator=with_labels)
    assert first.calibration == second.calibration == third.calibration
    for model in (labelled, collated):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_all_kinds_of_datasets_are_the_same_rows() -> None:
    class MapStyle:
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> dict[str, Any]:
            return rows()[index]

    table = datasets.Dataset.from_list(rows())
    kinds = {
        "list": rows(),
        "map style": MapStyle(),
        "Dataset": table,
        "IterableDataset": table.to_iterable_dataset(),
    }
    # a stream is read in its own order, which K-prune, which holds no rows out, does not see
    plans = {
        kind: kept(make_pruner(shallow(), data, sparsity=0.6, method="kprune").plan())
        for kind, data in kinds.items()
    }
    for kind, plan in plans.items():
        assert plan == plans["list"], kind


# ---------------------------------------------------------------------------------------------------------------------
# As in Trainer
# ---------------------------------------------------------------------------------------------------------------------


class Recorder(KPruneCallback):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def on_prune_begin(self, args: Any, report: Any, **kwargs: Any) -> None:
        self.events.append(("on_prune_begin", ",".join(kwargs["sublayers"])))

    def on_sublayer_begin(self, args: Any, report: Any, name: str, **kwargs: Any) -> None:
        self.events.append(("on_sublayer_begin", name))

    def on_sublayer_end(self, args: Any, report: Any, sublayer: Any, **kwargs: Any) -> None:
        assert report.sublayers[-1] is sublayer
        assert isinstance(kwargs["model"], PreTrainedModel)
        self.events.append(("on_sublayer_end", sublayer.name))

    def on_prune_end(self, args: Any, report: Any, **kwargs: Any) -> None:
        self.events.append(("on_prune_end", str(len(report.sublayers))))

    def on_save(self, args: Any, report: Any, output_dir: str, **kwargs: Any) -> None:
        assert Path(output_dir, "config.json").exists()
        self.events.append(("on_save", output_dir))


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    pruner = make_pruner(shallow(), sparsity=0.6, method="magnitude", callbacks=[recorder])
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    names = [f"encoder.layer.{i}.{kind}" for i in range(LAYERS) for kind in ("attention", "ffn")]
    middle = [(event, name) for name in names for event in ("on_sublayer_begin", "on_sublayer_end")]
    last = [("on_prune_end", str(2 * LAYERS)), ("on_save", str(tmp_path / "out"))]
    assert recorder.events == [("on_prune_begin", ",".join(names)), *middle, *last]


def test_callbacks_are_added_as_instance_or_class_and_removed() -> None:
    pruner = make_pruner(shallow(), sparsity=0.6, callbacks=[Recorder])
    (added,) = [c for c in pruner.callback_handler.callbacks if isinstance(c, Recorder)]
    other = Recorder()
    pruner.add_callback(other)
    pruner.remove_callback(other)
    pruner.plan()
    assert added.events
    assert not other.events
    pruner.remove_callback(Recorder)
    pruner.remove_callback(PrinterCallback)
    assert pruner.callback_handler.callbacks == []


class Gauge(KPruneCallback):
    """Notes phases and fractions, and whether the run was ended."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.fractions: list[float] = []
        self.ends = 0

    def on_phase_begin(self, args: Any, report: Any, phase: str, **kwargs: Any) -> None:
        self.phases.append(phase)

    def on_progress(self, args: Any, report: Any, done: float, **kwargs: Any) -> None:
        self.fractions.append(done)

    def on_run_end(self, args: Any, report: Any, **kwargs: Any) -> None:
        self.ends += 1


@pytest.mark.parametrize("method", slow_unless_in(("surgeon",), ("surgeon", "kprune", "magnitude")))
def test_progress_moves_from_the_start_to_the_end_in_every_phase(method: str) -> None:
    gauge = Gauge()
    pruner = make_pruner(shallow(), sparsity=0.6, method=method, callbacks=[gauge], per_device_batch_size=8)
    for run, phases in (
        (pruner.plan, ["prepare", "measure", "search"]),
        (pruner.prune, ["prepare", "measure", "search", "tune"]),
    ):
        run()
        assert list(dict.fromkeys(gauge.phases)) == phases
        assert gauge.fractions == sorted(gauge.fractions)
        assert gauge.fractions[0] < 0.5
        assert gauge.fractions[-1] == pytest.approx(1, abs=1e-3)
        assert len(gauge.fractions) > LAYERS * 2
        assert gauge.ends == 1
        gauge.__init__()  # type: ignore[misc]


def test_a_sweep_is_one_run_and_a_failed_run_is_ended() -> None:
    gauge = Gauge()
    pruner = make_pruner(shallow(), method="magnitude", callbacks=[gauge])
    pruner.sweep([0.4, 0.6])
    assert gauge.ends == 1
    assert gauge.fractions == sorted(gauge.fractions)
    assert gauge.fractions[-1] == pytest.approx(1, abs=1e-3)
    with pytest.raises(CalibrationError):
        pruner.prune([])
    assert gauge.ends == 2


def test_without_a_terminal_there_is_a_line_per_phase(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pruner = make_pruner(shallow(), sparsity=0.6, disable_tqdm=False)
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"hf_kprune: {p}" for p in ("prepare", "measure", "search", "tune", "save")
    ]


def test_on_a_terminal_there_is_one_bar_with_its_phase_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_kprune.callbacks.shows_bars", lambda: True)
    pruner = make_pruner(shallow(), sparsity=0.6, method="flap", disable_tqdm=False)
    pruner.prune()
    written = capsys.readouterr().err
    first, last = written.split("\r")[1], written.rstrip().split("\r")[-1]
    assert "hf_kprune: prepare" in written
    assert " 0%|" in first
    assert "hf_kprune: tune     100%|" in last
    assert " left" in last
    (bar,) = [c for c in pruner.callback_handler.callbacks if isinstance(c, ProgressCallback)]
    assert bar.bar is None


def test_verbose_prints_a_line_per_sublayer_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (True, False):
        report = prune(shallow(), sparsity=0.6, method="magnitude", verbose=verbose)
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [str(s) for s in report.sublayers if verbose]
        assert captured.err == ""


def test_a_summary_has_ten_lines_at_most() -> None:
    report = prune(shallow(), sparsity=0.6, method="magnitude")
    lines = report.summary().splitlines()
    assert len(lines) <= 10
    assert lines[0] == report.title()
    assert f"{report.before.parameters:,} -> {report.after.parameters:,}" in report.summary()


def test_loads_and_saves_of_ours_say_nothing_and_leave_what_the_user_chose(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers.utils import logging

    shallow().save_pretrained(tmp_path / "dense")
    capfd.readouterr()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    pruner = KPrunePruner(
        str(tmp_path / "dense"), KPruneArguments(sparsity=0.5, disable_tqdm=True), rows(), collate
    )
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_report_to_sends_figures_to_an_integration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[tuple[str, int, dict[str, float]]] = []

    class Stub(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert args.run_name == "mine"
            events.append(("begin", state.global_step, {}))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            events.append(("log", state.global_step, logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append(("end", state.global_step, {}))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stub", Stub)
    report = prune(
        shallow(),
        sparsity=0.6,
        method="flap",
        report_to=["stub"],
        run_name="mine",
        output_dir=str(tmp_path / "out"),
    )
    assert [event for event, _, _ in events] == ["begin", *["log"] * (2 * LAYERS + 1), "end"]
    for (_, step, logs), (number, s) in zip(events[1:-2], enumerate(report.sublayers), strict=True):
        assert step == number + 1
        assert logs["prune/kept"] == len(s.kept) / s.units
        assert logs.get("prune/error_after") == s.error_after
    assert events[-2][2] == {"prune/sparsity": report.sparsity, "prune/parameters": report.after.parameters}

    with pytest.raises(
        ArgumentError, match="report_to is .*paper.* is not supported; expected any of .*tensorboard"
    ):
        make_pruner(shallow(), report_to=["paper"])
    with pytest.raises(
        ArgumentError, match="the package of one of them is not installed: install it, or leave it out"
    ):
        make_pruner(shallow(), report_to=["codecarbon"])


def test_a_tokenizer_that_cannot_be_saved_leaves_the_pruned_model_to_be_saved_without_it(
    tmp_path: Path,
) -> None:
    places: list[str] = []

    class Unsaved:
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def save_pretrained(self, directory: str) -> None:
            places.append(directory)
            raise NotImplementedError("not yet")

    pruner = make_pruner(shallow(), sparsity=0.6, method="magnitude")
    pruner.prune()
    pruner.processing_class = Unsaved()
    with pytest.raises(
        CheckpointError, match=r"Unsaved.* cannot be saved.*to None; the pruned model is unharmed in memory$"
    ):
        pruner.save_model(str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="to None$"):
        save(pruner, str(tmp_path / "out"))
    assert len(places) == 2, "the command line has tried places that cannot help"
    assert list(tmp_path.iterdir()) == []
    pruner.processing_class = None
    pruner.save_model(str(tmp_path / "out"))


def test_a_place_without_room_for_the_tokenizer_is_left_for_another_one(tmp_path: Path) -> None:
    places: list[str] = []

    class Saved:
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def save_pretrained(self, directory: str) -> None:
            places.append(directory)
            if len(places) == 1:
                raise OSError(28, "No space left on device")

    pruner = make_pruner(shallow(), sparsity=0.6, method="magnitude")
    pruner.prune()
    pruner.processing_class = Saved()
    with pytest.raises(ArgumentError, match="the pruned model was saved to .* instead"):
        save(pruner, str(tmp_path / "out"))
    assert len(places) == 2


def test_training_arguments_made_in_between_do_no_harm(tmp_path: Path) -> None:
    """They reset the state that all accelerators share."""
    pruner = make_pruner(shallow(), sparsity=0.6, method="magnitude")
    TrainingArguments(str(tmp_path), use_cpu=True)
    assert pruner.prune().sparsity >= 0.6


def test_evaluate_and_predict_are_those_of_trainer(tmp_path: Path) -> None:
    def with_labels(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**collate(batch), "labels": torch.tensor([row["labels"] for row in batch])}

    def share(prediction: Any) -> dict[str, float]:
        return {"share": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    labelled = [{**row, "labels": i % 2} for i, row in enumerate(rows(11, seed=3))]
    model = shallow()
    functions = {"data_collator": with_labels, "compute_metrics": share}
    calibration = [{**row, "labels": 0} for row in rows()]
    options: dict[str, Any] = {"method": "magnitude", "per_device_eval_batch_size": 4, **functions}
    pruner = make_pruner(model, calibration, eval_dataset=labelled, **options)
    timings = ("runtime", "second", "time")
    for _ in ("dense", "pruned"):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=4,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(copy.deepcopy(model), arguments, eval_dataset=labelled, **functions)

        def figures(metrics: dict[str, float]) -> dict[str, float]:
            return {
                key: value for key, value in metrics.items() if not key.endswith(timings) and key != "epoch"
            }

        expected = figures(trainer.evaluate())
        assert figures(pruner.evaluate()) == expected
        assert {"eval_loss", "eval_share"} <= expected.keys()
        assert figures(pruner.evaluate(labelled[:5])) == figures(trainer.evaluate(labelled[:5]))
        mine, theirs = pruner.predict(labelled), trainer.predict(labelled)
        assert (mine.predictions == theirs.predictions).all()
        assert (mine.label_ids == theirs.label_ids).all()
        assert figures(mine.metrics) == figures(theirs.metrics)
        if not pruner.report:
            pruner.prune()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", slow_unless_in((Path,), (str, Path)))
def test_model_may_be_a_path(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    """Loaded with its own class and tokenizer, which strings are tokenised with."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    tokenizer = BertTokenizer({word: i for i, word in enumerate(words)})
    model = shallow()
    model.save_pretrained(tmp_path)
    texts = [" ".join(f"w{(7 * i + j) % 55}" for j in range(3 + i % 6)) for i in range(20)]
    direct = make_pruner(
        model, texts, sparsity=0.6, method="flap", processing_class=tokenizer, data_collator=None
    )
    expected = direct.prune()

    pruner = make_pruner(kind(tmp_path), sparsity=0.6)
    assert pruner.processing_class is None  # the model was saved alone
    assert type(pruner.model) is BertForSequenceClassification
    tokenizer.save_pretrained(tmp_path)
    pruner = make_pruner(kind(tmp_path), texts, sparsity=0.6, method="flap", data_collator=None)
    assert kept(pruner.prune()) == kept(expected)
    assert torch.equal(logits(pruner.model), logits(model))
    pairs = list(zip(texts, reversed(texts), strict=True))
    report = make_pruner(kind(tmp_path), pairs, data_collator=None, max_seq_length=8).plan()
    assert report.calibration["tokens"] == sum(min(8, len(tokenizer(*pair)["input_ids"])) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_plan_foretells_prune_and_leaves_the_model() -> None:
    model = shallow().train()
    model.bert.embeddings.requires_grad_(False)
    pruner = make_pruner(model, sparsity=0.6)
    with unchanged(model):
        planned = pruner.plan()
    assert pruner.report is None
    pruned = pruner.prune()
    assert planned.before == pruned.before
    assert planned.asked == pruned.asked
    assert planned.sparsity >= 0.6
    assert planned.estimate
    assert not pruned.estimate


def test_report_of_prune_outlives_a_later_plan_and_a_later_failure(tmp_path: Path) -> None:
    pruner = make_pruner(shallow(), sparsity=0.4, method="magnitude")
    report = pruner.prune()
    pruner.plan()
    with pytest.raises(CalibrationError):
        pruner.prune([])
    pruner.add_callback(Interrupt("on_prune_begin"))
    with pytest.raises(KeyboardInterrupt):
        pruner.prune()
    assert pruner.report is report


@pytest.mark.parametrize("options", [{}, {"tune_bias": True}, {"ridge": 0.1}])
def test_sparsity_zero_is_the_dense_model(options: dict[str, Any]) -> None:
    model = shallow()
    expected = logits(model)
    with unchanged(model):
        report = prune(model, sparsity=0, **options)
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "kprune")
    assert report.sparsity == 0
    assert all(len(s.kept) == s.units for s in report.sublayers)


@pytest.mark.parametrize(
    "sparsity",
    slow_unless_in(
        (0.05, 0.37, 0.61, 0.97), (0.01, 0.05, 0.11, 0.23, 0.37, 0.5, 0.61, 0.74, 0.82, 0.9, 0.97, 0.999)
    ),
)
def test_budget_holds_and_is_used_up(sparsity: float) -> None:
    """What is left would not buy one more unit of the topmost sublayer that lost any; above it nothing was cut."""
    report = prune(shallow(), sparsity=sparsity, tune=False)
    left = (1 - sparsity) * report.before.flops - cost(report)
    assert left >= -1e-9 * report.before.flops
    topmost = [s for s in report.sublayers if len(s.kept) < s.units][-1]
    assert left < unit_costs(report)[topmost.kind]
    assert report.sparsity >= sparsity - 1e-9


def test_switches_spare_heads_or_neurons() -> None:
    for switch, kind in (("prune_heads", "attention"), ("prune_ffn", "ffn")):
        report = prune(shallow(), sparsity=0.2, method="magnitude", **{switch: False})
        for s in report.sublayers:
            assert s.kind != kind or len(s.kept) == s.units
        assert report.sparsity >= 0.2


@pytest.mark.parametrize(
    ("option", "kind", "least", "sparsity"),
    [("min_heads", "attention", 1, 0.8), ("min_neurons", "ffn", 2, 0.93)],
)
def test_minimum_is_kept(option: str, kind: str, least: int, sparsity: float) -> None:
    """At a sparsity at which some sublayer would keep less otherwise."""
    fewest = [
        min(
            len(s.kept)
            for s in prune(shallow(), sparsity=sparsity, method="kprune", **{option: n}).sublayers
            if s.kind == kind
        )
        for n in (0, least)
    ]
    assert fewest[0] < least <= fewest[1]


@pytest.mark.parametrize("multiple", slow_unless_in((5,), (4, 5)))
def test_widths_are_multiples(multiple: int) -> None:
    for sparsity in (0.3, 0.55, 0.8):
        report = prune(shallow(), sparsity=sparsity, round_to=multiple, tune=False)
        for s in report.sublayers:
            assert s.kind == "attention" or len(s.kept) % multiple == 0 or len(s.kept) == NEURONS
        assert report.sparsity >= sparsity - 1e-9


def test_infeasible_budget_is_refused_before_anything_runs() -> None:
    """The message tells what can be reached, and that can be asked for: as printed, and exactly."""
    model, options = shallow(), {"min_heads": 1, "prune_ffn": False}
    calls: list[Any] = []
    hooks = [m.register_forward_pre_hook(lambda *_: calls.append(0)) for m in model.modules()]
    recorder = Recorder()
    pruner = make_pruner(model, sparsity=0.9, callbacks=[recorder], **options)
    for run in (pruner.prune, pruner.plan):
        message = "sparsity is 0.9.*min_heads=1.*prune_ffn=False.*can reach 0 to 0"
        with unchanged(model), pytest.raises(BudgetError, match=message) as caught:
            run()
    assert not calls
    assert not recorder.events
    for hook in hooks:
        hook.remove()
    printed = float(re.findall(r"reach 0 to (\S+)", str(caught.value))[0])
    costs = unit_costs(make_pruner(model, sparsity=0).plan())
    exact = 1 - (costs["attention"] + NEURONS * costs["ffn"]) / (
        HEADS * costs["attention"] + NEURONS * costs["ffn"]
    )
    assert exact - 1e-4 < printed <= exact
    for sparsity in (printed, exact):
        report = make_pruner(model, sparsity=sparsity, **options).plan()
        assert [len(s.kept) for s in report.sublayers] == [1, NEURONS] * LAYERS
    with pytest.raises(BudgetError):
        make_pruner(model, sparsity=exact + 1e-6, **options).plan()


def residual(model: PreTrainedModel, data: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens: residual stream below the FFN of the only layer, and the FFN's output."""
    layer, tensors = model.base_model.encoder.layer[0], dict[str, torch.Tensor]()
    hooks = [
        layer.intermediate.dense.register_forward_hook(lambda _, args, __: tensors.update(x=args[0])),
        layer.output.dense.register_forward_hook(lambda _, __, output: tensors.update(y=output)),
    ]
    batch = collate(data)
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    valid = batch["attention_mask"].bool()
    return tensors["x"][valid].double(), tensors["y"][valid].double()


def test_tuning_lowers_the_reconstruction_error_by_what_it_reports() -> None:
    dense, untuned, tuned = (shallow(num_hidden_layers=1) for _ in range(3))
    off = prune(untuned, sparsity=0.15, prune_heads=False, tune=False)
    on = prune(tuned, sparsity=0.15, prune_heads=False)
    assert kept(off) == kept(on)
    assert off.sublayers[1].error_before is None
    x, y = residual(dense, rows())
    ratios = [(residual(m, rows())[1] - y).norm(dim=1) / (x + y).norm(dim=1) for m in (untuned, tuned)]
    errors = [float(ratio.square().mean().sqrt()) for ratio in ratios]
    reported = (on.sublayers[1].error_before, on.sublayers[1].error_after)
    assert errors == pytest.approx(reported, rel=1e-4)
    assert errors[1] < errors[0]


def test_tuned_bias_keeps_the_mean_of_an_emptied_sublayer() -> None:
    for tune_bias in (False, True):
        dense, pruned = shallow(num_hidden_layers=1), shallow(num_hidden_layers=1)
        report = make_pruner(pruned, sparsity=0, prune_heads=False).plan()
        costs = unit_costs(report)
        ffn = NEURONS * costs["ffn"] / report.before.flops
        prune(pruned, sparsity=ffn, prune_heads=False, tune_bias=tune_bias)
        bias = pruned.bert.encoder.layer[0].output.dense.bias
        assert pruned.bert.encoder.layer[0].output.dense.weight.shape == (WIDTH, 0)
        before = dense.bert.encoder.layer[0].output.dense.bias
        expected = residual(dense, rows())[1].mean(0).float() if tune_bias else before
        torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize("size", slow_unless_in((5,), (1, 5)))
def test_result_does_not_depend_on_batches(size: int) -> None:
    one, other = shallow(), shallow()
    first = prune(one, sparsity=0.6, per_device_batch_size=32, statistics_dtype="float64")
    second = prune(other, sparsity=0.6, per_device_batch_size=size, statistics_dtype="float64")
    assert kept(first) == kept(second)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    slow_unless_in((torch.bfloat16,), (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
)
def test_flags_and_dtype_of_the_model_are_kept(dtype: torch.dtype) -> None:
    model = shallow().to(dtype).train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].eval()
    if dtype in (torch.float16, torch.bfloat16):
        model.classifier.float()  # kept in float32, as some models do with some modules
    before = state(model)
    identity, dtypes = id(model), {name: p.dtype for name, p in model.named_parameters()}
    prune(model, sparsity=0.5)
    after = state(model)
    assert id(model) == identity
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtypes[name], name
    assert after["training"].items() <= before["training"].items()
    assert after["requires_grad"].items() <= before["requires_grad"].items()
    assert after["hooks"] == after["forwards"] == 0


def test_compute_loss_replaces_the_predictive_knowledge() -> None:
    calls = []

    def indifferent(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
        assert student.logits.shape == teacher.logits.shape
        calls.append(valid.shape)
        losses: torch.Tensor = 0 * student.logits.sum(-1)
        return losses

    options: dict[str, Any] = {"sparsity": 0.6, "method": "kprune"}
    assert make_pruner(shallow(), **options).plan().knowledge == "classification"
    report = make_pruner(shallow(), compute_loss=indifferent, **options).prune()
    assert calls
    assert report.knowledge == "custom"
    without = make_pruner(shallow(), method_kwargs={"lambda_pred": 0.0}, **options).prune()
    assert [s.scores for s in report.sublayers] == [s.scores for s in without.sublayers]
    ordinary = make_pruner(shallow(), **options).prune()
    assert [s.scores for s in report.sublayers] != [s.scores for s in ordinary.sublayers]

    def too_short(student: Any, teacher: Any, valid: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = student.logits.sum()
        return loss

    model = shallow()
    with (
        unchanged(model),
        pytest.raises(ArgumentError, match=r"loss gave \(\) for 12 samples, expected one number each"),
    ):
        prune(model, sparsity=0.6, method="kprune", compute_loss=too_short)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, each with its own error and an unchanged model
# ---------------------------------------------------------------------------------------------------------------------


class Interrupt(KPruneCallback):
    """Ctrl-C at one event."""

    def __init__(self, event: str) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        setattr(self, event, interrupt)


def with_row(**row: Any) -> list[dict[str, Any]]:
    return [*rows(), row]


BAD_DATA: dict[str, tuple[Any, dict[str, Any], type[KPruneError], str]] = {
    "none": (False, {}, ArgumentError, "no calibration_dataset: pass it"),
    "empty": ([], {}, CalibrationError, "the calibration dataset is empty"),
    "padding only": (
        [{"input_ids": [1, 1], "attention_mask": [0, 0]}],
        {},
        CalibrationError,
        "dataset is empty",
    ),
    "too small": (
        rows(1),
        {},
        CalibrationError,
        r"tokens \(in 1 rows\) are fewer than the 16 columns .* give more rows",
    ),
    "few tokens": (rows(), {"num_tokens": 8}, CalibrationError, r"raise num_tokens \(now 8\)"),
    "too long": (
        with_row(input_ids=[2] * 41),
        {},
        CalibrationError,
        "has 41 tokens, .* takes at most 40; .* max_length=40",
    ),
    "id too large": (
        with_row(input_ids=[2, 60]),
        {},
        CalibrationError,
        "token ids 2 to 60, the model's vocabulary has 60",
    ),
    "id negative": (with_row(input_ids=[-1, 5]), {}, CalibrationError, "token ids -1 to 5"),
    "texts only": (
        datasets.Dataset.from_dict({"text": ["a", "b"]}),
        {},
        CalibrationError,
        r"has the columns \['text'\], BertFor.* takes .*tokenise the texts",
    ),
    "surplus column": (
        [{**row, "odd": 1} for row in rows()],
        {"remove_unused_columns": False},
        CalibrationError,
        r"\['attention_mask', 'input_ids', 'odd'\].* drop the other columns or set remove_unused_columns=True",
    ),
    "no tokenizer": (["a text"] * 9, {}, ArgumentError, "holds texts: pass processing_class"),
    "no collator": (
        rows(),
        {"data_collator": None},
        ArgumentError,
        "nothing to pad them with; pass processing_class",
    ),
    "not texts": (
        [("a", "b", "c")],
        {"processing_class": BertTokenizer({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})},
        CalibrationError,
        "expected a string or a pair of strings",
    ),
    "collator": (
        rows(),
        {"data_collator": lambda batch: {**collate(batch), "texts": ["a"]}},
        CalibrationError,
        r"the data collator made \['texts'\], expected tensors",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_calibration_data(case: str) -> None:
    data, options, error, message = BAD_DATA[case]
    model = shallow().train()
    pruner = make_pruner(model, data or [], sparsity=0.5, **options)
    if data is False:
        pruner.calibration_dataset = None
    with unchanged(model), pytest.raises(error, match=message):
        pruner.prune()


def test_models_that_number_positions_from_padding_take_fewer() -> None:
    model = shallow("roberta")
    for length, fits in ((38, True), (39, False)):  # 40 - padding_idx - 1
        pruner = make_pruner(
            model, with_row(input_ids=[2] * length, attention_mask=[1] * length), sparsity=0.5
        )
        if fits:
            pruner.plan()
            continue
        with unchanged(model), pytest.raises(CalibrationError, match="has 39 tokens, .* takes at most 38"):
            pruner.prune()


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_out_of_range(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"sparsity is (-0.1|1.0|1.5|nan|inf), expected"):
        KPruneArguments(sparsity=value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("layer.1.attention.self.value.weight", "encoder.layer.1.attention"),
        ("layer.1.intermediate.dense.weight", "encoder.layer.1.ffn"),
        ("layer.0.attention.output.dense.weight", "encoder.layer.0"),
    ],
)
def test_activations_that_overflow_name_the_sublayer(path: str, name: str) -> None:
    model = shallow()
    model.base_model.encoder.get_parameter(path).data.fill_(3e38)
    with unchanged(model), pytest.raises(CalibrationError, match=f"NaN or Inf in the activations of {name}"):
        prune(model, sparsity=0.5)


def fake_bitsandbytes(model: PreTrainedModel) -> Any:
    model.is_quantized = True
    return model


def fake_quantizer(model: PreTrainedModel) -> Any:
    model.hf_quantizer = object()
    return model


def lora(model: PreTrainedModel) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def injected(model: PreTrainedModel) -> Any:
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    except ValueError as error:  # the newest transformers may ask for a peft that is not out yet
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model


def integers(model: PreTrainedModel) -> Any:
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    return model


def chunked(model: PreTrainedModel) -> Any:
    model.config.chunk_size_feed_forward = 2
    return model


def test_a_model_that_was_read_from_gguf_into_floats_is_an_ordinary_one(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Transformers notes it as quantised, and saves no such model."""
    model = shallow()
    remove = partial(HfQuantizer.remove_quantization_config, None)
    model.hf_quantizer = SimpleNamespace(remove_quantization_config=remove)
    model.config.quantization_config = SimpleNamespace(quant_method="gguf")
    model.is_quantized = True
    logger = logging.getLogger("hf_kprune")
    logger.addHandler(caplog.handler)
    try:
        pruner = KPrunePruner(
            model, KPruneArguments(sparsity=0.4, method="magnitude", disable_tqdm=True), rows(24), collate
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "was read from GGUF: its weights are plain floats" in caplog.text
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


BAD_MODELS: dict[str, tuple[Callable[[PreTrainedModel], Any], type[KPruneError], str]] = {
    "quantised": (fake_bitsandbytes, UnsupportedModelError, "is quantised; prune it in float32"),
    "quantiser": (fake_quantizer, UnsupportedModelError, "is quantised; prune it in float32"),
    "PEFT": (
        lora,
        UnsupportedModelError,
        r"PEFT adapters.* merge them first: model = model.merge_and_unload\(\)",
    ),
    "adapters": (injected, UnsupportedModelError, "PEFT adapters"),
    "integers": (
        integers,
        UnsupportedModelError,
        "layer.1.output.dense.weight is torch.int8, .* dtype=torch.float32",
    ),
    "chunked": (chunked, UnsupportedModelError, "chunk_size_feed_forward is 2"),
    "no transformers model": (
        lambda m: m.classifier,
        UnsupportedModelError,
        "is a Linear, expected a .*PreTrainedModel",
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_pruned(case: str) -> None:
    spoil, error, message = BAD_MODELS[case]
    model = spoil(shallow())
    holder = getattr(model, "base_model", shallow())
    tensors = {name: value.clone() for name, value in holder.state_dict().items()}
    with pytest.raises(error, match=message):
        make_pruner(model)
    assert all(torch.equal(value, tensors[name]) for name, value in holder.state_dict().items())


def test_models_spoilt_after_the_pruner_was_made_are_refused_too() -> None:
    pruner = make_pruner(shallow())
    injected(pruner.model)
    with unchanged(pruner.model), pytest.raises(UnsupportedModelError, match="PEFT adapters"):
        pruner.prune()


def test_unsupported_architecture_says_how_to_add_it() -> None:
    model = MambaModel(MambaConfig(num_hidden_layers=1, hidden_size=8, state_size=4, vocab_size=100))
    message = "(?s)no family describes model_type 'mamba'.*register_family"
    with unchanged(model), pytest.raises(UnsupportedArchitectureError, match=message):
        make_pruner(model)


def test_full_output_directory_is_refused_before_pruning(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    model, recorder = shallow(), Recorder()
    pruner = make_pruner(model, output_dir=str(tmp_path), callbacks=[recorder])
    with (
        unchanged(model),
        pytest.raises(ArgumentError, match="is not empty; name another or set overwrite_output_dir=True"),
    ):
        pruner.prune()
    assert not recorder.events
    with pytest.raises(ArgumentError, match="is a file, expected a directory"):
        pruner.save_model(str(tmp_path / "thesis.txt"))
    with pytest.raises(ArgumentError, match="no output_dir"):
        make_pruner(model).save_model()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "event", slow_unless_in(("on_sublayer_end",), ("on_prune_begin", "on_sublayer_begin", "on_sublayer_end"))
)
def test_ctrl_c_leaves_the_model(event: str) -> None:
    model = shallow().train()
    pruner = make_pruner(model, sparsity=0.6, method="flap", callbacks=[Interrupt(event)])
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        pruner.prune()
    assert pruner.report is None
    pruner.remove_callback(Interrupt)  # and the pruner can be used again
    assert kept(pruner.prune()) == kept(prune(shallow(), sparsity=0.6, method="flap"))


def test_an_error_in_the_middle_leaves_the_model() -> None:
    class Failing(KPruneCallback):
        def on_sublayer_end(self, args: Any, report: Any, sublayer: Any, **kwargs: Any) -> None:
            if sublayer.name == "encoder.layer.1.attention":
                raise RuntimeError("the disk is gone")

    model = shallow()
    with unchanged(model), pytest.raises(RuntimeError, match="the disk is gone"):
        prune(model, sparsity=0.6, method="flap", callbacks=[Failing()])


def test_a_sparsity_that_the_switches_reach_exactly_is_reached() -> None:
    """All of the FFN and none of the heads: what rounding leaves of the budget must not count as too little."""
    model = shallow("bert", hidden_size=64, intermediate_size=640)
    for neurons in (0, 3):
        terms = budget_of(
            find_sublayers(model), KPruneArguments(sparsity=0.0, prune_heads=False), LENGTHS, Size()
        )
        ffn = sum(
            c * (s.num_units - neurons)
            for c, s in zip(terms.costs, terms.sublayers, strict=True)
            if s.kind == "ffn"
        )
        args = KPruneArguments(sparsity=ffn / terms.total, prune_heads=False, min_neurons=neurons, tune=False)
        reached = budget_of(find_sublayers(copy.deepcopy(model)), args, LENGTHS, Size())
        for i in range(len(reached.costs)):
            left = reached.remaining(i)
            scores = [torch.rand(s.num_units) for s in reached.sublayers[i:]]
            keep = threshold_search(
                scores, reached.costs[i:], left, reached.minimum[i:], reached.multiple[i:]
            )[0]
            assert int(keep.sum()) == reached.minimum[i]
            cut(reached.sublayers[i], keep)


def test_plan_writes_nothing_and_reports_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[str] = []

    class Listening(ReportingCallback):
        def __init__(self) -> None:
            self.integrations = []

        def _tell(self, event: str, **kwargs: Any) -> None:
            events.append(event)

    options: dict[str, Any] = {"sparsity": 0.5, "disable_tqdm": True, "use_cpu": True}
    options["output_dir"] = str(tmp_path / "out")
    pruner = KPrunePruner(
        shallow(), KPruneArguments(**options), rows(20), data_collator=collate, callbacks=[Listening()]
    )
    pruner.plan()
    assert not events
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_pooler_cannot_be_pooled_by_it() -> None:
    args = KPruneArguments(pooling="pooler", disable_tqdm=True, use_cpu=True)
    pruner = KPrunePruner(shallow("distilbert", ""), args, rows(20), data_collator=collate)
    with pytest.raises(ArgumentError, match="pooling is 'pooler', which DistilBertModel lacks"):
        pruner.prune()


def test_a_model_that_returns_tuples_is_pruned_like_one_that_does_not() -> None:
    kept = []
    for return_dict in (True, False):
        args = KPruneArguments(sparsity=0.5, disable_tqdm=True, use_cpu=True)
        pruner = KPrunePruner(shallow(return_dict=return_dict), args, rows(20), data_collator=collate)
        kept.append([s.kept for s in pruner.prune().sublayers])
    assert kept[0] == kept[1]


def test_a_model_of_several_dtypes_is_saved(tmp_path: Path) -> None:
    model = shallow().to(torch.bfloat16)
    model.classifier.float()
    pruner = KPrunePruner(
        model,
        KPruneArguments(sparsity=0.5, method="flap", disable_tqdm=True, use_cpu=True),
        rows(20),
        data_collator=collate,
    )
    pruner.prune()
    pruner.save_model(str(tmp_path / "out"))
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.classifier.weight, pruner.model.classifier.weight)
