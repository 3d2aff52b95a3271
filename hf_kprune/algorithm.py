"""The algorithm: for each sublayer, from the lowest to the highest, measure, score, search, cut, tune,
advance.

`prune` is the loop of Park et al. (ICLR 2024). K-prune decides at every sublayer, on what is pruned so far
(`decide`). A one-shot method, as the default is, has all its decisions beforehand, from one measurement of
the dense model (`Pruning._decisions`); where it knows several ways to split the budget, `choose` tries each
with this same loop on fewer rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .budgets import Budget
from .calibration.batches import Calibration
from .calibration.distance import Judge
from .calibration.equations import Reference, Sample, input_equations, normal_equations
from .calibration.knowledge import Knowledge
from .calibration.measure import measure_knowledge, tops_of
from .entries import SublayerReport
from .methods import Method, Statistics
from .methods.least_squares import correct_drift
from .methods.search import split
from .structure.hooks import State
from .structure.sublayers import Sublayer
from .structure.surgery import correct_inputs, frozen, has_bias, in_unit_order, set_output
from .structure.walk import Walk
from .structure.workbench import clear_workbench, give_back_memory, leave_workbench, workbench_of


MEASUREMENTS = 24
"""How often a student is measured at most if its method names no schedule, so that cost grows with depth and
not with its square."""


@dataclass(frozen=True)
class Decision:
    """Which units of a sublayer stay, boolean (U,), their scores (U,), if it took any, and how these were
    damped."""

    mask: Tensor
    scores: Tensor | None = None
    damping: float = 0.0


@dataclass(frozen=True)
class Job:
    """What the steps have in common.

    Args:
        calibration: The rows that are measured and tuned on.
        trials: All rows, also those on which models are compared.
        loss: The knowledge loss.
        method: The pruning method.
        budget: What may be spent.
        tunes: Whether weights are tuned.
        trial: Whether it is one: then no ridge is chosen and no errors are told.
        pending: What is decided already of the sublayers above the one that has been reached.
    """

    calibration: Calibration
    trials: Calibration
    loss: Knowledge
    method: Method
    budget: Budget
    tunes: bool
    trial: bool = False
    pending: list[Decision] = field(default_factory=list)


Journal = Callable[[Sublayer], AbstractContextManager[SublayerReport]]
"""Opens the entry of a sublayer in the report."""


def prune(
    job: Job,
    students: Sequence[Walk],
    teacher: Walk,
    plans: Sequence[Sequence[Decision]] | None,
    journal: Journal,
) -> None:
    """Cut each sublayer of a student, from the one that it has reached up, and tune it against the teacher,
    which also corrects for the error from below. Students of several plans go together, so that the teacher
    runs once for all."""
    tops = [] if plans is not None else tops_of(job.calibration, teacher)
    for position in range(students[0].position, len(teacher.sublayers)):
        reference = Reference(teacher, shared=len(students) > 1)
        for number, student in enumerate(students):
            with journal(student.sublayer) as entry:
                decision = decide(job, student, teacher, tops) if plans is None else plans[number][position]
                record(entry, decision)
                student.cut(decision.mask)
                if student.differs and job.tunes:
                    tune(job, student, reference, entry)
                job.calibration.advance(student)
        follow(job, students, teacher)


def decide(job: Job, student: Walk, teacher: Walk, tops: Sequence[State | None]) -> Decision:
    """Measure all units from the sublayer up, score them, search masks for all of them (KPMS), and take that
    of this sublayer, or those of the next few."""
    if job.budget.keeps_rest(student.position):
        return Decision(torch.ones(student.sublayer.num_units, dtype=torch.bool))
    if not job.pending:
        with job.calibration.phase("measure"):
            statistics = measure_knowledge(
                job.calibration, student, teacher, tops, job.loss, job.budget.costs
            )
        with job.calibration.phase("search"):
            scores = job.calibration.agree([job.method.worth(each) for each in statistics])
            masks = job.budget.search(job.method, statistics, scores, student.position)
            count = interval(job.method, len(student.sublayers))
            for mask in job.calibration.agree([mask.int() for mask in masks[:count]]):
                place = len(job.pending)
                job.pending.append(Decision(mask.bool().cpu(), scores[place], statistics[place].damping))
    return job.pending.pop(0)


def interval(method: Method, sublayers: int) -> int:
    """Of how many sublayers the decisions of one measurement are taken."""
    return method.measure_every or -(-sublayers // MEASUREMENTS)


def choose(
    job: Job,
    dense: Walk,
    teacher: Walk,
    statistics: Sequence[Statistics],
    scores: list[Tensor],
    exponents: Sequence[float | None],
) -> tuple[list[Decision], dict[str, float]]:
    """Search masks of all sublayers for each way to split the budget, and take those whose student, cut and
    tuned, is nearest to the teacher on the rows held out; its distance is returned for each way that was
    tried, by name."""
    with job.calibration.phase("search"):
        plans = dict(ways_to_split(job, statistics, scores, exponents))
    names: dict[str, str] = {}  # of the first of equal plans
    for name, plan in plans.items():
        names[name] = next(n for n in plans if all(map(torch.equal, masks_of(plans[n]), masks_of(plan))))
    distinct = {name: plans[name] for name in names.values()}
    if len(distinct) == 1:
        return next(iter(plans.values())), {}
    few = job.trials.trial()
    few.phase = lambda _: job.trials.phase("search")  # whatever a trial does is a part of the search
    with few.phase("search"):
        judge = Judge(few, teacher, job.loss)
    distances = distances_of(replace(job, calibration=few, trial=True), judge, dense, teacher, distinct)
    (best,) = broadcast_object_list([min(distances, key=distances.__getitem__)])
    return plans[best], {name: distances[first] for name, first in names.items()}


def masks_of(plan: Sequence[Decision]) -> list[Tensor]:
    """Those of all sublayers."""
    return [decision.mask for decision in plan]


def distances_of(
    job: Job, judge: Judge, dense: Walk, teacher: Walk, plans: Mapping[str, list[Decision]]
) -> dict[str, float]:
    """Cut and tune a student by each plan on the rows of a trial: how far it is from the teacher, by name."""
    few, distances = job.calibration, dict[str, float]()
    # each student has a layer in float32 on a workbench, so that there they go up one by one
    alone = workbench_of(dense.model) is not None
    for group in [[name] for name in plans] if alone else [list(plans)]:
        students = [few.walk(frozen(dense.model)) for _ in group]
        for student in students:
            student.keeps_layers = judge.needs_layers
        reference = few.walk(teacher.model, teacher.sublayers)
        prune(job, students, reference, [plans[name] for name in group], unwritten)
        with few.phase("search"):
            for name, student in zip(group, students, strict=True):
                distances[name] = judge.distance(student)
                leave_workbench(student.model)  # which has its last layer in float32
    return distances


def ways_to_split(
    job: Job, statistics: Sequence[Statistics], scores: list[Tensor], exponents: Sequence[float | None]
) -> Iterator[tuple[str, list[Decision]]]:
    """The ways to split the budget that are tried, by name, and the decisions on all sublayers: one for each
    exponent. If all layers are to end alike, which leaves an exponent little to say, as many numbers of heads
    take their place."""
    worths: list[tuple[str, list[Tensor], list[int] | None]] = [
        (str(each), scores if each is None else split(scores, job.budget.costs, each), None)
        for each in exponents
    ]
    if job.budget.args.uniform and len(exponents) > 1:
        (ways,) = broadcast_object_list([job.budget.ways_alike(scores, len(exponents))])
        worths = [(name, scores, counts) for name, counts in ways.items()]
    for name, worth, counts in worths:
        budget = copy.copy(job.budget)  # as a search may fix what its student keeps alike
        if counts is not None:
            budget.fix(counts)
        masks = budget.search(job.method, statistics, worth)
        agreed = job.calibration.agree([mask.int() for mask in masks])
        yield (
            name,
            [
                Decision(mask.bool().cpu(), score, each.damping)
                for mask, score, each in zip(agreed, scores, statistics, strict=True)
            ],
        )


def tune(job: Job, student: Walk, reference: Reference, entry: SublayerReport) -> None:
    """Correct what the input projections read for drift, if the method does, and refit the output projection
    (KPWT)."""
    sublayer, method, calibration = student.sublayer, job.method, job.calibration
    with calibration.phase("tune"):
        halved = method.ridge is None and not job.trial
        if method.tune_inputs and sublayer.num_units:
            tune_inputs(job, student, reference, halved)
        sample = None if job.trial else Sample(calibration, sublayer)
        sums = normal_equations(calibration, student, reference, halved, sample)
        weight, bias = in_unit_order(sublayer), sublayer.bias
        clear_workbench(reference.teacher.model)  # factors take the memory of a layer and more
        give_back_memory()
        fit = method.fit(sums, weight, bias, sublayer.unit_width, sublayer.has_bias_columns)
        tuned = calibration.agree([fit.weight] + ([] if fit.bias is None else [fit.bias]))
        if sample is not None:
            entry.error_before = sample.error(weight, bias)
            entry.error_after = sample.error(tuned[0], tuned[1] if tuned[1:] else bias)
        set_output(sublayer, *tuned)
    entry.damping, entry.undetermined = fit.damping, fit.undetermined


def tune_inputs(job: Job, student: Walk, reference: Reference, halved: bool) -> None:
    """Correct what the input projections read for drift."""
    sublayer, calibration = student.sublayer, job.calibration
    for paths, equations in input_equations(calibration, student, reference, halved):
        drift = correct_drift(equations, job.method.ridge, has_bias(sublayer, paths))
        shift = torch.zeros_like(equations.target_sum) if drift.bias is None else drift.bias
        correct_inputs(sublayer, paths, *calibration.agree([drift.weight, shift]))


def follow(job: Job, students: Sequence[Walk], teacher: Walk) -> None:
    """Carry all batches of the teacher to where its students are, if there is still something to tune."""
    if not any(student.differs for student in students):
        teacher.follow(students[0])
    elif job.tunes:
        job.calibration.advance(teacher)


def record(entry: SublayerReport, decision: Decision) -> None:
    """Write a decision into the report."""
    entry.kept = decision.mask.nonzero().flatten().tolist()
    if decision.scores is not None:
        entry.scores = [float(f"{score:.6g}") for score in decision.scores.tolist()]
        entry.score_damping = decision.damping


def unwritten(sublayer: Sublayer) -> AbstractContextManager[SublayerReport]:
    """An entry that is in no report: of a trial."""
    return nullcontext(SublayerReport(sublayer.name, sublayer.kind, sublayer.num_units))
