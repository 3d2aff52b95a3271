"""Runs that were interrupted go on and end as if they had not been: to the bit, with nothing done twice, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kill_while_pruning
import pytest
import torch
from checks import assert_same_state, files, unchanged
from data import collate, rows
from forks import printed_by
from models import slow_unless_in, tiny

from hf_kprune import (
    ArgumentError,
    CheckpointError,
    KPruneArguments,
    KPruneCallback,
    KPrunePruner,
    pruning,
)
from hf_kprune.report import PruningReport
from hf_kprune.resumption import States, states
from hf_kprune.run import Run
from hf_kprune.version import versions


def make_pruner(out: Path | None = None, seed: int = 0, data: Any = None, **options: Any) -> KPrunePruner:
    """On a model of four sublayers, with no more data than they need."""
    args = {"disable_tqdm": True, "use_cpu": True, "num_tokens": 100, **options}
    args |= {} if out is None else {"output_dir": str(out)}
    loss = args.pop("compute_loss", None)
    data, collator = rows(24) if data is None else data, args.pop("data_collator", collate)
    model = tiny(seed=seed, num_hidden_layers=2)
    return KPrunePruner(model, KPruneArguments(**args), data, collator, compute_loss=loss)


class Interrupt(KPruneCallback):
    """Ctrl-C at the n-th event of a kind: a phase by its name, or `sublayer`, which has ended."""

    def __init__(self, event: str, count: int = 1):
        self.event, self.left = event, count

    def note(self, event: str) -> None:
        self.left -= event == self.event
        if not self.left:
            raise KeyboardInterrupt

    def on_phase_begin(self, args: Any, report: Any, phase: str, **kwargs: Any) -> None:
        self.note(phase)

    def on_sublayer_begin(self, args: Any, report: Any, name: str, **kwargs: Any) -> None:
        self.note("begin")

    def on_sublayer_end(self, args: Any, report: Any, sublayer: Any, **kwargs: Any) -> None:
        self.note("sublayer")


def interrupt(pruner: KPrunePruner, resume: Any, event: str = "sublayer", count: int = 1) -> None:
    pruner.add_callback(Interrupt(event, count))
    with unchanged(pruner.model), pytest.raises(KeyboardInterrupt):
        pruner.prune(resume_from_checkpoint=resume)


def found(report: PruningReport) -> Any:
    """What a report says, without seconds."""
    entries = [replace(entry, seconds=0.0) for entry in report.sublayers]
    return entries, report.trials, report.after, report.sparsity, report.removed_at


def assert_same_run(one: KPrunePruner, other: KPrunePruner) -> None:
    assert one.report is not None
    assert other.report is not None
    assert found(one.report) == found(other.report)
    assert_same_state(one.model.state_dict(), other.model.state_dict())


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive parts of runs were done."""
    counter = Counter[str]()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            counter[name] += 1
            return result

        monkeypatch.setattr(module, name, call)

    counted(pruning, "measure_dense")
    counted(pruning, "choose")
    counted(sys.modules["hf_kprune.algorithm"], "tune")
    return counter


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted anywhere
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("surgeon", {}, marks=pytest.mark.several_splits),
        ("kprune", {"method_kwargs": {"measure_every": 4}}),
        pytest.param("kprune", {}, marks=pytest.mark.slow),
        pytest.param("flap", {}, marks=pytest.mark.slow),
        # which leaves a neuron and a half over, so that the numbers must not be searched again
        pytest.param(
            "kprune", {"uniform": True, "prune_heads": False, "sparsity": 0.08}, marks=pytest.mark.slow
        ),
        pytest.param("kwon", {}, marks=pytest.mark.slow),
        pytest.param("magnitude", {}, marks=pytest.mark.slow),
    ],
    ids=["surgeon", "kprune with a schedule", "kprune", "flap", "kprune and uniform", "kwon", "magnitude"],
)
def test_interrupted_at_every_step_a_run_ends_as_if_it_had_not_been(
    tmp_path: Path, counts: Counter[str], method: str, options: dict[str, Any]
) -> None:
    """One run that is interrupted after measuring, after choosing and then after every single sublayer."""
    options = {"method": method, "sparsity": 0.6, **options}
    at_once = make_pruner(**options)
    at_once.prune()
    expected = dict(counts)
    counts.clear()
    out = tmp_path / "out"
    if method != "kprune":
        interrupt(make_pruner(out, **options), True, "search")
        interrupt(make_pruner(out, **options), True, "begin")
    for _ in range(4):
        interrupt(make_pruner(out, **options), True)
    pruner = make_pruner(out, **options)
    pruner.prune(resume_from_checkpoint=True)
    assert_same_run(pruner, at_once)
    assert dict(+counts) == expected, "something was done twice"
    pruner.save_model()
    assert os.listdir(tmp_path) == ["out"]


