"""Budgets of time, which are measured: a look-up table of the model foresees what a cut takes, and cut models
correct it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..entries import Size
from ..errors import BudgetError
from ..latency.search import search_latency
from ..latency.table import LatencyTable
from ..latency.timing import compare, cut_to
from ..methods.base import Method, Statistics
from ..structure.sublayers import Sublayer
from .base import Budget


@dataclass
class Timing:
    """How long a model takes as it is.

    Args:
        model: The model.
        table: Its look-up table.
        inputs: The inputs that the table was measured with.
        ratio: How many times as long as the table says cut models were measured to take.
    """

    model: PreTrainedModel
    table: LatencyTable
    inputs: dict[str, Any]
    ratio: float = 1.0


class TimeBudget(Budget):
    """So many seconds are left to a forward pass. Units cost FLOPs where they are compared; times do not add
    up by unit.

    Args:
        sublayers: As for `Budget`.
        args: As for `Budget`.
        lengths: As for `Budget`.
        before: As for `Budget`.
        timing: How long the model takes.
        dry: Whether no cut model is measured, as a plan only estimates.
    """

    is_a_ratio: ClassVar[bool] = False
    """Whether it is asked for as a multiple of the present speed."""

    def __init__(
        self,
        sublayers: list[Sublayer],
        args: KPruneArguments,
        lengths: Mapping[str, float],
        before: Size,
        timing: Timing,
        dry: bool = False,
    ):
        self.timing, self.dry = timing, dry
        dense, asked = timing.table.dense, args.budget[1]
        self.seconds = dense / asked if self.is_a_ratio else asked
        super().__init__(sublayers, args, lengths, before)

    def spendable(self) -> float:
        return self.total

    def check(self) -> None:
        args, table = self.args, self.timing.table
        fastest = table.predict(self.fewest)
        if fastest > self.seconds:
            raise BudgetError(
                f"{self.option} is {self.asked}, {self.meaning}; the model takes {table.dense:.4g} s as it "
                f"is and {fastest:.4g} s with the least that min_heads={args.min_heads}, "
                f"min_neurons={args.min_neurons} and round_to={args.round_to} leave"
            )
        super().check()

    @property
    def keeps_all(self) -> bool:
        return self.timing.table.dense <= self.seconds

    def present(self) -> float:
        return self.in_terms(self.timing.table.dense, self.timing.table.dense)

    def in_terms(self, dense: float, seconds: float) -> float:
        """The seconds of a model in terms of what is asked for, beside those of the dense one."""
        return dense / seconds if self.is_a_ratio else seconds

    def achieved(self, student: PreTrainedModel) -> float:
        if self.dry:
            counts = [sublayer.num_units for sublayer in self.sublayers]
            return self.in_terms(self.timing.table.dense, self.timing.table.predict(counts))
        return self.in_terms(*compare([self.timing.model, student], self.timing.inputs))

    def search(
        self, method: Method, statistics: Sequence[Statistics], scores: Sequence[Tensor], position: int = 0
    ) -> list[Tensor]:
        """The best masks of which a cut model is measured to take the time that there is.

        The table's sums are a few per cent off, so what it is asked for is corrected, up to three times, by
        how far off it was. In a dry run its first answer holds.

        Raises:
            BudgetError: If no cut model was measured to be within 2 % of it.
        """
        assert position == 0  # the methods that take times decide all at once
        worth = [cost * score.clamp(min=0) for cost, score in zip(self.costs, scores, strict=True)]
        if self.dry:
            return method.arrange(statistics, self.foresee(worth))
        timing, by_ratio = self.timing, dict[float, list[Tensor]]()
        for _ in range(4):
            masks = self.foresee(worth)
            cut = cut_to(timing.model, [int(mask.sum()) for mask in masks], self.args.head_unit)
            dense, seconds = compare([timing.model, cut], timing.inputs)
            # both in one run, as the machine may have slowed down
            ratio = seconds / dense * timing.table.dense / self.seconds
            by_ratio[ratio] = masks
            if 0.98 < ratio < 1.01:
                break
            timing.ratio *= ratio
        within = [ratio for ratio in by_ratio if ratio < 1.02]
        if not within:
            raise BudgetError(
                f"{self.option} is {self.asked}, of which the fastest model that was cut and measured takes "
                f"{min(by_ratio):.2f} times the time; ask for less, or try again when the machine is quiet"
            )
        return method.arrange(statistics, by_ratio[max(within)])

    def foresee(self, worth: list[Tensor]) -> list[Tensor]:
        """The best masks by the table alone."""
        table = self.timing.table
        least = table.predict(self.fewest) - table.rest
        seconds = max(self.seconds / self.timing.ratio - table.rest, least)
        return search_latency(worth, table.curves, seconds, self.minimum, self.multiple)


class TargetLatency(TimeBudget):
    """A forward pass may take so many seconds."""

    option = "target_latency"
    meaning = "the seconds that a forward pass may take"


class TargetSpeedup(TimeBudget):
    """A forward pass is to be so many times as fast as now."""

    option = "target_speedup"
    meaning = "how many times as fast a forward pass is to be"
    is_a_ratio = True
