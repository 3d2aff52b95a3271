"""K-prune, the method of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..options import at_least, option, over
from .base import Method, Options, Statistics
from .knowledge import mean_squared_gradient, per_unit, representational
from .least_squares import Fit, NormalEquations, tune_weight


@dataclass
class KPruneKwargs:
    """How K-prune weighs its two kinds of knowledge, and heads against neurons, and how often it measures."""

    lambda_pred: Annotated[float, at_least(0)] = option(1.0, "Weigh the predictive knowledge by this number.")
    lambda_rep: Annotated[
        float, over(0, ": the first sublayer, below which nothing differs, has no other score")
    ] = option(2.5e-4, "Weigh the representational knowledge by this number, which must be over 0.")
    mu: Annotated[float | None, over(0, ", or None for the head size")] = option(
        None,
        "Weigh the scores of heads by this number against those of neurons. By default it is the size of a "
        "head, as in the paper.",
    )
    measure_every: Annotated[int | None, at_least(1)] = option(
        None,
        "Measure the student again after this many sublayers; 1 is the paper. By default it is measured for "
        "each sublayer of a model of up to 12 layers, and about 24 times in a deeper one.",
    )


class KPrune(Method):
    """K-prune as published (Park, Choi, Kang: Accurate Retraining-free Pruning for Pretrained Encoder-based
    Language Models, ICLR 2024), where the paper and its program differ with the program's scaling, which its
    figures come from.

        S_head   = mu (lambda_pred K_pred + lambda_rep K_rep) / F_head      (eq. 11)
        S_neuron =    (lambda_pred K_pred + lambda_rep K_rep) / F_neuron    (eq. 10)

    with the K of a head the mean over its columns, mu the head size, F in GFLOPs.

    Unlike the program: gradients are those of single sequences, put on the scale of its batches of 32 by
    `mean_squared_gradient`, so results depend on no batch; docs/how_it_works.md lists the rest.
    """

    needs = frozenset({"knowledge"})
    options = frozenset({"ridge", "tune_bias", "tune_inputs"})
    kwargs_class = KPruneKwargs
    kwargs: KPruneKwargs
    ranges: ClassVar = {"lambda_rep": (1e-6, 1.0), "mu": (4.0, 256.0)}
    one_shot = False
    tunes = True
    dtype = "float64"

    batch = 32
    """Batch size on whose scale the paper's lambda was tuned."""

    def __init__(self, options: Options):
        super().__init__(options)
        self.ridge, self.tune_bias = options.ridge or 0.0, bool(options.tune_bias)
        self.tune_inputs = bool(options.tune_inputs)
        self.measure_every = self.kwargs.measure_every

    def score(self, statistics: Statistics) -> Tensor:
        s, kwargs = statistics, self.kwargs
        assert s.gradient_sum is not None
        assert s.gradient_square is not None
        predictive = mean_squared_gradient(s.gradient_sum, s.gradient_square, s.samples, self.batch)
        represented = representational(s.energy, s.weight, s.tokens)
        knowledge = kwargs.lambda_pred * predictive + kwargs.lambda_rep * represented
        mu = kwargs.mu if s.has_heads and kwargs.mu is not None else s.unit_width
        return mu * per_unit(knowledge, s.unit_width) / (s.cost / 1e9)

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        return tune_weight(equations, weight, bias, self.ridge, self.tune_bias)
