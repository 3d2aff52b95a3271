"""KPWT, knowledge-preserving weight tuning (K-prune, part c): refit an output projection to the teacher by
least squares.

The features of a sublayer are never held for all tokens: their products are summed as they stream by. Pure
functions.

Shapes: n tokens, C kept columns, D residual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


DAMPING = 1e-10
"""Least damping of the normal equations, relative to the mean of their diagonal. Decides directions that no
data decide."""

FAINT = 1e-4
"""A column is pulled as if its mean square were at least this fraction of that of all."""

RIDGE = 1.0
"""The ridge where none is chosen, and the first that is tried where one is."""

RIDGES = tuple(4.0**power for power in range(-6, 4))
"""Ridges that are tried where none is given."""

DIRECTIONS = 64
"""Directions in which the errors of ridges are compared, if there are more."""

STRIP = 256
"""Rows of a Gram matrix that are computed at a time: enough for a product to be as fast as it can."""

ROUNDING = 1e-12
"""What is left of a mean square about the mean is nothing if it is no larger than this fraction of it."""


@dataclass
class Centred:
    """Tokens (n, C) less a centre that is near to their mean; each counts by its weight, or once.

    In float32, features that hardly vary about a large mean would lose in their products all that tells how
    they vary.

    Args:
        rest: What is left, times the root of the weights, (n, C), in the precision of the products.
        centre: (C,), float64; zero for products in float64, which need none.
        rest_sum: The weighted sum of what is left, (C,), float64.
        weight: The sum of the weights, (), float64.
    """

    rest: Tensor
    centre: Tensor
    rest_sum: Tensor
    weight: Tensor

    @classmethod
    def of(cls, tokens: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> Centred:
        each = tokens.new_ones(len(tokens)) if weights is None else weights
        each = each.double()
        centre, weight = tokens.new_zeros(tokens.shape[1]), each.sum()
        if dtype != torch.float64 and bool(weight):
            centre = ((each / weight) @ tokens.double()).to(tokens.dtype)
        rest = (tokens - centre).to(dtype)
        rest_sum = rest.sum(0, dtype=torch.float64) if weights is None else each @ rest.double()
        rest = rest if weights is None else rest * each.sqrt().unsqueeze(1).to(dtype)
        return cls(rest, centre.double(), rest_sum, weight)

    def total(self) -> Tensor:
        """The weighted sum of the tokens themselves, (C,), float64."""
        return self.rest_sum + self.weight * self.centre


def add_products(sums: Tensor, a: Centred, b: Centred) -> None:
    """Add A^T B of as many tokens A (n, C) and B (n, D), of the same weights, to float64 sums (C, D): what is
    left of the centres is multiplied in its own precision, the centres themselves in float64."""
    if a is b:
        add_gram(sums, a.rest)
    else:
        sums += a.rest.T @ b.rest
    if a.rest.dtype != torch.float64:
        sums.addmm_(torch.stack([a.centre, a.rest_sum], 1), torch.stack([b.total(), b.centre]))


def add_gram(sums: Tensor, x: Tensor) -> None:
    """Add X^T X of X (n, C) to float64 sums (C, C): the upper half, in strips of `STRIP` rows, and its mirror
    image."""
    for start in range(0, x.shape[1], STRIP):
        stop = min(start + STRIP, x.shape[1])
        strip = x[:, start:stop].T @ x[:, start:]
        sums[start:stop, start:] += strip
        sums[stop:, start:stop] += strip[:, stop - start :].T


@dataclass
class NormalEquations:
    """Sums over tokens that determine the fit of  Y ~ A W^T + 1 b^T, and its error. All float64.

    Args:
        gram: A^T A, (C, C).
        cross: A^T Y, (C, D).
        feature_sum: A^T 1, (C,).
        target_sum: Y^T 1, (D,).
        target_square: ||Y||_F^2, ().
        tokens: n, ().
        first: The same sums over the first half of the sequences, if a ridge is to be chosen by halves; else
            None.
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor
    tokens: Tensor
    first: NormalEquations | None = field(default=None, init=False)

    def join(self, first: NormalEquations) -> NormalEquations:
        """Add the sums over the first half of the sequences to these over the second, and keep them. The sums
        over the second are not there any more: three matrices at once would be too many."""
        for both, part in zip(self.tensors(), first.tensors(), strict=True):
            both += part
        self.first = first
        return self

    @contextmanager
    def parted(self, first: NormalEquations) -> Iterator[tuple[NormalEquations, NormalEquations]]:
        """Within this context, the sums over both halves of the sequences: these become those over the
        second, to rounding, and those over all again in the end."""
        pairs = list(zip(self.tensors(), first.tensors(), strict=True))
        for both, part in pairs:
            both -= part
        try:
            yield first, self
        finally:
            for both, part in pairs:
                both += part

    @classmethod
    def zeros(cls, columns: int, width: int, device: torch.device) -> NormalEquations:
        shapes: list[tuple[int, ...]] = [
            (columns, columns),
            (columns, width),
            (columns,),
            (width,),
            (),
            (),
        ]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, features: Tensor, target: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Add tokens: features A (n, C), target Y = X_T + Sub_T(X_T) - X_S (n, D).

        Products are taken in `dtype` and summed in float64, see `add_products`.
        """
        a, y = Centred.of(features, dtype), Centred.of(target, dtype)
        add_products(self.gram, a, a)
        add_products(self.cross, a, y)
        self.feature_sum += a.total()
        self.target_sum += y.total()
        self.target_square += torch.linalg.vector_norm(target, dtype=torch.float64).square()
        self.tokens += len(features)

    def along(self, directions: Tensor) -> NormalEquations:
        """The sums for targets in some directions (D, K) alone. Their squares are left as they are."""
        target_sum = self.target_sum @ directions
        return replace(self, cross=self.cross @ directions, target_sum=target_sum)

    def tensors(self) -> list[Tensor]:
        """The sums themselves, of all tokens."""
        return [getattr(self, each.name) for each in fields(self) if each.init]


@dataclass
class Fit:
    """A tuned output projection.

    Args:
        weight: W, (D, C), float64.
        bias: b, (D,), float64; None for a projection without one.
        damping: What was added to the diagonal, relative to its mean, the ridge included.
        undetermined: Columns that are, to rounding, linear combinations of others, so that the data do not
            determine their weights; they take the smallest change from the weights as they were.
    """

    weight: Tensor
    bias: Tensor | None
    damping: float = 0.0
    undetermined: int = 0


def squared_error(equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> Tensor:
    """||Y - A W^T - 1 b^T||_F^2, (), from the sums alone."""
    e, w = equations, weight.to(equations.gram.dtype)
    square = e.target_square - 2 * (e.cross * w.T).sum() + (e.gram @ w.T).mul_(w.T).sum()
    if bias is not None:
        b = bias.to(w.dtype)
        square = square - 2 * e.target_sum @ b + 2 * (e.feature_sum @ w.T) @ b + e.tokens * b @ b
    return square


def tune_weight(
    equations: NormalEquations,
    weight: Tensor,
    bias: Tensor | None,
    ridge: float | None = 0.0,
    tune_bias: bool = False,
) -> Fit:
    """argmin_{W, b} ||Y - A W^T - 1 b^T||_F^2 + ridge * sum_c (A^T A)_cc ||W_c - W_0c||^2,
    KPWT of Park et al. (2024).

    The unknown is the change from the present weights W_0: with G = A^T A,

        (G + ridge diag G) dW = A^T (Y - A W_0^T - 1 b_0^T),

    by a Cholesky factorisation. Where G is singular, damping of `DAMPING` (more if rounding asks for it)
    picks the smallest change. With `tune_bias`, A and the residual are centred first and the intercept
    follows from their means.

    Args:
        equations: The sums.
        weight: W_0, (D, C).
        bias: b_0, (D,), or None.
        ridge: Relative to the squares of each column of features, >= 0. None chooses it by the halves of the
            sums, see `choose_ridge`.
        tune_bias: Whether b is free; else, and where there is none, it stays as it is.

    Raises:
        ValueError: If the sums hold NaN or Inf.
    """
    if not all_finite(equations.tensors()):
        raise ValueError("the normal equations hold NaN or Inf")
    w0 = weight.to(torch.float64)
    b0 = None if bias is None else bias.to(torch.float64)
    free = tune_bias and b0 is not None
    if ridge is None:
        ridge = choose_ridge(equations, w0, b0, free)
    equations.first = None  # it takes as much memory as the sums
    w, b, floor, undetermined = solve(equations, residual_of(equations, w0, b0, free), w0, b0, ridge)
    return Fit(w, b, ridge + floor, undetermined)


def choose_ridge(equations: NormalEquations, weight: Tensor, bias: Tensor | None, tune_bias: bool) -> float:
    """The ridge with which each half of the sequences predicts the other best: 2-fold cross-validation.

    From `RIDGE` on weaker ones are tried until they are worse, or else stronger ones. Errors are compared in
    a few random directions (Achlioptas 2003), as fits in all of them take longer than factorisations. What
    fits half of the sequences is twice too strong for all of them, as it is relative to sums over them, while
    noise stays the same.

    Args:
        equations: The sums, with those over the first half.
        weight: W_0, (D, C).
        bias: b_0, (D,), or None.
        tune_bias: Whether b is free.

    Returns:
        The ridge; `RIDGE` where a half has no tokens.
    """
    first = equations.first
    if first is None or not 0 < first.tokens < equations.tokens:
        return RIDGE
    with equations.parted(first) as halves:
        if len(weight) > DIRECTIONS:
            axes = directions(len(weight)).to(weight.device)
            halves = halves[0].along(axes), halves[1].along(axes)
            weight, bias = axes.T @ weight, None if bias is None else bias @ axes
        return best_ridge(halves, weight, bias, tune_bias) / 2


def best_ridge(
    halves: tuple[NormalEquations, NormalEquations], weight: Tensor, bias: Tensor | None, tune_bias: bool
) -> float:
    """The ridge with which fits to each half predict the other best."""
    residuals = [residual_of(half, weight, bias, tune_bias) for half in halves]

    def error(ridge: float) -> float:
        total = 0.0
        for fitted, residual, other in zip(halves, residuals, halves[::-1], strict=True):
            w, b, _, _ = solve(fitted, residual, weight, bias, ridge)
            total += float(squared_error(other, w, b))
        return total

    best, least = RIDGE, error(RIDGE)
    for way in (sorted((r for r in RIDGES if r < RIDGE), reverse=True), [r for r in RIDGES if r > RIDGE]):
        for ridge in way:
            if (attempt := error(ridge)) >= least:
                break
            best, least = ridge, attempt
        if best != RIDGE:
            break
    return best


def directions(width: int) -> Tensor:
    """Random directions of a space in which errors are compared, (width, `DIRECTIONS`), float64: the square
    of an error is, on average over them, that in all directions."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (width, DIRECTIONS), generator=generator, dtype=torch.float64)
    return signs.mul_(2).sub_(1).div_(DIRECTIONS**0.5)


