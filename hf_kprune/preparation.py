"""One run of a pruner: inputs are checked and rows drawn before anything is measured; then a student is made
per budget.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.utils import logging

from .arguments import LATENCY_BATCH, KPruneArguments
from .budgets import BudgetWarning, Timing, budget_of
from .calibration.batches import Calibration, tokens_of
from .calibration.checks import gives_embeddings, try_loss
from .calibration.collate import collate
from .calibration.draw import draw_rows
from .calibration.knowledge import Knowledge
from .calibration.loss_check import BY_PRODUCTS
from .calibration.rows import row_tokens
from .calibration.sources import first_label, is_sized
from .calibration.tasks import EMBEDDINGS, knowledge_loss, knowledge_of_hidden_states, text_inputs
from .checkpoint.lineage import earlier_cuts, write_cuts
from .combinations import TIMES
from .errors import ArgumentError
from .evaluation import figures_of
from .latency.table import LatencyTable
from .memory import Memory, memory_of
from .methods import METHODS
from .methods.base import Method
from .processes import accompanied, check_alike, fingerprint, together
from .progress import Work
from .pruning import Pruning
from .report import PruningReport
from .resumption import Record, States
from .sizes import model_size, peak_memory, prunable_flops
from .state import Pruner, begin_phase, call, in_place, one_run
from .structure.facts import in_eval_mode
from .structure.offload import is_dispatched, read_state
from .structure.reach import last_stack, leaving, towers_left_alone
from .structure.readiness import bare_model, describe_units
from .structure.sublayers import LEFT_ALONE, Sublayer, find_sublayers
from .structure.surgery import restore, with_table_per_layer
from .text import public_name
from .version import versions


logger = logging.get_logger(__name__)

PLAN_TOKENS = 2_000
"""Tokens that a plan measures at most."""

MAY_DIFFER = (
    "output_dir",
    "overwrite_output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "html_report",
    "card_metadata",
)
"""Options that change nothing of the result, and that some scripts set on the main process only."""

MAY_CHANGE = (
    *(*MAY_DIFFER, "verbose", "max_shard_size", "per_device_batch_size", "per_device_eval_batch_size"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
)
"""Options that a run which goes on may have otherwise than it began with: the result is the same, up to
rounding where batches are of another size."""


SEVERAL = 3
"""Rows of a batch that a model is proved on."""


def first_batch(pruner: Pruner, model: PreTrainedModel) -> dict[str, Any] | None:
    """What a model that is to be pruned is called with on a few calibration rows; None if these are a stream,
    which can be read only once, or not there yet."""
    dataset, collator, reader = pruner.calibration_dataset, pruner.data_collator, pruner.processing_class
    if dataset is None or not is_sized(dataset):
        return None
    rows = draw_rows(model, dataset, reader, pruner.args, collator is not None, lambda _: 1, most=SEVERAL)
    return collate(rows.rows, collator, reader, model)[0]


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
            # no tower is left alone until it is known which of them run
            with accompanied(self.pruner.accelerator), leaving(self.model, ()):
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
            calibration = self.calibrate()
        calibration.check_same_rows()
        calibration.check_flops_length(model)
        lengths = calibration.flops_lengths  # are sums over processes, so what follows is the same on all
        calibration.check_enough_tokens()
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
        timed = self.time(teacher, calibration) if in_time else None
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
        loss = self.knowledge(calibration.sublayers)
        if loss.kinds is EMBEDDINGS:
            embeds = broadcast_object_list([gives_embeddings(calibration, model)])[0]
            if not embeds:
                loss = knowledge_of_hidden_states(model, args.temperature, calibration.sublayers)
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

    def calibrate(self) -> Calibration:
        """Draw the rows; find out which towers of the model run on them.

        Raises:
            ArgumentError: If there are no data.
        """
        if self.dataset is None:
            raise ArgumentError("no calibration_dataset: pass it to KPrunePruner or to prune()")
        model, pruner, processing_class = self.model, self.pruner, self.pruner.processing_class
        count = tokens_of(model, pruner.data_collator, processing_class)
        args, method = copy.copy(self.args), METHODS[self.args.method]
        if pruner.sentence_folder is not None:
            args.max_seq_length = pruner.sentence_folder.longest(args.max_seq_length, processing_class)
            processing_class = pruner.sentence_folder.reader(processing_class)
        if args.num_measure_tokens is None and method.measure_tokens is not None:
            args.num_measure_tokens = min(method.measure_tokens, args.num_tokens)
        args.statistics_dtype = args.statistics_dtype or method.dtype
        collates = pruner.data_collator is not None
        rows = draw_rows(model, self.dataset, processing_class, args, collates, count)
        make_batch = partial(
            collate,
            collator=pruner.data_collator,
            processing_class=pruner.processing_class,
            model=model,
        )
        inputs, _ = make_batch(rows.rows[:2])
        with in_eval_mode(model):
            left_alone = towers_left_alone(model, inputs, args.head_unit, args.towers)
        model.__dict__[LEFT_ALONE] = frozenset(left_alone)  # until `leaving` ends
        self.left_alone = {path.rstrip("."): reason for path, reason in left_alone.items()}
        few = PLAN_TOKENS if self.dry else None
        return Calibration(self.pruner.accelerator, rows, make_batch, model, args, count, few)

    def time(self, model: PreTrainedModel, calibration: Calibration) -> Timing:
        """The look-up table of a model, which the main process measures, or finds in the cache."""
        entry = None
        with together(self.pruner.accelerator):
            if self.pruner.accelerator.is_main_process:
                inputs = calibration.batches[0].inputs
                if "input_ids" in inputs and "pixel_values" not in inputs:
                    length = self.args.latency_length or math.ceil(max(calibration.lengths.values()))
                    inputs = dict(text_inputs(model, self.args.latency_batch_size, length))
                begin_phase(self.pruner, "time")
                entry = LatencyTable.cached(model, inputs, head_unit=self.args.head_unit), inputs
        table, inputs = broadcast_object_list([entry])[0]
        return Timing(model, table, inputs)

    def knowledge(self, sublayers: Sequence[Sublayer]) -> Knowledge:
        """The distance of outputs: the caller's, that of what `encode` gives, or that of the model's head."""
        args, folder = self.args, self.pruner.sentence_folder
        if self.pruner.compute_loss is not None:
            return Knowledge("custom", self.pruner.compute_loss, args.temperature, None)
        if folder is not None and args.pooling is None:
            loss = folder.knowledge(args.temperature)
            if loss is not None:
                return loss
        labels = (first_label(dataset) for dataset in self.datasets)
        label = next((label for label in labels if label is not None), None)
        loss = knowledge_loss(self.model, args.temperature, args.pooling or "mean", label, sublayers)
        # logits can be taken in parts only above the stack that gives them
        apart = sublayers[-1].stack_name != last_stack(self.model).stack_name
        return replace(loss, per_token=False) if loss.per_token and apart else loss

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
        report = self.report(args)
        with in_place(pruner, pruner.model, report):
            student = pruning.student(args, report, past)
        restore(student, model, pruning.modes)
        result = student if report.cut_something else model
        left = find_sublayers(result, *args.units)
        report.after = model_size(result, left, report.after.flops)
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
        record = Record(self.states, name, lambda: self.facts(args) | dict(more or {}))
        record.open(METHODS[args.method].one_shot)
        return record

    def facts(self, args: KPruneArguments) -> dict[str, object]:
        """What decides about a student, by the names that a message may give."""
        pruning, accelerator, loss = self.pruning, self.pruner.accelerator, self.pruner.compute_loss
        rows, config, device = pruning.calibration.rows, self.model.config.to_dict(), accelerator.device
        config = {name: value for name, value in config.items() if name not in ("_name_or_path", "kprune")}
        used = versions()
        facts = {name: value for name, value in args.to_dict().items() if name not in MAY_CHANGE}
        facts |= {name: used[name] for name in ("hf_kprune", "torch", "transformers")}
        facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts["number of processes"] = accelerator.num_processes
        facts["attention"] = self.model.config._attn_implementation
        facts["compute_loss"] = None if loss is None else getattr(loss, "__qualname__", type(loss).__name__)
        facts["knowledge"], facts["held out"] = pruning.loss.name, self.hold_out
        facts["rows"] = {name: value for name, value in rows.fingerprint.items() if name != "dataset"}
        facts["config"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        facts["weights"] = self.weights
        return facts

    @cached_property
    def weights(self) -> str:
        """Checksum of all tensors of the model."""
        tensors = sorted((name, fingerprint(tensor)) for name, tensor in read_state(self.model))
        return hashlib.sha256(repr(tensors).encode()).hexdigest()

    def report(self, args: KPruneArguments) -> PruningReport:
        """The report of a student, as far as it is known beforehand."""
        model, pruning, calibration = self.model, self.pruning, self.pruning.calibration
        sublayers = find_sublayers(model, *args.units)
        lengths = calibration.flops_lengths
        place = None if args.output_dir is None else public_name(args.output_dir)
        figures = figures_of(self.pruner)
        report = PruningReport(
            model=f"{public_name(model.config.name_or_path or 'a model')} ({type(model).__name__})",
            method=args.method,
            knowledge=pruning.loss.name,
            compared=pruning.compared,
            ignored=pruning.ignored,
            asked=dict([args.budget]),
            before=model_size(model, sublayers, prunable_flops(sublayers, lengths)),
            sequence_length=statistics.mean(lengths[name] for name in {s.stack_name for s in sublayers}),
            calibration=calibration.rows.fingerprint,
            arguments={**args.to_dict(), "output_dir": place},
            versions=versions(),
            device=f"{self.pruner.accelerator.device}, {self.pruner.accelerator.num_processes} process(es)",
            lineage=earlier_cuts(model, self.pruner.report),
            metrics={"before": figures} if figures else {},
        )
        if self.dry:
            report.estimate, counts = self.estimate(METHODS[args.method])
            report.calibration = report.calibration | counts
        return report

    def estimate(self, method: type[Method]) -> tuple[str, dict[str, int]]:
        """What a plan is estimated from, and what pruning does otherwise; counts of rows and tokens
        measured.
        """
        calibration = self.pruning.calibration
        count = tokens_of(self.model, self.pruner.data_collator, self.pruner.processing_class)
        tokens = sum(row_tokens(row, count) for row in calibration.rows.rows[: calibration.sample])
        text = (
            f"Estimated from {tokens:,} tokens ({calibration.sample:,} of {len(calibration.rows.rows):,} "
            "calibration rows), measured on the dense model, by one search and without tuning. "
        )
        if not method.one_shot:
            text += "prune() decides sublayer by sublayer, on what is pruned so far"
        else:
            ways = len(method.exponents)
            what = "numbers of heads" if self.args.uniform else "ways to split the budget over depth"
            trials = f" and tries up to {ways} {what}" if ways > 1 else ""
            text += f"prune() measures {calibration.rows.measured:,} rows{trials}"
        text += ": a sublayer may keep other units than here, and more or fewer of them."
        if self.args.budget[0] in TIMES:
            text += " Times are those of the look-up table; prune() measures cut models against them."
        text += f" It takes {self.memory}"  # `student` adds how long
        return text, {"rows_measured": calibration.sample, "tokens_measured": tokens}

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
