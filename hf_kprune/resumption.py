"""Interrupted runs go on: what a run has measured, decided and tuned is kept on the disk, and the same run,
begun again, takes it from there.

    FOLDER/measured-<digest>.safetensors      what was measured of the dense model, for any budget
    FOLDER/<run>/facts.safetensors            what the run is about: options, weights, rows, versions
    FOLDER/<run>/decided.safetensors          which units stay, of a method that decides beforehand
    FOLDER/<run>/sublayer-003.safetensors     its entry in the report when it is done, and its tuned weights
    FOLDER/<run>/finished.safetensors         that the model is there, and has only to be saved
    FOLDER/<run>/point.safetensors            of a sweep, how good a model is that is done

Every file is written once, beside its place, and put there in one step; all of them together are no larger
than the measurements and the tuned weights. What the batches have become is not kept: it follows from the
weights below, so a run that goes on carries the batches up again, by forward passes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from .algorithm import Decision, Job, follow
from .arguments import TARGETS
from .errors import ArgumentError, CheckpointError
from .files.contents import beside, reason
from .files.destination import as_text
from .files.disk import sync, sync_folder
from .files.workplace import take
from .methods import Statistics
from .processes import together
from .report import SublayerReport
from .structure.sublayers import Sublayer
from .structure.surgery import set_weights, weights_of
from .structure.walk import Walk
from .validation import show


logger = logging.get_logger(__name__)

PATIENCE = 60.0
"""Seconds after which a run that nobody asked to be resumed keeps its first state."""

ENDING = ".safetensors"
OURS = re.compile(r"(measured-[0-9a-f]{8}|facts|decided|point|finished|sublayer-\d{3,})\.safetensors(\.new)?")
"""The files that are written here. No other is ever removed."""

OF_BUDGETS = (
    *("sparsity", *TARGETS, "latency_batch_size", "latency_length", "uniform"),
    *("prune_heads", "prune_ffn", "min_heads", "min_neurons", "round_to", "tune", "tune_inputs"),
    *("flops_length", "metric", "number of evaluation rows"),
)
"""Facts that measurements do not depend on."""

DIFFER = {
    "weights": "the weights of the model differ",
    "config": "the config of the model differs",
    "rows": "the calibration rows differ",
}
"""What is said of facts whose values say nothing to a reader."""

PENDING = "pending."
"""How the names of decisions that are still to be carried out begin."""

Facts = Mapping[str, Any]
"""What a run is about, by the names that a message may give."""


class States:
    """The folder in which a run keeps what it takes to go on.

    Args:
        folder: Where; it is made when there is something to keep. None: nothing is kept.
        asked: Whether it was asked to go on. Then what is there is read, and all is kept at once. Otherwise
            nothing is read, and nothing is kept in the first minute.
        stays: Whether measurements stay when the run is over.
        accelerator: Its main process reads and writes.
    """

    def __init__(self, folder: Path | None, asked: bool, stays: bool, accelerator: Accelerator):
        self.folder, self.asked, self.stays, self.accelerator = folder, asked, stays, accelerator
        self.begin = time.monotonic()
        self.waiting: list[tuple[str, Mapping[str, Tensor], Callable[[], Any]]] = []
        self.lock: int | None = None
        self.keeps = True
        """Whether more is kept. Not after an error."""
        self.runs: set[str] = set()
        """The runs that are of this one."""

    def __enter__(self) -> States:
        with together(self.accelerator):
            if self.asked and self.is_here:
                try:
                    self.occupy()
                except OSError as error:
                    raise ArgumentError(
                        f"resume_from_checkpoint: states cannot be kept in {str(self.folder)!r}, "
                        f"{reason(error)}; pass another directory"
                    ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.waiting.clear()
        self.leave()

    @property
    def is_here(self) -> bool:
        """Whether this process is the one that keeps something."""
        return self.folder is not None and self.accelerator.is_main_process

    # ---- what is there ------------------------------------------------------------------------------------

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What is kept under a name, tensors and data, on every process; None if nothing is."""
        if not self.asked:
            return None
        content = None
        with together(self.accelerator):
            if self.folder is not None and self.has(name):
                content = load(self.folder / f"{name}{ENDING}")
        result: tuple[dict[str, Tensor], Any] | None
        (result,) = broadcast_object_list([content]) if self.accelerator.num_processes > 1 else (content,)
        return result

    def has(self, name: str) -> bool:
        """Whether something is kept under a name. On the main process."""
        if self.folder is None or not (self.asked and self.accelerator.is_main_process):
            return False
        return (self.folder / f"{name}{ENDING}").exists()

    # ---- what is kept -------------------------------------------------------------------------------------

    def keep(self, name: str, tensors: Mapping[str, Tensor], data: Callable[[], Any]) -> None:
        """Keep tensors and data (what JSON can say) under a name, as soon as the run has lasted long enough.

        An error, such as that of a full disk, ends the keeping and not the run.
        """
        if not (self.is_here and self.keeps):
            return
        self.waiting.append((name, tensors, data))
        if not (self.asked or time.monotonic() - self.begin > PATIENCE):
            return
        assert self.folder is not None
        try:
            if self.lock is None:
                self.occupy()
                self.remove("*/*", "measured-*")  # what a run that is not gone on with has left
                logger.info("states of this run are in %s: resume_from_checkpoint goes on", self.folder)
            for each, those, about in self.waiting:
                save(self.folder / f"{each}{ENDING}", those, about())
            self.waiting.clear()
        except (OSError, SafetensorError, CheckpointError) as error:
            logger.warning("no more states of this run are kept: %s", reason(error))
            self.waiting.clear()
            self.keeps = False

    def occupy(self) -> None:
        """Make the folder and lock it. Raises `CheckpointError` if another process has it."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = take(self.folder, self.folder)

    def leave(self) -> None:
        """Unlock the folder, which goes if it is empty."""
        if self.lock is not None and self.folder is not None:
            with suppress(OSError):
                (self.folder / "lock").unlink()
                self.folder.rmdir()
            os.close(self.lock)
            self.lock = None

    def drop(self, pattern: str) -> None:
        """Keep no longer what has such a name, such as `run/sublayer-*`, and no folder that is empty then."""
        self.waiting = [each for each in self.waiting if not fnmatchcase(each[0], pattern)]
        if self.is_here and self.lock is not None:
            self.remove(pattern)

    def remove(self, *patterns: str) -> None:
        """Remove files by name."""
        assert self.folder is not None
        for path in [path for each in patterns for path in self.folder.glob(f"{each}{ENDING}*")]:
            if OURS.fullmatch(path.name):
                path.unlink()
                with suppress(OSError):  # there is something else in it
                    path.parent.rmdir()

    def end(self) -> None:
        """Remove what is kept, as the run is over. In a directory that was named, measurements and other runs
        stay."""
        if not self.is_here or self.folder is None or not self.folder.is_dir():
            return
        with suppress(OSError, CheckpointError):  # another run has begun there
            if self.lock is None:
                self.occupy()
            self.remove(*(f"{run}/*" for run in self.runs) if self.stays else ("*/*", "measured-*"))
        self.leave()

    def say(self, origin: str) -> None:
        """Say where the run begins, if it was asked to go on."""
        if self.asked and self.is_here:
            logger.warning("states of this run are kept in %s, in which %s so far", self.folder, origin)


def states_of(accelerator: Accelerator, resume: bool | str | None, output_dir: str | None) -> States:
    """The states of a run.

    Args:
        accelerator: Its processes.
        resume: The option `resume_from_checkpoint`.
        output_dir: Where what is made is saved, if it is.

    Raises:
        ArgumentError: If there is no place for them, or if it is where the result is to be.
    """
    folder, named = None, isinstance(resume, str)
    with together(accelerator):
        if accelerator.is_main_process and resume is not False:
            folder = place_of(resume, output_dir)
    return States(folder, named or resume is True, named, accelerator)


def place_of(resume: bool | str | None, output_dir: str | None) -> Path | None:
    """The folder of the states of a run, see `states_of`, which has the arguments."""
    target = None if output_dir is None else Path(os.path.realpath(as_text(output_dir)))
    if isinstance(resume, str):
        folder = Path(os.path.realpath(as_text(resume, "resume_from_checkpoint")))
        if target is not None and target in (folder, *folder.parents):
            raise ArgumentError(
                f"resume_from_checkpoint is {resume!r}, which lies in output_dir, {output_dir!r}, where only "
                "the result may be; name another directory, or pass True"
            )
        return folder / "kprune_states"
    if resume and target is None:
        raise ArgumentError(
            "resume_from_checkpoint is True, but there is no output_dir that a state would belong to; pass "
            "the directory that states are kept in"
        )
    return None if target is None else beside(target, ".states")


def save(path: Path, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Write a file of tensors and of data beside its place, and put it there in one step."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, new, {"data": json.dumps(data)})
    sync(new)
    os.replace(new, path)
    sync_folder(path.parent)


def load(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], Any]:
    """The tensors, if they are wanted, and the data of a file.

    Raises:
        CheckpointError: If it is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            # copies, as results depend on how memory is aligned, and as the file may be removed
            values = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors else {}  # noqa: SIM118
            return values, json.loads(file.metadata()["data"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not what this program wrote ({reason(error)}); delete it, or begin anew "
            "without resume_from_checkpoint"
        ) from error


class Record:
    """What is kept of the way to one student.

    Args:
        states: Where.
        name: What the run is called in there.
        facts: Gives what the run is about.
    """

    def __init__(self, states: States, name: str, facts: Callable[[], Facts]):
        self.states, self.name, self.facts = states, name, facts
        states.runs.add(name)
        self.began = False
        """Whether an interrupted run has left something here. On the main process."""
        self.origin = "nothing is done"
        """Where the run begins, in words. On the main process."""

    def open(self, measures: bool) -> None:
        """Go on with what is there, or begin.

        Args:
            measures: Whether measurements of the dense model are of use.

        Raises:
            ArgumentError: If what is there is of another run.
        """
        states = self.states
        with together(states.accelerator):
            if states.is_here and states.asked:
                assert states.folder is not None
                now, folder = json.loads(json.dumps(self.facts())), states.folder / self.name
                measured = list(states.folder.glob(f"measured-*{ENDING}")) if measures else []
                for path in measured:
                    self.compare(load(path, tensors=False)[1]["facts"], of_measuring(now))
                then = load(folder / f"facts{ENDING}")[1] if states.has(f"{self.name}/facts") else None
                self.began = then is not None and (then == now or not states.has(f"{self.name}/finished"))
                if then is not None and self.began:
                    self.compare(then, now)
                else:
                    states.drop(f"{self.name}/*")
                done = len(list(folder.glob(f"sublayer-*{ENDING}")))
                if done or measured:
                    self.origin = f"sublayers up to number {done} are done" if done else "units are measured"
        if not self.began:
            self.keep("facts", {}, self.facts)

    def compare(self, then: Facts, now: Facts) -> None:
        """Raise `ArgumentError`, which names the differences, if a state is of something else."""
        names = [name for name in now if then.get(name) != now[name]]
        differences = [
            DIFFER.get(name, f"{name} is {show(now[name])} and was {show(then.get(name))} then")
            for name in names
        ]
        if differences:
            raise ArgumentError(
                f"the state in {str(self.states.folder)!r} is of another run; {'; '.join(differences[:4])}. "
                "Go on as it was begun, name another directory, or begin anew without "
                "resume_from_checkpoint"
            )

    def keep(self, name: str, tensors: Mapping[str, Tensor], data: Callable[[], Any]) -> None:
        """Keep something of this run."""
        self.states.keep(f"{self.name}/{name}", tensors, data)

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What is kept of this run under a name."""
        return self.states.read(f"{self.name}/{name}")

    # ---- what was measured --------------------------------------------------------------------------------

    def measured(
        self, costs: Sequence[float], sublayers: Sequence[Sublayer]
    ) -> tuple[list[Statistics], list[Tensor]] | None:
        """The statistics and scores of the sublayers, if they were measured with these costs of units."""
        state = self.states.read(measured_at(costs))
        if state is None:
            return None
        tensors, data = state
        statistics, scores = [], []
        for i, (sublayer, numbers) in enumerate(zip(sublayers, data["numbers"], strict=True)):
            weight = sublayer.weight.new_empty(0)  # of use in scoring only
            names = [each.name for each in fields(Statistics) if f"{i}.{each.name}" in tensors]
            device = self.states.accelerator.device
            sums: dict[str, Any] = {name: tensors[f"{i}.{name}"].to(device) for name in names}
            damping = numbers.pop("damping")
            statistics.append(Statistics(weight=weight, **numbers, **sums))
            statistics[-1].damping = damping
            scores.append(tensors[f"{i}.scores"])
        return statistics, scores

    def keep_measured(
        self, costs: Sequence[float], statistics: Sequence[Statistics], scores: Sequence[Tensor]
    ) -> None:
        """Keep what was measured; the weights are those of the model."""
        tensors, numbers = dict[str, Tensor](), list[dict[str, Any]]()
        for i, (each, score) in enumerate(zip(statistics, scores, strict=True)):
            values = {name: getattr(each, name) for name in (entry.name for entry in fields(each))}
            sums = {k: v for k, v in values.items() if isinstance(v, Tensor) and k != "weight"}
            tensors |= {f"{i}.{name}": value for name, value in sums.items()}
            tensors[f"{i}.scores"] = score.clone()  # it may be one of the sums
            numbers.append({k: v for k, v in values.items() if not isinstance(v, Tensor) and v is not None})
        about = lambda: {"facts": of_measuring(self.facts()), "numbers": numbers}  # noqa: E731
        self.states.keep(measured_at(costs), tensors, about)

    # ---- what was decided ---------------------------------------------------------------------------------

    def decided(self) -> tuple[list[Decision], dict[str, float]] | None:
        """The decisions about all sublayers, and the distances of the trials that led to them."""
        state = self.read("decided")
        if state is None:
            return None
        tensors, data = state
        decisions = [
            Decision(tensors[f"{i}.mask"], tensors.get(f"{i}.scores"), damping)
            for i, damping in enumerate(data["damping"])
        ]
        return decisions, data["trials"]

    def keep_decided(self, decisions: Sequence[Decision], trials: Mapping[str, float]) -> None:
        """Keep the decisions about all sublayers."""
        tensors = {f"{i}.mask": each.mask for i, each in enumerate(decisions)}
        tensors |= {
            f"{i}.scores": each.scores.clone() for i, each in enumerate(decisions) if each.scores is not None
        }
        data = {"damping": [each.damping for each in decisions], "trials": dict(trials)}
        self.keep("decided", tensors, lambda: data)

    # ---- what was cut and tuned ---------------------------------------------------------------------------

    def keep_sublayer(self, job: Job, position: int, sublayer: Sublayer, entry: SublayerReport) -> None:
        """Keep a sublayer that is done, and what is decided already of those above it."""
        tuned = entry.error_after is not None
        tensors = weights_of(sublayer) if tuned else {}
        for i, decision in enumerate(job.pending):
            tensors[f"{PENDING}{i}.mask"] = decision.mask
            if decision.scores is not None:
                tensors[f"{PENDING}{i}.scores"] = decision.scores.clone()
        data = {
            "entry": asdict(entry),
            "counts": job.budget.minimum if job.budget.fixed else None,
            "damping": [decision.damping for decision in job.pending],
        }
        self.keep(f"sublayer-{position:03}", tensors, lambda: data)

    def go_on(self, job: Job, student: Walk, teacher: Walk) -> list[SublayerReport]:
        """Bring a student and its teacher to where the run was interrupted; the entries of what lies
        below."""
        entries = list[SublayerReport]()
        while student.rest and (state := self.read(f"sublayer-{student.position:03}")) is not None:
            tensors, data = state
            entries.append(SublayerReport(**data["entry"]))
            sublayer = student.sublayer
            mask = torch.zeros(sublayer.num_units, dtype=torch.bool)
            mask[entries[-1].kept] = True
            student.cut(mask)
            set_weights(sublayer, {k: v for k, v in tensors.items() if not k.startswith(PENDING)})
            job.pending[:] = [
                Decision(tensors[f"{PENDING}{i}.mask"], tensors.get(f"{PENDING}{i}.scores"), damping)
                for i, damping in enumerate(data["damping"])
            ]
            if data["counts"] is not None:
                job.budget.fix(data["counts"])
            job.calibration.advance(student)
            follow(job, [student], teacher)
        return entries

    def finish(self) -> None:
        """Keep that the model is there, so that what is kept of it is in no other run's way."""
        self.keep("finished", {}, dict)

    def drop_model(self) -> None:
        """Keep no longer what the model follows from, as it is saved."""
        self.states.drop(f"{self.name}/decided")
        self.states.drop(f"{self.name}/sublayer-*")


def of_measuring(facts: Facts) -> Facts:
    """The facts that measurements depend on."""
    return {name: value for name, value in facts.items() if name not in OF_BUDGETS}


def measured_at(costs: Sequence[float]) -> str:
    """The name of what was measured with these costs of units."""
    return f"measured-{hashlib.sha256(json.dumps(list(costs)).encode()).hexdigest()[:8]}"
