"""What a pruning method is handed and what it decides: `Statistics` in, the functions of `Method` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..options import from_json
from .least_squares import Fit, NormalEquations
from .search import common_scores, threshold_search


BY_COLUMN = (
    *("weight", "magnitude", "energy", "feature_sum", "gradient_sum", "gradient_square", "absolute"),
    *("weighted_sum", "fisher_by_token"),
)
"""Statistics whose last dimension is that of columns or of units."""

BY_TWO = ("gram", "fisher")
"""Statistics of two columns or units each."""


@dataclass
class Statistics:
    """What was measured of one sublayer, summed over the calibration sequences. C columns, U units, D the
    residual width.

    Args:
        has_heads: Whether its units are attention heads; else they are neurons.
        unit_width: Columns of a unit; C = U * unit_width.
        cost: What one unit costs, FLOPs unless the budget is in something else.
        weight: Output projection, (D, C), columns unit by unit, like all that has C entries.
        has_bias: Whether it has a bias.
        magnitude: Sum of the squares of all weights of each unit, input and output projections, (U,),
            float64.
        energy: Sum over tokens of squared features, (C,), float64.
        feature_sum: Sum over tokens of features, (C,), float64.
        tokens: Number of tokens.
        samples: Number of sequences.
        gradient_sum: Sum over sequences of the gradient of the predictive loss to each column's mask, (C,),
            float64. Zero as long as the student is the teacher (there it is zero by definition and not
            measured).
        gradient_square: Sum over sequences of its square, (C,), float64.
        gram: Sum over tokens of |g|^2 a a^T, with a the features and g as for `metric`, (C, C), float64.
        weighted_sum: Sum over tokens of |g|^2 a, (C,), float64.
        total_weight: Sum over tokens of |g|^2, (), float64.
        metric: Fisher information of the sublayer's output, the sum over tokens of g g^T with g the gradient
            to it of the loss against outputs drawn from what the dense model predicts
            (`Knowledge.draw`), (D, D), float64.
        fisher: Fisher information of the units' masks, the sum over sequences of g g^T with g such a gradient
            to all masks of the sublayer, (U, U), float64.
        absolute: Sum over sequences of |g| of those, (U,), float64.
        fisher_by_token: The sum over tokens of g^2 with g the gradient of such a loss to a unit's mask at
            that token alone, (U,), float64. Of whole experts, in place of `gram` and `metric`.
        experts: Experts that share out the units among them evenly, one after the other, and of which each is
            scored by itself (`parts`); else 1. Of several, `gram` and `fisher` are those of each, (E, U / E,
            U / E). Of whole experts, which are units, they are the groups among which a router chooses.

    Attributes:
        damping: What `Method.score` had to add to the diagonal of the features' second moments beyond its
            ridge, relative to its mean, as they were singular up to rounding.

    Example:

        >>> import torch
        >>> from hf_kprune import Statistics
        >>> ones = torch.ones(3, dtype=torch.float64)
        >>> s = Statistics(False, 1, 4.0, torch.ones(2, 3), True, ones, ones, ones, tokens=2, samples=1)
        >>> s.energy / s.tokens
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    has_heads: bool
    unit_width: int
    cost: float
    weight: Tensor
    has_bias: bool
    magnitude: Tensor
    energy: Tensor
    feature_sum: Tensor
    tokens: int
    samples: int
    gradient_sum: Tensor | None = None
    gradient_square: Tensor | None = None
    gram: Tensor | None = None
    weighted_sum: Tensor | None = None
    total_weight: Tensor | None = None
    metric: Tensor | None = None
    fisher: Tensor | None = None
    absolute: Tensor | None = None
    fisher_by_token: Tensor | None = None
    experts: int = 1
    damping: float = field(default=0.0, init=False)

    def parts(self) -> list[Statistics]:
        """The statistics of each expert, as of a sublayer by itself; its own if there are none."""
        if self.experts == 1:
            return [self]
        sums = {name: getattr(self, name) for name in BY_COLUMN if getattr(self, name) is not None}
        each = {name: value.unflatten(-1, (self.experts, -1)) for name, value in sums.items()}
        each |= {name: value for name in BY_TWO if (value := getattr(self, name)) is not None}
        return [
            replace(
                self,
                experts=1,
                weight=each["weight"][:, number],
                **{name: value[number] for name, value in each.items() if name != "weight"},
            )
            for number in range(self.experts)
        ]


