"""A knowledge loss is tried before any work is done with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .knowledge import CLASS, TOKEN, YES_OR_NO_OF_TOKENS, Draws, Knowledge


BY_PRODUCTS = {
    "encoder_last_hidden_state",
    "extract_features",
    "image_embeds",
    "image_hidden_states",
    "image_pooler_output",
    "video_pooler_output",
    "language_model_outputs",
    "last_hidden_state",
    "logits_per_image",
    "logits_per_text",
    "past_key_values",
    "pooler_output",
    "qformer_outputs",
    "rope_deltas",
    "text_model_output",
    "vision_model_output",
    "vision_outputs",
}
"""Outputs of Transformers' classes that are no answers: others follow from them, or they from others."""


def tensors_in(value: object) -> list[Tensor]:
    """The floating tensors in an output: itself, or those of a tuple, such as all hidden states."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def leaves_of(value: Any, generator: torch.Generator) -> Any:
    """The same output with noise, so that it is not the teacher's, as leaves of a graph."""
    if type(value) in (tuple, list):
        return type(value)(leaves_of(part, generator) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
    return (value.detach() + noise).requires_grad_()


def check_loss(
    loss: Knowledge, outputs: Any, valid: Tensor, draws: Draws, samples: int
) -> tuple[list[str], list[str]]:
    """Try a knowledge loss on outputs of the teacher, and on the same with noise as the student's.

    Args:
        loss: The loss.
        outputs: Outputs of the model for a few rows, in float32.
        valid: Tokens of these rows that count, (B, T).
        draws: Random numbers of these rows.
        samples: Number of these rows.

    Returns:
        Names of the outputs that the loss reads, and of those that it does not.

    Raises:
        ArgumentError: If it gives no finite, differentiable number for each row, or, chosen by the head,
            always the same, or if the head answers by tokens, and by others than those that the last layers
            begin with.
    """
    for key, kind in loss.kinds_in(outputs).items():
        by_token = kind in (TOKEN, YES_OR_NO_OF_TOKENS) or (kind is CLASS and outputs[key].dim() == 3)
        if by_token and outputs[key].shape[:2] != valid.shape:
            raise ArgumentError(
                f"the head gives {key} of shape {tuple(outputs[key].shape)}, and the last layers whose "
                f"sublayers are known begin with {valid.shape[1]} tokens of each of {len(valid)} sequences, "
                "so that it cannot be told which answers are of which tokens; pass compute_loss"
            )
    name = "compute_loss" if loss.kinds is None else f"the knowledge loss ({loss.name})"
    generator = torch.Generator().manual_seed(0)
    drawn = loss.draw(outputs, loss.noise(outputs, draws), valid)
    student = copy.copy(outputs)
    for key, value in outputs.items():
        student[key] = leaves_of(value, generator)
    with torch.enable_grad():
        losses = loss(student, drawn, valid)
        _check_losses(name, losses, samples, loss.of_hidden_states)
        total = losses.sum()
    leaves = {
        key: [leaf for leaf in tensors_in(value) if leaf.requires_grad] for key, value in student.items()
    }
    flat = [leaf for group in leaves.values() for leaf in group]
    slopes = dict(zip(map(id, flat), torch.autograd.grad(total, flat, allow_unused=True), strict=True))
    read = [key for key, group in leaves.items() if any(slopes[id(leaf)] is not None for leaf in group)]
    gradients = [slope for slope in slopes.values() if slope is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise ArgumentError(
            f"the gradient of {name} to {', '.join(read)} is NaN or infinite, expected finite numbers"
        )
    if loss.kinds is not None and bool(valid.any()) and not any(bool(g.any()) for g in gradients):
        raise ArgumentError(
            f"{name} does not depend on the outputs ({', '.join(read) or ', '.join(outputs)}), so nothing "
            "would be preserved; a softmax over a single label is such a case: pass compute_loss, or set "
            "model.config.num_labels and problem_type"
        )
    return read, [key for key in outputs if key not in read]


def _check_losses(name: str, losses: object, samples: int, of_parts: bool) -> None:
    """Raise `ArgumentError` unless `losses` are one finite number with a graph for each of the samples.

    Args:
        name: What the loss is called.
        losses: What it gave.
        samples: Number of rows.
        of_parts: Whether it compares hidden states, which a model may have of parts of a row.
    """
    expected = "a floating tensor of one differentiable number for each row"
    if not isinstance(losses, Tensor):
        raise ArgumentError(f"{name} returned a {type(losses).__name__}, expected {expected}, ({samples},)")
    if losses.shape != (samples,) and of_parts:
        raise ArgumentError(
            f"the knowledge loss compares hidden states, and gave {tuple(losses.shape)} for {samples} rows: "
            "layers of the model read several sequences for each row, such as windows of an image, so that "
            "what they give is not one sequence for each; pass compute_loss"
        )
    if losses.shape != (samples,):
        raise ArgumentError(
            f"the knowledge loss gave {tuple(losses.shape)} for {samples} samples, expected one number each: "
            f"{expected}"
        )
    if not losses.is_floating_point():
        raise ArgumentError(f"{name} returned numbers of {losses.dtype}, expected {expected}")
    if not losses.requires_grad:
        raise ArgumentError(
            f"{name} returned numbers without a graph, expected {expected}; leave out torch.no_grad(), "
            "detach(), item() and NumPy on the way from the student's outputs"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ArgumentError(f"{name} returned {losses.tolist()}, expected finite numbers")
