"""How much of a run is done, from the steps that its loops report, and silence around what libraries say of our own loads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import datasets
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


if TYPE_CHECKING:
    from .calibration.calibration import Calibration
    from .methods.base import Method


class Work:
    """Counts steps, each about one sublayer that runs on one batch, and tells which fraction of all is done.

    Args:
        tell: Called with that fraction, from 0 to 1, whenever it has risen by a thousandth.
        students: How many there will be, as far as is known: more for a sweep.
    """

    def __init__(self, tell: Callable[[float], None], students: int = 1):
        self.tell, self.students = tell, students
        self.done, self.end, self.total, self.last = 0.0, 0.0, 0.0, 0.0

    def begin(self, steps: float, later: float) -> None:
        """A student begins that takes about so many steps; those that follow take `later` each."""
        self.students -= 1
        self.end = self.done + steps
        self.total = self.end + max(self.students, 0) * later

    def end_student(self) -> None:
        """The student is done, maybe in fewer steps than were thought."""
        self.step(self.end - self.done)

    def step(self, steps: float = 1.0) -> None:
        """So many steps are done."""
        self.done = min(self.done + steps, self.end)
        fraction = self.done / self.total if self.total else 0.0
        if abs(fraction - self.last) >= 0.001:
            self.last = fraction
            self.tell(fraction)


def steps_of(
    method: Method, calibration: Calibration, sublayers: int, measured: bool, tune: bool, dry: bool
) -> float:
    """About how many steps a student takes.

    Args:
        method: That decides.
        calibration: Of its batches.
        sublayers: How many.
        measured: Whether the dense model was measured for an earlier student, as one-shot methods do once.
        tune: Whether weights are tuned.
        dry: Whether it is planned only.
    """
    batches = calibration.batches
    few = sum(batch.measured for batch in batches)
    tried, compared = sum(batch.tried for batch in batches), sum(batch.held_out for batch in batches)
    correct = (4 if method.tune_inputs else 2) if tune and method.tunes else 0
    if not method.one_shot and not dry:
        measuring = few * sublayers + 3 * few * sublayers * (sublayers + 1) / 2
        return measuring + len(batches) * sublayers * (1 + correct)
    measuring = 0 if measured else few * sublayers * (6 if method.needs else 1)
    if dry:
        return measuring
    trials = len(method.exponents) if len(method.exponents) > 1 and compared else 0
    return (
        measuring
        + (trials * tried + len(batches)) * sublayers * (1 + correct)
        + trials * 2 * compared * sublayers
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, tables and warnings of Transformers and datasets inside; afterwards as the caller had them."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    no_hub_bars, no_data_bars = are_progress_bars_disabled(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            with warnings.catch_warnings():  # of the Hub's bars, where the environment forbids them
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()
        if no_hub_bars:
            disable_progress_bars()
        if not no_data_bars:
            datasets.enable_progress_bars()
