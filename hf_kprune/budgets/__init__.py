"""Budgets: what may be spent. One class for each kind; `BUDGETS` names them by the option that asks for
them."""

from __future__ import annotations

from collections.abc import Mapping

from ..arguments import KPruneArguments
from ..entries import Size
from ..structure.sublayers import Sublayer
from .base import Budget, BudgetWarning
from .sizes import Sparsity, TargetBytes, TargetFlops, TargetParams
from .times import TargetLatency, TargetSpeedup, TimeBudget, Timing


__all__ = ["BUDGETS", "Budget", "BudgetWarning", "TimeBudget", "Timing", "budget_of"]

BUDGETS: dict[str, type[Budget]] = {
    kind.option: kind
    for kind in (Sparsity, TargetFlops, TargetParams, TargetBytes, TargetLatency, TargetSpeedup)
}
"""The kinds of budget, by the name of the option."""


def budget_of(
    sublayers: list[Sublayer],
    args: KPruneArguments,
    lengths: Mapping[str, float],
    before: Size,
    timing: Timing | None = None,
    dry: bool = False,
) -> Budget:
    """The budget that `args` ask for.

    Args:
        sublayers: As for `Budget`.
        args: As for `Budget`.
        lengths: As for `Budget`.
        before: As for `Budget`.
        timing: How long the model takes, if the budget is one of time.
        dry: Whether it is for a plan, which measures no cut model.
    """
    kind = BUDGETS[args.budget[0]]
    if issubclass(kind, TimeBudget):
        assert timing is not None
        return kind(sublayers, args, lengths, before, timing, dry)
    return kind(sublayers, args, lengths, before)
