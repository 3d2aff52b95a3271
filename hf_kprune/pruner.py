"""`KPrunePruner`, modelled on `Trainer`. The algorithm is in algorithm.py."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers import PrinterCallback as PrintsMetrics
from transformers.trainer_utils import BestRun, PredictionOutput
from transformers.utils import logging

from .algorithm import Pruning, Timed
from .arguments import LATENCY_BATCH, TARGETS, TIMES, KPruneArguments, Unasked
from .budget import BudgetTerms, BudgetWarning, expected_bytes, model_size, peak_memory, prunable_flops
from .calibration.calibration import Calibration, tokens_of
from .calibration.collate import collate
from .calibration.embeddings import folder_of, refuse_wrapper
from .calibration.metrics import evaluate_texts, metrics_of
from .calibration.rows import draw_rows, row_tokens
from .calibration.tasks import BY_PRODUCTS, Knowledge, KnowledgeLoss, knowledge_loss
from .callbacks import CallbackHandler, KPruneCallback, PrinterCallback, ProgressCallback, ReportingCallback
from .checkpoint.hub import check_card_place, check_push, model_card, push_folder
from .checkpoint.lineage import earlier_cuts, write_cuts
from .checkpoint.loading import load_model, load_tokenizer
from .checkpoint.remote_code import check_code_travels
from .checkpoint.saving import save_atomically
from .errors import ArgumentError, CheckpointError, KPruneError
from .files.destination import as_text, origins
from .latency.table import LatencyTable, compare
from .methods import METHODS
from .methods.base import Method
from .processes import accompanied, check_alike, together
from .progress import Work
from .report import PruningReport, Size
from .structure.checks import check_described, check_model, unwrapped
from .structure.detect import describe
from .structure.facts import in_eval_mode, is_causal, text_inputs
from .structure.reach import leaving, towers_left_alone
from .structure.sublayers import LEFT_ALONE, find_sublayers, uniform_names, with_own_tables
from .structure.surroundings import plain_modes, undisturbed
from .sweep import Sweep, SweepPoint, smallest_within
from .text import public_name
from .validation import checked, checked_arguments, show
from .version import versions


logger = logging.get_logger(__name__)

PLAN_TOKENS = 2_000
"""Tokens that a plan measures at most."""

RANGES = {"obs": {"ridge": (1e-4, 1.0)}, "kprune": {"lambda_rep": (1e-6, 1.0), "mu": (4.0, 256.0)}}
"""What `hyperparameter_search` varies of each method: the pull of tuned weights towards what they were; how K-prune weighs
its two kinds of knowledge, and heads against neurons."""


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Add to an error, whatever it is, what it did not undo."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


MAY_DIFFER = ("output_dir", "overwrite_output_dir", "disable_tqdm", "report_to", "run_name")
"""Options that change nothing of the result, and that some scripts set on the main process only."""


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
        calibration_dataset: Tokenised rows, or texts, pairs of texts or chats, which `processing_class` tokenises: a
            `datasets.Dataset`, a list, a generator, a `DataLoader`, a dict of columns, a table of pandas, a list of tensors
            (1, L) or (L,), ... `KPruneArguments.text_columns` names the columns of texts. Labels in it are ignored. If None,
            it must be passed to `prune()`.
        data_collator: Makes batches of rows. Default: pads with `processing_class`.
        eval_dataset: For `evaluate()`, as in `Trainer`.
        processing_class: Tokenizer, saved with the model. Default, if `model` is a name or path: the one found there.
        compute_metrics: For `evaluate()`, as in `Trainer`. Default: the usual figures of the model's task.
        callbacks: Instances or classes of `KPruneCallback`, added to the default ones.
        compute_loss: Replaces the predictive knowledge chosen by the model's head: (student_outputs, teacher_outputs,
            valid_tokens (B, T)) -> tensor (B,), one differentiable number per sequence.

    Raises:
        UnsupportedModelError: If the model cannot be pruned: unknown architecture, quantised, with adapters, ...
    """

    @checked_arguments(
        "model",
        args="KPruneArguments(sparsity=0.5); its names shared with TrainingArguments mean the same",
        data_collator="an object or a function that makes a batch of a list of rows",
        compute_metrics="a function from an EvalPrediction to a dict of numbers",
        compute_loss="a function of (student_outputs, teacher_outputs, valid_tokens)",
        callbacks="[callback], each derived from hf_kprune.KPruneCallback, which is no TrainerCallback",
    )
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
        self.args.check()
        refuse_wrapper(model)
        check_is_model(model)
        check_processing_class(processing_class)
        if eval_dataset is not None:
            check_rows("eval_dataset", eval_dataset)
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or load_tokenizer(os.fspath(model))
            model = load_model(os.fspath(model))
        model = self._unspoilt(model)
        self.sentence_folder = folder_of(model)
        if self.sentence_folder is not None:
            self.sentence_folder.check(self.args, compute_loss is not None)
        self._describe(model)
        self.model = model.to(self.accelerator.device)
        self.calibration_dataset = calibration_dataset
        self.data_collator, self.processing_class = data_collator, processing_class
        self.eval_dataset, self.compute_metrics = eval_dataset, compute_metrics
        self.compute_loss = compute_loss
        self.report: PruningReport | None = None
        self._saved: str | None = None
        self._seconds = dict[str, float]()
        self._left_alone = dict[str, str]()
        self._runs = 0
        shown = ((ProgressCallback, not self.args.disable_tqdm), (PrinterCallback, self.args.verbose))
        self.callback_handler = CallbackHandler([kind() for kind, wanted in shown if wanted])
        if self.args.report_to not in ([], ["none"]):
            self.add_callback(ReportingCallback(self.args))
        for callback in callbacks or []:
            self.add_callback(callback)

    def _unspoilt(self, model: Any) -> PreTrainedModel:
        """The model without what others have wrapped around it, if nothing about it forbids to prune it."""
        with plain_modes():
            model = unwrapped(model)
            check_model(model)
        return cast(PreTrainedModel, model)

    def _describe(self, model: PreTrainedModel) -> None:
        """See to it that heads and neurons are known and can be cut, and that what is saved can be loaded."""
        with plain_modes():
            describe(model, by=self.args.head_unit)
            check_described(model, self.args.head_unit)

    @property
    def accelerator(self) -> Accelerator:
        """Device and processes. Made anew each time: `TrainingArguments`, of whomever, reset what older ones share."""
        return Accelerator(cpu=self.args.use_cpu)

    # -----------------------------------------------------------------------------------------------------------------
    # Pruning
    # -----------------------------------------------------------------------------------------------------------------

    @plain_modes()
    def prune(self, calibration_dataset: Any = None) -> PruningReport:
        """Prune the model in place and return what was done.

        Until the last moment a copy is worked on: an error or Ctrl-C leaves the model as it was.

        Raises:
            BudgetError: If `sparsity` is out of reach, before anything runs.
            CalibrationError: If the calibration data cannot be used.
            ArgumentError: If options or inputs contradict each other, or if `output_dir` cannot be saved to.
        """
        self._check_place(calibration_dataset)
        with self._run(), self._pruning(calibration_dataset, [self.args]) as pruning:
            student, report = self._student(pruning, self.args)
        warn_of(report)
        if any(len(entry.kept) < entry.units for entry in report.sublayers):
            self.model.__dict__.update(student.__dict__)  # one step: nothing can come between
        self.report, self._saved = report, None
        self._tell_of_the_end()
        return report

    @plain_modes()
    def plan(self, calibration_dataset: Any = None) -> PruningReport:
        """A dry run: an estimate of what `prune()` would do, in seconds, with the model left as it is.

        All that `prune()` checks is checked. Units are measured on the dense model, on 2,000 tokens at most, and searched
        once; nothing is tuned, and no weight is copied, but for those of a half-precision model, which are measured in
        float32. So totals are as asked, and which units stay may differ: the report says how.

        Raises:
            BudgetError: As `prune()`.
            CalibrationError: As `prune()`.
            ArgumentError: As `prune()`.
        """
        self._check_place(calibration_dataset)
        with (
            self._unreported(),
            self._run(),
            self._pruning(calibration_dataset, [self.args], dry=True) as pruning,
        ):
            report = self._student(pruning, self.args)[1]
        warn_of(report)
        return report

    def _check_place(self, calibration_dataset: Any) -> None:
        """Refuse options that cannot be and an `output_dir` that cannot be saved to, before anything runs."""
        with together(self.accelerator):
            self.args.check()
            if self.accelerator.is_main_process:
                if self.args.output_dir is not None:
                    size = expected_bytes(self.model, self.args)
                    self.args.check_output_dir(None, self._origins(calibration_dataset), size)
                    check_code_travels(self.model)
                if self.args.push_to_hub:
                    check_push(self.args, self.args.output_dir)

    def _estimate(self, calibration: Calibration, method: Method) -> tuple[str, dict[str, int]]:
        """What a plan was estimated from, and what pruning does otherwise; what was measured."""
        count = tokens_of(self.model, self.data_collator, self.processing_class)
        tokens = sum(row_tokens(row, count) for row in calibration.rows.rows[: calibration.sample])
        text = (
            f"Estimated from {tokens:,} tokens ({calibration.sample:,} of {len(calibration.rows.rows):,} calibration rows), "
            "measured on the dense model, by one search and without tuning. "
        )
        if not method.one_shot:
            text += "prune() decides sublayer by sublayer, on what is pruned so far"
        else:
            ways = len(method.exponents)
            trials = f" and tries {ways} ways to split the budget over depth" if ways > 1 else ""
            text += f"prune() measures {calibration.rows.measured:,} rows{trials}"
        text += ": a sublayer may keep other units than here, and more or fewer of them."
        if self.args.budget[0] in TIMES:
            text += " Times are those of the look-up table; prune() measures cut models against them."
        return text, {"rows_measured": calibration.sample, "tokens_measured": tokens}

    @checked_arguments(budgets="fractions to remove, such as [0.5, 0.75], or dicts of one budget")
    @plain_modes()
    def sweep(
        self,
        budgets: Sequence[float | dict[str, float]] = (0.4, 0.5, 0.6, 0.7, 0.8),
        calibration_dataset: Any = None,
        metric: str | None = None,
        greater_is_better: bool = True,
        max_drop: float | None = None,
        refine: int = 2,
        output_dir: str | None = None,
    ) -> Sweep:
        """Prune for many budgets from shared measurements, and compare the models.

        Each is judged by `evaluate()` on `eval_dataset`, if there is one, and by how far it is from the dense model on
        calibration rows that are held out, which takes no labels. If they are all there is to judge by, without an
        `eval_dataset`, nothing is fitted on them. The model itself stays as it is; with `max_drop` it becomes the smallest one
        that is good enough, as after `prune()`.

        Args:
            budgets: Fractions of the prunable FLOPs to remove, or dicts of one option, such as {"target_params": 5e6}.
            calibration_dataset: As for `prune()`.
            metric: Name of what `evaluate()` gives, with or without "eval_". Default: the distance.
            greater_is_better: Of the metric.
            max_drop: How much worse than the dense model's the metric may be: 0.03 for 3 points of accuracy.
            refine: With `max_drop`, how many times to try between the sparsest good enough and the next.
            output_dir: Where all models are saved, each in a directory named after its sparsity. Default: nowhere.

        Raises:
            ArgumentError: If options contradict each other, or the metric is no number.
        """
        self.args.check()
        if metric is not None and self.eval_dataset is None:
            raise ArgumentError(
                f"metric is {metric!r}, but there is no eval_dataset: pass it to KPrunePruner"
            )
        if metric is None and not greater_is_better:
            raise ArgumentError(
                "greater_is_better is False, but there is no metric that it is said of; pass metric"
            )
        if refine < 0:
            raise ArgumentError(f"refine is {refine}, expected at least 0")
        asked: list[dict[str, Any]] = [
            budget if isinstance(budget, dict) else {"sparsity": float(budget)} for budget in budgets
        ]
        if not asked or any(
            len(options) != 1 or not options.keys() <= {"sparsity", *TARGETS} for options in asked
        ):
            raise ArgumentError(
                f"budgets are {list(budgets)}, expected at least one, each a fraction or a dict of one budget"
            )
        if max_drop is not None and (max_drop < 0 or any("sparsity" not in options for options in asked)):
            raise ArgumentError(
                f"max_drop is {max_drop} and budgets are {list(budgets)}, expected at least 0, and fractions to remove"
            )
        if len({tuple(options.items()) for options in asked}) < len(asked):
            raise ArgumentError(f"budgets are {list(budgets)}, expected each of them once")
        if not isinstance(self.args.sparsity, Unasked):
            name, value = self.args.budget
            warnings.warn(
                f"{name} is {value:,.6g} in the arguments, which a sweep does not use: it tries its own budgets",
                BudgetWarning,
                stacklevel=2,
            )
        if output_dir is not None and self.args.push_to_hub:
            raise ArgumentError(
                "push_to_hub is True, but a sweep makes many models: push the one that you choose"
            )

        def within(options: dict[str, Any]) -> KPruneArguments:
            return replace(self.args, **{**dict.fromkeys(("sparsity", *TARGETS)), **options})

        each = list(map(within, asked))

        folder = None if output_dir is None else as_text(output_dir)

        def place(options: dict[str, Any]) -> str | None:
            return folder and os.path.join(folder, "-".join(f"{k}-{v:g}" for k, v in options.items()))

        with together(self.accelerator):
            if self.accelerator.is_main_process:
                if folder is not None:
                    size = sum(expected_bytes(self.model, options) for options in each)
                    for options in asked:
                        self.args.check_output_dir(place(options), self._origins(calibration_dataset), size)
                elif max_drop is not None and self.args.output_dir is not None:
                    self.args.check_output_dir(None, self._origins(calibration_dataset))
                if self.args.push_to_hub:
                    check_push(self.args, self.args.output_dir)
        key = metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"
        dense, found = self.model, list[tuple[SweepPoint, PreTrainedModel, PruningReport]]()
        hold_out = self.eval_dataset is None
        with self._unreported(), self._run(), self._pruning(calibration_dataset, each, hold_out) as pruning:
            pruning.calibration.check_held_out()

            def judged(options: dict[str, Any], size: Size, sparsity: float) -> SweepPoint:
                metrics = self.evaluate() if self.eval_dataset is not None else {}
                if key is not None and not math.isfinite(metrics.get(key, math.nan)):
                    raise ArgumentError(f"metric is {metric!r}, expected a number among {metrics}")
                distance = pruning.calibration.distance(self.model, pruning.teacher, pruning.loss)
                speedup = 1.0
                if self.accelerator.is_main_process and self.model is not dense:
                    seconds = compare([dense, self.model], pruning.calibration.batches[-1].inputs)
                    speedup = seconds[0] / seconds[1]
                (speedup,) = broadcast_object_list([speedup])
                return SweepPoint(options, sparsity, size.flops, size.parameters, distance, speedup, metrics)

            def made(options: dict[str, Any]) -> SweepPoint:
                student, report = self._student(pruning, within(options))
                with self._in_place(student, report):
                    point = judged(options, report.after, report.sparsity)
                    point.path = place(options)
                    if point.path is not None:
                        self._tell_of_the_save(self._save(point.path))
                good = (
                    max_drop is not None and swept.quality(point) >= swept.quality(swept.points[0]) - max_drop
                )
                if good and (not found or point.flops <= found[-1][0].flops):
                    found[:] = [(point, student, report)]
                return point

            whole = model_size(
                dense,
                pruning.references,
                prunable_flops(pruning.references, pruning.calibration.flops_lengths),
            )
            swept = Sweep([judged({}, whole, 0.0)], key, greater_is_better)
            if max_drop is None:
                swept.points += sorted(map(made, asked), key=lambda point: point.sparsity)
            else:
                at = [options["sparsity"] for options in asked]
                smallest_within(lambda sparsity: made({"sparsity": sparsity}), swept, at, max_drop, refine)
        for point, student, report in found if swept.best else ():
            assert point is swept.points[cast(int, swept.best)]
            warn_of(report)
            self.model.__dict__.update(student.__dict__)
            self.report, self._saved = report, None
            self._tell_of_the_end()
        return swept

    @checked_arguments(hp_space="a function from an Optuna trial to a dict of options")
    @plain_modes()
    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: Literal["minimize", "maximize"] = "minimize",
        calibration_dataset: Any = None,
        **kwargs: Any,
    ) -> BestRun:
        """Search for options with Optuna (`pip install "hf_kprune[sweep]"`), by the convention of
        `Trainer.hyperparameter_search`. The model stays as it is; to use what is found, set
        `pruner.args = replace(pruner.args, **best.hyperparameters)` and prune.

        Args:
            hp_space: From an Optuna trial to options. Default: `ridge` of our method, `lambda_rep` and `mu` of K-prune.
            compute_objective: From the metrics of `evaluate()`, with an `eval_dataset`, and `distance` to a number. Default:
                `distance`, the knowledge loss on calibration rows that are held out, on which nothing is fitted then.
            n_trials: Number of trials.
            direction: `"minimize"` or `"maximize"`.
            calibration_dataset: As for `prune()`.
            kwargs: For `optuna.create_study`.

        Raises:
            ArgumentError: If there is no `hp_space` and none by default.
        """
        try:
            import optuna
        except ImportError as error:
            raise ArgumentError(
                'hyperparameter_search takes Optuna: pip install "hf_kprune[sweep]"'
            ) from error
        self.args.check()
        if n_trials < 1:
            raise ArgumentError(f"n_trials is {n_trials}, expected at least 1")
        args = self.args
        if hp_space is None and args.method not in RANGES:
            raise ArgumentError(f"no hp_space, and method {args.method!r} has none by default: pass one")

        def space(trial: Any) -> dict[str, Any]:
            if hp_space is not None:
                return dict(checked("what hp_space gives", hp_space(trial), dict[str, Any]))
            return {
                name: trial.suggest_float(name, *ends, log=True) for name, ends in RANGES[args.method].items()
            }

        def objective(trial: Any) -> float:
            (options,) = broadcast_object_list([space(trial)])  # each process has an Optuna of its own
            self.args = replace(args, **options)
            with (
                self._run(),
                self._pruning(calibration_dataset, [self.args], compute_objective is None) as pruning,
            ):
                pruning.calibration.check_held_out()
                student, report = self._student(pruning, self.args)
                with self._in_place(student, report):
                    metrics = self.evaluate() if self.eval_dataset is not None else {}
                metrics["distance"] = pruning.calibration.distance(student, pruning.teacher, pruning.loss)
            if compute_objective is None:
                return metrics["distance"]
            return float(checked("what compute_objective gives", compute_objective(metrics), float))

        study = optuna.create_study(direction=direction, **kwargs)
        try:
            with self._unreported():
                study.optimize(objective, n_trials=n_trials)
        finally:
            self.args = args
        best = study.best_trial
        told = str(best.number), best.value, space(optuna.trial.FixedTrial(best.params))
        number, value, options = broadcast_object_list([told])[0]
        return BestRun(number, value, options, study)

    @contextmanager
    def _unreported(self) -> Iterator[None]:
        """Keep what is no pruning run of the model itself from `report_to`."""
        listeners = self.callback_handler.callbacks
        self.callback_handler.callbacks = [c for c in listeners if not isinstance(c, ReportingCallback)]
        try:
            yield
        finally:
            self.callback_handler.callbacks = listeners

    @contextmanager
    def _in_place(self, model: PreTrainedModel, report: PruningReport) -> Iterator[None]:
        """Evaluate and save another model as if it were this one's."""
        before = self.model, self.report, self._saved
        self.model, self.report = model, report
        try:
            yield
        finally:
            self.model, self.report, self._saved = before

    @contextmanager
    def _pruning(
        self,
        calibration_dataset: Any,
        budgets: Sequence[KPruneArguments],
        hold_out: bool = False,
        dry: bool = False,
    ) -> Iterator[Pruning]:
        """What students for these budgets are made of. What can be refused is refused here, before anything runs."""
        self._seconds = {}
        with self._phase("prepare"), together(self.accelerator):
            self.args.check()
            self.model = self._unspoilt(self.model)
        with (
            accompanied(self.accelerator),
            leaving(self.model, ()),
        ):  # until it is known which of its towers run
            with self._phase("prepare"):
                pruning = self._prepared(calibration_dataset, budgets, hold_out, dry)
            with in_eval_mode(pruning.teacher):
                self._check_loss(pruning)
                yield pruning

    def _prepared(
        self, calibration_dataset: Any, budgets: Sequence[KPruneArguments], hold_out: bool, dry: bool
    ) -> Pruning:
        """The rows drawn, the budgets and all else checked."""
        args, model = self.args, self.model
        with together(self.accelerator):
            self._describe(model)
        alike = {name: value for name, value in args.to_dict().items() if name not in MAY_DIFFER}
        alike |= {"the budget": [each.budget for each in budgets], "the config": model.config.to_dict()}
        check_alike(self.accelerator, model, alike)
        with together(self.accelerator):
            calibration = self._calibration(model, calibration_dataset, PLAN_TOKENS if dry else None)
        calibration.check_same_rows()
        calibration.check_flops_length(model)
        lengths = (
            calibration.flops_lengths
        )  # summed over processes, so what follows is the same on all of them
        calibration.check_enough_tokens()
        sublayers = calibration.sublayers
        own = with_own_tables(model)
        before = model_size(own, find_sublayers(own), prunable_flops(sublayers, lengths))
        timed = (
            self._timed(own, calibration) if any(budget.budget[0] in TIMES for budget in budgets) else None
        )
        remarks = [
            f"{path} is left alone, as {why}; the budget is of the rest"
            for path, why in self._left_alone.items()
        ]
        remarks += [
            remark
            for budget in budgets
            for remark in BudgetTerms(
                sublayers, budget, lengths, before, timed.table if timed else None
            ).remarks()
        ]
        if timed is None and (args.latency_length is not None or args.latency_batch_size != LATENCY_BATCH):
            remarks.append(
                "latency_batch_size and latency_length have no effect without target_latency or target_speedup"
            )
        for remark in dict.fromkeys(remarks):
            warnings.warn(remark, BudgetWarning, stacklevel=6)
        if args.uniform:
            uniform_names(sublayers, args.prune_heads, args.prune_ffn)
        loss = self._knowledge(calibration_dataset)
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work = Work(self._progress(), len(budgets))
        calibration.step = work.step
        return Pruning(
            model, calibration, loss, before, timed, args, hold_out, self._phase, self._tell, work, dry
        )

    def _check_loss(self, pruning: Pruning) -> None:
        """Try the knowledge loss on a batch; say what it is made of, and warn of answers that it does not count."""
        loss, name = pruning.loss, type(self.model).__name__
        with together(self.accelerator):
            names = pruning.calibration.try_loss(pruning.teacher, loss)
        pruning.compared, pruning.ignored = broadcast_object_list([names])[0]
        logger.info("%s compares the outputs %s of %s", loss.name, ", ".join(pruning.compared), name)
        answers = [output for output in pruning.ignored if output not in BY_PRODUCTS]
        if answers:
            advice = (
                "pass compute_loss to count them"
                if self.compute_loss is None
                else "count them in compute_loss too"
            )
            warnings.warn(
                f"the knowledge loss ({loss.name}) compares {', '.join(pruning.compared)} of {name} and ignores "
                f"{', '.join(answers)}, which pruning may change; {advice}",
                stacklevel=5,
            )

    def _student(self, pruning: Pruning, args: KPruneArguments) -> tuple[PreTrainedModel, PruningReport]:
        """A pruned copy of the model, with flags and dtypes of the model, and the report."""
        begin = time.perf_counter()
        model, calibration = self.model, pruning.calibration
        sublayers = find_sublayers(model, args.head_unit)
        report = PruningReport(
            model=f"{public_name(model.config.name_or_path or 'a model')} ({type(model).__name__})",
            method=args.method,
            knowledge=pruning.loss.name,
            compared=pruning.compared,
            ignored=pruning.ignored,
            asked=dict([args.budget]),
            before=model_size(model, sublayers, prunable_flops(sublayers, calibration.flops_lengths)),
            sequence_length=sum(calibration.flops_lengths.values()) / len(calibration.flops_lengths),
            calibration=calibration.rows.fingerprint,
            arguments={
                **args.to_dict(),
                "output_dir": None if args.output_dir is None else public_name(args.output_dir),
            },
            versions=versions(),
            device=f"{self.accelerator.device}, {self.accelerator.num_processes} process(es)",
            lineage=earlier_cuts(model, self.report),
        )
        if pruning.dry:
            report.estimate, measured = self._estimate(calibration, METHODS[args.method](args))
            report.calibration = report.calibration | measured
        previous, self.report = self.report, report
        try:
            student = pruning.student(args, report)
        finally:
            self.report = previous
        for name, module in student.named_modules():
            module.training = pruning.modes.get(name, pruning.modes[""])
        originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            original = originals.get(name)  # a table of positions of its own has none
            tensor.data = tensor.data.to(model.dtype if original is None else original.dtype)
            tensor.requires_grad_(original is None or original.requires_grad)
        result = student if any(len(entry.kept) < entry.units for entry in report.sublayers) else model
        report.after = model_size(result, find_sublayers(result, args.head_unit), report.after.flops)
        report.after.all_flops = report.before.all_flops - report.before.flops + report.after.flops
        if pruning.timed is not None and args.budget[0] in TIMES:
            if pruning.dry:
                counts = [len(entry.kept) for entry in report.sublayers]
                report.achieved = pruning.timed.foreseen(counts, args.budget[0])
            else:
                report.achieved = pruning.timed.achieved(student, args.budget[0])
        report.seconds = {
            **self._seconds,
            "total": self._seconds.get("prepare", 0.0) + time.perf_counter() - begin,
        }
        self._seconds = {}
        report.peak_memory = peak_memory(self.accelerator.device)
        write_cuts(student, [*report.lineage, report.cut()])
        report.left_alone = dict(self._left_alone)
        student.__dict__.pop(LEFT_ALONE, None)
        return student, report

    def _knowledge(self, calibration_dataset: Any) -> Knowledge:
        """What the distance of outputs is: the caller's, that of what `encode` gives, or by the model's head."""
        args = self.args
        if self.compute_loss is not None:
            return Knowledge("custom", self.compute_loss, args.temperature, None)
        if self.sentence_folder is not None and args.pooling is None:
            loss = self.sentence_folder.knowledge(args.temperature)
            if loss is not None:
                return loss
        datasets = (calibration_dataset, self.calibration_dataset, self.eval_dataset)
        label = next((label for dataset in datasets if (label := first_label(dataset)) is not None), None)
        return knowledge_loss(self.model, args.temperature, args.pooling or "mean", label)

    def _timed(self, model: PreTrainedModel, calibration: Calibration) -> Timed:
        """The look-up table of the model, measured on the main process, or found in the cache."""
        made = None
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                inputs = calibration.batches[0].inputs
                if "input_ids" in inputs and "pixel_values" not in inputs:
                    length = self.args.latency_length or math.ceil(max(calibration.lengths.values()))
                    inputs = dict(text_inputs(model, self.args.latency_batch_size, length))
                self._tell("on_phase_begin", "time", model=model)
                made = LatencyTable.cached(model, inputs, by=self.args.head_unit), inputs
        table, inputs = broadcast_object_list([made])[0]
        return Timed(model, table, inputs)

    def _calibration(self, model: PreTrainedModel, dataset: Any, few: int | None = None) -> Calibration:
        dataset = self.calibration_dataset if dataset is None else dataset
        if dataset is None:
            raise ArgumentError("no calibration_dataset: pass it to KPrunePruner or to prune()")
        count = tokens_of(model, self.data_collator, self.processing_class)
        args, method, processing_class = (
            copy.copy(self.args),
            METHODS[self.args.method](self.args),
            self.processing_class,
        )
        if self.sentence_folder is not None:
            args.max_seq_length = self.sentence_folder.longest(args.max_seq_length, processing_class)
            processing_class = self.sentence_folder.reader(processing_class)
        if args.num_measure_tokens is None and method.measure_tokens is not None:
            args.num_measure_tokens = min(method.measure_tokens, args.num_tokens)
        args.statistics_dtype = args.statistics_dtype or method.dtype
        rows = draw_rows(model, dataset, processing_class, args, self.data_collator is not None, count)
        inputs, _ = collate(rows.rows[:2], self.data_collator, self.processing_class, model)
        with in_eval_mode(model):
            left_alone = towers_left_alone(model, inputs, args.head_unit)
        model.__dict__[LEFT_ALONE] = frozenset(left_alone)  # until `leaving` ends
        self._left_alone = {path.rstrip("."): reason for path, reason in left_alone.items()}
        return Calibration(
            self.accelerator, rows, self.data_collator, self.processing_class, model, args, count, few
        )

    @contextmanager
    def _run(self) -> Iterator[None]:
        """What is one run for callbacks; a run within a run is a part of it."""
        self._runs += 1
        try:
            yield
        finally:
            self._runs -= 1
            if not self._runs:
                self._tell("on_run_end", model=self.model)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._tell("on_phase_begin", name, model=self.model)
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def _progress(self) -> Callable[[float], None]:
        """Tells callbacks of the fraction that is done; on other processes than the main one it tells nobody."""
        handler = self.callback_handler if self.accelerator.is_main_process else CallbackHandler([])
        return lambda done: handler.call("on_progress", self.args, self.report, done, model=self.model)

    def _tell(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.accelerator.is_main_process:
            self.callback_handler.call(event, self.args, self.report, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # As in Trainer
    # -----------------------------------------------------------------------------------------------------------------

    @checked_arguments(callback="derive it from hf_kprune.KPruneCallback; a TrainerCallback has other events")
    def add_callback(self, callback: KPruneCallback | type[KPruneCallback]) -> None:
        """Add a callback, an instance or a class."""
        self.callback_handler.callbacks.append(callback() if isinstance(callback, type) else callback)

    @checked_arguments()
    def remove_callback(self, callback: KPruneCallback | type[KPruneCallback]) -> None:
        """Remove a callback, or all callbacks of a class."""
        keep = [c for c in self.callback_handler.callbacks if c is not callback and type(c) is not callback]
        self.callback_handler.callbacks = keep

    @checked_arguments()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`Trainer.evaluate` of the model as it is now.

        Without `compute_metrics`, by the task: accuracy, F1 and Matthews' correlation of classes, Pearson's and Spearman's
        of numbers, perplexity of a causal language model. SQuAD's exact match and F1 come from rows with `question`,
        `context` and `answers`, perplexity also from texts, or rows with a column of them, which need no labels.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_rows("eval_dataset", dataset)
        if self._runs:
            self._tell("on_phase_begin", "evaluate", model=self.model)
        if self.compute_metrics is None and self.data_collator is None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            with undisturbed(self.model):
                figures = evaluate_texts(self.model, dataset, tokenizer, self.args)
            if figures is not None:
                return {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        with self._trainer() as trainer:
            metrics: dict[str, float] = trainer.evaluate(dataset, ignore_keys, metric_key_prefix)
        loss = metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None and is_causal(self.model):
            metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        return metrics

    @checked_arguments()
    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """`Trainer.predict` of the model as it is now."""
        check_rows("test_dataset", test_dataset)
        with self._trainer() as trainer:
            return trainer.predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _trainer(self) -> Iterator[Trainer]:
        with tempfile.TemporaryDirectory() as unused, undisturbed(self.model):
            arguments = self.args.training_arguments(unused)
            arguments.report_to = []
            arguments.disable_tqdm = arguments.disable_tqdm or bool(self._runs)  # there is one bar
            trainer = Trainer(
                model=self.model,
                args=arguments,
                data_collator=self.data_collator,
                processing_class=self.processing_class,
                compute_metrics=self.compute_metrics or metrics_of(self.model),
            )
            trainer.remove_callback(PrintsMetrics)  # what it prints is what is returned
            yield trainer

    @checked_arguments()
    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model as an ordinary checkpoint with tokenizer, report and model card; push it if `push_to_hub`.

        It is written aside, reloaded, compared tensor by tensor and only then moved to `output_dir`.

        Raises:
            ArgumentError: If `output_dir` is missing, holds what must stay, or cannot be written: `check_output_dir`.
            CheckpointError: If it cannot be written after all, or does not load back as it was saved. In any case the model
                is as it was, and can be saved elsewhere.
        """
        try:
            with self._run():
                path = self._save(output_dir)
        except (KPruneError, CheckpointError) as error:
            if self.report is None:
                raise
            advice = (
                "the pruned model is unharmed in memory, and save_model('elsewhere') is all that is needed"
            )
            raise type(error)(f"{error}; {advice}") from error
        self._tell_of_the_save(path)
        if self.args.push_to_hub:
            self._push()

    def _save(self, output_dir: Any) -> str:
        """Save the model as it is now, without pushing it, and return where."""
        args, path = self.args, output_dir
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                size = model_size(self.model).bytes
                path = args.check_output_dir(output_dir, self._origins(), size)
                check_code_travels(self.model)
                self._tell("on_phase_begin", "save", model=self.model)
                save_atomically(
                    self.model, path, args.max_shard_size, self._save_beside, args.overwrite_output_dir
                )
        path = str(path or args.output_dir)
        self._saved = os.path.abspath(path)
        return path

    def _tell_of_the_save(self, path: str) -> None:
        with (
            together(self.accelerator),
            noting(f"The checkpoint in {self._saved} is whole; on_save came after it was written."),
        ):
            self._tell("on_save", path, model=self.model)

    def _origins(self, calibration_dataset: Any = None) -> list[str]:
        """Files and directories that model and data come from, which must not be replaced."""
        data = calibration_dataset, self.calibration_dataset, self.eval_dataset
        return origins(self.model, self.processing_class, self.sentence_folder, *data)

    def _tell_of_the_end(self) -> None:
        with (
            together(self.accelerator),
            noting("The model is pruned all the same: on_prune_end came after. save_model() works."),
        ):
            self._tell("on_prune_end", model=self.model)

    def _save_beside(self, directory: str) -> None:
        if self.processing_class is not None:
            try:
                self.processing_class.save_pretrained(directory)
            except Exception as error:  # its own code, of whatever kind
                raise CheckpointError(
                    f"processing_class, {show(self.processing_class)}, cannot be saved: its save_pretrained failed with a "
                    f"{type(error).__name__}; set pruner.processing_class to one that can be saved, or to None"
                ) from error
        if self.report is not None:
            self.report.save(directory)
        self.create_model_card(output_dir=directory)
        if self.sentence_folder is not None:
            self.sentence_folder.carry(directory)

    @checked_arguments()
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
        directory = self.args.output_dir if output_dir is None else output_dir
        if directory is None:
            raise ArgumentError("no output_dir: pass it to create_model_card() or to KPruneArguments")
        if self.accelerator.is_main_process:
            place = check_card_place(directory, self.args.overwrite_output_dir)
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
            card = card if self.sentence_folder is None else self.sentence_folder.card(card)
            place.write_text(card, encoding="utf-8")

    @checked_arguments()
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
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                check_push(self.args, self._saved or self.args.output_dir, token)
        if self._saved is None:
            push, self.args.push_to_hub = self.args.push_to_hub, False
            try:
                self.save_model()
            finally:
                self.args.push_to_hub = push
        return self._push(commit_message, token, revision, run_as_future=not blocking, **kwargs)

    def _push(
        self,
        commit_message: str = "K-pruned model",
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        with together(self.accelerator):
            if not self.accelerator.is_main_process:
                return None
            check_push(self.args, self._saved, token)
            return push_folder(str(self._saved), self.args, commit_message, token, revision, **kwargs)


def check_is_model(model: Any) -> None:
    """Raise `ArgumentError`, with the way out, for what is neither a module nor a name."""
    if isinstance(model, (torch.nn.Module, os.PathLike)) or (isinstance(model, str) and model.strip()):
        return
    way_out = ""
    if isinstance(model, PreTrainedConfig):
        way_out = ": AutoModel.from_config() makes one of a config, from_pretrained() loads a trained one"
    elif isinstance(model, type):
        way_out = f": {model.__name__}.from_pretrained() loads one"
    elif isinstance(getattr(model, "model", None), PreTrainedModel):
        way_out = ": pass its .model"
    raise ArgumentError(
        f"model is {show(model)}, expected a transformers PreTrainedModel or the name or path of one{way_out}"
    )


def check_processing_class(processing_class: Any) -> None:
    """Raise `ArgumentError` for what cannot turn data into inputs: a name, a class, a model, a config."""
    if processing_class is None:
        return
    able = callable(processing_class) or hasattr(processing_class, "pad")
    if not able or isinstance(processing_class, (str, type, torch.nn.Module)):
        name = repr(str(processing_class)) if isinstance(processing_class, (str, os.PathLike)) else "..."
        raise ArgumentError(
            f"processing_class is {show(processing_class)}, expected a tokenizer or processor: "
            f"AutoTokenizer.from_pretrained({name})"
        )


def check_rows(name: str, dataset: Any) -> None:
    """Raise `ArgumentError` for what is no dataset of rows."""
    able = hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    if not able or isinstance(dataset, (str, bytes, os.PathLike)):
        raise ArgumentError(
            f"{name} is {show(dataset)}, expected a dataset of tokenised rows: pass one as {name}"
        )


def warn_of(report: PruningReport) -> None:
    """Warn of a cut that empties sublayers, or that leaves little of a kind of unit."""
    if remarks := report.remarks():
        out = "ask for less, set min_heads or min_neurons, or spare a kind with prune_heads=False or prune_ffn=False"
        warnings.warn(f"{'; '.join(remarks)}. If that is too much: {out}", BudgetWarning, stacklevel=3)


def first_label(dataset: Any) -> Any:
    """The label of the first row of a dataset that can be looked into; None if it has none."""
    if (
        not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
        or isinstance(dataset, Mapping)
        or not len(dataset)
    ):
        return None
    row = dataset[0]
    return row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