def test_a_sublayer_that_was_not_finished_is_done_again(tmp_path: Path, counts: Counter[str]) -> None:
    options: dict[str, Any] = {"sparsity": 0.6, "method": "flap"}
    at_once = make_pruner(**options)
    at_once.prune()
    before = counts["tune"]
    interrupt(make_pruner(tmp_path / "out", **options), True, "begin", 3)
    pruner = make_pruner(tmp_path / "out", **options)
    pruner.prune(resume_from_checkpoint=True)
    assert_same_run(pruner, at_once)
    assert counts["tune"] == 2 * before


@pytest.mark.parametrize("dtype", slow_unless_in([torch.bfloat16], [torch.bfloat16, torch.float16]))
def test_a_model_in_half_precision_goes_on_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> KPrunePruner:
        pruner = make_pruner(tmp_path / "out", sparsity=0.6, method="flap")
        pruner.model.to(dtype)
        return pruner

    at_once = make()
    at_once.prune()
    interrupt(make(), True, count=3)
    pruner = make()
    pruner.prune(resume_from_checkpoint=True)
    assert_same_run(pruner, at_once)


def test_where_a_run_begins_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    for said, event in (
        ("nothing is done", "search"),
        ("units are measured", "sublayer"),
        ("1 ", "sublayer"),
    ):
        caplog.clear()
        interrupt(make_pruner(out, method="magnitude"), True, event)
        assert "states of this run are kept in" in caplog.text
        assert said in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Where states are, and what becomes of them
# ---------------------------------------------------------------------------------------------------------------------