@dataclass
class Residual:
    """What W_0 and b_0 leave to a change of them, whatever the ridge. All float64.

    Args:
        change: A^T (Y - A W_0^T - 1 b_0^T), (C, D), of features about their mean if b is free.
        sum: 1^T (Y - A W_0^T - 1 b_0^T), (D,).
        centre: c with  A^T A - c c^T  the moments of the same features, (C,); None where that is A^T A.
    """

    change: Tensor
    sum: Tensor
    centre: Tensor | None


def residual_of(equations: NormalEquations, weight: Tensor, bias: Tensor | None, tune_bias: bool) -> Residual:
    """The residual of W_0 (D, C) and b_0 (D,)."""
    e = equations
    change = torch.addmm(e.cross, e.gram, weight.T, alpha=-1)
    rest = e.target_sum - e.feature_sum @ weight.T
    if bias is not None:
        change.addr_(e.feature_sum, bias, alpha=-1)
        rest = rest - e.tokens * bias
    if not tune_bias:
        return Residual(change, rest, None)
    change.addr_(e.feature_sum, rest / e.tokens, alpha=-1)
    return Residual(change, rest, e.feature_sum / e.tokens.sqrt())


def solve(
    equations: NormalEquations, residual: Residual, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None, float, int]:
    """W (D, C) and b (D,) of `tune_weight`, its damping beyond the ridge, and how many columns the data do
    not determine. All float64."""
    e, b, undetermined, centre = equations, bias, 0, residual.centre
    delta, floor = torch.zeros_like(residual.change), 0.0
    squares = e.gram.diagonal() if centre is None else e.gram.diagonal() - centre.square()
    scale = float(squares.mean()) if len(squares) else 0.0
    square = float(e.gram.diagonal().mean()) if len(squares) else 0.0
    if scale > ROUNDING * square:  # else features are constant: b does it all
        pull = ridge * squares.clamp(min=FAINT * scale)
        factor, floor = damped_cholesky(e.gram, scale, pull, centre)
        delta = solve_factored(factor, residual.change)
        # a pivot is what is left of a column's norm once the columns before it are projected out: if they
        # give it with the coefficients c, floor * scale * (1 + |c|^2)
        undetermined = int((factor.diagonal().square() < 1e3 * floor * scale).sum())
    if centre is not None and bias is not None:
        b = bias + (residual.sum - e.feature_sum @ delta) / e.tokens
    return weight + delta.T, b, floor, undetermined


