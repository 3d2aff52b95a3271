"""Pruning methods: what each scores, how it searches, how it repairs. The loop over sublayers is in `pruner.py`.

A method is a class made from `KPruneArguments` with the three functions of `Method`. To add one, write it and enter it in
`METHODS` under the name that `KPruneArguments(method=...)` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .knowledge import mean_squared_gradient, per_unit, representational
from .reconstruction import Fit, NormalEquations, tune_weight
from .search import threshold_search


if TYPE_CHECKING:
    from .arguments import KPruneArguments


@dataclass
class Statistics:
    """What was measured of one sublayer, summed over all calibration sequences. C columns, U units.

    Args:
        kind: `"attention"`, `"cross_attention"` or `"ffn"`.
        unit_width: Columns of a unit; C = U * unit_width.
        cost: FLOPs of one unit.
        weight: Output projection, (D, C).
        energy: Sum over tokens of squared features, (C,), float64.
        gradient_sum: Sum over sequences of the gradient of the predictive loss to each column's mask, (C,), float64.
            Zero as long as the student is the teacher (there it is zero by definition and not measured).
        gradient_square: Sum over sequences of its square, (C,), float64.
        tokens: Number of tokens.
        samples: Number of sequences.
    """

    kind: str
    unit_width: int
    cost: float
    weight: Tensor
    energy: Tensor
    gradient_sum: Tensor
    gradient_square: Tensor
    tokens: int
    samples: int


class Method(Protocol):
    """The three decisions of a pruning method."""

    def score(self, statistics: Statistics) -> Tensor:
        """Importance of each unit per cost, (U,)."""

    def search(
        self, scores: Sequence[Tensor], costs: Sequence[float], budget: float, minimum: Sequence[int], multiple: Sequence[int]
    ) -> list[Tensor]:
        """Keep-masks (U,) of the target sublayer and all above it; only the first is used. See `threshold_search`."""

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> Fit:
        """New output weights (D, C) of the kept columns."""


class KPrune:
    """K-prune as published (Park, Choi, Kang: Accurate Retraining-free Pruning for Pretrained Encoder-based Language
    Models, ICLR 2024), where the paper and its program differ with the program's scaling, which its figures come from.

    S_head   = mu (lambda_pred K_pred + lambda_rep K_rep) / F_head                                       (eq. 11)
    S_neuron =    (lambda_pred K_pred + lambda_rep K_rep) / F_neuron                                     (eq. 10)

    with the K of a head the mean over its columns, mu the head size, F in GFLOPs.

    Unlike the program: gradients are those of single sequences, put on the scale of its batches of 32 by
    `mean_squared_gradient`, so results depend on no batch; docs/how_it_works.md lists the rest.
    """

    batch = 32
    """Batch size on whose scale the paper's lambda was tuned."""

    def __init__(self, args: KPruneArguments):
        self.args = args

    def score(self, statistics: Statistics) -> Tensor:
        s, args = statistics, self.args
        predictive = mean_squared_gradient(s.gradient_sum, s.gradient_square, s.samples, self.batch)
        knowledge = args.lambda_pred * predictive + args.lambda_rep * representational(s.energy, s.weight, s.tokens)
        mu = (s.unit_width if args.mu is None else args.mu) if s.kind != "ffn" else 1
        return mu * per_unit(knowledge, s.unit_width) / (s.cost / 1e9)

    def search(
        self, scores: Sequence[Tensor], costs: Sequence[float], budget: float, minimum: Sequence[int], multiple: Sequence[int]
    ) -> list[Tensor]:
        return threshold_search(scores, costs, budget, minimum, multiple)

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> Fit:
        return tune_weight(equations, weight, bias, self.args.ridge, self.args.tune_bias)


METHODS: dict[str, Callable[[KPruneArguments], Method]] = {"kprune": KPrune}
