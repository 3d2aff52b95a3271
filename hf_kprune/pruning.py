"""From one teacher and one calibration set, students for one budget or for several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .algorithm import Decision, Job, choose, prune, record
from .arguments import KPruneArguments
from .budgets import Budget, Timing, budget_of
from .calibration.batches import Calibration
from .calibration.checks import check_walk
from .calibration.knowledge import Knowledge
from .calibration.measure import measure_dense, measure_knowledge
from .entries import Size, SublayerReport
from .methods import METHODS, Method, Statistics
from .progress import Work
from .report import PruningReport
from .resumption import Record
from .seconds import Seconds, now, pace_of, seconds_beyond, steps_of
from .sizes import prunable_flops
from .structure.offload import duplicate
from .structure.sublayers import Sublayer, find_sublayers
from .structure.surgery import cut, frozen, with_table_per_layer, write_plan
from .structure.uniform import write_stock_config
from .structure.workbench import clear_workbench, needs_workbench, on_workbench, workbench_of


PHASES = ("prepare", "measure", "search", "tune")
"""Names of the phases whose seconds a plan foretells."""

REPORTED_LENGTHS = (128, 512)
"""Tokens of the sequences for which a report says what is removed, beside those that the budget is about."""


@dataclass
class Pruning:
    """One teacher and one calibration set, from which students for one budget or several come.

    Args:
        model: The dense model, in evaluation mode as long as this is used. It is left as it is.
        calibration: Of its inputs.
        loss: Of its head.
        before: Its size, in which shared tables of positions count for each layer (T5), as they do in what is
            cut of it.
        timed: How long it takes, if a budget is one of time.
        args: Options; those of the budget are taken from what `student` is given.
        hold_out: Whether students are measured and tuned without the rows that models are compared on.
        phase: Takes the time of a phase by its name.
        tell: Tells callbacks of an event.
        work: Is told how much there is to do.
        dry: Whether students are outlines of shapes without weights, decided by one measurement and one
            search and not tuned.
    """

    model: PreTrainedModel
    calibration: Calibration
    loss: Knowledge
    before: Size
    timed: Timing | None
    args: KPruneArguments
    hold_out: bool
    phase: Callable[[str], AbstractContextManager[None]]
    tell: Callable[..., None]
    work: Work
    dry: bool = False

    def __post_init__(self) -> None:
        self.fitted, self.calibration.phase = self.calibration, self.phase
        model, device = self.model, self.calibration.accelerator.device
        # of weights that were made in inference mode no graph can be built
        inference = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        self.teacher = with_table_per_layer(duplicate(model) if inference else model)
        if needs_workbench(model, device):
            sublayers = find_sublayers(self.teacher, *self.args.units)
            self.teacher = on_workbench(self.teacher, sublayers, device)
        self.references = find_sublayers(self.teacher, *self.args.units)
        self.modes = {name: module.training for name, module in model.named_modules()}  # before evaluation
        self.checked = False
        self.compared: list[str] = []  # names of the outputs that the loss reads, and of the others
        self.ignored: list[str] = []
        self.all_flops = 0.0
        self.costs: list[float] = []  # with which the following was scored
        self.statistics: list[Statistics] = []
        self.scores: list[Tensor] = []
        self.passes = 0.0  # seconds that measuring took, without scoring
        self.beyond: dict[str, float] = {}  # seconds that pruning takes beyond a plan, by phase

    def student(self, args: KPruneArguments, report: PruningReport, past: Record) -> PreTrainedModel:
        """A pruned copy of the teacher, for the budget in `args`. What is done already is in the record of
        its past."""
        method = METHODS[args.method](args)
        student = frozen(self.teacher, "meta") if self.dry else frozen(self.teacher)
        sublayers = find_sublayers(student, *args.units)
        lengths = self.calibration.flops_lengths
        budget = budget_of(sublayers, args, lengths, self.before, self.timed, self.dry)
        flops, at = prunable_flops(sublayers, lengths), self.flops_at(sublayers)
        self.budget = budget
        self._announce(method, budget)
        subject = self.teacher if self.dry else student
        self.tell("on_prune_begin", model=subject, sublayers=[s.name for s in sublayers])
        with self.phase("measure"):
            self._check()
        tunes = self.args.tune and method.tunes and not self.dry
        job = Job(self.fitted, self.calibration, self.loss, method, budget, tunes)
        decisions = self._decisions(job, student, report, past)
        keep = partial(past.keep_sublayer, job)
        journal = Journal(report, self.tell, subject, lambda: prunable_flops(sublayers, lengths), keep)
        if self.dry:
            for sublayer, decision in zip(sublayers, decisions or [], strict=True):
                with journal(sublayer) as entry:
                    record(entry, decision)
                    cut(sublayer, decision.mask)
        else:
            walk = self.fitted.walk(student, sublayers)
            teacher = self.fitted.walk(self.teacher, self.references)
            report.sublayers += past.go_on(job, walk, teacher)
            prune(job, [walk], teacher, None if decisions is None else [decisions], journal)
        if args.uniform:
            write_stock_config(sublayers)
        else:
            write_plan(sublayers)
        report.after.flops = prunable_flops(sublayers, lengths)
        report.before.all_flops = self.all_flops
        report.removed_at = {
            tokens: 1 - left / at[tokens] for tokens, left in self.flops_at(sublayers).items()
        }
        report.sparsity = 1 - report.after.flops / flops
        if self.dry:
            self._foresee(job, sublayers, report)
        self.work.end_student()
        return student

    def achieved(self, student: PreTrainedModel) -> float:
        """What the last student comes to, in terms of the budget; a time is measured."""
        return self.budget.achieved(student)

    def seconds(self, plan: Mapping[str, float]) -> Seconds:
        """Those that pruning takes, from those that the phases of a plan took."""
        ways = len(METHODS[self.args.method].exponents)
        phases = {**plan, "search": ways * plan.get("search", 0.0)}
        return Seconds({name: phases.get(name, 0.0) + self.beyond.get(name, 0.0) for name in PHASES})

    def _foresee(self, job: Job, left: list[Sublayer], report: PruningReport) -> None:
        """Find out how many seconds it takes to prune beyond what the plan takes itself."""
        tunes = self.args.tune and job.method.tunes and report.cut_something
        about = self.calibration, job.method, self.loss, self.teacher, self.references, left
        pace, alone = pace_of(*about) if tunes else None, workbench_of(self.teacher) is not None
        share = 1 - report.sparsity
        self.beyond = seconds_beyond(self.calibration, job.method, pace, self.passes, share, alone)

    def _announce(self, method: Method, budget: Budget) -> None:
        """Say how much there is to do."""
        about, tune = (method, self.calibration, len(self.references)), self.args.tune
        later = steps_of(*about, measured=True, tune=tune, dry=self.dry)
        first = steps_of(*about, measured=self.costs == budget.costs, tune=tune, dry=self.dry)
        self.work.begin(first, later)

    def _check(self) -> None:
        """Check, once, that the teacher can be walked, and set rows aside if models are compared on them."""
        if not self.checked:
            head = not self.loss.of_hidden_states
            check_walk(self.calibration, self.teacher, self.references, head)
            self.all_flops = self.calibration.all_flops(self.teacher, self.references)
            clear_workbench(self.teacher)
            self.checked = True
            if self.dry:
                self.fitted = self.calibration.only(lambda batch: batch.sampled)
            elif self.hold_out:
                self.fitted = self.calibration.only(lambda batch: not batch.held_out)

    def flops_at(self, sublayers: list[Sublayer]) -> dict[str, float]:
        """Prunable FLOPs of a text of as many tokens as a report speaks of."""
        lengths = REPORTED_LENGTHS if self.calibration.texts else ()
        return {
            str(length): prunable_flops(sublayers, self.calibration.lengths_at(length)) for length in lengths
        }

    def _decisions(
        self, job: Job, student: PreTrainedModel, report: PruningReport, past: Record
    ) -> list[Decision] | None:
        """The decisions that are taken before anything is cut; None if each is taken when its sublayer is
        reached.

        A plan takes the split in the middle, and of K-prune the first of its decisions, which is about all
        units.
        """
        if job.budget.keeps_all:
            return [Decision(torch.ones(s.num_units, dtype=torch.bool)) for s in job.budget.sublayers]
        if not (job.method.one_shot or self.dry):
            return None
        if (earlier := past.decided()) is not None:
            report.trials |= earlier[1]
            return earlier[0]
        dense = frozen(self.teacher) if self.dry else student
        sublayers = find_sublayers(dense, *self.args.units) if self.dry else job.budget.sublayers
        self._measure(job, dense, sublayers, past)
        walk, teacher = self.fitted.walk(dense, sublayers), self.fitted.walk(self.teacher, self.references)
        decisions, distances = choose(
            job, walk, teacher, self.statistics, self.scores, self._exponents(job.method)
        )
        report.trials |= distances
        past.keep_decided(decisions, distances)
        return decisions

    def _measure(self, job: Job, dense: PreTrainedModel, sublayers: list[Sublayer], past: Record) -> None:
        """Measure and score all units of the dense model, unless an earlier student has, or an earlier
        run."""
        if self.costs == job.budget.costs:
            return
        if (earlier := past.measured(job.budget.costs, sublayers)) is not None:
            self.costs, (self.statistics, self.scores) = job.budget.costs, earlier
            return
        self.costs = job.budget.costs
        measured = sum(batch.measured for batch in self.fitted.batches)
        walk, needs = self.fitted.walk(dense, sublayers), job.method.needs
        with self.phase("measure"):
            if job.method.one_shot:
                of_all = measure_dense(self.fitted, walk, needs, self.loss, self.costs)
            else:
                of_all = enumerate(measure_knowledge(self.fitted, walk, walk, [], self.loss, self.costs))
            scored, device, scoring = {}, self.calibration.accelerator.device, 0.0
            start = now(device)
            for position, statistics in of_all:
                begin = now(device)
                scored[position] = statistics, job.method.worth(statistics).cpu()
                scoring += now(device) - begin
                self.calibration.step(2 * measured if needs else 0)
                statistics.gram = statistics.metric = None
                statistics.weight = statistics.weight.new_empty(0)  # it may be there no longer
            self.passes = now(device) - start - scoring
        self.statistics, self.scores = map(list, zip(*(scored[p] for p in sorted(scored)), strict=True))
        past.keep_measured(self.costs, self.statistics, self.scores)

    def _exponents(self, method: Method) -> tuple[float | None, ...]:
        """The ways to split the budget over depth that are tried."""
        exponents, rows = method.exponents, self.calibration.rows
        if len(exponents) > 1 and not rows.held_out:
            warnings.warn(
                f"{rows.measured} calibration rows are measured on, too few to hold some out, so the "
                "budget is split without trying how; give at least 4 rows, shorter ones if need be, and a "
                "larger num_measure_tokens",
                stacklevel=2,
            )
            exponents = (1.0,)
        return (exponents[len(exponents) // 2],) if self.dry else exponents


class Journal:
    """Writes the entry of each sublayer into a report, and tells callbacks of it.

    Args:
        report: The report.
        tell: Tells callbacks of an event.
        subject: The model that they are told of.
        flops_left: Gives the prunable FLOPs of the student as it is.
        keep: Keeps what is done, see `Record.keep_sublayer`.
    """

    def __init__(
        self,
        report: PruningReport,
        tell: Callable[..., None],
        subject: PreTrainedModel,
        flops_left: Callable[[], float],
        keep: Callable[[int, Sublayer, SublayerReport], None],
    ):
        self.report, self.tell, self.subject = report, tell, subject
        self.flops_left, self.keep = flops_left, keep

    @contextmanager
    def __call__(self, sublayer: Sublayer) -> Iterator[SublayerReport]:
        begin = time.perf_counter()
        entry = SublayerReport(sublayer.name, sublayer.kind_in_reports, sublayer.num_units)
        self.tell("on_sublayer_begin", sublayer.name, model=self.subject)
        yield entry
        entry.flops_left = self.flops_left()
        entry.seconds = time.perf_counter() - begin
        self.keep(len(self.report.sublayers), sublayer, entry)
        self.report.sublayers.append(entry)
        self.tell("on_sublayer_end", entry, model=self.subject)