def correct_drift(equations: NormalEquations, ridge: float | None, tune_bias: bool) -> Fit:
    """The map  x -> M x + c  that takes what the student's projections read to what the teacher's read, by
    least squares.

    argmin_{M, c} ||X_T - X_S M^T - 1 c^T||_F^2 + ridge * sum_c (X_S^T X_S)_cc ||M_c - I_c||^2

    Args:
        equations: Of features X_S (n, D) and targets X_T (n, D).
        ridge: Pull of M towards the identity, as in `tune_weight`.
        tune_bias: Whether there is a c; else it is zero.
    """
    width = len(equations.gram)
    identity = torch.eye(width, dtype=torch.float64, device=equations.gram.device)
    return tune_weight(equations, identity, torch.zeros_like(identity[0]), ridge, tune_bias)


def damped_cholesky(
    gram: Tensor, scale: float, pull: Tensor | float, centre: Tensor | None = None
) -> tuple[Tensor, float]:
    """The lower Cholesky factor of  G - c c^T + diag(pull + floor * scale), and the floor: `DAMPING`, or as
    much more as rounding asks for.

    Args:
        gram: G, (C, C), float64.
        scale: What the floor is relative to, over 0.
        pull: The part of the damping that is wanted, (C,) or one number.
        centre: c, (C,), float64, with  G - c c^T  positive semidefinite up to rounding; None: G is.

    Raises:
        ValueError: If it is far from that, or holds NaN or Inf.
    """
    # LAPACK works on columns, and in the place of the matrix: so no further one is needed
    factor = gram.new_empty(gram.shape).mT
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    floor = DAMPING
    while floor < 1:
        factor.copy_(gram)
        if centre is not None:
            factor.addr_(centre, centre, alpha=-1)
        factor.diagonal().add_(pull).add_(floor * scale)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed and all_finite([factor]):  # on a GPU NaN has been seen with no failure
            return factor, floor
        floor *= 10
    raise ValueError("a matrix of second moments is not positive semidefinite, or holds NaN or Inf")


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """X with  L L^T X = B,  of a lower factor L (C, C) and B (C, K): as `torch.cholesky_solve`, which copies
    the factor."""
    solution: Tensor = torch.linalg.solve_triangular(factor, right, upper=False)
    torch.linalg.solve_triangular(factor.mT, solution, upper=True, out=solution)
    return solution


def all_finite(sums: Iterable[Tensor]) -> bool:
    """Whether sums, float64, hold no NaN or Inf. What is added to these stays one, and the squares of what
    fits into float32 do not overflow; telling number by number takes a second copy."""
    return all(bool(each.sum().isfinite()) for each in sums)
