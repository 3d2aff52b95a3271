"""What may listen to a pruning run, and the listeners that come with it. All are called on the main process only."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from .arguments import KPruneArguments
from .errors import ArgumentError
from .report import PruningReport, SublayerReport


class KPruneCallback:
    """Base of callbacks; override what you need. `report` holds what was done so far.

    Keyword arguments always hold `model`, the student (the pruned model, in `on_prune_end` and `on_save`).
    """

    def on_prune_begin(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        """Before anything is measured. `kwargs["sublayers"]` names the sublayers to come."""

    def on_sublayer_begin(self, args: KPruneArguments, report: PruningReport, name: str, **kwargs: Any) -> None:
        """Before a sublayer is measured."""

    def on_sublayer_end(self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any) -> None:
        """After a sublayer has been cut and tuned."""

    def on_prune_end(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        """After the model has been pruned."""

    def on_save(self, args: KPruneArguments, report: PruningReport | None, output_dir: str, **kwargs: Any) -> None:
        """After a checkpoint has been written to `output_dir`. `report` is None if nothing was pruned in this run."""


class CallbackHandler:
    """Calls its callbacks in order."""

    def __init__(self, callbacks: list[KPruneCallback]):
        self.callbacks = callbacks

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args, **kwargs)


class PrinterCallback(KPruneCallback):
    """Prints a line per sublayer: kept/total, FLOPs left, reconstruction error before and after tuning, seconds."""

    def on_sublayer_end(self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any) -> None:
        print(sublayer, flush=True)


class ProgressCallback(KPruneCallback):
    """A progress bar with the time left; the lines of `PrinterCallback` above it.

    A sublayer costs about as many steps as there are sublayers above it, which measuring runs through.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.left = 0

    def on_prune_begin(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        self.left = len(kwargs["sublayers"])
        self.bar = tqdm(
            total=self.left * (self.left + 1) // 2,
            desc="Pruning",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
        )

    def on_sublayer_begin(self, args: KPruneArguments, report: PruningReport, name: str, **kwargs: Any) -> None:
        self.bar.set_postfix_str(name)

    def on_sublayer_end(self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any) -> None:
        tqdm.write(str(sublayer))
        self.bar.update(self.left)
        self.left -= 1
        if not self.left:  # here and not in on_prune_end, which plan() never comes to
            self.bar.close()


class ReportingCallback(KPruneCallback):
    """Sends the figures of every sublayer, and of the whole, to the integrations of `report_to` (TensorBoard, W&B, ...)."""

    def __init__(self, args: KPruneArguments) -> None:
        self.arguments = args.training_arguments("kprune_runs")  # not output_dir, which must be empty
        self.state, self.control = TrainerState(is_world_process_zero=True), TrainerControl()
        try:
            self.integrations = [make() for make in get_reporting_integration_callbacks(self.arguments.report_to)]
        except (ValueError, RuntimeError, ImportError) as error:  # unknown, or its package is not installed
            raise ArgumentError(f"report_to is {args.report_to}: {error}") from error

    def _tell(self, event: str, **kwargs: Any) -> None:
        for integration in self.integrations:
            getattr(integration, event)(self.arguments, self.state, self.control, **kwargs)

    def on_prune_begin(self, args: KPruneArguments, report: PruningReport, **kwargs: Any) -> None:
        self._tell("on_train_begin", model=kwargs["model"])

    def on_sublayer_end(self, args: KPruneArguments, report: PruningReport, sublayer: SublayerReport, **kwargs: Any) -> None:
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
