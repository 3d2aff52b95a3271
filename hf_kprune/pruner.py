"""`KPrunePruner`, modelled on `Trainer`. The algorithm is in algorithm.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.trainer_utils import BestRun

from .arguments import KPruneArguments
from .calibration.embeddings import folder_of, parts_of
from .calibration.knowledge import KnowledgeLoss
from .calibration.sources import check_processing_class, check_rows
from .callbacks import CallbackHandler, KPruneCallback, default_callbacks
from .checkpoint.loading import Offload, check_is_model, check_offload, load_model, load_tokenizer
from .errors import ArgumentError
from .evaluation import Evaluator
from .hyperparameters import Search
from .preparation import first_batch
from .publication import push, save, tell_of_the_save, write_card
from .recovery import Learner
from .report import PruningReport
from .resumption import States, states_of
from .run import Run, warn_of
from .state import adopt, check_inplace, check_place
from .structure.offload import is_dispatched
from .structure.readiness import bare_model, describe_units
from .structure.surroundings import plain_modes
from .sweep import Sweep
from .sweeper import Sweeper
from .validation import checked_arguments


RESUMES = "True for the state that belongs to output_dir, or the directory that states are kept in"


class KPrunePruner(Evaluator, Learner):
    """Makes a Transformers model smaller and faster without retraining. It is modelled on `Trainer`.

    Args:
        model: A `PreTrainedModel`, a `SentenceTransformer` or a `CrossEncoder`, or the name or path of one,
            which is loaded with the class that its config names. `prune()` changes it in place, all at once
            at its end; submodules that you hold on to stay dense.
        args: Options; `sparsity` is the fraction of prunable FLOPs to **remove**.
        calibration_dataset: Tokenised rows, or texts, pairs of texts or chats, which `processing_class`
            tokenises: a `datasets.Dataset`, a list, a generator, a `DataLoader`, a dict of columns, a table
            of pandas, a list of tensors (1, L) or (L,), ... `KPruneArguments.text_columns` names the columns
            of texts. Labels in it are ignored. If None, it must be passed to `prune()`, and a model whose
            type is not listed is proved on inputs made up from its config alone.
        data_collator: Makes batches of rows. Default: pads with `processing_class`.
        eval_dataset: For `evaluate()`, as in `Trainer`.
        processing_class: Tokenizer, saved with the model. Default, if `model` is a name: the one there.
        compute_metrics: For `evaluate()`, as in `Trainer`. Default: the usual figures of the model's task.
        callbacks: Instances or classes of `KPruneCallback`, added to the default ones.
        compute_loss: Replaces the predictive knowledge of the model's head: (student_outputs,
            teacher_outputs, valid_tokens (B, T)) -> tensor (B,), one differentiable number per sequence.
            Outputs have their names as in Transformers; of a tensor or a tuple `"output 0"` and so on.
        offload: If `model` is a name: `"disk"` leaves its layers in its checkpoint, `"cpu"` in the memory of
            the machine, and one at a time comes to the device. Default: the model lies on the device as a
            whole. A model that was loaded with a `device_map` is taken as it is.

    Raises:
        UnsupportedModelError: If the model cannot be pruned: unknown, quantised, with adapters, ...

    Example:

        >>> from hf_kprune import KPruneArguments, KPrunePruner
        >>> texts = ["a warm and funny film", "a dull and lifeless sequel"] * 20
        >>> options = {"method": "magnitude", "num_tokens": 100, "disable_tqdm": True}
        >>> pruner = KPrunePruner("examples/sst2-tiny", KPruneArguments(sparsity=0.5, **options), texts)
        >>> report = pruner.prune()
        >>> round(report.sparsity, 2), pruner.model.num_parameters() == report.after.parameters
        (0.5, True)
    """

    @checked_arguments(
        "model",
        args="KPruneArguments(sparsity=0.5); its names shared with TrainingArguments mean the same",
        data_collator="an object or a function that makes a batch of a list of rows",
        compute_metrics="a function from an EvalPrediction to a dict of numbers",
        compute_loss="a function of (student_outputs, teacher_outputs, valid_tokens)",
        callbacks="[callback], each derived from hf_kprune.KPruneCallback, which is no TrainerCallback",
    )
    def __init__(  # noqa: PLR0913, as that of Trainer
        self,
        model: PreTrainedModel | torch.nn.Module | str | os.PathLike[str],
        args: KPruneArguments | None = None,
        calibration_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[KPruneCallback | type[KPruneCallback]] | None = None,
        compute_loss: KnowledgeLoss | None = None,
        offload: Literal["cpu", "disk"] | None = None,
    ):
        self.args = args or KPruneArguments()
        self.args.check()
        self.accelerators: dict[bool, Accelerator] = {}
        parts = parts_of(model)
        if parts is not None:
            cast(torch.nn.Module, model).to(self.accelerator.device)
            model, processing_class = parts[0], processing_class or parts[1]
        check_is_model(model)
        check_offload(model, offload)
        check_processing_class(processing_class)
        if eval_dataset is not None:
            check_rows("eval_dataset", eval_dataset)
        self.source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or load_tokenizer(os.fspath(model))
            model = load_model(os.fspath(model), Offload(offload, self.accelerator.device))
        model = bare_model(model)
        self.sentence_folder = folder_of(model) if parts is None else parts[2]
        if self.sentence_folder is not None:
            self.sentence_folder.check(self.args, compute_loss is not None)
        self.calibration_dataset = calibration_dataset
        self.data_collator, self.processing_class = data_collator, processing_class
        describe_units(model, self.args.head_unit, lambda: first_batch(self, model))
        self.model = model if is_dispatched(model) else model.to(self.accelerator.device)
        self.dense_model: PreTrainedModel | None = None  # once it is kept, by `prune(inplace=False)`
        self.eval_dataset, self.compute_metrics = eval_dataset, compute_metrics
        self.compute_loss = compute_loss
        self.report: PruningReport | None = None
        self.metrics: dict[str, float] = {}  # before pruning
        self.states: States | None = None  # of the run that made the model what it is, until it is saved
        self.checkpoint: str | None = None  # where the model was saved as it is now
        self.callback_handler = CallbackHandler(default_callbacks(self.args))
        for callback in callbacks or []:
            self.add_callback(callback)

    @property
    def accelerator(self) -> Accelerator:
        """Device and processes. Made anew once `TrainingArguments`, of whomever, reset what all share."""
        cpu = self.args.use_cpu
        if cpu not in self.accelerators or not hasattr(self.accelerators[cpu].state, "device"):
            self.accelerators[cpu] = Accelerator(cpu=cpu)
        return self.accelerators[cpu]

    @checked_arguments(resume_from_checkpoint=RESUMES)
    @plain_modes()
    def prune(
        self,
        calibration_dataset: Any = None,
        resume_from_checkpoint: bool | str | None = None,
        inplace: bool = True,
    ) -> PruningReport:
        """Prune the model in place and return what was done.

        Until the last moment a copy is worked on: an error or Ctrl-C leaves the model as it was.

        Args:
            calibration_dataset: Instead of the pruner's.
            resume_from_checkpoint: True or a directory: keep a state after measuring, after choosing and
                after each sublayer, and go on from the one that an interrupted run of the same kind has left,
                if there is one; the result is that of a run without interruption. With True the state lies
                beside `output_dir`, and is gone when the model has been saved. In a directory measurements
                stay, so that another budget for the same model and data costs no measuring. By default a
                state is kept once a run with an `output_dir` has lasted a minute, and nothing is gone on
                from. False keeps none.
            inplace: If False, the model that the pruner was given stays dense, and is `dense_model` of the
                pruner from then on; `model` is another one, which shares no memory with it.

        Raises:
            BudgetError: If `sparsity` is out of reach, before anything runs.
            CalibrationError: If the calibration data cannot be used.
            ArgumentError: If options or inputs contradict each other, if `output_dir` cannot be saved to, or
                if a state is of other data, options, weights or versions.

        Example:

            >>> import tempfile
            >>> from hf_kprune import KPruneArguments, KPrunePruner
            >>> texts = ["a warm and funny film", "a dull and lifeless sequel"] * 20
            >>> states = tempfile.mkdtemp()
            >>> for sparsity in (0.5, 0.7):  # measured once
            ...     args = KPruneArguments(sparsity=sparsity, num_tokens=100, tune=False, disable_tqdm=True)
            ...     pruner = KPrunePruner("examples/sst2-tiny", args, texts)
            ...     report = pruner.prune(resume_from_checkpoint=states)
            ...     pruner.save_model(tempfile.mkdtemp())
        """
        check_place(self, calibration_dataset)
        check_inplace(self.model, inplace)
        with self._states(resume_from_checkpoint, self.args.output_dir) as states:
            with Run(self, calibration_dataset, [self.args], states=states).open() as run:
                past = run.record(self.args)
                states.say(past.origin)
                student, report = run.student(self.args, past)
            warn_of(report)
            adopt(self, student, report, inplace)
            past.finish()
            self.states = states
        return report

    def _states(self, resume: bool | str | None, output_dir: str | None) -> States:
        """The states of a run that begins. What an earlier one has ended with is in the model itself."""
        self._end_states()
        return states_of(self.accelerator, resume, output_dir)

    def _end_states(self) -> None:
        """Keep no longer what the model follows from."""
        if self.states is not None:
            self.states.end()
            self.states = None

    @plain_modes()
    def plan(self, calibration_dataset: Any = None) -> PruningReport:
        """A dry run: an estimate of what `prune()` would do, in seconds, with the model left as it is.

        All that `prune()` checks is checked. Units are measured on the dense model, on 2,000 tokens at most,
        and searched once; nothing is tuned, and no weight is copied, but for those of a half-precision model,
        which are measured in float32. So totals are as asked, and which units stay may differ: the report
        says how. It also estimates how much memory `prune()` takes, and how many seconds on this device.

        Raises:
            BudgetError: As `prune()`.
            CalibrationError: As `prune()`.
            ArgumentError: As `prune()`.
        """
        check_place(self, calibration_dataset)
        run = Run(self, calibration_dataset, [self.args], dry=True)
        with self.callback_handler.unreported(), run.open():
            report = run.student(self.args)[1]
        warn_of(report)
        return report

    @checked_arguments(
        budgets="fractions to remove, such as [0.5, 0.75], or dicts of one budget",
        resume_from_checkpoint=RESUMES,
    )
    @plain_modes()
    def sweep(  # noqa: PLR0913
        self,
        budgets: Sequence[float | dict[str, float]] = (0.4, 0.5, 0.6, 0.7, 0.8),
        calibration_dataset: Any = None,
        metric: str | None = None,
        greater_is_better: bool = True,
        max_drop: float | None = None,
        refine: int = 2,
        output_dir: str | None = None,
        resume_from_checkpoint: bool | str | None = None,
        inplace: bool = True,
    ) -> Sweep:
        """Prune for many budgets from shared measurements, and compare the models.

        Each is judged by `evaluate()` on `eval_dataset`, if there is one, and by how far it is from the dense
        model on calibration rows that are held out, which takes no labels. If they are all there is to judge
        by, without an `eval_dataset`, nothing is fitted on them. The model itself stays as it is; with
        `max_drop` it becomes the smallest one that is good enough, as after `prune()`.

        Args:
            budgets: Fractions of the prunable FLOPs to remove, or dicts of one: {"target_params": 5e6}.
            calibration_dataset: As for `prune()`.
            metric: Name of what `evaluate()` gives, with or without "eval_". Default: the distance.
            greater_is_better: Of the metric.
            max_drop: How much worse than the dense model's the metric may be: 0.03 for 3 points of accuracy.
            refine: With `max_drop`, how many times to try between the sparsest good enough and the next.
            output_dir: Directory of directories, named by sparsity, to save models in. Default: none.
            resume_from_checkpoint: As for `prune()`; models that an interrupted sweep has judged are not made
                again. With True states lie beside `output_dir`, or else beside that of the options.
            inplace: As for `prune()`, of the model that `max_drop` finds.

        Raises:
            ArgumentError: If options contradict each other, or the metric is no number.
        """
        check_inplace(self.model, inplace)
        options = metric, greater_is_better, max_drop, refine, output_dir, inplace
        place = output_dir
        if output_dir is None and (max_drop is not None or resume_from_checkpoint):
            place = self.args.output_dir
        with self._states(resume_from_checkpoint, place) as states:
            sweep = Sweeper(self, budgets, calibration_dataset, *options, states).sweep()
            if sweep.best:
                self.states = states  # until the model is saved
            else:
                states.end()
        return sweep

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
        """Search for options with Optuna, by the convention of `Trainer.hyperparameter_search`.

        It takes `pip install optuna`. The model stays as it is. To use what the search finds, set
        `pruner.args = replace(pruner.args, **best.hyperparameters)` and prune.

        Args:
            hp_space: From an Optuna trial to options. Default: the `ranges` of the method, `ridge` of ours,
                `lambda_rep` and `mu` of K-prune in `method_kwargs`.
            compute_objective: From the metrics of `evaluate()`, with an `eval_dataset`, and `distance` to a
                number. Default: `distance`, the knowledge loss on calibration rows that are held out, on
                which nothing is fitted then.
            n_trials: Number of trials.
            direction: `"minimize"` or `"maximize"`.
            calibration_dataset: As for `prune()`.
            kwargs: For `optuna.create_study`.

        Raises:
            ArgumentError: If there is no `hp_space` and none by default.
        """
        search = Search(self, hp_space, compute_objective, calibration_dataset)
        return search.best_run(n_trials, direction, **kwargs)

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
    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model as an ordinary checkpoint with all that belongs to it; push it if `push_to_hub`.

        Tokenizer, report and model card are saved with it. All is written aside, reloaded, compared tensor by
        tensor and only then moved to `output_dir`.

        Raises:
            ArgumentError: If `output_dir` is missing, holds what must stay, or cannot be written:
                `check_output_dir`.
            CheckpointError: If it cannot be written after all, or does not load back as it was saved. In any
                case the model is as it was, and can be saved elsewhere, unless the error is about itself, its
                generation config or its tokenizer.
        """
        path = save(self, output_dir)
        self._end_states()
        tell_of_the_save(self, path)
        if self.args.push_to_hub:
            push(self)

    @checked_arguments()
    def create_model_card(  # noqa: PLR0913, as that of Trainer
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
        comparison: Any = None,
    ) -> None:
        """Write README.md, a model card, into an existing directory (default: `output_dir` of the options).

        The other arguments are those of `Trainer.create_model_card`, and `comparison`: what
        `hf_kprune.compare` gives for the dense model and this one, whose measured times the card shows then.

        Raises:
            ArgumentError: If there is no such directory, or `comparison` is something else.
        """
        if comparison is not None and not hasattr(comparison, "timings"):
            raise ArgumentError(
                f"comparison is a {type(comparison).__name__}, expected what hf_kprune.compare gives"
            )
        source = finetuned_from, tasks, dataset_tags, dataset, dataset_args
        measured = "" if comparison is None else replace(comparison, names=["dense", "pruned"]).to_markdown()
        write_card(self, output_dir, language, license, tags, model_name, *source, measured)

    @checked_arguments()
    def push_to_hub(
        self,
        commit_message: str = "Model pruned with hf_kprune",
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
        return push(self, commit_message, token, revision, run_as_future=not blocking, **kwargs)