def test_by_default_a_state_is_kept_once_a_run_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "out", dict[str, Any](method="flap", sparsity=0.6)
    interrupt(make_pruner(out, **options), None, count=3)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(states, "PATIENCE", 0.0)
    interrupt(make_pruner(out, **options), False, count=3)
    assert not os.listdir(tmp_path)
    interrupt(make_pruner(out, **options), None, count=3)
    (folder,) = os.listdir(tmp_path)
    assert folder.startswith(".out.")
    assert sorted(files(tmp_path / folder / "run")) == [
        "decided.safetensors",
        "facts.safetensors",
        *(f"sublayer-00{i}.safetensors" for i in range(3)),
    ]
    monkeypatch.setattr(states, "PATIENCE", 60.0)
    pruner, at_once = make_pruner(out, **options), make_pruner(**options)
    pruner.prune(resume_from_checkpoint=True)
    at_once.prune()
    assert_same_run(pruner, at_once)
    pruner.save_model()
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_not_gone_on_with_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is not to be resumed replaces a state of other options, and a save removes it, even in a minute."""
    out = tmp_path / "out"
    monkeypatch.setattr(states, "PATIENCE", 0.0)
    interrupt(make_pruner(out, method="flap"), True, count=3)
    interrupt(make_pruner(out, method="kprune"), None, count=1)
    (folder,) = os.listdir(tmp_path)
    kept = sorted(files(tmp_path / folder))
    assert kept == ["run/facts.safetensors", "run/sublayer-000.safetensors"]
    monkeypatch.setattr(states, "PATIENCE", 60.0)
    pruner = make_pruner(out, method="magnitude")
    pruner.prune()
    assert os.listdir(tmp_path) == [folder]
    pruner.save_model()
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_budget_on_the_same_data_measures_nothing(tmp_path: Path, counts: Counter[str]) -> None:
    states, both = tmp_path / "states", list[dict[str, Any]]()
    both += {"sparsity": 0.4}, {"target_flops": 5e4, "round_to": 2, "min_heads": 1}
    for number, options in enumerate(both):
        pruner, at_once = (make_pruner(method="flap", **options) for _ in range(2))
        at_once.prune()
        pruner.prune(resume_from_checkpoint=str(states))
        assert_same_run(pruner, at_once)
        pruner.save_model(str(tmp_path / str(number)))
        (measured,) = files(states)
        assert measured.startswith("kprune_states/measured-")
    assert counts["measure_dense"] == 2 + 1
    assert pruner.report is not None
    other_costs = make_pruner(method="flap", target_params=0.9 * pruner.report.before.parameters)
    other_costs.prune(resume_from_checkpoint=str(states))
    assert counts["measure_dense"] == 4


def test_a_finished_run_that_was_not_saved_goes_on_and_is_in_no_way(
    tmp_path: Path, counts: Counter[str]
) -> None:
    first, again, other = (make_pruner(method="flap", sparsity=sparsity) for sparsity in (0.5, 0.5, 0.6))
    first.prune(resume_from_checkpoint=str(tmp_path))
    tuned = counts["tune"]
    again.prune(resume_from_checkpoint=str(tmp_path))
    assert_same_run(again, first)
    assert counts["tune"] == tuned > 0
    other.prune(resume_from_checkpoint=str(tmp_path))
    assert counts["tune"] > tuned
    assert counts["measure_dense"] == 1
    other.save_model(str(tmp_path / "out"))
    assert [name.split("-")[0] for name in files(tmp_path / "kprune_states")] == ["measured"]


def test_files_of_others_stay(tmp_path: Path, interrupted: Path) -> None:
    states = shutil.copytree(interrupted, tmp_path / "states")
    foreign = [
        "kprune_states/run/notes.txt",
        "kprune_states/sublayer-0.safetensors",
        "lock",
        "facts.safetensors",
    ]
    for name in foreign:
        (states / name).write_text("precious")
    pruner = make_pruner(method="flap")
    pruner.prune(resume_from_checkpoint=str(states))
    pruner.save_model(str(tmp_path / "out"))
    left = files(states)
    assert {name: left.pop(name) for name in foreign} == dict.fromkeys(foreign, b"precious")
    assert [name.split("-")[0] for name in left] == ["kprune_states/measured"]


def test_a_model_that_is_pruned_again_has_no_state_of_its_first_run(tmp_path: Path) -> None:
    pruner = make_pruner(tmp_path / "out", method="flap", sparsity=0.3)
    pruner.prune(resume_from_checkpoint=True)
    pruner.args.sparsity = 0.5
    report = pruner.prune(resume_from_checkpoint=True)
    assert len(report.lineage) == 1
    pruner.save_model(str(tmp_path / "elsewhere"))
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_a_disk_that_fills_ends_the_keeping_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writes, save = [], states.save

    def fill(path: Path, *rest: Any) -> None:
        writes.append(path)
        if len(writes) > 3:
            raise OSError(28, "No space left on device")
        save(path, *rest)

    monkeypatch.setattr(states, "save", fill)
    pruner, at_once = make_pruner(tmp_path / "out", method="flap"), make_pruner(method="flap")
    pruner.prune(resume_from_checkpoint=True)
    at_once.prune()
    assert_same_run(pruner, at_once)
    assert "no more states of this run are kept: No space left on device" in caplog.text
    assert len(writes) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def other_loss(student: Any, teacher: Any, valid: Any) -> Any:
    return (student.logits - teacher.logits).square().mean(1)


def short(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: tensor[:, :3] for name, tensor in collate(batch).items()}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": 0.6}, r"sparsity is 0\.6 and was 0\.5 then\."),
    "method": ({"method": "magnitude"}, "method is 'magnitude' and was 'flap' then"),
    "two options": (
        {"tune": False, "round_to": 2},
        "round_to is 2 and was 1 then; tune is False and was True then",
    ),
    "weights": ({"seed_of_model": 1}, r"the weights of the model differ\."),
    "data": ({"data": rows(24, seed=3)}, r"the calibration rows differ\."),
    "loss": ({"compute_loss": other_loss}, "compute_loss is 'other_loss' and was None then"),
    "collator": ({"data_collator": short}, "data_collator is 'short' and was 'collate' then"),
    "version": ({"torch": "9.9"}, r"torch is '9\.9' and was '.*' then\."),
    "processes": ({"processes": 2}, "number of processes is 2 and was 1 then"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of states."""
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt(make_pruner(method="flap"), folder, count=2)
    return folder


