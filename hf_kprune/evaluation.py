"""The model of a pruner is evaluated as it is now, by `Trainer`, or on texts."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import PredictionOutput

from .calibration.metrics import evaluate_texts, metrics_of
from .calibration.sources import check_rows
from .errors import ArgumentError
from .state import Pruner, begin_phase
from .structure.facts import is_causal
from .structure.surroundings import undisturbed
from .validation import checked_arguments


def evaluate(pruner: Pruner, dataset: Any, ignore_keys: list[str] | None, prefix: str) -> dict[str, float]:
    """The figures of a dataset, as `KPrunePruner.evaluate` gives them."""
    if pruner.callback_handler.runs:
        begin_phase(pruner, "evaluate")
    if pruner.compute_metrics is None and pruner.data_collator is None:
        tokenizer = getattr(pruner.processing_class, "tokenizer", pruner.processing_class)
        with undisturbed(pruner.model):
            figures = evaluate_texts(pruner.model, dataset, tokenizer, pruner.args)
        if figures is not None:
            return {f"{prefix}_{name}": value for name, value in figures.items()}
    with trainer_of(pruner) as trainer:
        metrics: dict[str, float] = trainer.evaluate(dataset, ignore_keys, prefix)
    loss = metrics.get(f"{prefix}_loss")
    if loss is not None and is_causal(pruner.model):
        metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
    return metrics


def plain_figures(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Figures without the prefix of their names, and without the times that they took."""
    return {
        name.removeprefix(f"{prefix}_"): float(value)
        for name, value in metrics.items()
        if isinstance(value, float) and not name.endswith(("runtime", "_per_second", "time"))
    }


def keep_figures(pruner: Pruner, metrics: dict[str, float], prefix: str) -> None:
    """Keep the figures of the model as it is now for its report and its card."""
    figures = plain_figures(metrics, prefix)
    if pruner.report is None:
        pruner.metrics = figures
    else:
        pruner.report.metrics[pruner.report.stage] = figures


def figures_of(pruner: Pruner) -> dict[str, float]:
    """The figures of the model as it is now; none if they were not measured."""
    return pruner.metrics if pruner.report is None else pruner.report.metrics.get(pruner.report.stage, {})


@contextmanager
def trainer_of(pruner: Pruner) -> Iterator[Trainer]:
    """Within this context, a `Trainer` of the model of a pruner, which is as before when it ends."""
    with tempfile.TemporaryDirectory() as unused, undisturbed(pruner.model):
        arguments = pruner.args.training_arguments(unused)
        arguments.report_to = []
        arguments.disable_tqdm |= pruner.callback_handler.runs > 0  # there is one bar
        trainer = Trainer(
            model=pruner.model,
            args=arguments,
            data_collator=pruner.data_collator,
            processing_class=pruner.processing_class,
            compute_metrics=pruner.compute_metrics or metrics_of(pruner.model),
        )
        trainer.remove_callback(PrinterCallback)  # what it prints is what is returned
        yield trainer


class Evaluator:
    """What a pruner has of `Trainer` to evaluate its model."""

    @checked_arguments()
    def evaluate(
        self: Pruner,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """`Trainer.evaluate` of the model as it is now.

        Without `compute_metrics`, by the task: accuracy, F1 and Matthews' correlation of classes, Pearson's
        and Spearman's of numbers, perplexity of a causal language model. SQuAD's exact match and F1 come from
        rows with `question`, `context` and `answers`, perplexity also from texts, or rows with a column of
        them, which need no labels.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_rows("eval_dataset", dataset)
        metrics = evaluate(self, dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            keep_figures(self, metrics, metric_key_prefix)
        return metrics

    @checked_arguments()
    def predict(
        self: Pruner, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """`Trainer.predict` of the model as it is now."""
        check_rows("test_dataset", test_dataset)
        with trainer_of(self) as trainer:
            return trainer.predict(test_dataset, ignore_keys, metric_key_prefix)

    @checked_arguments()
    def log_metrics(self: Pruner, split: str, metrics: dict[str, Any]) -> None:
        """`Trainer.log_metrics`: print figures in lines, on the main process."""
        with trainer_of(self) as trainer:
            trainer.log_metrics(split, metrics)

    @checked_arguments()
    def save_metrics(self: Pruner, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """`Trainer.save_metrics`: write figures to `{split}_results.json` and, if `combined`, add them to
        `all_results.json`, in `output_dir`, where the model has been saved.

        Raises:
            ArgumentError: If there is no such directory.
        """
        place = self.args.output_dir
        if place is None or not os.path.isdir(place):
            raise ArgumentError(
                f"output_dir is {place!r}, expected a directory that is there: call save_model() before"
            )
        with trainer_of(self) as trainer:
            trainer.args.output_dir = place
            trainer.save_metrics(split, metrics, combined)
