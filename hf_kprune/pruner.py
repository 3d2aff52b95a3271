"""`KPrunePruner`: the page to read. `_prune_sublayers` is the whole algorithm; each line of it is a module of its own."""

from __future__ import annotations

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PredictionOutput

from .arguments import KPruneArguments
from .calibration import Calibration, in_eval_mode, together, tokens_of
from .callbacks import CallbackHandler, KPruneCallback, PrinterCallback, ProgressCallback, ReportingCallback
from .checkpoint import save_atomically
from .cost import BudgetTerms, model_size, peak_memory
from .detect import describe
from .errors import ArgumentError
from .heads import Knowledge, KnowledgeLoss, knowledge_loss
from .hooks import State
from .hub import model_card, push_folder
from .interface import Method, Statistics
from .loading import load_model, load_tokenizer
from .methods import METHODS
from .reconstruction import correct_drift
from .report import PruningReport, SublayerReport
from .rows import draw_rows
from .search import TOLERANCE, split, uniform_search
from .sublayers import (
    Sublayer,
    check_model,
    correct_inputs,
    cut,
    find_sublayers,
    has_bias,
    in_unit_order,
    set_output,
    twin,
    uniform_names,
    with_own_tables,
    write_plan,
    write_stock_config,
)
from .version import versions


Decision = Callable[[int, list[State], bool], tuple[Tensor, Tensor | None]]
"""(sublayer, student's streams below it, whether the student differs from the teacher) -> units to keep, their scores."""


