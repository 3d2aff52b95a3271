"""KPWT: the streamed sums and their solution == explicit least squares on the stacked matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from data import normal
from torch import Tensor

from hf_kprune.methods.least_squares import (
    RIDGE,
    RIDGES,
    NormalEquations,
    choose_ridge,
    damped_cholesky,
    squared_error,
    tune_weight,
)


TOKENS, COLUMNS, WIDTH = 120, 7, 5


def problem(columns: int = COLUMNS, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features A with a mean, target Y near a linear function of them, and weights W_0, b_0 near that."""
    a = normal(tokens, columns) * torch.linspace(0.3, 3, columns, dtype=torch.float64) + 0.7
    w0, b0 = normal(WIDTH, columns, seed=1), normal(WIDTH, seed=2)
    y = a @ (w0 + 0.3 * normal(WIDTH, columns, seed=3)).T + b0 + 0.4 + normal(tokens, WIDTH, seed=4)
    return a, y, w0, b0


def sums(
    a: Tensor,
    y: Tensor,
    sizes: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> NormalEquations:
    equations = NormalEquations.zeros(a.shape[1], y.shape[1], a.device)
    parts = (t.split(sizes or [len(a)]) for t in (a, y))
    for features, target in zip(*parts, strict=True):
        equations.add(features, target, dtype)
    return equations


def lstsq(a: Tensor, y: Tensor) -> Tensor:
    """The least-norm solution by SVD, (D, C)."""
    solution: Tensor = torch.linalg.lstsq(a, y, driver="gelsd").solution
    return solution.T


def explicit_error(a: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    rest = y - a @ weight.T - (0 if bias is None else bias)
    return float(rest.norm())


def error(equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> float:
    return float(squared_error(equations, weight, bias).sqrt())


@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_lstsq_with_the_bias_kept(has_bias: bool) -> None:
    a, y, w0, b0 = problem()
    bias = b0 if has_bias else None
    fit = tune_weight(sums(a, y), w0, bias)
    torch.testing.assert_close(fit.weight, lstsq(a, y - b0 if has_bias else y), rtol=1e-7, atol=1e-8)
    assert fit.bias is bias or (fit.bias is not None and torch.equal(fit.bias, b0))
    assert fit.undetermined == 0


def test_equals_lstsq_with_an_intercept() -> None:
    a, y, w0, b0 = problem()
    fit = tune_weight(sums(a, y), w0, b0, tune_bias=True)
    solution = lstsq(torch.cat([a, torch.ones(TOKENS, 1, dtype=a.dtype)], 1), y)
    torch.testing.assert_close(fit.weight, solution[:, :-1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fit.bias, solution[:, -1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("intercept", [False, True])
def test_equals_lstsq_with_a_ridge_towards_the_present_weights(ridge: float, intercept: bool) -> None:
    """The ridge as rows: a column of norm s is to map sqrt(ridge) s to the same times W_0, centred if b is free."""
    a, y, w0, b0 = problem()
    fit = tune_weight(sums(a, y), w0, b0, ridge=ridge, tune_bias=intercept)
    features, target = (a - a.mean(0), y - y.mean(0)) if intercept else (a, y - b0)
    rows = torch.diag((ridge * features.square().sum(0)).sqrt())
    solution = lstsq(torch.cat([features, rows]), torch.cat([target, rows @ w0.T]))
    torch.testing.assert_close(fit.weight, solution, rtol=1e-7, atol=1e-8)
    expected = y.mean(0) - fit.weight @ a.mean(0) if intercept else b0
    torch.testing.assert_close(fit.bias, expected, rtol=1e-7, atol=1e-8)
    assert (fit.weight - w0).norm() < (tune_weight(sums(a, y), w0, b0, 0.0, intercept).weight - w0).norm()


def halved(a: Tensor, y: Tensor) -> NormalEquations:
    """The sums, with those over every second token."""
    first, second = (sums(a[i::2], y[i::2]) for i in (0, 1))
    return second.join(first)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_ridge_is_the_one_with_which_each_half_predicts_the_other(intercept: bool) -> None:
    a, y, w0, b0 = problem()
    generator = torch.Generator().manual_seed(3)
    chosen = []
    for noise in (0.0, 3.0, 1000.0):
        noisy = y + noise * torch.randn(y.shape, dtype=y.dtype, generator=generator)
        equations = halved(a, noisy)
        errors = {}
        for ridge in RIDGES:
            errors[ridge] = 0.0
            for fitted, other in ((0, 1), (1, 0)):
                fit = tune_weight(sums(a[fitted::2], noisy[fitted::2]), w0, b0, ridge, intercept)
                bias = 0.0 if fit.bias is None else fit.bias
                errors[ridge] += float((noisy[other::2] - a[other::2] @ fit.weight.T - bias).square().sum())
        best = min(RIDGES, key=lambda ridge: errors[ridge])
        chosen.append(choose_ridge(equations, w0, b0, intercept))
        assert chosen[-1] == best / 2
        fit = tune_weight(equations, w0, b0, None, intercept)
        torch.testing.assert_close(fit.weight, tune_weight(equations, w0, b0, best / 2, intercept).weight)
    assert chosen[0] < chosen[-1], "noise asks for no stronger ridge"


def test_where_a_half_is_empty_the_ridge_is_the_usual_one() -> None:
    a, y, w0, b0 = problem()
    for equations in (
        sums(a, y),
        sums(a, y).join(sums(a[:0], y[:0])),
        sums(a[:0], y[:0]).join(sums(a, y)),
    ):
        assert choose_ridge(equations, w0, b0, False) == RIDGE


def test_a_huge_ridge_changes_nothing() -> None:
    a, y, w0, b0 = problem()
    torch.testing.assert_close(tune_weight(sums(a, y), w0, b0, ridge=1e9).weight, w0, rtol=1e-6, atol=1e-6)


def test_order_and_batching_do_not_matter() -> None:
    a, y, w0, b0 = problem()
    one = tune_weight(sums(a, y), w0, b0, tune_bias=True)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    many = tune_weight(sums(a[order], y[order], [1, 0, 50, 69]), w0, b0, tune_bias=True)
    torch.testing.assert_close(many.weight, one.weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(many.bias, one.bias, rtol=1e-10, atol=1e-10)


def test_sums_are_what_they_are_called() -> None:
    a, y, _, _ = problem()
    expected = (
        a.T @ a,
        a.T @ y,
        a.sum(0),
        y.sum(0),
        y.norm() ** 2,
        torch.tensor(120.0).double(),
    )
    tensors = sums(a, y, [40, 80]).tensors()
    assert len(tensors) == len(expected)
    for value, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_error_of_the_sums_is_the_explicit_one(has_bias: bool) -> None:
    a, y, w0, b0 = problem()
    bias, equations = b0 if has_bias else None, sums(a, y)
    assert error(equations, w0, bias) == pytest.approx(explicit_error(a, y, w0, bias), rel=1e-10)
    for tune_bias in (False, True):
        fit = tune_weight(equations, w0, bias, tune_bias=tune_bias)
        after = error(equations, fit.weight, fit.bias)
        assert after == pytest.approx(explicit_error(a, y, fit.weight, fit.bias), rel=1e-10)


def test_tuning_never_raises_the_error_and_freedom_lowers_it() -> None:
    a, y, w0, b0 = problem()
    equations = sums(a, y)
    ridged, plain, free = (
        tune_weight(equations, w0, b0, r, b) for r, b in ((0.5, False), (0.0, False), (0.0, True))
    )
    errors = [explicit_error(a, y, fit.weight, fit.bias) for fit in (free, plain, ridged)]
    assert errors[0] < errors[1] < errors[2] < explicit_error(a, y, w0, b0)
    again = tune_weight(equations, plain.weight, plain.bias)
    torch.testing.assert_close(again.weight, plain.weight, rtol=1e-9, atol=1e-9)


def test_tuning_without_a_bias_to_tune_is_not_centred() -> None:
    """`tune_bias` for a projection that has none: b must be fixed at 0, or W would be the fit of a model with one."""
    a, y, w0, _ = problem()
    fit = tune_weight(sums(a, y), w0, None, tune_bias=True)
    assert fit.bias is None
    torch.testing.assert_close(fit.weight, lstsq(a, y), rtol=1e-7, atol=1e-8)


def degenerate(name: str) -> tuple[Tensor, int]:
    """Features of which some columns are combinations of others, and how many are."""
    a = problem()[0]
    if name == "duplicate":
        return torch.cat([a, a[:, :2]], 1), 2
    if name == "zero":
        return torch.cat([a[:, :3], torch.zeros(TOKENS, 2, dtype=a.dtype), a[:, 3:]], 1), 2
    if name == "sum":
        return torch.cat([a, 5 * a[:, :1] - 2 * a[:, 1:2] + a[:, 4:5]], 1), 1
    if name == "few tokens":
        return normal(4, COLUMNS, seed=1), COLUMNS - 4
    return torch.zeros(TOKENS, 3, dtype=a.dtype), 0  # "all zero": there is nothing to solve


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ["duplicate", "zero", "sum", "few tokens", "all zero"])
def test_what_the_data_do_not_determine_changes_least_and_is_reported(name: str, intercept: bool) -> None:
    a, undetermined = degenerate(name)
    columns = a.shape[1]
    _, y, w0, b0 = problem(columns, len(a))
    fit = tune_weight(sums(a, y), w0, b0, tune_bias=intercept)
    centre: Callable[[Tensor], Tensor] = (lambda t: t - t.mean(0)) if intercept else (lambda t: t)
    best = w0 + lstsq(centre(a), centre(y - a @ w0.T - b0))  # lstsq gives the change of least norm
    torch.testing.assert_close(fit.weight, best, rtol=1e-4, atol=1e-4)
    bias = b0 if not intercept else (y - a @ best.T).mean(0)
    after = explicit_error(a, y, fit.weight, fit.bias)
    assert after == pytest.approx(explicit_error(a, y, best, bias), rel=1e-5, abs=1e-5)
    assert fit.undetermined == undetermined + (intercept and name == "few tokens")  # a mean uses one token up


def test_many_nearly_dependent_columns_stay_finite_and_fit_as_well_as_lstsq() -> None:
    a = normal(400, 3) @ normal(3, 60, seed=7) + 1e-9 * normal(400, 60, seed=8)
    _, y, w0, b0 = problem(60, 400)
    fit = tune_weight(sums(a, y), w0, b0)
    best = lstsq(a, y - b0)
    assert bool(torch.isfinite(fit.weight).all())
    assert fit.undetermined == 57
    assert (fit.weight - w0).norm() < 10 * w0.norm()  # lstsq follows the noise of 1e-9 and does not stay near
    rank_3 = explicit_error(a, y, w0 + torch.linalg.pinv(a, rtol=1e-6).matmul(y - b0 - a @ w0.T).T, b0)
    after = explicit_error(a, y, fit.weight, fit.bias)
    assert explicit_error(a, y, best, b0) <= after <= rank_3 * (1 + 1e-6)


def test_a_ridge_determines_everything() -> None:
    a, _ = degenerate("duplicate")
    _, y, w0, b0 = problem(a.shape[1])
    fit = tune_weight(sums(a, y), w0, b0, ridge=1e-3)
    assert fit.undetermined == 0
    assert fit.damping == pytest.approx(1e-3, rel=1e-6)


def test_without_columns_a_free_bias_becomes_the_mean_of_the_target() -> None:
    a, y, w0, b0 = problem()
    equations = sums(a[:, :0], y)
    fit = tune_weight(equations, w0[:, :0], b0, tune_bias=True)
    torch.testing.assert_close(fit.bias, y.mean(0))
    assert fit.weight.shape == (WIDTH, 0)
    kept = tune_weight(equations, w0[:, :0], b0)
    assert kept.bias is not None
    assert torch.equal(kept.bias, b0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_and_inf_are_refused(value: float, place: int) -> None:
    a, y, w0, b0 = problem()
    (a, y)[place][3, 2] = value
    for ridge in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN or Inf"):
            tune_weight(sums(a, y), w0, b0, ridge=ridge)


def test_float32_products_are_close() -> None:
    a, y, w0, b0 = problem()
    exact = tune_weight(sums(a, y), w0, b0)
    close = tune_weight(sums(a.float(), y.float(), [60, 60], dtype=torch.float32), w0, b0)
    assert close.weight.dtype == torch.float64
    torch.testing.assert_close(close.weight, exact.weight, rtol=1e-3, atol=1e-4)
    assert not torch.equal(close.weight, exact.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_do_not_vary_leave_the_weights_and_the_intercept_does_all(dtype: torch.dtype) -> None:
    _, y, w0, b0 = problem()
    constant = torch.linspace(1.0, 1e3, COLUMNS, dtype=torch.float64).float().double().expand(TOKENS, COLUMNS)
    fit = tune_weight(sums(constant, y, [50, 50, 20], dtype=dtype), w0, b0, tune_bias=True)
    assert torch.equal(fit.weight, w0)
    torch.testing.assert_close(fit.bias, y.mean(0) - w0 @ constant[0], rtol=1e-5, atol=1e-4)


def test_float32_products_fit_what_varies_about_a_large_mean() -> None:
    a, y, w0, b0 = problem()
    a = a + torch.tensor([0.0, 1e3, 0.0, -1e4, 0.0, 10.0, 0.0])
    exact, close = (
        tune_weight(sums(a, y, dtype=d), w0, b0, tune_bias=True) for d in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(close.weight, exact.weight, rtol=1e-3, atol=1e-4)
    after = [explicit_error(a, y, fit.weight, fit.bias) for fit in (close, exact)]
    assert after[0] == pytest.approx(after[1], rel=1e-2)


def test_a_factor_of_nan_is_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has given one of a singular matrix, without a word."""
    x = normal(4, COLUMNS)
    gram, cholesky_ex = x.T @ x, torch.linalg.cholesky_ex

    def silent(matrix: Tensor, out: tuple[Tensor, Tensor]) -> None:
        weak = float(torch.linalg.eigvalsh(matrix)[0]) < 1e-7
        cholesky_ex(matrix, out=out)
        if weak:
            out[0].fill_(torch.nan)
            out[1].zero_()

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    factor, floor = damped_cholesky(gram, 1.0, 0.0)
    assert floor >= 1e-7 / 10
    torch.testing.assert_close(factor @ factor.T, gram + floor * torch.eye(COLUMNS, dtype=gram.dtype))


@pytest.mark.parametrize("matrix", [-torch.eye(3), torch.full((3, 3), torch.nan)])
def test_what_no_damping_mends_is_said(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="not positive semidefinite, or holds NaN or Inf"):
        damped_cholesky(10 * matrix.double(), 1.0, 0.0)
