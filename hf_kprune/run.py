"""One run of a pruner: all is checked before anything is measured; then a student is made per budget."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.utils import logging

from .arguments import LATENCY_BATCH, KPruneArguments
from .budgets import BudgetWarning, budget_of
from .calibration.checks import try_loss
from .calibration.loss_check import BY_PRODUCTS
from .checkpoint.lineage import write_cuts
from .combinations import TIMES
from .errors import ArgumentError
from .memory import Memory, memory_of
from .methods import METHODS
from .preparation import calibrate, knowledge_of, times_of
from .processes import accompanied, check_alike, fingerprint, together
from .progress import Work
from .prospect import MAY_DIFFER, estimate, facts_of, report_of
from .pruning import Pruning
from .report import PruningReport
from .resumption import Record, States
from .sizes import model_size, peak_memory, prunable_flops
from .state import Pruner, begin_phase, call, in_place, one_run
from .structure.facts import in_eval_mode
from .structure.offload import is_dispatched, read_state
from .structure.reach import leaving
from .structure.readiness import bare_model, describe_units
from .structure.sublayers import LEFT_ALONE, find_sublayers
from .structure.surgery import restore, with_table_per_layer
from .structure.workbench import large_tensors_apart, needs_workbench


logger = logging.get_logger(__name__)


class Run:
    """A teacher that students are made of.

    Args:
        pruner: It holds the model, the options and the listeners. Its model is left as it is.
        dataset: The calibration data. None: those of the pruner.
        budgets: The options of each student to come.
        hold_out: Whether students are measured and tuned without the rows that they are judged by.
        dry: Whether students are estimates without weights, as `KPrunePruner.plan` asks for.
        states: Where is kept what it takes to go on after an interruption. None: nowhere.
    """

    def __init__(  # noqa: PLR0913
        self,
        pruner: Pruner,
        dataset: Any,
        budgets: Sequence[KPruneArguments],
        hold_out: bool = False,
        dry: bool = False,
        states: States | None = None,
    ):
        self.pruner, self.model, self.args = pruner, pruner.model, pruner.args
        self.dataset = pruner.calibration_dataset if dataset is None else dataset
        self.datasets = dataset, pruner.calibration_dataset, pruner.eval_dataset
        self.budgets, self.hold_out, self.dry = budgets, hold_out, dry
        self.is_main_process = pruner.accelerator.is_main_process
        self.seconds = dict[str, float]()
        self.left_alone = dict[str, str]()
        self.states = States(None, False, False, pruner.accelerator) if states is None else states
        self.pruning: Pruning
        self.memory: Memory

    @contextmanager
    def open(self) -> Iterator[Run]:
        """Prepare the run, and keep the teacher in evaluation mode while students are made.

        All that can be refused is refused here, before anything is measured.
        """
        with one_run(self.pruner):
            with self.phase("prepare"), together(self.pruner.accelerator):
                self.args.check()
                self.pruner.model = self.model = bare_model(self.model)
            lifts = needs_workbench(self.model, self.pruner.accelerator.device)
            memory = large_tensors_apart() if lifts else nullcontext()
            # no tower is left alone until it is known which of them run
            with memory, accompanied(self.pruner.accelerator), leaving(self.model, ()):
                with self.phase("prepare"):
                    self.pruning = self.prepare()
                with in_eval_mode(self.pruning.teacher):
                    self.check_loss()
                    yield self

    def prepare(self) -> Pruning:
        """Draw the rows, and check budgets and all else."""
        args, model = self.args, self.model
        with together(self.pruner.accelerator):
            describe_units(model, args.head_unit)
        alike = {name: value for name, value in args.to_dict().items() if name not in MAY_DIFFER}
        alike |= {"the budget": [each.budget for each in self.budgets], "the config": model.config.to_dict()}
        alike["resume_from_checkpoint"] = self.states.asked
        check_alike(self.pruner.accelerator, model, alike)
        with together(self.pruner.accelerator):
            calibration, self.left_alone = calibrate(self.pruner, args, self.dataset, self.dry)
        calibration.check_same_rows()
        calibration.check_flops_length(model)
        lengths = calibration.flops_lengths  # are sums over processes, so what follows is the same on all
        calibration.check_enough_tokens()
        calibration.check_counted()
        teacher = with_table_per_layer(model)
        before = model_size(
            teacher,
            find_sublayers(teacher, *args.units),
            prunable_flops(calibration.sublayers, lengths),
        )
        in_time = any(budget.budget[0] in TIMES for budget in self.budgets)
        if in_time and is_dispatched(model):
            raise ArgumentError(
                f"{self.args.budget[0]} is about the time of a model that lies on one device as a whole, and "
                f"layers of {type(model).__name__} wait elsewhere; load it without offload or device_map, or "
                "give sparsity or target_params"
            )
        timed = times_of(self.pruner, teacher, calibration) if in_time else None
        remarks = [
            f"{path} is left alone, as {reason}; the budget is of the rest"
            for path, reason in self.left_alone.items()
        ]
        for budget in self.budgets:
            remarks += budget_of(calibration.sublayers, budget, lengths, before, timed, self.dry).remarks()
        if not in_time and (args.latency_length is not None or args.latency_batch_size != LATENCY_BATCH):
            remarks.append(
                "latency_batch_size and latency_length have no effect without target_latency or "
                "target_speedup"
            )
        for remark in dict.fromkeys(remarks):
            warnings.warn(remark, BudgetWarning, stacklevel=6)
        loss = knowledge_of(self.pruner, calibration, self.datasets)
        if self.pruner.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work = Work(lambda done: self.tell("on_progress", done), len(self.budgets))
        calibration.step = work.step
        method = METHODS[args.method](args)
        tunes = args.tune and method.tunes
        self.memory = memory_of(model, calibration.sublayers, calibration, method, loss, tunes)
        if not self.dry:
            self.memory.check(self.pruner.accelerator.device)
        context = args, self.hold_out, self.phase, self.tell, work, self.dry
        return Pruning(model, calibration, loss, before, timed, *context)

    def check_loss(self) -> None:
        """Try the knowledge loss on a batch; say which outputs it reads, and warn of answers that it does
        not.
        """
        pruning, name = self.pruning, type(self.model).__name__
        loss = pruning.loss
        with together(self.pruner.accelerator):
            names = try_loss(pruning.calibration, pruning.teacher, loss)
        pruning.compared, pruning.ignored = broadcast_object_list([names])[0]
        logger.info("%s compares the outputs %s of %s", loss.name, ", ".join(pruning.compared), name)
        answers = [output for output in pruning.ignored if output not in BY_PRODUCTS]
        if answers:
            how = "pass compute_loss to count them"
            advice = how if self.pruner.compute_loss is None else "count them in compute_loss too"
            warnings.warn(
                f"the knowledge loss ({loss.name}) compares {', '.join(pruning.compared)} of {name} and "
                f"ignores {', '.join(answers)}, which pruning may change; {advice}",
                stacklevel=5,
            )

    def student(
        self, args: KPruneArguments, past: Record | None = None
    ) -> tuple[PreTrainedModel, PruningReport]:
        """A pruned copy of the model, with flags and dtypes of the model, and the report of it.

        Args:
            args: Its budget is in them.
            past: What is done already. None: nothing, and nothing of it is kept.
        """
        past = past or Record(States(None, False, False, self.pruner.accelerator), "", dict)
        begin = time.perf_counter()
        model, pruning, pruner = self.model, self.pruning, self.pruner
        report = report_of(pruner, pruning, args)
        if self.dry:
            report.estimate, counts = estimate(pruner, pruning, self.memory)
            report.calibration = report.calibration | counts
        with in_place(pruner, pruner.model, report):
            student = pruning.student(args, report, past)
        restore(student, model, pruning.modes)
        result = student if report.cut_something else model
        sublayers = find_sublayers(result, *args.units)
        report.after = model_size(result, sublayers, report.after.flops)
        report.after.all_flops = report.before.all_flops - report.before.flops + report.after.flops
        report.achieved = pruning.achieved(student)
        total = self.seconds.get("prepare", 0.0) + time.perf_counter() - begin
        report.seconds = {**self.seconds, "total": total}
        if self.dry:
            seconds = pruning.seconds(self.seconds)
            report.estimate += f", and {seconds}."
            report.expected_seconds = {**seconds.phases, "total": seconds.total}
        self.seconds.clear()
        report.peak_memory = peak_memory(self.pruner.accelerator.device)
        write_cuts(student, [*report.lineage, report.cut()])
        report.left_alone = dict(self.left_alone)
        student.__dict__.pop(LEFT_ALONE, None)
        return student, report

    def record(
        self, args: KPruneArguments, name: str = "run", more: Mapping[str, object] | None = None
    ) -> Record:
        """What is kept of an earlier run for the budget in `args`, and what will be kept of this one.

        Args:
            args: Options.
            name: What the run is called among those that share measurements.
            more: Facts beside those of the run.

        Raises:
            ArgumentError: If what is there is of other data, options, weights or versions.
        """
        record = Record(self.states, name, partial(self.facts, args, more or {}))
        record.open(METHODS[args.method].one_shot)
        return record

    def facts(self, args: KPruneArguments, more: Mapping[str, object]) -> dict[str, object]:
        """What decides about a student, and `more` facts."""
        return facts_of(self.pruner, self.pruning, args, self.hold_out, self.weights) | dict(more)

    @cached_property
    def weights(self) -> str:
        """Checksum of all tensors of the model."""
        tensors = sorted((name, fingerprint(tensor)) for name, tensor in read_state(self.model))
        return hashlib.sha256(repr(tensors).encode()).hexdigest()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell listeners of a phase, and count its seconds."""
        begin = time.perf_counter()
        begin_phase(self.pruner, name)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def tell(self, event: str, *args: object, **kwargs: object) -> None:
        """Tell listeners of an event, as the function `tell` does, but ask once only which process this
        is.
        """
        if self.is_main_process:
            call(self.pruner, event, *args, **kwargs)


def warn_of(report: PruningReport) -> None:
    """Warn of a cut that empties sublayers, or that leaves little of a kind of unit."""
    if remarks := report.remarks():
        out = "ask for less, set min_heads or min_neurons, or spare a kind with prune_heads=False or "
        out += "prune_ffn=False or prune_experts=False"
        warnings.warn(f"{'; '.join(remarks)}. If that is too much: {out}", BudgetWarning, stacklevel=4)
