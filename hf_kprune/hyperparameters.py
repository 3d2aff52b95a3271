"""Search for options with Optuna, by the convention of `Trainer.hyperparameter_search`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import BestRun

from .calibration.distance import distance
from .errors import ArgumentError
from .methods import METHODS
from .options import from_json
from .run import Run
from .state import Pruner, in_place
from .validation import checked


@dataclass
class Search:
    """A search for options. `KPrunePruner.hyperparameter_search` documents its options.

    Args:
        pruner: It holds the dense model and the options that the search begins with.
    """

    pruner: Pruner
    hp_space: Callable[[Any], dict[str, Any]] | None
    compute_objective: Callable[[dict[str, float]], float] | None
    calibration_dataset: Any

    def __post_init__(self) -> None:
        self.args = self.pruner.args

    def best_run(self, n_trials: int, direction: str, **kwargs: object) -> BestRun:
        """Try options and return the best ones. The pruner has its own options back afterwards.

        Args:
            n_trials: How often options are tried.
            direction: Of the objective.
            kwargs: For `optuna.create_study`.

        Raises:
            ArgumentError: If Optuna is missing, or if there is nothing to try.
        """
        try:
            import optuna
        except ImportError as error:
            raise ArgumentError("hyperparameter_search takes Optuna: pip install optuna") from error
        self.args.check()
        if n_trials < 1:
            raise ArgumentError(f"n_trials is {n_trials}, expected at least 1")
        if self.hp_space is None and not METHODS[self.args.method].ranges:
            raise ArgumentError(f"no hp_space, and method {self.args.method!r} has none by default: pass one")
        study = optuna.create_study(direction=direction, **kwargs)
        try:
            with self.pruner.callback_handler.unreported():
                study.optimize(self.objective, n_trials=n_trials)
        finally:
            self.pruner.args = self.args
        best = study.best_trial
        result = str(best.number), best.value, self.space(optuna.trial.FixedTrial(best.params))
        number, value, options = broadcast_object_list([result])[0]
        return BestRun(number, value, options, study)

    def space(self, trial: Any) -> dict[str, Any]:
        """The options that an Optuna trial is about."""
        if self.hp_space is not None:
            return dict(checked("what hp_space gives", self.hp_space(trial), dict[str, Any]))
        method = METHODS[self.args.method]
        values = {name: trial.suggest_float(name, *ends, log=True) for name, ends in method.ranges.items()}
        kwargs = {name: values.pop(name) for name in method.kwargs_names() if name in values}
        if kwargs:
            values["method_kwargs"] = from_json("method_kwargs", self.args.method_kwargs) | kwargs
        return values

    def objective(self, trial: object) -> float:
        """Prune with the options of a trial, and judge the student."""
        (options,) = broadcast_object_list([self.space(trial)])  # each process has an Optuna of its own
        pruner, hold_out = self.pruner, self.compute_objective is None
        pruner.args = replace(self.args, **options)
        with Run(pruner, self.calibration_dataset, [pruner.args], hold_out).open() as run:
            calibration, teacher, loss = run.pruning.calibration, run.pruning.teacher, run.pruning.loss
            calibration.check_held_out()
            student, report = run.student(pruner.args)
            with in_place(pruner, student, report):
                metrics = pruner.evaluate() if pruner.eval_dataset is not None else {}
            metrics["distance"] = distance(calibration, student, teacher, loss)
        if self.compute_objective is None:
            return metrics["distance"]
        return float(checked("what compute_objective gives", self.compute_objective(metrics), float))
