"""Surgeon, our own method and the default: optimal brain surgeon for units of columns, in the metric of the
Fisher information.

Shapes: C columns of an output projection, D residual width, U units of w columns, C = U w.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Options, Statistics
from .least_squares import ROUNDING, STRIP, Fit, NormalEquations, damped_cholesky, tune_weight
from .search import convex_slopes


SHARE = 0.03
"""Fraction of the remaining neurons eliminated between two updates of what the others cost; heads go one by
one."""


DENSE = 0.8
"""Neurons that are gone are taken out of the matrices once fewer than this fraction of them stay."""


SHRINKAGE = 1e-2
"""Ridge of the features' second moments by which units are scored: far above the rounding of float32."""


class Surgeon(Method):
    """Our own method, the default: optimal brain surgeon in the metric of the Fisher information, a split of
    the budget over depth that is tried out, and tuning of output and of input projections.

    The loss of a sublayer's output changing by e is 1/2 e^T F e, F its Fisher information (K-FAC's factor).
    Tokens count by the square of the gradient at them, so that of features and gradients only the latter's
    direction is taken for independent.
    Units are eliminated one after the other, those first that cost least of it *after* the rest has taken
    over their work by least squares (Hassibi and Stork 1993; Kurtic et al. 2023, ZipLM). The losses of a
    sublayer's units so add up to a curve, and all sublayers' curves have one unit, so that one threshold
    splits the budget (`search.split`).

    A whole expert sees tokens of its kind, of which the prediction minds errors more or less than of others,
    so its loss is not the product of two moments over tokens but the mean of 1/2 (g^T W_e x_e)^2.
    """

    needs = frozenset({"curvature"})
    options = frozenset({"ridge", "tune_bias", "tune_inputs"})
    ranges: ClassVar = {"ridge": (1e-4, 1.0)}
    exponents: ClassVar[tuple[float | None, ...]] = (1.0, 0.8, 0.6)
    tunes = True
    measure_tokens = 10_000
    in_time = True

    def __init__(self, options: Options):
        super().__init__(options)
        self.ridge = options.ridge
        self.tune_bias = options.tune_bias is not False
        self.tune_inputs = options.tune_inputs is not False
        self.latest: tuple[Tensor, Tensor] | None = None

    def score(self, statistics: Statistics) -> Tensor:
        s = statistics
        if s.fisher_by_token is not None:
            return s.fisher_by_token / (2 * s.samples) / s.cost
        assert s.gram is not None
        assert s.weighted_sum is not None
        assert s.total_weight is not None
        assert s.metric is not None
        centred = self.tune_bias and s.has_bias
        inverse, s.damping = inverse_covariance(
            s.gram, s.weighted_sum, float(s.total_weight), centred, SHRINKAGE
        )
        root = self.root(s.metric) / s.samples**0.5
        return eliminate(inverse, s.weight, root, s.unit_width) / s.cost

    def root(self, metric: Tensor) -> Tensor:
        """The square root of a metric, see `root_of`: experts have one in common."""
        if self.latest is None or self.latest[0] is not metric:
            self.latest = metric, root_of(metric)
        return self.latest[1]

    def tune(self, equations: NormalEquations, weight: Tensor, bias: Tensor | None, unit_width: int) -> Fit:
        return tune_weight(equations, weight, bias, self.ridge, self.tune_bias)


def inverse_covariance(
    gram: Tensor, feature_sum: Tensor, total: float, centred: bool, ridge: float
) -> tuple[Tensor, float]:
    """The inverse of the second moments of features, (C, C), about their mean if `centred`, with
    `ridge` relative to their mean square, and the damping beyond it, relative as well, that makes them
    positive definite.

    The sums are over tokens of which each counts by its weight, and `total` is the sum of all weights.

    What an intercept can take over costs nothing, so moments about the mean are what counts where the bias is
    tuned.
    """
    total = total or 1.0
    centre = feature_sum / total**0.5 if centred else None
    squares = gram.diagonal() if centre is None else gram.diagonal() - centre.square()
    square = float(gram.diagonal().mean()) if len(gram) else 0.0
    scale = max(float(squares.mean()) if len(gram) else 0.0, ROUNDING * square) or 1.0
    factor, damping = damped_cholesky(gram, scale, ridge * scale, centre)
    return torch.cholesky_inverse(factor, out=factor).mul_(total).mT, damping


