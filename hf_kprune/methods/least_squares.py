"""KPWT, knowledge-preserving weight tuning (K-prune, part c): refit an output projection to the teacher by
least squares.

The features of a sublayer are never held for all tokens: their products are summed as they stream by. Pure
functions.

Shapes: n tokens, C kept columns, D residual width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


DAMPING = 1e-10
"""Least damping of the normal equations, relative to the mean of their diagonal. Decides directions that no
data decide."""

STRIP = 256
"""Rows of a Gram matrix that are computed at a time: enough for a product to be as fast as it can."""

ROUNDING = 1e-12
"""What is left of a mean square about the mean is nothing if it is no larger than this fraction of it."""


@dataclass
class Centred:
    """Tokens (n, C) less a centre that is near to their mean.

    In float32, features that hardly vary about a large mean would lose in their products all that tells how
    they vary.

    Args:
        rest: What is left, (n, C), in the precision of the products.
        centre: (C,), float64; zero for products in float64, which need none.
        rest_sum: The sum of what is left, (C,), float64.
    """

    rest: Tensor
    centre: Tensor
    rest_sum: Tensor

    @classmethod
    def of(cls, tokens: Tensor, dtype: torch.dtype) -> Centred:
        centre = tokens.new_zeros(tokens.shape[1])
        if dtype != torch.float64 and len(tokens):
            centre = tokens.mean(0, dtype=torch.float64).to(tokens.dtype)
        rest = (tokens - centre).to(dtype)
        return cls(rest, centre.double(), rest.sum(0, dtype=torch.float64))

    def total(self) -> Tensor:
        """The sum of the tokens themselves, (C,), float64."""
        return self.rest_sum + len(self.rest) * self.centre


def add_products(sums: Tensor, a: Centred, b: Centred) -> None:
    """Add A^T B of as many tokens A (n, C) and B (n, D) to float64 sums (C, D): what is left of the centres
    is multiplied in its own precision, the centres themselves in float64."""
    sums += gram_of(a.rest) if a is b else a.rest.T @ b.rest
    if a.rest.dtype != torch.float64:
        sums += torch.stack([a.centre, a.rest_sum], 1) @ torch.stack([b.total(), b.centre])


def gram_of(x: Tensor) -> Tensor:
    """X^T X of X (n, C), (C, C): the upper half, in strips of `STRIP` rows, and its mirror image."""
    columns = x.shape[1]
    gram = x.new_empty(columns, columns)
    for start in range(0, columns, STRIP):
        stop = min(start + STRIP, columns)
        gram[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


@dataclass
class NormalEquations:
    """Sums over tokens that determine the fit of  Y ~ A W^T + 1 b^T, and its error. All float64.

    Args:
        gram: A^T A, (C, C).
        cross: A^T Y, (C, D).
        feature_sum: A^T 1, (C,).
        target_sum: Y^T 1, (D,).
        target_square: ||Y||_F^2, ().
        reference_square: ||X_T + Sub_T(X_T)||_F^2, (), what errors are relative to.
        tokens: n, ().
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor
    reference_square: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, columns: int, width: int, device: torch.device) -> NormalEquations:
        shapes: list[tuple[int, ...]] = [
            (columns, columns),
            (columns, width),
            (columns,),
            (width,),
            (),
            (),
            (),
        ]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(
        self, features: Tensor, target: Tensor, reference: Tensor, dtype: torch.dtype = torch.float64
    ) -> None:
        """Add tokens: features A (n, C), target Y = X_T + Sub_T(X_T) - X_S (n, D), reference X_T + Sub_T(X_T)
        (n, D).

        Products are taken in `dtype` and summed in float64, see `add_products`.
        """
        a, y = Centred.of(features, dtype), Centred.of(target, dtype)
        add_products(self.gram, a, a)
        add_products(self.cross, a, y)
        self.feature_sum += a.total()
        self.target_sum += y.total()
        self.target_square += target.double().square().sum()
        self.reference_square += reference.double().square().sum()
        self.tokens += len(features)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class Fit:
    """A tuned output projection and how well it does.

    Args:
        weight: W, (D, C), float64.
        bias: b, (D,), float64; None for a projection without one.
        error_before: ||Y - A W^T - 1 b^T||_F / ||X_T + Sub_T(X_T)||_F with the weights as they were.
        error_after: The same with the tuned ones.
        damping: What was added to the diagonal, relative to its mean, the ridge included.
        undetermined: Columns that are, to rounding, linear combinations of others, so that the data do not
            determine their weights; they take the smallest change from the weights as they were.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error_after: float
    damping: float = 0.0
    undetermined: int = 0


def relative_error(equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> float:
    """||Y - A W^T - 1 b^T||_F relative to ||X_T + Sub_T(X_T)||_F, from the sums alone."""
    e, w = equations, weight.to(torch.float64)
    square = e.target_square - 2 * (e.cross * w.T).sum() + ((e.gram @ w.T) * w.T).sum()
    if bias is not None:
        b = bias.to(torch.float64)
        square = square - 2 * e.target_sum @ b + 2 * (e.feature_sum @ w.T) @ b + e.tokens * b @ b
    return float((square.clamp(min=0) / e.reference_square.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


def fit_of(
    equations: NormalEquations,
    old_weight: Tensor,
    old_bias: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Fit:
    """The fit of new weights (D, C) and bias (D,) in the place of old ones; None: the old."""
    before = old_weight.to(torch.float64), None if old_bias is None else old_bias.to(torch.float64)
    after = before[0] if weight is None else weight.to(torch.float64), before[1] if bias is None else bias
    return Fit(*after, relative_error(equations, *before), relative_error(equations, *after))


def tune_weight(
    equations: NormalEquations,
    weight: Tensor,
    bias: Tensor | None,
    ridge: float = 0.0,
    tune_bias: bool = False,
) -> Fit:
    """Weight and bias that tune what the kept columns give (KPWT of Park et al. 2024):

    argmin_{W, b} ||Y - A W^T - 1 b^T||_F^2 + ridge * mean(diag A^T A) * ||W - W_0||_F^2.

    The unknown is the change from the present weights W_0: (G + ridge) dW = A^T (Y - A W_0^T - 1 b_0^T), by a
    Cholesky factorisation. Where G is singular, damping of `DAMPING` (more if rounding asks for it) picks the
    smallest change. With `tune_bias`, A and the residual are centred first and the intercept follows from
    their means.

    Args:
        equations: The sums.
        weight: W_0, (D, C).
        bias: b_0, (D,), or None.
        ridge: Relative to the mean diagonal of the Gram matrix, >= 0.
        tune_bias: Whether b is free; else, and where there is none, it stays as it is.

    Raises:
        ValueError: If the sums hold NaN or Inf.
    """
    if not all(bool(torch.isfinite(t).all()) for t in equations.tensors()):
        raise ValueError("the normal equations hold NaN or Inf")
    e, w0 = equations, weight.to(torch.float64)
    b0 = None if bias is None else bias.to(torch.float64)
    tune_bias = tune_bias and b0 is not None
    error_before = relative_error(e, w0, b0)
    gram, change = e.gram, e.cross - e.gram @ w0.T  # A^T (Y - A W_0^T)
    rest = e.target_sum - e.feature_sum @ w0.T  # 1^T (Y - A W_0^T)
    if b0 is not None:
        change, rest = change - torch.outer(e.feature_sum, b0), rest - e.tokens * b0
    if tune_bias:
        gram = gram - torch.outer(e.feature_sum, e.feature_sum) / e.tokens
        change = change - torch.outer(e.feature_sum, rest) / e.tokens

    delta, damping, undetermined = torch.zeros_like(change), 0.0, 0
    scale = float(gram.diagonal().mean()) if len(gram) else 0.0
    if scale > ROUNDING * float(
        e.gram.diagonal().mean() if len(gram) else 0
    ):  # else features are constant: b does it all
        factor, floor = damped_cholesky(gram, scale, ridge)
        delta, damping = torch.cholesky_solve(change, factor), ridge + floor
        # a pivot is what is left of a column's norm once the columns before it are projected out: if they
        # give it with the coefficients c, floor * scale * (1 + |c|^2)
        undetermined = int((factor.diagonal().square() < 1e3 * floor * scale).sum())
    w = w0 + delta.T
    b = b0 + (rest - e.feature_sum @ delta) / e.tokens if tune_bias and b0 is not None else b0
    return Fit(w, b, error_before, relative_error(e, w, b), damping, undetermined)


def correct_drift(equations: NormalEquations, ridge: float, tune_bias: bool) -> Fit:
    """The map  x -> M x + c  that takes what the student's projections read to what the teacher's read, by
    least squares.

    argmin_{M, c} ||X_T - X_S M^T - 1 c^T||_F^2 + ridge * mean(diag X_S^T X_S) * ||M - I||_F^2

    Args:
        equations: Of features X_S (n, D) and targets X_T (n, D).
        ridge: Pull of M towards the identity, as in `tune_weight`.
        tune_bias: Whether there is a c; else it is zero.
    """
    width = len(equations.gram)
    identity = torch.eye(width, dtype=torch.float64, device=equations.gram.device)
    return tune_weight(equations, identity, torch.zeros_like(identity[0]), ridge, tune_bias)


def damped_cholesky(gram: Tensor, scale: float, ridge: float) -> tuple[Tensor, float]:
    """The Cholesky factor of  G + (ridge + floor) * scale * 1, and the floor: `DAMPING`, or as much more as
    rounding asks for.

    Args:
        gram: G, (C, C), float64, positive semidefinite up to rounding.
        scale: What the damping is relative to, over 0.
        ridge: The part of it that is wanted.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    floor = DAMPING
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + (ridge + floor) * scale * eye)
        if not failed:
            return factor, floor
        floor *= 10
