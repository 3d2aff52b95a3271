"""The algorithm: decide which units of each sublayer stay, cut, tune. `Pruning.student` is the page to read."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .budget import BudgetTerms, prunable_flops
from .calibration.calibration import Calibration
from .calibration.knowledge import Knowledge
from .errors import BudgetError
from .latency.table import LatencyTable, compare, cut_to, search_latency
from .methods import METHODS
from .methods.base import Method, Statistics
from .methods.least_squares import correct_drift
from .methods.search import TOLERANCE, group_sizes, split, uniform_search
from .progress import Work, steps_of
from .report import PruningReport, Size, SublayerReport
from .structure.facts import in_half_precision
from .structure.hooks import State
from .structure.sublayers import Sublayer, find_sublayers
from .structure.surgery import (
    correct_inputs,
    cut,
    frozen,
    has_bias,
    in_unit_order,
    set_output,
    twin,
    with_own_tables,
    write_plan,
)
from .structure.uniform import uniform_names, write_stock_config


Decision = Callable[[int, list[State], bool], tuple[Tensor, Tensor | None]]
"""(sublayer, student's states below it, whether the student differs from the teacher) -> units to keep, their scores."""


TOLD_LENGTHS = (128, 512)
"""Tokens of the sequences for which a report tells what is removed, beside those that the budget is about."""


@dataclass
class Timed:
    """A model as it is, its look-up table, the inputs of that, and how many times as long as it says cut models take."""

    model: PreTrainedModel
    table: LatencyTable
    inputs: dict[str, Any]
    ratio: float = 1.0

    def masks(self, worth: list[Tensor], terms: BudgetTerms, head_unit: str) -> list[Tensor]:
        """The best masks of which a cut model is measured to take the time that there is.

        The table's sums are a few per cent off, so what it is asked for is corrected, up to three times, by how far off
        it was.

        Raises:
            BudgetError: If no cut model was measured to be within 2 % of it.
        """
        found: dict[float, list[Tensor]] = {}
        for _ in range(4):
            masks = self.first_masks(worth, terms)
            whole, taken = compare(
                [self.model, cut_to(self.model, [int(m.sum()) for m in masks], head_unit)], self.inputs
            )
            ratio = (
                taken / whole * self.table.dense / terms.seconds
            )  # of both in one run, as the machine may have slowed down
            found[ratio] = masks
            if 0.98 < ratio < 1.01:
                break
            self.ratio *= ratio
        within = [ratio for ratio in found if ratio < 1.02]
        if not within:
            raise BudgetError(
                f"{terms.name} is {terms.asked}, of which the fastest model that was cut and measured takes "
                f"{min(found):.2f} times the time; ask for less, or try again when the machine is quiet"
            )
        return found[max(within)]

    def first_masks(self, worth: list[Tensor], terms: BudgetTerms) -> list[Tensor]:
        """The best masks by the table alone."""
        budget = max(terms.seconds / self.ratio - self.table.rest, self.least(terms))
        return search_latency(worth, self.table.curves, budget, terms.minimum, terms.multiple)

    def least(self, terms: BudgetTerms) -> float:
        """Seconds of the sublayers with what must stay of them."""
        least = [
            group_sizes(s.num_units, m, r)[0]
            for s, m, r in zip(terms.sublayers, terms.minimum, terms.multiple, strict=True)
        ]
        return self.table.predict(least) - self.table.rest

    def achieved(self, student: PreTrainedModel, name: str) -> float:
        """What `student` comes to, measured, in terms of what was asked for."""
        dense, seconds = compare([self.model, student], self.inputs)
        return self.in_terms(dense, seconds, name)

    def foreseen(self, counts: list[int], name: str) -> float:
        """What a student with so many units would come to, by the table."""
        return self.in_terms(self.table.dense, self.table.predict(counts), name)

    @staticmethod
    def in_terms(dense: float, seconds: float, name: str) -> float:
        return dense / seconds if name == "target_speedup" else seconds


class Pruning:
    """One teacher and one calibration set, from which students for one budget or several are made.

    Args:
        model: The dense model, in evaluation mode as long as this is used. It is left as it is.
        calibration: Of its inputs.
        loss: Of its head.
        before: Its size, in which shared tables of positions count for each layer (T5), as they do in what is cut of it.
        timed: How its time is measured, if a budget is one.
        args: Options; those of the budget are taken from what `student` is given.
        hold_out: Whether students are measured and tuned without the rows that `Calibration.distance` compares them on.
        phase: Takes the time of a phase by its name.
        tell: Tells callbacks of an event.
        work: Is told how much there is to do.
        dry: Whether students are outlines of shapes without weights, decided by one measurement and one search and not tuned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        loss: Knowledge,
        before: Size,
        timed: Timed | None,
        args: KPruneArguments,
        hold_out: bool,
        phase: Callable[[str], AbstractContextManager[None]],
        tell: Callable[..., None],
        work: Work,
        dry: bool = False,
    ):
        self.dry, self.work = dry, work
        self.args, self.calibration, self.loss, self.before = args, calibration, loss, before
        self.hold_out, self.fitted = hold_out, calibration
        self.timed, self.phase, self.tell = timed, phase, tell
        # statistics of half-precision models are taken in float32; what is saved keeps the model's dtype
        half = in_half_precision(model)
        # of weights that were made in inference mode no graph can be built
        frozen = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
        copied = copy.deepcopy(model) if half or frozen else model
        self.teacher = with_own_tables(copied.float() if half else copied)
        self.references = find_sublayers(self.teacher, args.head_unit)
        self.modes = {
            name: module.training for name, module in model.named_modules()
        }  # before evaluation mode
        self.checked = False
        self.compared: list[str] = []  # names of the outputs that the loss reads, and of the others
        self.ignored: list[str] = []
        self.all_flops = 0.0
        self.costs: list[float] = []  # with which the following was scored
        self.measured: list[Statistics] = []
        self.scores: list[Tensor] = []

    def student(self, args: KPruneArguments, report: PruningReport) -> PreTrainedModel:
        """A pruned copy of the teacher, for the budget in `args`: for each sublayer, bottom to top, decide, cut, tune."""
        method = METHODS[args.method](args)
        student = (
            frozen(self.teacher, "meta") if self.dry else copy.deepcopy(self.teacher).requires_grad_(False)
        )
        sublayers = find_sublayers(student, args.head_unit)
        terms = BudgetTerms(
            sublayers,
            args,
            self.calibration.flops_lengths,
            self.before,
            self.timed.table if self.timed else None,
        )
        flops, at = prunable_flops(sublayers, self.calibration.flops_lengths), self.flops_at(sublayers)
        about = method, self.calibration, len(sublayers)
        later = steps_of(*about, measured=True, tune=self.args.tune, dry=self.dry)
        self.work.begin(
            steps_of(*about, measured=self.costs == terms.costs, tune=self.args.tune, dry=self.dry), later
        )
        self.tell(
            "on_prune_begin",
            model=self.teacher if self.dry else student,
            sublayers=[s.name for s in sublayers],
        )
        with self.phase("measure"):
            if not self.checked:
                self.calibration.check(self.teacher, self.references)
                self.all_flops = self.calibration.all_flops(self.teacher, self.references)
                self.checked = True
                if self.hold_out:
                    self.fitted = self.calibration.without_held_out()
        if terms.keeps_all:
            decide = keep_all(sublayers)
        elif method.one_shot or self.dry:
            dense = frozen(self.teacher) if self.dry else student
            decide = self.decided(dense, find_sublayers(dense, args.head_unit), method, terms, report)
        else:
            decide = self.deciding(student, sublayers, method, terms)
        self.bottom_up(student, sublayers, self.fitted, method, decide, report)
        if args.uniform:
            write_stock_config(sublayers)
        else:
            write_plan(sublayers)
        report.after.flops = prunable_flops(sublayers, self.calibration.flops_lengths)
        report.before.all_flops = self.all_flops
        report.removed_at = {
            tokens: 1 - left / at[tokens] for tokens, left in self.flops_at(sublayers).items()
        }
        report.sparsity, report.achieved = 1 - report.after.flops / flops, terms.achieved()
        self.work.end_student()
        return student

    def flops_at(self, sublayers: list[Sublayer]) -> dict[str, float]:
        """Prunable FLOPs of a text of as many tokens as a report tells of."""
        lengths = TOLD_LENGTHS if self.calibration.texts else ()
        return {
            str(length): prunable_flops(sublayers, self.calibration.lengths_at(length)) for length in lengths
        }

    def bottom_up(
        self,
        student: PreTrainedModel,
        sublayers: list[Sublayer],
        calibration: Calibration,
        method: Method,
        decide: Decision,
        report: PruningReport | None = None,
    ) -> None:
        """Cut each sublayer of `student` to what `decide` keeps and tune it (KPWT) against the teacher, which also corrects
        for the error from below. Callbacks and `report` are told, if there is a report."""
        teacher_streams, streams = calibration.bottom(), calibration.bottom()
        subject = self.teacher if self.dry else student
        changed = False  # whether the student differs from the teacher yet
        for i, sublayer in enumerate(sublayers):
            begin, units = time.perf_counter(), sublayer.num_units
            entry = SublayerReport(sublayer.name, sublayer.kind, units)
            if report is not None:
                self.tell("on_sublayer_begin", sublayer.name, model=subject)
            keep, scores = decide(i, streams, changed)
            cut(sublayer, keep)
            changed = changed or not bool(keep.all())
            with self.phase("tune" if report is not None else "search"):
                if changed and self.args.tune and method.tunes and not self.dry:
                    around = (student, sublayers, streams, self.teacher, self.references, teacher_streams, i)
                    tune(sublayer, calibration, method, around, entry)
                if not self.dry:
                    calibration.advance(student, sublayers, i, streams)
                if not changed:
                    teacher_streams = list(streams)
            if report is not None:
                entry.kept = keep.nonzero().flatten().tolist()
                entry.scores = (
                    None if scores is None else [float(f"{score:.6g}") for score in scores.tolist()]
                )
                entry.score_damping = (
                    self.measured[i].damping if self.measured and scores is not None else 0.0
                )
                entry.flops_left = prunable_flops(sublayers, calibration.flops_lengths)
                entry.seconds = time.perf_counter() - begin
                report.sublayers.append(entry)
                self.tell("on_sublayer_end", entry, model=subject)

    def deciding(
        self, student: PreTrainedModel, sublayers: list[Sublayer], method: Method, terms: BudgetTerms
    ) -> Decision:
        """K-prune's way: measure every unit from the sublayer up on the student as pruned so far, search a mask for all of
        them (KPMS), and use it for this sublayer only."""
        calibration, args = self.fitted, self.args
        with self.phase("measure"):
            teacher_top = calibration.top(self.teacher, self.references)

        def decide(i: int, streams: list[State], changed: bool) -> tuple[Tensor, Tensor | None]:
            spent = sum(cost * s.num_units for cost, s in zip(terms.costs[:i], sublayers[:i], strict=True))
            budget = terms.remaining(spent, i)
            if terms.cost_from(i) <= budget * (1 + TOLERANCE) or terms.minimum[i] >= sublayers[i].num_units:
                return torch.ones(sublayers[i].num_units, dtype=torch.bool), None
            with self.phase("measure"):
                measured = calibration.measure(
                    student,
                    sublayers,
                    i,
                    streams,
                    self.teacher,
                    self.references,
                    teacher_top,
                    self.loss if changed else None,
                )
            with self.phase("search"):
                for statistics, cost in zip(measured, terms.costs[i:], strict=True):
                    statistics.cost = cost
                scores = [method.score(s) for s in measured]
                if args.uniform and not terms.fixed:
                    alike = uniform_names(sublayers, args)[i:]
                    left = (
                        terms.costs[i:],
                        budget,
                        terms.minimum[i:],
                        terms.multiple[i:],
                        alike,
                        terms.allowed[i:],
                    )
                    counts = [s.num_units for s in sublayers[:i]] + uniform_search(scores, *left)
                    terms.fix(calibration.agree([torch.tensor(counts)])[0].tolist())
                    budget = terms.remaining(spent, i)
                masks = method.search(measured, scores, budget, terms.minimum[i:], terms.multiple[i:])
                return calibration.agree([masks[0].int()])[0].bool().cpu(), scores[0]

        return decide

    def decided(
        self,
        dense: PreTrainedModel,
        sublayers: list[Sublayer],
        method: Method,
        terms: BudgetTerms,
        report: PruningReport,
    ) -> Decision:
        """The way of one-shot methods: measure every unit once, on the dense model; of the ways to split the budget over depth
        take the one whose student, cut and tuned, is nearest to the teacher on rows held out. A plan takes the one in the
        middle, and of K-prune the first of its decisions, which is about all units, for all of them."""
        with self.phase("measure"):
            if self.costs != terms.costs:
                self.costs, self.measured, self.scores = terms.costs, [], []
                if method.one_shot:
                    of_all = self.fitted.measure_dense(dense, sublayers, method.needs, self.loss)
                else:
                    streams: list[State] = self.fitted.bottom()
                    no_tops: list[State | None] = [None for _ in streams]
                    of_all = iter(
                        self.fitted.measure(dense, sublayers, 0, streams, dense, sublayers, no_tops, None)
                    )
                for statistics, cost in zip(of_all, terms.costs, strict=True):
                    statistics.cost = cost
                    self.scores.append(method.score(statistics).cpu())
                    self.calibration.step(
                        2 * sum(batch.measured for batch in self.fitted.batches) if method.needs else 0
                    )
                    statistics.gram = statistics.metric = None
                    self.measured.append(statistics)
        exponents, rows = method.exponents, self.calibration.rows
        if len(exponents) > 1 and not rows.held_out:
            warnings.warn(
                f"{rows.measured} calibration rows are measured on, too few to hold some out, so the budget is split without "
                "trying how; give at least 4 rows, shorter ones if need be, and a larger num_measure_tokens",
                stacklevel=2,
            )
            exponents = (1.0,)
        if self.dry:
            exponents = (exponents[len(exponents) // 2],)
        with self.phase("search"):
            plans = {}
            for exponent in exponents:
                scores = self.scores if exponent is None else split(self.scores, terms.costs, exponent)
                masks = self.masks(method, scores, terms)
                plans[exponent] = [
                    mask.bool().cpu() for mask in self.calibration.agree([mask.int() for mask in masks])
                ]
        few = self.calibration.trial()
        for exponent, plan in plans.items() if len(plans) > 1 else ():
            student = twin(dense)
            layers = find_sublayers(student, self.args.head_unit)
            self.bottom_up(student, layers, few, method, lambda i, *_, plan=plan: (plan[i], None))
            with self.phase("search"):
                report.trials[str(exponent)] = self.calibration.distance(student, self.teacher, self.loss)
        (best,) = broadcast_object_list(
            [min(plans, key=lambda exponent: report.trials.get(str(exponent), 0.0))]
        )
        return lambda i, *_: (plans[best][i], self.scores[i])

    def masks(self, method: Method, scores: list[Tensor], terms: BudgetTerms) -> list[Tensor]:
        """Keep-masks of all sublayers within the budget."""
        if terms.table is not None and self.timed is not None:
            worth = [cost * score.clamp(min=0) for cost, score in zip(terms.costs, scores, strict=True)]
            if self.dry:
                return method.arrange(self.measured, self.timed.first_masks(worth, terms))
            return method.arrange(self.measured, self.timed.masks(worth, terms, self.args.head_unit))
        if self.args.uniform:
            alike = uniform_names(terms.sublayers, self.args)
            given = terms.costs, terms.budget, terms.minimum, terms.multiple, alike, terms.allowed
            terms = copy.copy(terms)
            terms.fix(uniform_search(scores, *given))
        return method.search(self.measured, scores, terms.remaining(0.0, 0), terms.minimum, terms.multiple)


def keep_all(sublayers: list[Sublayer]) -> Decision:
    """Nothing is to go."""
    return lambda i, *_: (torch.ones(sublayers[i].num_units, dtype=torch.bool), None)


def tune(
    sublayer: Sublayer,
    calibration: Calibration,
    method: Method,
    around: tuple[Any, ...],
    entry: SublayerReport,
) -> None:
    """Correct what the input projections read for drift, if the method does, and refit the output projection (KPWT)."""
    if method.tune_inputs and sublayer.num_units:
        for paths, equations in calibration.input_equations(*around):
            drift = correct_drift(equations, method.ridge, has_bias(sublayer, paths))
            correct_inputs(sublayer, paths, *calibration.agree([drift.weight, cast(Tensor, drift.bias)]))
    equations = calibration.normal_equations(*around)
    fit = method.tune(equations, in_unit_order(sublayer), sublayer.bias, sublayer.unit_width)
    set_output(sublayer, *calibration.agree([fit.weight] + ([] if fit.bias is None else [fit.bias])))
    entry.error_before, entry.error_after = fit.error_before, fit.error_after
    entry.damping, entry.undetermined = fit.damping, fit.undetermined