def eliminate(inverse: Tensor, weight: Tensor, root: Tensor, width: int) -> Tensor:
    """Loss that each unit adds when it goes, the cheapest first: (U,), float64, rising in the order in which
    they go.

    With the features' moments S, the output weights W and the metric F = R R^T of the output, the least of

        1/2 tr(F dW S dW^T)

    over all dW that take the columns P of a unit to zero is

        1/2 tr(F W_P ((S^-1)_PP)^-1 W_P^T),

    reached by dW = -W_P ((S^-1)_PP)^-1 (S^-1)_P: (Hassibi and Stork 1993, for blocks of columns). Then S
    loses the columns, by a Schur complement of its inverse. The sum over the units that have gone is the loss
    of the sublayer, or, where the next one would go more cheaply than the last, less: a search that stops at
    a threshold does not stop there.

    Args:
        inverse: S^-1, (C, C), positive definite, columns unit by unit. It is changed.
        weight: W, (D, C).
        root: R, (D, D).
        width: w.
    """
    inverse = inverse.contiguous()
    effects = weight.to(inverse.dtype).T @ root  # (C, D)
    losses, order_gone = [inverse.new_zeros(1)], []
    units = torch.arange(len(inverse) // width, device=inverse.device)
    stays = torch.ones(len(units), dtype=torch.bool, device=inverse.device)
    columns = torch.arange(width, device=inverse.device)
    while n := int(stays.sum()):
        if width == 1:
            each = torch.linalg.vector_norm(effects, dim=1).square() / inverse.diagonal()
        else:
            blocks = inverse.view(n, width, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            parts = effects.view(n, width, -1)
            each = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        count = max(1, int(SHARE * n)) if width == 1 else 1
        gone = each.masked_fill(~stays, torch.inf).argsort(stable=True)[:count]
        p = (gone.unsqueeze(1) * width + columns).flatten()
        rows, goes = inverse[p], effects[p]
        solved = torch.linalg.solve(rows[:, p], torch.cat([rows, goes], 1))
        # of several that go together each takes its own part of what they cost together
        share = each[gone] / each[gone].sum().clamp(min=torch.finfo(each.dtype).tiny)
        losses.append(share * (goes * solved[:, len(inverse) :]).sum() / 2)
        order_gone.append(units[gone])
        inverse.addmm_(rows.T, solved[:, : len(inverse)], alpha=-1)
        effects.addmm_(rows.T, solved[:, len(inverse) :], alpha=-1)
        stays[gone] = False
        if width > 1 or int(stays.sum()) < DENSE * len(stays):  # what is gone has become zero
            q = (stays.nonzero() * width + columns).flatten()
            inverse, effects = compact(inverse, q, q), compact(effects, q)
            units, stays = units[stays], stays[stays]
    slopes = convex_slopes(torch.cat(losses).cumsum(0).cpu()).to(inverse.device)
    return torch.empty_like(slopes).index_copy_(0, torch.cat(order_gone), slopes) if order_gone else slopes


def compact(matrix: Tensor, rows: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
    """Rows and columns of a matrix, their numbers rising, in the memory of the matrix itself."""
    flat, place = matrix.view(-1), 0
    for some in rows.split(STRIP):
        # no row that is still to be read begins before those end that are written
        strip = matrix[some][:, columns].flatten()
        flat[place : place + len(strip)] = strip
        place += len(strip)
    return flat[:place].view(len(rows), matrix[:0, columns].shape[1])


def root_of(metric: Tensor) -> Tensor:
    """L with  L L^T = F  of a positive semidefinite F (D, D), up to rounding."""
    scale = float(metric.diagonal().mean()) if len(metric) else 0.0
    return damped_cholesky(metric, scale, 0.0)[0] if scale > 0 else torch.zeros_like(metric)
