"""Knowledge measurement (K-prune, part a): how much of what the teacher knows hangs on each unit. Pure
functions.

Shapes: B sequences, T tokens, K classes, C columns of an output projection, D residual width, U units, w
columns a unit.
"""

from __future__ import annotations

from torch import Tensor


def mean_squared_gradient(gradient_sum: Tensor, gradient_square: Tensor, samples: int, batch: int) -> Tensor:
    """Predictive score of each mask, 1/2 E[(dK_pred/dm)^2], as the paper's program estimates it, free of
    batches: (C,).

    The program squares the gradient of the *mean loss of a batch* of B = 32 and divides the sum over the N/B
    batches by N; its lambda is tuned to that scale. Its expectation over all ways to draw the batches needs
    only sums of the gradients g_i of single samples:

        1 / (2 B^2) * ( E[g^2] + (B - 1) E[g_i g_j] ),   E[g_i g_j] = ((sum g)^2 - sum g^2) / (N (N - 1))  for
        i != j

    Args:
        gradient_sum: sum_i g_i, (C,), float64.
        gradient_square: sum_i g_i^2, (C,), float64.
        samples: N.
        batch: B; N if there are fewer samples.
    """
    batch = min(batch, samples)
    square = gradient_square / samples
    product = (gradient_sum.square() - gradient_square) / max(samples * (samples - 1), 1)
    return ((square + (batch - 1) * product) / (2 * batch**2)).clamp(min=0)


def representational(energy: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """Representational score of each column c, mean_t a_tc^2 * mean_r W_rc^2: (C,) (eq. 5 with only mask c at
    zero).

    Args:
        energy: sum_t a_tc^2 over the tokens that are not padding, (C,), float64.
        weight: Output projection, (D, C).
        tokens: Number of those tokens.
    """
    return energy / tokens * weight.to(energy.dtype).square().mean(0)


def per_unit(columns: Tensor, width: int) -> Tensor:
    """Score of a unit: the mean over its w columns, (U * w,) -> (U,)."""
    return columns.view(-1, width).mean(1)
