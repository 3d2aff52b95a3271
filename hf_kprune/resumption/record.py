"""What a run keeps on the way to one student: what it is about, measured, decided, cut and tuned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..algorithm import Decision, Job, follow
from ..arguments import TARGETS
from ..entries import SublayerReport
from ..errors import ArgumentError
from ..methods import Statistics
from ..processes import together
from ..structure.sublayers import Sublayer
from ..structure.surgery import set_weights, weights_of
from ..structure.walk import Walk
from ..validation import show
from .states import ENDING, States, load


OF_BUDGETS = (
    *("sparsity", *TARGETS, "latency_batch_size", "latency_length", "uniform"),
    *("prune_heads", "prune_ffn", "prune_experts", "min_heads", "min_neurons", "round_to"),
    *("tune", "tune_inputs"),
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
