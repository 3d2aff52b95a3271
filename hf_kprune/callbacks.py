"""What may listen to a pruning run, and the listeners that come with it. All are called on the main process
only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .arguments import KPruneArguments
from .entries import SublayerReport
from .errors import ArgumentError
from .report import PruningReport


class KPruneCallback:
    """Base of callbacks; override what you need. `report` holds what was done so far.

    Keyword arguments always hold `model`, the student (the pruned model, in `on_prune_end` and `on_save`).

    Example:

        >>> from hf_kprune import KPruneCallback
        >>> class Count(KPruneCallback):
        ...     sublayers = 0
        ...     def on_sublayer_end(self, args, report, sublayer, **kwargs):
        ...         self.sublayers += 1
    """

    def on_prune_begin(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        """Before anything is measured. `kwargs["sublayers"]` names the sublayers to come."""

    def on_sublayer_begin(
        self, args: KPruneArguments, report: PruningReport, name: str, **kwargs: Any
    ) -> None:
        """Before a sublayer is measured."""

    def on_sublayer_end(
        self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any
    ) -> None:
        """After a sublayer has been cut and tuned."""

    def on_prune_end(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        """After the model has been pruned."""

    def on_phase_begin(
        self, args: KPruneArguments, report: PruningReport | None, phase: str, **kwargs: Any
    ) -> None:
        """A part of the work begins: prepare, time, measure, search, tune, evaluate or save.

        Phases may take turns: methods that decide sublayer by sublayer measure, search and tune each of them,
        and those that decide all at once measure first. Trials of how to split the budget over depth are a
        part of the search.
        """

    def on_progress(
        self, args: KPruneArguments, report: PruningReport | None, done: float, **kwargs: Any
    ) -> None:
        """The fraction `done`, from 0 to 1, of what `prune()`, `plan()` or `sweep()` does has been done,
        about.
        """

    def on_run_end(self, args: KPruneArguments, report: PruningReport | None, **kwargs: Any) -> None:
        """What was begun by the first `on_phase_begin` is over, well or by an error."""

    def on_save(
        self, args: KPruneArguments, report: PruningReport | None, output_dir: str, **kwargs: Any
    ) -> None:
        """After a checkpoint has been written to `output_dir`. `report` is None if nothing was pruned in this
        run.
        """


class CallbackHandler:
    """Calls its callbacks in order.

    Args:
        callbacks: Those to call.
    """

    def __init__(self, callbacks: list[KPruneCallback]):
        self.callbacks = callbacks
        self.runs = 0
        """How many runs are going on, one within the other."""
        self.phase = ""
        """The phase that began last in the run that is going on."""

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the method of that name of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*args, **kwargs)

    @contextmanager
    def unreported(self) -> Iterator[None]:
        """Keep what is no pruning run of the model itself from `report_to`."""
        callbacks = self.callbacks
        self.callbacks = [c for c in callbacks if not isinstance(c, ReportingCallback)]
        try:
            yield
        finally:
            self.callbacks = callbacks


class PrinterCallback(KPruneCallback):
    """Prints a line per sublayer, above the bar: kept/total, FLOPs left, error before and after tuning,
    seconds.
    """

    def on_sublayer_end(
        self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any
    ) -> None:
        tqdm.write(str(sublayer))


class ProgressCallback(KPruneCallback):
    """One bar for a whole run on the standard error, with phase and time left; a line per phase where that is
    no terminal.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.phases: list[str] = []

    def on_phase_begin(
        self, args: KPruneArguments, report: PruningReport | None, phase: str, **kwargs: Any
    ) -> None:
        if self.bar is None and shows_bars():
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
            desc = f"hf_kprune: {phase:8}"
            self.bar = tqdm(total=1.0, desc=desc, bar_format=form, smoothing=0, leave=phase == "prepare")
        if self.bar is not None:
            self.bar.set_description_str(f"hf_kprune: {phase:8}")
        elif phase not in self.phases and sys.stderr is not None:
            print(f"hf_kprune: {phase}", file=sys.stderr, flush=True)
        self.phases.append(phase)

    def on_progress(
        self, args: KPruneArguments, report: PruningReport | None, done: float, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def on_run_end(self, args: KPruneArguments, report: PruningReport | None, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.phases = None, []


def shows_bars() -> bool:
    """Whether there is something that bars can move on: a terminal or a notebook."""
    in_notebook = any("notebook" in base.__module__ for base in tqdm.__mro__)
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())


class ReportingCallback(KPruneCallback):
    """Sends the figures of every sublayer, and of the whole, to the integrations of `report_to` (TensorBoard,
    W&B, ...).
    """

    def __init__(self, args: KPruneArguments) -> None:
        self.arguments = args.training_arguments("kprune_runs")  # not output_dir, which must be empty
        self.state, self.control = TrainerState(is_world_process_zero=True), TrainerControl()
        try:
            self.integrations = [
                make() for make in get_reporting_integration_callbacks(self.arguments.report_to)
            ]
        except (ValueError, RuntimeError, ImportError) as error:  # unknown, or its package is not installed
            unknown = [name for name in args.report_to if name not in {"all", *INTEGRATION_TO_CALLBACK}]
            if unknown:
                raise ArgumentError(
                    f"report_to is {args.report_to}, of which {', '.join(unknown)} is not supported; "
                    f"expected any of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
                ) from error
            raise ArgumentError(
                f"report_to is {args.report_to}, and the package of one of them is not installed: install "
                "it, or leave it out"
            ) from error

    def _tell(self, event: str, **kwargs: Any) -> None:
        for integration in self.integrations:
            getattr(integration, event)(self.arguments, self.state, self.control, **kwargs)

    def on_prune_begin(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        self._tell("on_train_begin", model=kwargs["model"])

    def on_sublayer_end(
        self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any
    ) -> None:
        self.state.global_step += 1
        figures = {
            "kept": len(sublayer.kept) / max(sublayer.units, 1),
            "gflops_left": sublayer.flops_left / 1e9,
            "seconds": sublayer.seconds,
            "error_before": sublayer.error_before,
            "error_after": sublayer.error_after,
        }
        logs = {f"prune/{key}": value for key, value in figures.items() if value is not None}
        self._tell("on_log", model=kwargs["model"], logs=logs)

    def on_prune_end(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        logs = {"prune/sparsity": report.sparsity, "prune/parameters": report.after.parameters}
        self._tell("on_log", model=kwargs["model"], logs=logs)
        self._tell("on_train_end", model=kwargs["model"])


def default_callbacks(args: KPruneArguments) -> list[KPruneCallback]:
    """The callbacks that the options ask for."""
    shown = ((ProgressCallback, not args.disable_tqdm), (PrinterCallback, args.verbose))
    callbacks: list[KPruneCallback] = [kind() for kind, wanted in shown if wanted]
    if args.report_to not in ([], ["none"]):
        callbacks.append(ReportingCallback(args))
    return callbacks