class Options(Protocol):
    """What methods read of the options of a run, see `KPruneArguments`."""

    seed: int
    ridge: float | None
    tune_bias: bool | None
    tune_inputs: bool | None
    method_kwargs: dict[str, Any] | str | None


@dataclass
class NoKwargs:
    """The options of a method that takes none in `method_kwargs`."""


class Method:
    """A pruning method: the decisions that differ between methods, and what they need.

    The defaults are those of a baseline: one measurement of the dense model, one threshold for all sublayers,
    and output weights left as they are. A method overrides what is its own; `score` it must.

    Args:
        options: The options of the run.

    Example:

        >>> from hf_kprune import Method
        >>> class Loudest(Method):
        ...     def score(self, statistics):
        ...         return statistics.energy.view(-1, statistics.unit_width).mean(1) / statistics.cost
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What is measured beyond features: `"knowledge"` (`gradient_sum`, `gradient_square`; not for
    one-shot methods), `"curvature"` (`gram` and `metric`, or `fisher_by_token`), `"fisher"` (`fisher`,
    `absolute`)."""

    options: ClassVar[frozenset[str]] = frozenset()
    """Names of the options of `KPruneArguments` that it reads and other methods do not."""

    kwargs_class: ClassVar[type[Any]] = NoKwargs
    """Dataclass of the options that it alone takes, in `method_kwargs`. Every field has a default; its
    annotation is what a value is checked by."""

    kwargs: object
    """Those of the run."""

    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    """What a search for options varies by default, of either kind, on a logarithmic scale."""

    one_shot: ClassVar[bool] = True
    """Whether all masks follow from one measurement of the dense model. Else every sublayer is decided on the
    student as pruned and tuned up to there."""

    measure_every: int | None = 1
    """Unless it is one-shot, how many sublayers are decided by one measurement of the student; None: as many
    as it takes to measure no more than `algorithm.MEASUREMENTS` times."""

    exponents: ClassVar[tuple[float | None, ...]] = (None,)
    """Ways to split the budget over depth, see `search.split` (None: by the scores as they are). With more
    than one, each is tried, or at most as many numbers of heads if all layers are to end alike, and the
    student that is nearest to the teacher on held-out calibration rows wins."""

    measure_tokens: ClassVar[int | None] = None
    """Tokens measured if the options name no number; None: all."""

    tunes: ClassVar[bool] = False
    """Whether output weights are tuned at all."""

    dtype: ClassVar[str] = "float32"
    """The precision in which products are summed for tuning if the options name none."""

    in_time: ClassVar[bool] = False
    """Whether score times cost is an importance that adds up, so that units can be searched for a budget of
    time."""

    in_whole_experts: ClassVar[bool] = True
    """Whether it scores whole experts, and not single neurons alone."""

    ridge: float | None = 0.0
    """Pull of what is tuned towards what it was, see `tune_weight`; None chooses it for each sublayer."""

    tune_bias: bool = False
    """Whether output biases are tuned."""

    tune_inputs: bool = False
    """Whether input projections are corrected for the drift of what they read, see `correct_drift`."""

    def __init__(self, options: Options) -> None:
        self.seed = options.seed
        self.kwargs = self.kwargs_class(**from_json("method_kwargs", options.method_kwargs))

    @classmethod
    def kwargs_names(cls) -> list[str]:
        """Names of the options that it takes in `method_kwargs`."""
        return [each.name for each in fields(cls.kwargs_class)]

    def score(self, statistics: Statistics) -> Tensor:
        """Importance of each unit per cost, (U,)."""
        raise NotImplementedError

    def worth(self, statistics: Statistics) -> Tensor:
        """Importance of each unit per cost, (U,), by which units are searched: `score`; of experts that of
        each by itself, see `common_scores`. One without tokens is ordered by the size of weights."""
        parts = statistics.parts()
        if len(parts) == 1:
            return self.score(statistics)
        reached = [bool(part.energy.any()) for part in parts]
        scores = [self.score(p) if known else p.magnitude for p, known in zip(parts, reached, strict=True)]
        statistics.damping = max(part.damping for part in parts)
        return common_scores(scores, reached)

    def search(
        self,
        statistics: Sequence[Statistics],
        scores: Sequence[Tensor],
        budget: float,
        minimum: Sequence[int],
        multiple: Sequence[int],
    ) -> list[Tensor]:
        """Keep-masks (U,), on the CPU, of all sublayers that were measured. See `threshold_search`.

        Of the measurements, `gram` and `metric` are gone by then: those of all sublayers at once would be
        large.
        """
        return threshold_search(scores, [each.cost for each in statistics], budget, minimum, multiple)

    def arrange(self, statistics: Sequence[Statistics], masks: list[Tensor]) -> list[Tensor]:
        """The masks that a search in time ended with, of as many units in each sublayer, but perhaps of
        others."""
        return masks

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        """New output weights (D, C) of the kept columns, unit by unit, and bias."""
        return Fit(weight.double(), None if bias is None else bias.double())

    def fit(
        self,
        equations: Sequence[NormalEquations],
        weight: Tensor,
        bias: Tensor | None,
        unit_width: int,
        has_bias_columns: bool = False,
    ) -> Fit:
        """New output weights (D, C) of the kept columns, unit by unit, and bias: `tune`; of experts that of
        each by itself, unless no token has reached it. If the last column of each is its bias, it stays as it
        is where biases do."""
        if len(equations) == 1 and not has_bias_columns:
            return self.tune(equations[0], weight, bias, unit_width)
        fits = []
        for each, columns in zip(equations, weight.unflatten(1, (len(equations), -1)).unbind(1), strict=True):
            if not each.tokens:
                fits.append(Fit(columns.double(), None))
            elif has_bias_columns and not self.tune_bias:
                last, rest = columns[:, -1:].double(), columns[:, :-1]
                fit = self.tune(without_bias(each, last[:, 0]), rest, None, min(unit_width, rest.shape[1]))
                fits.append(replace(fit, weight=torch.cat([fit.weight, last], 1)))
            else:
                fits.append(self.tune(each, columns, None, unit_width))
        return joint_fit(fits)


def without_bias(equations: NormalEquations, bias: Tensor) -> NormalEquations:
    """The sums for the neurons of an expert, and for what is left to them of the target by its bias b (D,),
    float64, whose feature is the last column:  Y - a_C b^T."""
    e, feature = equations, equations.gram[:, -1]
    rest = NormalEquations(
        gram=e.gram[:-1, :-1],
        cross=e.cross[:-1] - torch.outer(feature[:-1], bias),
        feature_sum=e.feature_sum[:-1],
        target_sum=e.target_sum - e.feature_sum[-1] * bias,
        target_square=e.target_square - 2 * e.cross[-1] @ bias + feature[-1] * (bias @ bias),
        tokens=e.tokens,
    )
    if e.first is not None:
        rest.first = without_bias(e.first, bias)
    return rest


def joint_fit(fits: Sequence[Fit]) -> Fit:
    """The fits of experts beside each other, (D, sum of C)."""
    return Fit(
        torch.cat([fit.weight for fit in fits], 1),
        None,
        max(fit.damping for fit in fits),
        sum(fit.undetermined for fit in fits),
    )
