"""Knowledge measurement: the divergences against torch.distributions, the scores against their definitions."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from data import normal
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as torch_kl

from hf_kprune.calibration.knowledge import CLASS, gradient_of_draw
from hf_kprune.calibration.losses import (
    bernoulli_kl_divergence,
    kl_divergence,
    mean_over_tokens,
    squared_error,
)
from hf_kprune.methods.knowledge import mean_squared_gradient, per_unit, representational


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_is_that_of_torch_from_teacher_to_student(temperature: float) -> None:
    student, teacher = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    expected = torch_kl(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), temperature**2 * expected)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_bernoulli_kl_is_that_of_torch_and_that_of_two_explicit_classes(temperature: float) -> None:
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    values = bernoulli_kl_divergence(student, teacher, temperature)
    expected = torch_kl(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature))
    torch.testing.assert_close(values, temperature**2 * expected.sum(-1))

    def classes(z: Tensor) -> Tensor:  # the probabilities of yes and no, as logits of two classes
        yes = torch.sigmoid(z / temperature)
        return temperature * torch.stack([yes, 1 - yes], -1).log()

    torch.testing.assert_close(values, kl_divergence(classes(student), classes(teacher), temperature).sum(-1))


@pytest.mark.parametrize("loss", [kl_divergence, bernoulli_kl_divergence, squared_error])
def test_gradient_is_the_finite_difference_and_vanishes_at_the_teacher(loss: object) -> None:
    temperature = () if loss is squared_error else (2.0,)
    student, teacher = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, *temperature), [student])  # type: ignore[operator]

    def gradient(reference: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss(student, reference, *temperature).sum(), [student])  # type: ignore[operator]
        return g

    assert gradient(student.detach().clone()).abs().max() < 1e-12 < gradient(teacher).abs().min()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_of_a_draw_is_that_of_the_divergence_from_it(temperature: float) -> None:
    logits, uniform, valid = normal(4, 3, 5).requires_grad_(), torch.rand(4, 3), torch.ones(4, 3)
    drawn = CLASS.outcome(logits.detach(), uniform, valid, temperature)
    (expected,) = torch.autograd.grad(kl_divergence(logits, drawn, temperature).sum(), logits)
    torch.testing.assert_close(gradient_of_draw(logits, uniform, temperature), expected)


def test_kl_of_very_confident_logits_is_finite_and_grows() -> None:
    teacher = torch.tensor([300.0, -300.0])
    near, far = torch.tensor([250.0, -300.0]), torch.tensor([-300.0, 300.0])
    assert kl_divergence(near, teacher, 2.0) < kl_divergence(far, teacher, 2.0) < float("inf")


def test_squared_error_is_the_mean_over_outputs_and_does_not_broadcast() -> None:
    """METHOD 1.13, B1: [B, 1] against [B] would give all pairs, with a gradient even where student and teacher agree."""
    student, teacher = normal(4, 1), normal(4, 1, seed=1)
    expected = torch.nn.functional.mse_loss(student, teacher, reduction="none").mean(-1)
    torch.testing.assert_close(squared_error(student, teacher), expected)
    wide = normal(4, 3), normal(4, 3, seed=1)
    torch.testing.assert_close(
        squared_error(*wide), torch.nn.functional.mse_loss(*wide, reduction="none").mean(-1)
    )
    with pytest.raises(ValueError, match=r"student \(4, 1\) and teacher \(4,\) must have one shape"):
        squared_error(student, teacher.squeeze(-1))


@pytest.mark.parametrize("trailing", [(), (3,)])
def test_mean_over_tokens_is_the_mean_of_each_sequence_and_nothing_leaks_from_padding(
    trailing: tuple[int, ...],
) -> None:
    values, valid = (
        normal(3, 5, *trailing),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]]).bool(),
    )
    expected = torch.stack([v[m].mean(0) for v, m in zip(values, valid, strict=True)])
    for filler in (0.0, 1e30, float("nan"), float("inf")):
        padded = torch.where(valid.view(3, 5, *[1] * len(trailing)), values, filler).requires_grad_()
        means = mean_over_tokens(padded, valid)
        torch.testing.assert_close(means, expected)
        (gradient,) = torch.autograd.grad(means.sum(), [padded])
        assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))
        assert bool((gradient[valid] > 0).all())


def test_mean_over_no_tokens_is_zero() -> None:
    assert torch.equal(
        mean_over_tokens(normal(1, 4), torch.zeros(1, 4).bool()), torch.zeros(1, dtype=torch.float64)
    )


@pytest.mark.parametrize(("samples", "batch"), [(4, 1), (4, 2), (6, 2), (6, 3), (5, 5), (1, 1)])
def test_mean_squared_gradient_is_the_programs_statistic_averaged_over_all_batchings(
    samples: int, batch: int
) -> None:
    gradients = normal(samples, 7) + 0.5
    batchings = torch.stack(
        [gradients[list(order)].view(-1, batch, 7) for order in permutations(range(samples))]
    )
    program = batchings.mean(2).square().sum(1) / (2 * samples)  # squared gradients of batch means, over N
    value = mean_squared_gradient(gradients.sum(0), gradients.square().sum(0), samples, batch)
    torch.testing.assert_close(value, program.mean(0))


def test_mean_squared_gradient_of_batches_of_one_is_that_of_samples() -> None:
    gradients = normal(9, 3)
    sums = gradients.sum(0), gradients.square().sum(0), 9
    torch.testing.assert_close(mean_squared_gradient(*sums, batch=1), gradients.square().mean(0) / 2)


def test_fewer_samples_than_a_batch_are_one_batch() -> None:
    gradients = normal(5, 3)
    sums = gradients.sum(0), gradients.square().sum(0), 5
    torch.testing.assert_close(mean_squared_gradient(*sums, batch=32), gradients.mean(0).square() / 10)


def test_mean_squared_gradient_is_never_negative() -> None:
    """Gradients that cancel: the exact value is 0 for one batch of all, and rounding must not turn it negative."""
    gradients = normal(1000, 50, seed=3)
    gradients = torch.cat([gradients, -gradients])
    assert float(mean_squared_gradient(gradients.sum(0), gradients.square().sum(0), 2000, 2000).min()) >= 0


def test_representational_is_the_mean_square_of_a_columns_contribution() -> None:
    features, weight = normal(11, 6), normal(4, 6, seed=1)
    contributions = torch.einsum("tc,rc->ctr", features, weight)  # of each column, to each token and output
    expected = contributions.square().mean((1, 2))
    torch.testing.assert_close(representational(features.square().sum(0), weight, 11), expected)


def test_per_unit_is_the_mean_over_the_unit() -> None:
    columns = normal(12)
    expected = torch.stack([columns[:4].mean(), columns[4:8].mean(), columns[8:].mean()])
    torch.testing.assert_close(per_unit(columns, 4), expected)
    assert torch.equal(per_unit(columns, 1), columns)
    assert per_unit(columns[:0], 4).shape == (0,)
