"""A knowledge loss, and draws from what a teacher predicts, against which the loss has a gradient.

The Fisher information needs gradients where student and teacher are the same, and there the loss has none. It
has one against a draw from what the teacher predicts, and over many draws the products of these gradients are
its curvature, up to a factor that is the same for all sublayers: the mean over the n tokens of a row gives
1/n of it, so that a row counts by its gradients, not by its length.

Shapes: B sequences, T tokens, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


KnowledgeLoss = Callable[[Any, Any, Tensor], Tensor]
"""(student outputs, teacher outputs, valid tokens (B, T)) -> one loss per sequence, (B,)."""

FAR = 1e4
"""Logit of what was drawn, the others' being 0: a certainty at every temperature in use."""

NUDGE = 1e-2
"""Standard deviation of the normal draws: small, for losses that normalise what they compare."""


class Draws:
    """Random numbers that belong to rows and their tokens, whatever batch they are in.

    Args:
        seed: Seed of all draws.
        rows: Number of each row among all rows. A row may be several sequences (choices).
        valid: Tokens of the sequences that are not padding, (B, T).
    """

    def __init__(self, seed: int, rows: Sequence[int], valid: Tensor):
        self.generators = [np.random.default_rng([seed, row]) for row in rows]
        self.valid = valid

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) for each sequence, (B, ...)."""
        return self._stacked(shape, lambda generator, size: generator.random(size))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers for each sequence, (B, ...)."""
        return self._stacked(shape, lambda generator, size: generator.standard_normal(size))

    def _stacked(
        self, shape: tuple[int, ...], draw: Callable[[np.random.Generator, tuple[int, ...]], Any]
    ) -> Tensor:
        share = shape[0] // len(self.generators)
        numbers = [draw(generator, shape[1:]) for generator in self.generators for _ in range(share)]
        return torch.tensor(np.stack(numbers), dtype=torch.float32, device=self.valid.device)

    def uniform_of_tokens(self) -> Tensor:
        """Numbers in [0, 1) for each token that is not padding, (B, T)."""
        numbers = torch.zeros(self.valid.shape)
        share = len(numbers) // len(self.generators)
        for i, valid in enumerate(self.valid.cpu()):
            numbers[i, valid] = torch.from_numpy(self.generators[i // share].random(int(valid.sum()))).float()
        return numbers.to(self.valid.device)


# ------------------------------------------------------------------------------------------------------------
# How an output is drawn
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """How one output is drawn from what a model predicts.

    Args:
        noise: The random numbers that this takes, of the output and `Draws`.
        outcome: What is drawn, of the output, the noise, the valid tokens (B, T) and the temperature.
    """

    noise: Callable[[Tensor, Draws], Tensor]
    outcome: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _by_sequence(value: Tensor, draws: Draws) -> Tensor:
    return draws.uniform(len(value))


def _by_number(value: Tensor, draws: Draws) -> Tensor:
    return draws.uniform(*value.shape)


def _by_token(_value: Tensor, draws: Draws) -> Tensor:
    return draws.uniform_of_tokens()


def _by_class_head(value: Tensor, draws: Draws) -> Tensor:
    return _by_token(value, draws) if value.dim() == 3 else _by_sequence(value, draws)


def _by_channel(value: Tensor, draws: Draws) -> Tensor:
    """Normal numbers (B, ..., D) for an output of (B, ..., D), the same for all that lies between."""
    sequences, *between = value.shape
    channels = between[-1:]
    return draws.normal(sequences, *channels).view(sequences, *[1] * (value.dim() - 2), *channels)


def _class(logits: Tensor, uniform: Tensor, _valid: Tensor, temperature: float) -> Tensor:
    """Logits (..., K) of one class, drawn from softmax(logits / T) by numbers (...) in [0, 1)."""
    place = place_of((logits / temperature).softmax(-1), uniform)
    return torch.zeros_like(logits).scatter_(-1, place, FAR)


def place_of(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The class (..., 1) that numbers (...) in [0, 1) draw from probabilities (..., K)."""
    below = torch.searchsorted(probabilities.cumsum(-1), uniform.unsqueeze(-1).contiguous(), right=True)
    return below.clamp(max=probabilities.shape[-1] - 1)


def gradient_of_draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The gradient of  T^2 KL(class || softmax(logits / T))  to logits (..., K), where numbers (...) in
    [0, 1) draw the class from softmax(logits / T):  T (softmax(logits / T) - one at the class)."""
    probabilities = (logits.detach() / temperature).softmax(-1)
    place = place_of(probabilities, uniform)
    minus_one = probabilities.new_full(place.shape, -1)
    return probabilities.scatter_add_(-1, place, minus_one).mul_(temperature)


def _token(logits: Tensor, uniform: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Logits (B, T) of one token that is no padding."""
    lowest = torch.finfo(logits.dtype).min / 2
    return _class(logits.masked_fill(~valid, lowest), uniform, valid, temperature)


def _yes_or_no(logits: Tensor, uniform: Tensor, _valid: Tensor, temperature: float) -> Tensor:
    return FAR * (2 * (uniform < torch.sigmoid(logits / temperature)).to(logits.dtype) - 1)


def _near(value: Tensor, normal: Tensor, _valid: Tensor, _temperature: float) -> Tensor:
    return value + NUDGE * normal


CLASS = Draw(_by_class_head, _class)
"""One class out of the last dimension; of each token if there are three."""

TOKEN = Draw(_by_sequence, _token)
"""One out of all tokens."""

YES_OR_NO = Draw(_by_number, _yes_or_no)
"""Each number by itself."""

YES_OR_NO_OF_TOKENS = Draw(_by_token, _yes_or_no)
"""One answer for each token."""

NORMAL = Draw(_by_channel, _near)
"""Numbers about the teacher's, with the same noise for all tokens."""


@dataclass(frozen=True)
class Knowledge:
    """A knowledge loss, and how to draw from what a teacher predicts.

    Args:
        name: What the report calls it.
        loss: The loss.
        temperature: Temperature of the softmax.
        kinds: How each output that the loss reads is drawn. None: all are read, and drawn as `NORMAL`.
        per_token: Whether the loss is a mean over tokens of divergences of their `logits`, so that it may be
            taken in parts.
        of_hidden_states: Whether the loss compares hidden states, which `kinds` names by their stacks, and
            not outputs.
    """

    name: str
    loss: KnowledgeLoss
    temperature: float
    kinds: Mapping[str, Draw] | None
    per_token: bool = False
    of_hidden_states: bool = False

    def __call__(self, student: object, teacher: object, valid: Tensor) -> Tensor:
        return self.loss(student, teacher, valid)

    def noise(self, outputs: Any, draws: Draws) -> dict[str, Tensor]:
        """The random numbers that `draw` takes for these outputs."""
        return {key: kind.noise(outputs[key], draws) for key, kind in self.kinds_in(outputs).items()}

    def draw(self, outputs: Any, noise: Mapping[str, Tensor], valid: Tensor) -> Any:
        """Outputs drawn from what a model with these outputs predicts."""
        drawn = copy.copy(outputs)
        for key, kind in self.kinds_in(outputs).items():
            drawn[key] = kind.outcome(outputs[key].detach(), noise[key], valid, self.temperature)
        return drawn

    def kinds_in(self, outputs: Any) -> dict[str, Draw]:
        """How each of these outputs is drawn."""
        if self.kinds is None:
            floats = [k for k, v in outputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
            return dict.fromkeys(floats, NORMAL)
        return {key: kind for key, kind in self.kinds.items() if outputs.get(key) is not None}
