"""Pruning methods: what each scores, how it searches, how it repairs. The loop over sublayers is in `algorithm.py`.

A method is a class made from `KPruneArguments` with the three functions of `Method`. To add one, write it and enter it in
`METHODS` under the name that `KPruneArguments(method=...)` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .base import Method, Statistics
from .baselines import RIVALS
from .elimination import covariance, eliminate
from .knowledge import mean_squared_gradient, per_unit, representational
from .least_squares import Fit, NormalEquations, tune_weight
from .search import threshold_search


if TYPE_CHECKING:
    from ..arguments import KPruneArguments


class KPrune:
    """K-prune as published (Park, Choi, Kang: Accurate Retraining-free Pruning for Pretrained Encoder-based Language
    Models, ICLR 2024), where the paper and its program differ with the program's scaling, which its figures come from.

    S_head   = mu (lambda_pred K_pred + lambda_rep K_rep) / F_head                                       (eq. 11)
    S_neuron =    (lambda_pred K_pred + lambda_rep K_rep) / F_neuron                                     (eq. 10)

    with the K of a head the mean over its columns, mu the head size, F in GFLOPs.

    Unlike the program: gradients are those of single sequences, put on the scale of its batches of 32 by
    `mean_squared_gradient`, so results depend on no batch; docs/how_it_works.md lists the rest.
    """

    needs = frozenset({"knowledge"})
    options = frozenset({"lambda_pred", "lambda_rep", "mu", "ridge", "tune_bias", "tune_inputs"})
    one_shot = False
    exponents: tuple[float | None, ...] = (None,)
    tunes = True
    dtype = "float64"
    measure_tokens: int | None = None
    in_time = False
    batch = 32
    """Batch size on whose scale the paper's lambda was tuned."""

    def __init__(self, args: KPruneArguments):
        self.args = args
        self.ridge, self.tune_bias, self.tune_inputs = (
            args.ridge or 0.0,
            bool(args.tune_bias),
            bool(args.tune_inputs),
        )

    def score(self, statistics: Statistics) -> Tensor:
        s, args = statistics, self.args
        assert s.gradient_sum is not None
        assert s.gradient_square is not None
        predictive = mean_squared_gradient(s.gradient_sum, s.gradient_square, s.samples, self.batch)
        knowledge = args.lambda_pred * predictive + args.lambda_rep * representational(
            s.energy, s.weight, s.tokens
        )
        mu = (s.unit_width if args.mu is None else args.mu) if s.has_heads else 1
        return mu * per_unit(knowledge, s.unit_width) / (s.cost / 1e9)

    def search(
        self,
        measured: Sequence[Statistics],
        scores: Sequence[Tensor],
        budget: float,
        minimum: Sequence[int],
        multiple: Sequence[int],
    ) -> list[Tensor]:
        return threshold_search(scores, [s.cost for s in measured], budget, minimum, multiple)

    def arrange(self, measured: Sequence[Statistics], masks: list[Tensor]) -> list[Tensor]:
        return masks

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        return tune_weight(equations, weight, bias, self.ridge, self.tune_bias)


class OptimalBrainSurgeon:
    """Our own method, the default: optimal brain surgeon in the metric of the Fisher information, a split of the budget over
    depth that is tried out, and tuning of output and of input projections.

    The loss of a sublayer's output changing by e is 1/2 e^T F e, F its Fisher information (K-FAC's factor). Units are
    eliminated one after the other, those first that cost least of it *after* the rest has taken over their work by least
    squares (Hassibi and Stork 1993; Kurtic et al. 2023, ZipLM). The losses of a sublayer's units so add up to a curve, and
    all sublayers' curves have one unit, so that one threshold splits the budget (`search.split`).
    """

    needs = frozenset({"curvature"})
    options = frozenset({"ridge", "tune_bias", "tune_inputs"})
    one_shot = True
    exponents: tuple[float | None, ...] = (0.5, 0.7, 1.0)
    tunes = True
    dtype = "float32"  # the ridge is far above its rounding
    measure_tokens: int | None = 10_000
    in_time = True

    def __init__(self, args: KPruneArguments):
        self.ridge = 1e-2 if args.ridge is None else args.ridge
        self.tune_bias = args.tune_bias is not False
        self.tune_inputs = args.tune_inputs is not False

    def score(self, statistics: Statistics) -> Tensor:
        s = statistics
        assert s.gram is not None
        assert s.metric is not None
        centred = self.tune_bias and s.has_bias
        moments, s.damping = covariance(s.gram, s.feature_sum, s.tokens, centred, self.ridge)
        return eliminate(moments, s.weight, s.metric / s.samples, s.unit_width) / s.cost

    search, arrange = KPrune.search, KPrune.arrange

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        return tune_weight(equations, weight, bias, self.ridge, self.tune_bias)


METHODS: dict[str, Callable[[KPruneArguments], Method]] = {
    "obs": OptimalBrainSurgeon,
    "kprune": KPrune,
    **RIVALS,
}
