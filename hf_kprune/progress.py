"""How much of a run is done, from the steps that its loops report, and silence around what libraries say of
our own loads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


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


@contextmanager
def unwarned() -> Iterator[None]:
    """No warnings of Transformers inside; afterwards as the caller had them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, tables and warnings of Transformers and datasets inside; afterwards as the caller had them."""
    bars = logging.is_progress_bar_enabled()
    no_hub_bars, no_data_bars = are_progress_bars_disabled(), datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with unwarned():
            yield
    finally:
        if bars:
            with warnings.catch_warnings():  # of the Hub's bars, where the environment forbids them
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()
        if no_hub_bars:
            disable_progress_bars()
        if not no_data_bars:
            datasets.enable_progress_bars()