@pytest.mark.parametrize("which", OTHERS)
def test_a_state_of_something_else_is_refused_with_the_difference(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    options, message = dict(OTHERS[which][0]), OTHERS[which][1]
    before = files(interrupted)
    if version := options.pop("torch", None):
        used = {**versions(), "torch": version}
        monkeypatch.setattr("hf_kprune.prospect.versions", lambda: used)
    if processes := options.pop("processes", None):
        facts = Run.facts
        monkeypatch.setattr(Run, "facts", lambda *args: {**facts(*args), "number of processes": processes})
    seed = options.pop("seed_of_model", 0)
    pruner = make_pruner(None, seed, **{"method": "flap", **options})
    with unchanged(pruner.model), pytest.raises(ArgumentError, match=message) as caught:
        pruner.prune(resume_from_checkpoint=str(interrupted))
    assert "is of another run; " in str(caught.value)
    assert str(caught.value).endswith("or begin anew without resume_from_checkpoint")
    assert files(interrupted) == before


def test_measurements_of_something_else_are_refused_too(tmp_path: Path) -> None:
    pruner = make_pruner(method="flap")
    pruner.prune(resume_from_checkpoint=str(tmp_path))
    pruner.save_model(str(tmp_path / "out"))
    other = make_pruner(method="flap", sparsity=0.6, data=rows(24, seed=3))
    with pytest.raises(ArgumentError, match=r"is of another run; the calibration rows differ\."):
        other.prune(resume_from_checkpoint=str(tmp_path))
    deciding = make_pruner(method="kprune")  # which takes no such measurements
    deciding.prune(resume_from_checkpoint=str(tmp_path))


PLACES: list[tuple[Any, str | None, str]] = [
    (True, None, "resume_from_checkpoint is True, but there is no output_dir that a state would belong to"),
    ("out/states", "out", "resume_from_checkpoint is '.*out/states', which lies in output_dir"),
    ("out", "out", "which lies in output_dir"),
    (" ", "out", "resume_from_checkpoint is ' ', expected the name of a directory"),
    (3, "out", "resume_from_checkpoint is 3, expected True or False or a string or None: True for the state"),
    ("file/states", "out", "states cannot be kept in '.*file/states/kprune_states', Not a directory; pass"),
]


@pytest.mark.parametrize(("resume", "out", "message"), PLACES)
def test_places_that_no_state_can_be_in_are_refused(
    tmp_path: Path, resume: Any, out: str | None, message: str
) -> None:
    (tmp_path / "file").touch()
    pruner = make_pruner(None if out is None else tmp_path / out, method="magnitude")
    if isinstance(resume, str) and resume.strip():
        resume = str(tmp_path / resume)
    with unchanged(pruner.model), pytest.raises(ArgumentError, match=message):
        pruner.prune(resume_from_checkpoint=resume)
    assert os.listdir(tmp_path) == ["file"]


def test_two_processes_do_not_keep_states_in_one_place(tmp_path: Path) -> None:
    pruner = make_pruner(method="magnitude")
    states = States(tmp_path / "kprune_states", True, True, pruner.accelerator)
    with states, pytest.raises(CheckpointError, match=r"kprune_states' is being written by another process"):
        pruner.prune(resume_from_checkpoint=str(tmp_path))
    pruner.prune(resume_from_checkpoint=str(tmp_path))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [cut_short, lambda path: path.write_text("{}")], ids=["short", "other"])
