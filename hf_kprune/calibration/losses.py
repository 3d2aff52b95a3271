"""How far the answers of a student are from those of its teacher. Pure functions.

Shapes: B sequences, T tokens, K classes, D residual width. The losses of heads, `of_...`, take the
temperature of the softmax (gamma in the paper), the outputs of student and teacher, and which tokens are no
padding, (B, T), and give one number per sequence, (B,): nothing depends on how the sequences are batched, and
padding never counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..errors import ArgumentError


class Outputs(Protocol):
    """What a model gives: tensors by name."""

    def __getattr__(self, name: str) -> Tensor: ...

    def __getitem__(self, name: str) -> Tensor: ...

    def __contains__(self, name: object) -> bool: ...


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Predictive knowledge, T^2 KL(softmax(z_T / T) || softmax(z_S / T)): (..., K) -> (...).

    The sum is over the last dimension. Park et al. 2024, eq. 4, in the direction of the published code.
    """
    target = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * (target.exp() * (target - F.log_softmax(student / temperature, dim=-1))).sum(-1)


def bernoulli_kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum of the divergences of K independent yes-or-no decisions: (..., K) -> (...)."""
    two = (
        torch.stack([student, torch.zeros_like(student)], -1),
        torch.stack([teacher, torch.zeros_like(teacher)], -1),
    )
    return kl_divergence(*two, temperature).sum(-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the last dimension: (..., K) -> (...).

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    return (student - teacher).square().mean(-1)


def mean_over_tokens(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values of the tokens of each sequence that are `valid`: (B, T, ...) -> (B, ...)."""
    weight = valid.to(values.dtype).reshape(*valid.shape, *[1] * (values.dim() - 2))
    return torch.where(weight.bool(), values, 0).sum(1) / weight.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# Losses of heads
# ------------------------------------------------------------------------------------------------------------


def of_classes(temperature: float, student: Outputs, teacher: Outputs, _valid: Tensor) -> Tensor:
    """Divergence of the classes of a sequence: `logits` of (B, K)."""
    return kl_divergence(student.logits, teacher.logits, temperature)


def of_labels(temperature: float, student: Outputs, teacher: Outputs, _valid: Tensor) -> Tensor:
    """Divergence of the yes-or-no labels of a sequence: `logits` of (B, K)."""
    return bernoulli_kl_divergence(student.logits, teacher.logits, temperature)


def of_numbers(_temperature: float, student: Outputs, teacher: Outputs, _valid: Tensor) -> Tensor:
    """Mean squared difference of the numbers of a sequence: `logits` of (B, K)."""
    return squared_error(student.logits, teacher.logits)


def of_tokens(temperature: float, student: Outputs, teacher: Outputs, valid: Tensor) -> Tensor:
    """Mean over tokens of the divergence of their classes: `logits` of (B, T, K)."""
    return mean_over_tokens(kl_divergence(student.logits, teacher.logits, temperature), valid)


def of_spans(temperature: float, student: Outputs, teacher: Outputs, valid: Tensor) -> Tensor:
    """Mean of the divergences of the first and of the last token of an answer: logits of (B, T) each."""
    pairs = [(student[key], teacher[key]) for key in ("start_logits", "end_logits")]
    # finite, and still so when divided by the temperature and shifted by the softmax
    lowest = min(temperature, 1) * torch.finfo(student.start_logits.dtype).min / 2
    first, last = (
        kl_divergence(s.masked_fill(~valid, lowest), t.masked_fill(~valid, lowest), temperature)
        for s, t in pairs
    )
    return (first + last) / 2


def of_pretraining(temperature: float, student: Outputs, teacher: Outputs, valid: Tensor) -> Tensor:
    """Divergence of both heads of BERT, or of ELECTRA's.

    BERT's are of words, and whether a sentence is the next; ELECTRA's is whether a token was replaced.
    """
    if "seq_relationship_logits" in student:
        words = kl_divergence(student.prediction_logits, teacher.prediction_logits, temperature)
        pair = kl_divergence(student.seq_relationship_logits, teacher.seq_relationship_logits, temperature)
        return mean_over_tokens(words, valid) + pair
    s, t = student.logits.unsqueeze(-1), teacher.logits.unsqueeze(-1)
    return mean_over_tokens(bernoulli_kl_divergence(s, t, temperature), valid)


def of_towers(_temperature: float, student: Outputs, teacher: Outputs, _valid: Tensor) -> Tensor:
    """Sum of the squared distances of embeddings of text and of image, (B, E) each, made of length 1."""
    pairs = [(student[key], teacher[key]) for key in ("text_embeds", "image_embeds") if key in student]
    distances = [(F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1) for s, t in pairs]
    return torch.stack(distances).sum(0)


def of_embeddings(
    temperature: float, student: Outputs, teacher: Outputs, valid: Tensor, pooling: str
) -> Tensor:
    """Squared distance between what a base model is used for.

    Args:
        temperature: It has no meaning here.
        student: Outputs with `last_hidden_state` (B, T, D) and, for `"pooler"`, `pooler_output` (B, D); of
            one tower with a projection `text_embeds` (B, E). A `pooler_output` alone (DPR) is the embedding,
            whatever the pooling.
        teacher: The same.
        valid: Tokens that are not padding, (B, T).
        pooling: `"mean"` over tokens, `"cls"` the first token, `"pooler"` the model's own pooler, each
            normalised to length 1; `"none"` compares the hidden states themselves, as the mean over tokens.
    """
    if "last_hidden_state" not in student and "text_embeds" in student:
        return of_towers(temperature, student, teacher, valid)
    if "last_hidden_state" not in student and "pooler_output" in student:
        pooling = "pooler"
    if "last_hidden_state" in student and pooling in ("mean", "none"):
        valid = valid_of(student.last_hidden_state, valid)
    if pooling == "none":
        return mean_over_tokens(squared_error(student.last_hidden_state, teacher.last_hidden_state), valid)
    return (embedding(student, valid, pooling) - embedding(teacher, valid, pooling)).square().sum(-1)


def valid_of(hidden: Tensor, valid: Tensor) -> Tensor:
    """Which hidden states (B, R, D) of a model are no padding, by the tokens of its layers, (B, T): some join
    several to one above them.

    Raises:
        ArgumentError: If it does, and there is padding.
    """
    if hidden.shape[:2] == valid.shape:
        return valid
    if not bool(valid.all()):
        raise ArgumentError(
            f"the model gives {hidden.shape[1]} hidden states where its layers have {valid.shape[1]} tokens, "
            "some of them padding, so which of them count is not known; give rows of one length, or pass "
            "compute_loss"
        )
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=valid.device)


def of_hidden_states(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], _valid: Tensor) -> Tensor:
    """Squared distance of the hidden states above each stack, (B, T, D), relative to the teacher's, added up.

    Both are zero where there is padding.
    """
    distances = [
        (hidden - teacher[name]).square().sum((1, 2)) / teacher[name].square().sum((1, 2)).clamp(min=1e-12)
        for name, hidden in student.items()
    ]
    return torch.stack(distances).sum(0)


def embedding(outputs: Outputs, valid: Tensor, pooling: str) -> Tensor:
    """The embedding of each sequence, of length 1: (B, D)."""
    if pooling == "mean":
        return F.normalize(mean_over_tokens(outputs.last_hidden_state, valid), dim=-1)
    return F.normalize(outputs.last_hidden_state[:, 0] if pooling == "cls" else outputs.pooler_output, dim=-1)
