"""Makes the models of a sweep: for every budget a student of one run, judged in the place of the dense
model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from .arguments import TARGETS, KPruneArguments
from .budgets import BudgetWarning
from .calibration.distance import distance
from .checkpoint.exporters import check_generation
from .checkpoint.hub import check_push
from .entries import Size
from .errors import ArgumentError
from .files.contents import is_empty
from .files.destination import as_text
from .files.exchange import recover
from .latency.timing import compare
from .options import Unasked
from .processes import together
from .publication import tell_of_the_save, write
from .report import PruningReport
from .resumption import Record, States
from .run import Run, warn_of
from .sizes import expected_bytes, model_size, prunable_flops
from .state import Pruner, adopt, in_place, origins_of
from .sweep import Sweep, SweepPoint, smallest_within


@dataclass
class Sweeper:
    """A sweep that is to be made. `KPrunePruner.sweep` documents its options.

    Args:
        pruner: It holds the dense model, and judges the others in the place of it.
    """

    pruner: Pruner
    budgets: Sequence[float | dict[str, float]]
    calibration_dataset: Any
    metric: str | None
    greater_is_better: bool
    max_drop: float | None
    refine: int
    output_dir: str | None
    inplace: bool
    states: States

    def __post_init__(self) -> None:
        self.dense = self.pruner.model
        self.best: tuple[SweepPoint, PreTrainedModel, PruningReport] | None = None
        self.pasts = dict[str, Record]()
        self.table: Sweep
        self.run: Run

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Each budget by the name of its option."""
        return [
            budget if isinstance(budget, dict) else {"sparsity": float(budget)} for budget in self.budgets
        ]

    def sweep(self) -> Sweep:
        """Prune for every budget and compare; with `max_drop`, let the pruner adopt the smallest model good
        enough.
        """
        self.pruner.args.check()
        self.check_metric()
        self.check_budgets()
        budgets = list(map(self.arguments, self.asked))
        self.check_places(budgets)
        hold_out = self.pruner.eval_dataset is None
        self.run = Run(self.pruner, self.calibration_dataset, budgets, hold_out, states=self.states)
        with self.pruner.callback_handler.unreported(), self.run.open():
            self.dense = self.pruner.model
            pasts = [self.past(budget) for budget in self.asked]
            done = sum(self.states.has(f"{past.name}/point") for past in pasts)
            self.states.say(f"{done} of {len(pasts)} budgets are done" if done else pasts[0].origin)
            self.run.pruning.calibration.check_held_out()
            self.table = Sweep([self.judge_dense()], self.key, self.greater_is_better)
            if self.max_drop is None:
                self.table.points += sorted(map(self.point, self.asked), key=lambda point: point.sparsity)
            else:
                sparsities = [budget["sparsity"] for budget in self.asked]
                smallest_within(self.point_at, self.table, sparsities, self.max_drop, self.refine)
        if self.best is not None and self.table.best:
            point, student, report = self.best
            assert point is self.table.points[self.table.best]
            warn_of(report)
            adopt(self.pruner, student, report, self.inplace)
        return self.table

    # ----------------------------------------------------------------------------------------------------
    # What can be refused before anything runs
    # ----------------------------------------------------------------------------------------------------

    def check_metric(self) -> None:
        """Raise `ArgumentError` for a metric that nothing gives, and for what is said of none."""
        if self.metric is not None and self.pruner.eval_dataset is None:
            raise ArgumentError(
                f"metric is {self.metric!r}, but there is no eval_dataset: pass it to KPrunePruner"
            )
        if self.metric is None and not self.greater_is_better:
            raise ArgumentError(
                "greater_is_better is False, but there is no metric that it is said of; pass metric"
            )
        if self.refine < 0:
            raise ArgumentError(f"refine is {self.refine}, expected at least 0")

    def check_budgets(self) -> None:
        """Raise `ArgumentError` for budgets that cannot be swept over; warn of one in the options, which has
        no effect.
        """
        asked, budgets, max_drop = self.asked, list(self.budgets), self.max_drop
        if not asked or any(len(each) != 1 or not each.keys() <= {"sparsity", *TARGETS} for each in asked):
            raise ArgumentError(
                f"budgets are {budgets}, expected at least one, each a fraction or a dict of one budget"
            )
        if max_drop is not None and (max_drop < 0 or any("sparsity" not in each for each in asked)):
            raise ArgumentError(
                f"max_drop is {max_drop} and budgets are {budgets}, expected at least 0, and fractions to "
                "remove"
            )
        if len({tuple(each.items()) for each in asked}) < len(asked):
            raise ArgumentError(f"budgets are {budgets}, expected each of them once")
        if not isinstance(self.pruner.args.sparsity, Unasked):
            name, value = self.pruner.args.budget
            warnings.warn(
                f"{name} is {value:,.6g} in the arguments, which a sweep does not use: it tries its own "
                "budgets",
                BudgetWarning,
                stacklevel=5,
            )

    def check_places(self, budgets: list[KPruneArguments]) -> None:
        """Raise `ArgumentError` for directories that the models for these budgets cannot be saved to."""
        pruner, args = self.pruner, self.pruner.args
        if self.output_dir is not None and args.push_to_hub:
            raise ArgumentError(
                "push_to_hub is True, but a sweep makes many models: push the one that you choose"
            )
        read = origins_of(pruner, self.calibration_dataset)
        if self.output_dir is not None:
            as_text(self.output_dir)
        with together(pruner.accelerator):
            if pruner.accelerator.is_main_process:
                if self.output_dir is not None or (self.max_drop is not None and args.output_dir is not None):
                    check_generation(pruner.model)
                if self.output_dir is not None:
                    size = sum(expected_bytes(pruner.model, budget) for budget in budgets)
                    for budget in self.asked:
                        if not self.states.has(f"{label(budget)}/facts"):  # else it was checked then
                            args.check_output_dir(self.place(budget), read, size)
                elif self.max_drop is not None and args.output_dir is not None:
                    args.check_output_dir(None, read)
                if args.push_to_hub:
                    check_push(args, args.output_dir)

    # ----------------------------------------------------------------------------------------------------
    # One model after the other
    # ----------------------------------------------------------------------------------------------------

    def arguments(self, budget: dict[str, Any]) -> KPruneArguments:
        """The options of the pruner with another budget."""
        return replace(self.pruner.args, **{**dict.fromkeys(("sparsity", *TARGETS)), **budget})

    def place(self, budget: dict[str, object]) -> str | None:
        """Where the model for a budget is saved, if it is."""
        if self.output_dir is None:
            return None
        return os.path.join(as_text(self.output_dir), label(budget))

    def past(self, budget: dict[str, Any]) -> Record:
        """What an interrupted sweep has kept of a model, and where this one keeps it."""
        name, rows = label(budget), self.pruner.eval_dataset
        if name not in self.pasts:
            count = len(rows) if hasattr(rows, "__len__") else None
            more = {"metric": self.key, "number of evaluation rows": count}
            self.pasts[name] = self.run.record(self.arguments(budget), name, more)
        return self.pasts[name]

    def point_at(self, sparsity: float) -> SweepPoint:
        """The model of which a fraction of the prunable FLOPs is removed."""
        return self.point({"sparsity": sparsity})

    def point(self, budget: dict[str, object]) -> SweepPoint:
        """Make the model for a budget, judge it, and save it if that was asked for, unless an interrupted
        sweep has."""
        past = self.past(budget)
        known = past.read("point")
        if known is not None:
            point = SweepPoint(**known[1])
            if not self.is_best(point):
                return point
        student, report = self.run.student(self.arguments(budget), past)
        if known is None:
            with in_place(self.pruner, student, report):
                point = self.judge(budget, report.after, report.sparsity)
                point.path = self.place(budget)
                if point.path is not None and not self.is_there(point.path, past):
                    tell_of_the_save(self.pruner, write(self.pruner, point.path))
            past.keep("point", {}, lambda: asdict(point))
            if self.max_drop is None:
                past.drop_model()
        if self.is_best(point):
            self.best = point, student, report
        return point

    def is_best(self, point: SweepPoint) -> bool:
        """Whether a model is the smallest so far that is good enough, if such a one is looked for."""
        if self.max_drop is None:
            return False
        least = self.table.quality(self.table.points[0]) - self.max_drop
        smallest = self.best is None or point.flops <= self.best[0].flops
        return smallest and self.table.quality(point) >= least

    def is_there(self, path: str, past: Record) -> bool:
        """Whether an interrupted sweep has saved a model already. Where nothing may be replaced, what is in
        its place is that."""
        there = False
        with together(self.pruner.accelerator):
            if past.began and not self.run.args.overwrite_output_dir:
                recover(path)
                there = os.path.isdir(path) and not is_empty(Path(path).resolve())
        (there,) = broadcast_object_list([there])
        return bool(there)

    def judge_dense(self) -> SweepPoint:
        """The dense model, which the others are compared with."""
        references, lengths = self.run.pruning.references, self.run.pruning.calibration.flops_lengths
        return self.judge({}, model_size(self.dense, references, prunable_flops(references, lengths)), 0.0)

    def judge(self, budget: dict[str, Any], size: Size, sparsity: float) -> SweepPoint:
        """Judge the model that is in the place of the dense one.

        Raises:
            ArgumentError: If the metric is no number.
        """
        pruner, pruning = self.pruner, self.run.pruning
        metrics = pruner.evaluate() if pruner.eval_dataset is not None else {}
        if self.key is not None and not math.isfinite(metrics.get(self.key, math.nan)):
            raise ArgumentError(f"metric is {self.metric!r}, expected a number among {metrics}")
        far = distance(pruning.calibration, pruner.model, pruning.teacher, pruning.loss)
        speedup = 1.0
        if pruner.accelerator.is_main_process and pruner.model is not self.dense:
            seconds = compare([self.dense, pruner.model], pruning.calibration.batches[-1].inputs)
            speedup = seconds[0] / seconds[1]
        (speedup,) = broadcast_object_list([speedup])
        return SweepPoint(budget, sparsity, size.flops, size.parameters, far, speedup, metrics)

    @property
    def key(self) -> str | None:
        """The metric as `evaluate()` calls it."""
        metric = self.metric
        return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"


def label(budget: dict[str, Any]) -> str:
    """A budget as the name of a directory."""
    return "-".join(f"{option}-{value:g}" for option, value in budget.items())