def test_a_damaged_state_is_refused_by_name(
    interrupted: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "kprune_states/run/sublayer-000.safetensors")
    with pytest.raises(
        CheckpointError, match=r"sublayer-000.safetensors' is not what this program wrote .*delete"
    ):
        make_pruner(method="flap").prune(resume_from_checkpoint=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sparsities that models were made for. No model is timed."""
    monkeypatch.setattr("hf_kprune.sweeper.compare", lambda *_: [1.0, 1.0])
    sparsities, student = list[float](), Run.student

    def noting(self: Run, args: KPruneArguments, *rest: Any) -> Any:
        sparsities.append(float(args.sparsity or 0))
        return student(self, args, *rest)

    monkeypatch.setattr(Run, "student", noting)
    return sparsities


def sweep(pruner: KPrunePruner, resume: Any, **options: Any) -> list[tuple[Any, ...]]:
    points = pruner.sweep([0.3, 0.6], resume_from_checkpoint=resume, **options).points
    return [(p.asked, p.sparsity, p.parameters, p.distance, p.path) for p in points]


@pytest.mark.parametrize("method", slow_unless_in(["magnitude"], ["magnitude", "kprune"]))
def test_a_sweep_goes_on_after_its_finished_budgets(
    tmp_path: Path, counts: Counter[str], students: list[float], method: str
) -> None:
    out, options = tmp_path / "swept", dict[str, Any](method=method)
    at_once = sweep(make_pruner(**options), None, output_dir=str(out))
    expected = {path: data for path, data in files(out).items() if path.endswith("model.safetensors")}
    out.rename(tmp_path / "other")
    measured = counts["measure_dense"]
    pruner = make_pruner(**options)
    pruner.add_callback(Interrupt("sublayer", 4 + 3))
    with pytest.raises(KeyboardInterrupt):
        sweep(pruner, True, output_dir=str(out))
    students.clear()
    resumed = sweep(make_pruner(**options), True, output_dir=str(out))
    assert students == [0.6]
    assert resumed == at_once
    assert counts["measure_dense"] == 2 * measured
    assert {p: data for p, data in files(out).items() if p.endswith("model.safetensors")} == expected
    assert sorted(os.listdir(tmp_path)) == ["other", "swept"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.slow
def test_a_model_that_was_saved_when_its_sweep_was_killed_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, students: list[float]
) -> None:
    """Between a save and the note that a budget is done."""
    out, states = str(tmp_path / "swept"), tmp_path / "states"
    at_once = sweep(make_pruner(method="magnitude"), None, output_dir=out)
    os.rename(out, tmp_path / "other")
    with monkeypatch.context() as patch:

        def kill(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("hf_kprune.sweeper.tell_of_the_save", kill)
        with pytest.raises(KeyboardInterrupt):
            sweep(make_pruner(method="magnitude"), states, output_dir=out)
    assert os.listdir(out) == ["sparsity-0.3"]
    assert sweep(make_pruner(method="magnitude"), states, output_dir=out) == at_once
    assert [name.split("-")[0] for name in files(states)] == ["kprune_states/measured"]


@pytest.mark.slow
def test_the_best_of_a_sweep_that_goes_on_is_the_best(
    tmp_path: Path, students: list[float], counts: Counter[str]
) -> None:
    out, options = tmp_path / "out", dict[str, Any](method="flap")
    drop: dict[str, Any] = {"max_drop": 1.0, "refine": 1}
    at_once = make_pruner(**options)
    table = at_once.sweep([0.3, 0.6, 0.8], **drop)
    assert table.best
    interrupted = make_pruner(out, **options)
    interrupted.add_callback(Interrupt("sublayer", 4 + 4 + 4 - 1))
    with pytest.raises(KeyboardInterrupt):
        interrupted.sweep([0.3, 0.6, 0.8], resume_from_checkpoint=True, **drop)
    pruner, tuned = make_pruner(out, **options), counts["tune"]
    again = pruner.sweep([0.3, 0.6, 0.8], resume_from_checkpoint=True, **drop)
    assert [p.distance for p in again.points] == [p.distance for p in table.points]
    assert again.best == table.best
    assert_same_run(pruner, at_once)
    assert counts["tune"] - tuned <= 1 + 3 * (len(table.points) - 4)
    pruner.save_model()
    assert os.listdir(tmp_path) == ["out"]


def test_a_sweep_leaves_the_state_of_another_run(
    tmp_path: Path, students: list[float], interrupted: Path
) -> None:
    """In a directory that both name, and beside the output_dir of the options, to which a sweep saves nothing."""
    states, out = shutil.copytree(interrupted, tmp_path / "states"), tmp_path / "out"
    interrupt(make_pruner(out, method="flap"), True)
    before = {name: data for name, data in files(tmp_path).items() if "/run/" in name}
    assert len({name.split("/")[0] for name in before}) == 2
    sweep(make_pruner(out, method="flap", num_tokens=100), None)
    pruner = make_pruner(out, method="flap")
    pruner.eval_dataset = rows(2)  # nothing is held out then, as in the other run
    pruner.evaluate = lambda *_: {}  # type: ignore[method-assign]
    sweep(pruner, states)
    assert {name: data for name, data in files(tmp_path).items() if "/run/" in name} == before


def test_a_sweep_judged_otherwise_is_another(tmp_path: Path) -> None:
    pruner = make_pruner(method="flap")
    pruner.eval_dataset = rows(8)
    pruner.add_callback(Interrupt("sublayer", 2))
    with pytest.raises(KeyboardInterrupt):
        sweep(pruner, tmp_path)
    pruner = make_pruner(method="flap")
    for data, message in (
        (rows(6), "number of evaluation rows is 6 and was 8 then"),
        (None, "held out is True"),
    ):
        pruner.eval_dataset = data
        with pytest.raises(ArgumentError, match=message):
            sweep(pruner, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.several_splits
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    text = printed_by(kill_while_pruning.main, [str(tmp_path), "30"], out=tmp_path, timeout=1100)
    counted = json.loads(text.splitlines()[-1])
    assert counted["kills"] >= 30
    assert counted["differing"] == 0
    assert counted["runs"] > 4


def test_what_a_kill_may_leave_of_a_state_has_a_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would remove it, and the folder with it."""
    names = list[str]()
    monkeypatch.setattr(states, "sync", lambda path: names.extend(os.listdir(path.parent)))
    states.save(tmp_path / "run" / "facts.safetensors", {"a": torch.ones(3)}, {})
    assert names == ["facts.safetensors.new"]
    assert states.OURS.fullmatch(names[0])
    assert os.listdir(tmp_path / "run") == ["facts.safetensors"]
