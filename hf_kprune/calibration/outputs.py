"""What a model makes of a batch: its head on all tokens, or on some at a time, in float32, and the knowledge
loss of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArgumentError, CalibrationError
from ..structure.probes import only_tokens
from ..structure.runs import run_to_top
from ..structure.sublayers import Sublayer
from ..structure.workbench import in_half_precision
from .batch import Batch
from .knowledge import Knowledge


LOGITS = 2**22
"""Logits of a language model that exist at once while measuring; with more, its head runs on some tokens at a
time."""

ON_GPU = 8
"""So many times more exist at once on a GPU."""


def logits_at_once(device: torch.device) -> int:
    """Logits that may exist at once on a device."""
    return LOGITS * ON_GPU if device.type == "cuda" else LOGITS


def answers_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """What a model gives, by name. What one gives as a tensor or as a tuple, whatever it is asked for, is
    called `output 0` and so on."""
    options = {} if model.config.return_dict else {"return_dict": True}
    outputs = model(**inputs, **options)
    if isinstance(outputs, Mapping):
        return outputs
    parts = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return {f"output {place}": part for place, part in enumerate(parts)}


def outputs_for(
    loss: Knowledge | None, model: PreTrainedModel, sublayers: Sequence[Sublayer], batch: Batch
) -> Any:
    """What a loss compares of a model on a batch, in float32: its outputs, or, by the names of stacks, the
    hidden states above them, (B, T, D), zero where there is padding."""
    if loss is None or not loss.of_hidden_states:
        return in_float32(answers_of(model, batch.inputs))
    tops = run_to_top(model, batch.inputs, sublayers).inputs
    last = {s.stack_name: s for s in sublayers}
    return {name: _without_padding(batch, last[name], tops[name]) for name in loss.kinds or ()}


def _without_padding(batch: Batch, sublayer: Sublayer, hidden: Tensor) -> Tensor:
    """Hidden states above a stack in float32, (B, T, D), zero where there is padding."""
    hidden = batch.by_token(hidden, sublayer.stack_name)
    return hidden.float() * batch.tokens(sublayer, hidden).unsqueeze(-1)


def in_float32(outputs: Any) -> Any:
    """Model outputs with their half-precision tensors in float32."""
    for key, value in outputs.items():
        if isinstance(value, Tensor) and in_half_precision(value):
            outputs[key] = value.float()
    return outputs


def chunk_of(model: PreTrainedModel, batch: Batch) -> int:
    """Tokens of a batch whose logits over the vocabulary may exist at once; 0 if those of all may."""
    vocabulary, most = model.get_output_embeddings(), logits_at_once(batch.counted.device)
    if vocabulary is None or batch.counted.numel() * len(vocabulary.weight) <= most:
        return 0
    return max(1, most // (len(batch.counted) * len(vocabulary.weight)))


def narrowed(model: PreTrainedModel, chunk: int, start: int = 0) -> AbstractContextManager[None]:
    """Within this context the head of a model runs on `chunk` tokens from `start` on; on all if that is 0."""
    if not chunk:
        return nullcontext()
    return only_tokens(model.get_output_embeddings(), start, start + chunk)


def in_chunks(counted: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens of a batch, `chunk` at a time: their places, which of them count, (B, chunk), and the
    share that each has in a mean over those of its sequence that count, (B, chunk)."""
    shares = counted / counted.sum(1, True).clamp(min=1)
    for start in range(0, counted.shape[1], chunk):
        tokens = slice(start, start + chunk)
        yield tokens, counted[:, tokens], shares[:, tokens]


def losses_of(loss: Knowledge, student: object, teacher: object, batch: Batch) -> Tensor:
    """The knowledge loss of each row of a batch, (B,).

    Raises:
        ArgumentError: If it gives anything else.
        CalibrationError: If it is not finite.
    """
    losses = loss(student, teacher, batch.counted)
    if losses.shape != (batch.samples,):
        raise ArgumentError(
            f"the knowledge loss gave {tuple(losses.shape)} for {batch.samples} samples, expected one "
            "number each"
        )
    if not bool(torch.isfinite(losses).all()):
        raise CalibrationError(
            f"NaN or Inf in the knowledge loss ({loss.name}), while the activations below it are finite; "
            "check what the head of the model, or compute_loss, makes of the calibration data"
        )
    return losses
