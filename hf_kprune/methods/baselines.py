"""Baselines and published methods to compare with, each from one measurement of the dense model and cut once.

They share units, budgets and checkpoints with ours, so that only their decisions differ. Options that serve
`"surgeon"` and `"kprune"` alone (ridge, tune_bias, tune_inputs) say nothing to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Method, Options, Statistics
from .knowledge import per_unit
from .least_squares import Fit, NormalEquations


class Magnitude(Method):
    """Size of weights: the squared L2 norm of all weights of a unit, per cost, by one threshold (Li et al.:
    Pruning Filters for Efficient ConvNets, ICLR 2017, who sum absolute values and prune a given share of each
    layer). Not tuned.

    Squares, as they add up: two units as one have twice the score at twice the cost, so that a head, with the
    weights of a hundred neurons, neither wins nor loses by its size alone. The norm itself would let nearly
    all heads go first.
    """

    in_time = True

    def score(self, statistics: Statistics) -> Tensor:
        return statistics.magnitude / statistics.cost


class Random(Method):
    """Scores per cost drawn evenly from 0 to 1 with `seed`: heads and neurons have the same chance. Not
    tuned."""

    def __init__(self, options: Options):
        super().__init__(options)
        self.generator = torch.Generator().manual_seed(options.seed)

    def score(self, statistics: Statistics) -> Tensor:
        return torch.rand(len(statistics.magnitude), generator=self.generator, dtype=torch.float64)


class Taylor(Method):
    """First order Taylor importance, the mean over sequences of |dL/dm| of a unit's mask m, per cost, by one
    threshold (Michel, Levy, Neubig: Are Sixteen Heads Really Better than One?, NeurIPS 2019; Molchanov et al.
    2017, for neurons). Not tuned.

    Unlike there, labels are drawn from what the dense model predicts, and scores of a layer are not divided
    by their norm: as changes of one loss they compare across layers, and per cost heads with neurons.
    """

    needs = frozenset({"fisher"})
    in_time = True

    def score(self, statistics: Statistics) -> Tensor:
        assert statistics.absolute is not None
        return statistics.absolute / statistics.samples / statistics.cost


class FLAP(Method):
    """An et al.: Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, with
    metric WIFV, structure AL-AM and bias compensation.

    Score of a column is the variance of its feature times the squared norm of its output weights,
    standardised within the sublayer; that of a head the mean over its columns. It is not divided by the cost:
    one threshold for all is set where the units above it fit the budget, in which each counts what it costs.

    Differences from its program, which serves LLaMA: attention's metric is not squared, of which the paper
    says nothing; a head counts its cost, not 512 / 3 neurons; the bias gives the mean of the target, so that
    it also makes good the shift from sublayers below; a projection without a bias gets none.
    """

    tunes = True

    def score(self, statistics: Statistics) -> Tensor:
        s = statistics
        variance = (s.energy / s.tokens - (s.feature_sum / s.tokens).square()).clamp(min=0)
        metric = variance * s.weight.to(variance.dtype).square().sum(0)
        if len(metric):
            metric = (metric - metric.mean()) / metric.std(correction=0).clamp(
                min=torch.finfo(metric.dtype).tiny
            )
        return per_unit(metric, s.unit_width)

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        e = equations
        mean = (e.target_sum - weight.to(torch.float64) @ e.feature_sum) / e.tokens
        return Fit(weight.double(), None if bias is None else mean)


class WandaSP(Method):
    """Wanda-sp, the structured form of Wanda (Sun et al., ICLR 2024) that An et al. 2024 compare FLAP with.
    Not tuned.

    A unit's importance is the sum of |W| ||x||_2 over its weights in the output projection, x its feature
    over all tokens. It is compared within a sublayer only, and all sublayers keep an equal share. The score
    is therefore the share of the sublayer's units that are no more important, on which one threshold does
    just that and then fills what the rounding to whole units leaves; the program leaves it.
    """

    def score(self, statistics: Statistics) -> Tensor:
        s = statistics
        columns = s.energy.sqrt() * s.weight.to(s.energy.dtype).abs().sum(0)
        rank = per_unit(columns, s.unit_width).argsort(stable=True).argsort()
        return (rank + 1).double() / max(len(rank), 1)