class KPrunePruner:
    """Makes a Transformers model smaller and faster without retraining (K-prune, Park et al., ICLR 2024).

    Modelled on `Trainer`:

        pruner = KPrunePruner(model, KPruneArguments(sparsity=0.5), calibration_dataset=texts, processing_class=tokenizer)
        report = pruner.prune()
        pruner.save_model("pruned")

    Args:
        model: A `PreTrainedModel`, or the name or path of one, which is loaded with the class that its config names.
            `prune()` changes it in place, all at once at its end; submodules that you hold on to stay dense.
        args: Options; `sparsity` is the fraction of prunable FLOPs to **remove**.
        calibration_dataset: A `datasets.Dataset`, an `IterableDataset`, any map-style dataset of tokenised rows, or a
            plain list of strings (or of pairs of strings), tokenised with `processing_class`. Labels in it are ignored.
            If None, it must be passed to `prune()`.
        data_collator: Makes batches of rows. Default: pads with `processing_class`.
        eval_dataset: For `evaluate()`, as in `Trainer`.
        processing_class: Tokenizer, saved with the model. Default, if `model` is a name or path: the one found there.
        compute_metrics: For `evaluate()`, as in `Trainer`.
        callbacks: Instances or classes of `KPruneCallback`, added to the default ones.
        compute_loss: Replaces the predictive knowledge chosen by the model's head: (student_outputs, teacher_outputs,
            valid_tokens (B, T)) -> tensor (B,), one differentiable number per sequence.

    Raises:
        UnsupportedModelError: If the model cannot be pruned: unknown architecture, quantised, with adapters, ...
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        args: KPruneArguments | None = None,
        calibration_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[KPruneCallback | type[KPruneCallback]] | None = None,
        compute_loss: KnowledgeLoss | None = None,
    ):
        self.args = args or KPruneArguments()
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or load_tokenizer(os.fspath(model))
            model = load_model(os.fspath(model))
        check_model(model)
        describe(model, by=self.args.head_unit)
        self.model = model.to(self.accelerator.device)
        self.calibration_dataset = calibration_dataset
        self.data_collator, self.processing_class = data_collator, processing_class
        self.eval_dataset, self.compute_metrics = eval_dataset, compute_metrics
        self.compute_loss = compute_loss
        self.report: PruningReport | None = None
        self._saved: str | None = None
        self._seconds: dict[str, float] = {}
        self.callback_handler = CallbackHandler([PrinterCallback() if self.args.disable_tqdm else ProgressCallback()])
        if self.args.report_to not in ([], ["none"]):
            self.add_callback(ReportingCallback(self.args))
        for callback in callbacks or []:
            self.add_callback(callback)

    @property
    def accelerator(self) -> Accelerator:
        """Device and processes. Made anew each time: `TrainingArguments`, of whomever, reset what older ones share."""
        return Accelerator(cpu=self.args.use_cpu)

    # -----------------------------------------------------------------------------------------------------------------
    # Pruning
    # -----------------------------------------------------------------------------------------------------------------

    def prune(self, calibration_dataset: Any = None) -> PruningReport:
        """Prune the model in place and return what was done.

        Until the last moment a copy is worked on: an error or Ctrl-C leaves the model as it was.

        Raises:
            BudgetError: If `sparsity` is out of reach, before anything runs.
            CalibrationError: If the calibration data cannot be used.
            ArgumentError: If options or inputs contradict each other.
        """
        with together(self.accelerator):
            if self.args.output_dir is not None and self.accelerator.is_main_process:
                self.args.check_output_dir()
        student, report = self._prune_copy(calibration_dataset)
        if any(len(entry.kept) < entry.units for entry in report.sublayers):
            self.model.__dict__.update(student.__dict__)  # one step: nothing can come between
        self.report, self._saved = report, None
        self._tell("on_prune_end", model=self.model)
        return report

    def plan(self, calibration_dataset: Any = None) -> PruningReport:
        """A dry run: the report of what `prune()` would do, to the unit, with the model left as it is."""
        listeners = self.callback_handler.callbacks
        self.callback_handler.callbacks = [c for c in listeners if not isinstance(c, ReportingCallback)]
        try:
            return self._prune_copy(calibration_dataset)[1]
        finally:
            self.callback_handler.callbacks = listeners

    def _prune_sublayers(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        calibration: Calibration,
        loss: Knowledge,
        report: PruningReport,
    ) -> None:
        """For each sublayer, bottom to top: decide which units stay, cut, tune."""
        args, method = self.args, METHODS[self.args.method](self.args)
        sublayers, references = (find_sublayers(model, args.head_unit) for model in (student, teacher))
        terms = BudgetTerms(sublayers, args, calibration.lengths)
        with self._phase("measure"):
            calibration.check(teacher, references)
        if method.one_shot:
            decide = self._decided(student, sublayers, teacher, references, calibration, loss, method, terms, report)
        else:
            decide = self._deciding(student, sublayers, teacher, references, calibration, loss, method, terms)
        self._bottom_up(student, sublayers, teacher, references, calibration, method, decide, report)
        if args.uniform:
            write_stock_config(student, sublayers)
        else:
            write_plan(student, sublayers)
        report.sparsity = 1 - terms.cost_from(0) / terms.total
        report.after.flops = terms.cost_from(0)

    def _bottom_up(
        self,
        student: PreTrainedModel,
        sublayers: list[Sublayer],
        teacher: PreTrainedModel,
        references: list[Sublayer],
        calibration: Calibration,
        method: Method,
        decide: Decision,
        report: PruningReport | None = None,
    ) -> None:
        """Cut each sublayer of `student` to what `decide` keeps and tune it (KPWT) against `teacher`, which also corrects for
        the error from below. Callbacks and `report` are told, if there is a report."""
        teacher_streams, streams = calibration.bottom(), calibration.bottom()
        changed = False  # whether the student differs from the teacher yet
        for i, sublayer in enumerate(sublayers):
            begin, units = time.perf_counter(), sublayer.num_units
            entry = SublayerReport(sublayer.name, sublayer.kind, units)
            if report is not None:
                self._tell("on_sublayer_begin", sublayer.name, model=student)
            keep, scores = decide(i, streams, changed)
            cut(sublayer, keep)
            changed = changed or not bool(keep.all())
            with self._phase("tune" if report is not None else "search"):
                if changed and self.args.tune and method.tunes:
                    around = (student, sublayers, streams, teacher, references, teacher_streams, i)
                    self._tune(sublayer, calibration, method, around, entry)
                calibration.advance(student, sublayers, i, streams)
                if not changed:
                    teacher_streams = list(streams)
            if report is not None:
                entry.kept = keep.nonzero().flatten().tolist()
                entry.scores = None if scores is None else [float(f"{score:.6g}") for score in scores.tolist()]
                entry.flops_left = sum(s.num_units * s.unit_flops(calibration.lengths) for s in sublayers)
                entry.seconds = time.perf_counter() - begin
                report.sublayers.append(entry)
                self._tell("on_sublayer_end", entry, model=student)

    def _tune(
        self, sublayer: Sublayer, calibration: Calibration, method: Method, around: tuple[Any, ...], entry: SublayerReport
    ) -> None:
        if method.tune_inputs and sublayer.num_units:
            for paths, equations in calibration.input_equations(*around):
                drift = correct_drift(equations, method.ridge, has_bias(sublayer, paths))
                correct_inputs(sublayer, paths, *calibration.agree([drift.weight, cast(Tensor, drift.bias)]))
        equations = calibration.normal_equations(*around)
        fit = method.tune(equations, in_unit_order(sublayer), sublayer.bias, sublayer.unit_width)
        set_output(sublayer, *calibration.agree([fit.weight] + ([] if fit.bias is None else [fit.bias])))
        entry.error_before, entry.error_after = fit.error_before, fit.error_after
        entry.damping, entry.undetermined = fit.damping, fit.undetermined

    def _deciding(
        self,
        student: PreTrainedModel,
        sublayers: list[Sublayer],
        teacher: PreTrainedModel,
        references: list[Sublayer],
        calibration: Calibration,
        loss: Knowledge,
        method: Method,
        terms: BudgetTerms,
    ) -> Decision:
        """K-prune's way: measure every unit from the sublayer up on the student as pruned so far, search a mask for all of
        them (KPMS), and use it for this sublayer only."""
        args = self.args
        with self._phase("measure"):
            teacher_top = calibration.top(teacher, references)
        alike = uniform_names(sublayers, args.prune_heads, args.prune_ffn) if args.uniform else []

        def decide(i: int, streams: list[State], changed: bool) -> tuple[Tensor, Tensor | None]:
            spent = sum(cost * s.num_units for cost, s in zip(terms.costs[:i], sublayers[:i], strict=True))
            budget = terms.remaining(spent, i)
            if terms.cost_from(i) <= budget * (1 + TOLERANCE) or terms.minimum[i] >= sublayers[i].num_units:
                return torch.ones(sublayers[i].num_units, dtype=torch.bool), None
            with self._phase("measure"):
                measured = calibration.measure(
                    student, sublayers, i, streams, teacher, references, teacher_top, loss if changed else None
                )
            with self._phase("search"):
                for statistics, cost in zip(measured, terms.costs[i:], strict=True):
                    statistics.cost = cost
                scores = [method.score(s) for s in measured]
                if args.uniform and not terms.fixed:
                    left = terms.costs[i:], budget, terms.minimum[i:], terms.multiple[i:], alike[i:], terms.allowed[i:]
                    terms.fix([s.num_units for s in sublayers[:i]] + uniform_search(scores, *left))
                    budget = terms.remaining(spent, i)
                masks = method.search(measured, scores, budget, terms.minimum[i:], terms.multiple[i:])
                return calibration.agree([masks[0].int()])[0].bool().cpu(), scores[0]

        return decide

    def _decided(
        self,
        dense: PreTrainedModel,
        sublayers: list[Sublayer],
        teacher: PreTrainedModel,
        references: list[Sublayer],
        calibration: Calibration,
        loss: Knowledge,
        method: Method,
        terms: BudgetTerms,
        report: PruningReport,
    ) -> Decision:
        """The way of one-shot methods: measure every unit once, on the dense model; of the ways to split the budget over depth
        take the one whose student, cut and tuned, is nearest to the teacher on rows held out."""
        if terms.total <= terms.budget * (1 + TOLERANCE):
            return lambda i, *_: (torch.ones(sublayers[i].num_units, dtype=torch.bool), None)
        measured, scores = [], []
        with self._phase("measure"):
            of_all = calibration.measure_dense(dense, sublayers, method.needs, loss)
            for statistics, cost in zip(of_all, terms.costs, strict=True):
                statistics.cost = cost
                scores.append(method.score(statistics).cpu())
                statistics.gram = statistics.metric = None
                measured.append(statistics)
        exponents, few = method.exponents, calibration.trial()
        if len(exponents) > 1 and not calibration.rows.held_out:
            warnings.warn(
                f"{calibration.rows.measured} calibration rows are measured on, too few to hold some out, so the budget is split "
                "without trying how; give at least 4 rows, shorter ones if need be, and a larger num_measure_tokens",
                stacklevel=2,
            )
            exponents = (1.0,)
        with self._phase("search"):
            plans = {}
            for exponent in exponents:
                at = scores if exponent is None else split(scores, terms.costs, exponent)
                masks = self._masks(method, measured, at, terms)
                plans[exponent] = [mask.bool().cpu() for mask in calibration.agree([mask.int() for mask in masks])]
        for exponent, masks in plans.items() if len(plans) > 1 else ():
            student = twin(dense)
            layers = find_sublayers(student, self.args.head_unit)
            self._bottom_up(student, layers, teacher, references, few, method, lambda i, *_, m=masks: (m[i], None))
            with self._phase("search"):
                report.trials[str(exponent)] = calibration.distance(student, teacher, loss)
        best = min(plans, key=lambda exponent: report.trials.get(str(exponent), 0.0))
        return lambda i, *_: (plans[best][i], scores[i])

    def _masks(self, method: Method, measured: list[Statistics], scores: list[Tensor], terms: BudgetTerms) -> list[Tensor]:
        if self.args.uniform:
            alike = uniform_names(terms.sublayers, self.args.prune_heads, self.args.prune_ffn)
            left = terms.costs, terms.budget, terms.minimum, terms.multiple, alike, terms.allowed
            terms = copy.copy(terms)
            terms.fix(uniform_search(scores, *left))
        return method.search(measured, scores, terms.remaining(0.0, 0), terms.minimum, terms.multiple)

    def _prune_copy(self, calibration_dataset: Any) -> tuple[PreTrainedModel, PruningReport]:
        """Prune a copy of the model. Everything that can be refused is refused here, before anything runs."""
        args, model = self.args, self.model
        begin, self._seconds = time.perf_counter(), {}
        with self._phase("prepare"):
            check_model(model)
            with together(self.accelerator):
                calibration = self._calibration(model, calibration_dataset)
            calibration.check_same_rows()
            lengths = calibration.lengths  # summed over processes, so what follows is the same on all of them
            calibration.check_enough_tokens()
            terms = BudgetTerms(calibration.sublayers, args, lengths)
            if args.uniform:
                uniform_names(terms.sublayers, args.prune_heads, args.prune_ffn)
            if self.compute_loss is not None:
                loss = Knowledge("custom", self.compute_loss, args.temperature, None)
            else:
                loss = knowledge_loss(model, args.temperature, args.pooling)
            report = PruningReport(
                model=f"{model.config.name_or_path or 'a model'} ({type(model).__name__})",
                method=args.method,
                knowledge=loss.name,
                sparsity_asked=args.sparsity,
                before=model_size(model, terms.sublayers, terms.total),
                sequence_length=sum(lengths.values()) / len(lengths),
                calibration=calibration.rows.fingerprint,
                arguments=args.to_dict(),
                versions=versions(),
                device=f"{self.accelerator.device}, {self.accelerator.num_processes} process(es)",
            )
            if self.accelerator.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # statistics of half-precision models are taken in float32; what is saved keeps the model's dtype
            half = model.dtype in (torch.float16, torch.bfloat16)
            teacher = with_own_tables(copy.deepcopy(model).float() if half else model)
            student = copy.deepcopy(teacher)
            student.requires_grad_(False)
        modes = {name: module.training for name, module in model.named_modules()}
        names = [s.name for s in terms.sublayers]
        previous, self.report = self.report, report
        try:
            self._tell("on_prune_begin", model=student, sublayers=names)
            with in_eval_mode(teacher):
                student.eval()
                self._prune_sublayers(student, teacher, calibration, loss, report)
        finally:
            self.report = previous
        for name, module in student.named_modules():
            module.training = modes.get(name, model.training)
        originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            original = originals.get(name)  # a table of positions of its own has none
            tensor.data = tensor.data.to(model.dtype if original is None else original.dtype)
            tensor.requires_grad_(original is None or original.requires_grad)
        result = student if any(len(entry.kept) < entry.units for entry in report.sublayers) else model
        report.after = model_size(result, find_sublayers(result, args.head_unit), report.after.flops)
        report.seconds = {**self._seconds, "total": time.perf_counter() - begin}
        report.peak_memory = peak_memory(self.accelerator.device)
        return student, report

    def _calibration(self, model: PreTrainedModel, dataset: Any) -> Calibration:
        dataset = self.calibration_dataset if dataset is None else dataset
        if dataset is None:
            raise ArgumentError("no calibration_dataset: pass it to KPrunePruner or to prune()")
        count = tokens_of(model, self.data_collator, self.processing_class)
        args, method = self.args, METHODS[self.args.method](self.args)
        if args.num_measure_tokens is None and method.measure_tokens is not None:
            args = replace(args, num_measure_tokens=min(method.measure_tokens, args.num_tokens))
        args = replace(args, statistics_dtype=args.statistics_dtype or method.dtype)
        rows = draw_rows(model, dataset, self.processing_class, args, self.data_collator is not None, count)
        return Calibration(self.accelerator, rows, self.data_collator, self.processing_class, model, args, count)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def _tell(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.accelerator.is_main_process:
            self.callback_handler.call(event, self.args, self.report, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # As in Trainer
    # -----------------------------------------------------------------------------------------------------------------

    def add_callback(self, callback: KPruneCallback | type[KPruneCallback]) -> None:
        """Add a callback, an instance or a class."""
        self.callback_handler.callbacks.append(callback() if isinstance(callback, type) else callback)

    def remove_callback(self, callback: KPruneCallback | type[KPruneCallback]) -> None:
        """Remove a callback, or all callbacks of a class."""
        keep = [c for c in self.callback_handler.callbacks if c is not callback and type(c) is not callback]
        self.callback_handler.callbacks = keep

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`Trainer.evaluate` of the model as it is now."""
        with self._trainer() as trainer:
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            metrics: dict[str, float] = trainer.evaluate(dataset, ignore_keys, metric_key_prefix)
            return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """`Trainer.predict` of the model as it is now."""
        with self._trainer() as trainer:
            return trainer.predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _trainer(self) -> Iterator[Trainer]:
        with tempfile.TemporaryDirectory() as unused:
            arguments = self.args.training_arguments(unused)
            arguments.report_to = []
            yield Trainer(
                model=self.model,
                args=arguments,
                data_collator=self.data_collator,
                processing_class=self.processing_class,
                compute_metrics=self.compute_metrics,
            )

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model as an ordinary checkpoint with tokenizer, report and model card; push it if `push_to_hub`.

        It is written aside, reloaded, compared tensor by tensor and only then moved to `output_dir`.

        Raises:
            ArgumentError: If `output_dir` is missing, or holds files and `overwrite_output_dir` is False.
            CheckpointError: If it does not load back as it was saved.
        """
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                path = self.args.check_output_dir(output_dir)
                save_atomically(self.model, path, self.args.max_shard_size, self._save_beside)
                self._tell("on_save", path, model=self.model)
        self._saved = output_dir or self.args.output_dir
        if self.args.push_to_hub:
            self._push()

    def _save_beside(self, directory: str) -> None:
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        if self.report is not None:
            self.report.save(directory)
        self.create_model_card(output_dir=directory)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        output_dir: str | None = None,
    ) -> None:
        """Write README.md, a model card, into `output_dir`, an existing directory (default: the one of the options).

        The other arguments are those of `Trainer.create_model_card`.
        """
        directory = output_dir or self.args.output_dir
        if directory is None:
            raise ArgumentError("no output_dir: pass it to create_model_card() or to KPruneArguments")
        if self.accelerator.is_main_process:
            card = model_card(
                self.model,
                self.report,
                language=language,
                license=license,
                tags=tags,
                model_name=model_name,
                finetuned_from=finetuned_from,
                tasks=tasks,
                dataset_tags=dataset_tags,
                dataset=dataset,
                dataset_args=dataset_args,
            )
            Path(directory, "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str = "K-pruned model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the saved checkpoint to the Hub, after saving it if need be.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Instead of `hub_token`.
            revision: Branch, instead of `hub_revision`; made if it does not exist.
            kwargs: For `huggingface_hub.HfApi.upload_folder`.

        Returns:
            What `upload_folder` returns, on the main process; None on others.
        """
        if self._saved is None:
            push, self.args.push_to_hub = self.args.push_to_hub, False
            try:
                self.save_model()
            finally:
                self.args.push_to_hub = push
        return self._push(commit_message, token, revision, run_as_future=not blocking, **kwargs)

    def _push(
        self, commit_message: str = "K-pruned model", token: str | None = None, revision: str | None = None, **kwargs: Any
    ) -> Any:
        with together(self.accelerator):
            if not self.accelerator.is_main_process:
                return None
            return push_folder(str(self._saved), self.args, commit_message, token, revision, **kwargs)
