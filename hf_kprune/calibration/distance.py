"""How far a student is from its teacher: the knowledge loss on the rows that are held out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..processes import together
from ..structure.facts import in_eval_mode, to_model
from ..structure.hooks import State
from ..structure.shelf import Shelf
from ..structure.sublayers import find_sublayers
from ..structure.walk import Walk
from ..structure.workbench import give_back_memory
from .backward import Head
from .batch import Batch
from .batches import Calibration
from .knowledge import Knowledge
from .outputs import chunk_of, in_chunks, losses_of, outputs_for


Outputs = Callable[[int, int], Any]
"""(chunk, start) -> outputs in float32: of all tokens if the chunk is 0, or of so many from `start` on."""

Predictor = Callable[[int, Batch, int, int], Outputs]
"""(number of a batch, the batch, the first of its samples, the one after the last) -> a model's outputs of
these samples."""


def predictor(model: PreTrainedModel, loss: Knowledge) -> Predictor:
    """What a loss compares of a whole model."""
    sublayers = find_sublayers(model) if loss.of_hidden_states else ()

    def outputs(_: int, batch: Batch, start: int, stop: int) -> Outputs:
        part = batch.part(start, stop)
        part.inputs = to_model(part.inputs, model)  # models may differ in dtype
        return partial(some_tokens, outputs_for(loss, model, sublayers, part))

    return outputs


def some_tokens(outputs: Any, chunk: int, start: int) -> Any:
    """Outputs with the logits (B, chunk, K) of some tokens, or as they are if `chunk` is 0."""
    if not chunk:
        return outputs
    some = copy.copy(outputs)
    some["logits"] = outputs["logits"][:, start : start + chunk]
    return some


def predictor_above(walk: Walk, tops: Mapping[int, State] | Shelf, loss: Knowledge) -> Predictor:
    """What a loss compares of the head of a model alone, of states above its highest sublayer, by number of
    batch."""

    def outputs(i: int, batch: Batch, start: int, stop: int) -> Outputs:
        return partial(Head(walk, tops[i].part(start, stop, batch.samples), loss), batch.part(start, stop))

    return outputs


def distance(
    calibration: Calibration, student: PreTrainedModel, teacher: PreTrainedModel, loss: Knowledge
) -> float:
    """The mean knowledge loss of the student on the rows that are held out."""
    with in_eval_mode(student), in_eval_mode(teacher):
        return mean_loss(calibration, teacher, predictor(student, loss), predictor(teacher, loss), loss)


class Judge:
    """How far the students of trials are from their teacher on the rows that are held out.

    A student that has been walked to the top is judged by its head alone, so its layers may be gone; only a
    loss of the caller's own, which may read lower layers, needs them.

    Args:
        calibration: That of a trial.
        teacher: The dense model.
        loss: The knowledge loss.
    """

    def __init__(self, calibration: Calibration, teacher: Walk, loss: Knowledge):
        self.calibration, self.loss, self.model = calibration, loss, teacher.model
        self.needs_layers = loss.kinds is None
        batches = [] if self.needs_layers else enumerate(calibration.batches)
        walk = calibration.walk(teacher.model, teacher.sublayers)
        self.tops = {i: walk.top(i) for i, batch in batches if batch.held_out}

    def distance(self, student: Walk) -> float:
        """That of a student above its highest sublayer."""
        give_back_memory()
        if self.needs_layers:
            each = predictor(student.model, self.loss), predictor(self.model, self.loss)
        else:  # nothing above the layers was cut: one head does for both
            each = (
                predictor_above(student, student.states, self.loss),
                predictor_above(student, self.tops, self.loss),
            )
        return mean_loss(self.calibration, self.model, *each, self.loss)


def losses_in_parts(loss: Knowledge, student: Outputs, teacher: Outputs, batch: Batch, chunk: int) -> Tensor:
    """The knowledge loss of each row of a batch, (B,): of all tokens at once, or, of a loss that is a mean
    over tokens, of `chunk` at a time, so that not all logits of a large vocabulary exist at once."""
    if not chunk:
        return losses_of(loss, student(0, 0), teacher(0, 0), batch)
    losses = torch.zeros(len(batch.counted), device=batch.counted.device)
    for tokens, counted, shares in in_chunks(batch.counted, chunk):
        part = replace(batch, counted=counted)
        predicted, expected = student(chunk, tokens.start), teacher(chunk, tokens.start)
        losses += losses_of(loss, predicted, expected, part) * shares.sum(1)
    return losses


@torch.no_grad()
def mean_loss(
    calibration: Calibration,
    model: PreTrainedModel,
    student: Predictor,
    teacher: Predictor,
    loss: Knowledge,
) -> float:
    """The mean knowledge loss of a student on the rows that are held out.

    Args:
        calibration: The data.
        model: One of the two, for the size of its vocabulary.
        student: Its outputs.
        teacher: Those that they are compared with.
        loss: The knowledge loss.
    """
    sums = calibration.zeros(2)
    with together(calibration.accelerator):
        for i, each in enumerate(calibration.batches):
            chunk = chunk_of(model, each) if loss.per_token else 0
            size = max(1, each.samples * chunk // each.counted.shape[1]) if chunk else each.samples
            for start in range(0, each.samples if each.held_out else 0, size):
                stop = min(start + size, each.samples)
                batch = each.part(start, stop)
                losses = losses_in_parts(
                    loss,
                    student(i, each, start, stop),
                    teacher(i, each, start, stop),
                    batch,
                    chunk_of(model, batch) if loss.per_token else 0,
                )
                count = torch.tensor(float(len(losses)), device=sums.device).double()
                sums += torch.stack([losses.double().sum(), count])
                calibration.step(2 * len(calibration.sublayers) * batch.samples / each.samples)
    calibration.reduce([sums])
    return float(sums[0] / sums[1])
