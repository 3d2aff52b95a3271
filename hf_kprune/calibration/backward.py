"""Features of sublayers, and gradients to them or to their outputs, of every batch that is measured.

There are three ways over a model. `climb` takes no gradients. `backward` holds the graph of all sublayers, of
a few samples at a time. `descend` is the same for a loss that the head alone decides: it keeps the states
below all layers, and runs each layer again, from the highest to the lowest, so that the graph of one layer
exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor

from ..structure.hooks import State, in_turn, resumed
from ..structure.probes import outputs_of, probed
from ..structure.runs import run_to_top
from ..structure.shelf import Shelf
from ..structure.walk import Walk
from .batch import Batch
from .batches import Calibration
from .knowledge import Draws, Knowledge, gradient_of_draw
from .outputs import chunk_of, in_chunks, losses_of, narrowed, outputs_for


GRAPH_LAYERS = 3
"""Layers whose activations a backward pass may hold for a whole batch. A deeper model takes the batch in
slices, so that memory does not grow with depth."""


@dataclass
class Head:
    """The head of a model, on a state above the highest sublayer, for a loss if it is not for all outputs."""

    walk: Walk
    state: State
    loss: Knowledge | None = None

    def __call__(self, batch: Batch, chunk: int = 0, start: int = 0) -> Any:
        """Its outputs in float32, of all tokens or of `chunk` tokens from `start` on."""
        model, sublayers = self.walk.model, self.walk.sublayers
        with resumed(sublayers, len(sublayers), self.state), narrowed(model, chunk, start):
            return outputs_for(self.loss, model, sublayers, batch)


@dataclass
class Pass:
    """What was seen of a batch, or of a slice of it, by place among the sublayers from the one that a walk
    has reached up.

    Args:
        batch: The batch, or the slice.
        features: Inputs of the output projections, (B, T, C).
        gradients: Gradients of the summed loss to the features or to the outputs, as was asked for, (B, T, C)
            or (B, T, D). Those that the loss does not depend on are missing.
    """

    batch: Batch
    features: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def see(self, calibration: Calibration, walk: Walk, place: int, features: Sequence[Tensor]) -> None:
        """Note the features of the sublayer at `place`, of each time that it ran.

        Raises:
            CalibrationError: If they are not finite.
        """
        sublayer = walk.sublayers[walk.position + place]
        a = in_turn([self.batch.by_token(each.detach(), sublayer.stack_name) for each in features])
        calibration.check_finite(sublayer, (a[self.batch.tokens(sublayer, a)].sum(),))
        self.features[place] = a

    def pull(
        self,
        walk: Walk,
        points: Mapping[int, Sequence[Tensor]],
        tops: Tensor | Sequence[Tensor],
        pull: Tensor | Sequence[Tensor] | None,
        more: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Note the gradients to what sublayers read or gave each time that they ran, and return those to
        `more`.

        Args:
            walk: The model.
            points: What is pulled at, by place.
            tops: What depends on it.
            pull: The gradients to that; None: 1.
            more: Other tensors.
        """
        points = {place: parts for place, parts in points.items() if parts[0].requires_grad}  # or it is empty
        ends = [*chain.from_iterable(points.values()), *more]
        gradients = iter(torch.autograd.grad(tops, ends, pull, allow_unused=True))
        for place, parts in points.items():
            pairs = list(zip(parts, islice(gradients, len(parts)), strict=True))
            if any(gradient is not None for _, gradient in pairs):
                stack = walk.sublayers[walk.position + place].stack_name
                whole = (torch.zeros_like(part) if g is None else g for part, g in pairs)
                self.gradients[place] = in_turn([self.batch.by_token(each, stack) for each in whole])
        return list(gradients)


def backward(
    calibration: Calibration,
    walk: Walk,
    loss: Knowledge | None,
    points: Literal["features", "outputs"],
    teacher: Walk | None = None,
    tops: Sequence[State | None] = (),
) -> Iterator[Pass]:
    """Run the sublayers from the one that `walk` has reached up, forward and backward, on every batch that is
    measured.

    Args:
        calibration: The data.
        walk: The model, whose weights take no gradients.
        loss: The knowledge loss. None runs no backward pass.
        points: What the gradients are taken to.
        teacher: The model that is compared with. None compares with draws from what the model itself
            predicts.
        tops: States of the teacher above its highest sublayer, one for each batch.
    """
    model, targets, args = walk.model, walk.rest, calibration.args
    runs = sum(target.uses for target in targets)
    slices = -(-runs // (2 * GRAPH_LAYERS)) if loss is not None else 1
    for i, batch, start, samples in slices_of(calibration, slices):
        stop = start + batch.samples
        chunk = chunk_of(model, batch) if loss is not None and loss.per_token else 0
        autocast = calibration.autocast()
        with (
            torch.set_grad_enabled(loss is not None),
            autocast,
            walk.part(i, start, stop, samples),
            probed(targets) as features,
            outputs_of(targets if points == "outputs" else ()) as outputs,
        ):
            top = run_to_top(model, batch.inputs, walk.sublayers) if chunk else None
            predicted = outputs_for(loss, model, walk.sublayers, batch) if top is None else None
        result = Pass(batch)
        for place, tensor in features.items():
            result.see(calibration, walk, place, tensor)
        if loss is not None:
            reference: Head | Draws = Draws(args.seed, batch.rows, batch.counted)
            if teacher is not None and (above := tops[i]) is not None:
                reference = Head(teacher, above.part(start, stop, samples), loss)
            pull: Tensor | None = None
            if top is None:
                total = loss_on(predicted, reference, batch, loss, autocast)
            else:
                with autocast:
                    total = top.inputs[walk.sublayers[-1].stack_name]
                    pull = pull_on_top(Head(walk, top), reference, batch, loss, chunk)
            leaves = features if points == "features" else outputs
            result.pull(walk, leaves, total, pull)
        calibration.step((3 if loss is not None else 1) * len(targets) * batch.samples / samples)
        yield result


def slices_of(calibration: Calibration, count: int) -> Iterator[tuple[int, Batch, int, int]]:
    """Each batch that is measured, in at most `count` slices: its number, the slice, the first of its
    samples, and how many samples the batch has."""
    for i, batch in enumerate(calibration.batches):
        samples, size = batch.samples, -(-batch.samples // count)
        for start in range(0, samples if batch.measured else 0, size):
            yield i, batch.part(start, min(start + size, samples)), start, samples


def loss_on(
    predicted: Any, reference: Head | Draws, batch: Batch, loss: Knowledge, autocast: torch.autocast
) -> Tensor:
    """The knowledge loss of outputs, summed over the rows of a batch: against a teacher's head, or against
    draws from them."""
    if isinstance(reference, Draws):
        expected = loss.draw(predicted, loss.noise(predicted, reference), batch.counted)
    else:
        with torch.no_grad(), autocast:
            expected = reference(batch)
    return losses_of(loss, predicted, expected, batch).sum()


def pull_on_top(student: Head, reference: Head | Draws, batch: Batch, loss: Knowledge, chunk: int) -> Tensor:
    """The gradient of the summed knowledge loss to the hidden states below the student's head, (B, T, D).

    The heads run on `chunk` tokens at a time, so that not all logits of a large vocabulary exist at once.
    The loss is against a teacher's head, or against draws from what the student predicts.
    """
    name = student.walk.sublayers[-1].stack_name
    hidden = student.state.inputs[name]
    leaf, pull = hidden.detach().requires_grad_(), torch.zeros_like(hidden)
    top = Head(student.walk, State({**student.state.inputs, name: leaf}))
    noise = reference.uniform_of_tokens() if isinstance(reference, Draws) else None
    for tokens, counted, shares in in_chunks(batch.counted, chunk):
        with torch.enable_grad():
            predicted = top(batch, chunk, tokens.start)
        if noise is not None:
            gradient = gradient_of_draw(predicted.logits, noise[:, tokens], loss.temperature)
            gradient = gradient * shares.unsqueeze(-1)
            pull += torch.autograd.grad(predicted.logits, leaf, gradient)[0]
        elif isinstance(reference, Head):
            with torch.no_grad():
                expected = reference(batch, chunk, tokens.start)
            losses = loss(predicted, expected, counted) * shares.sum(1)
            pull += torch.autograd.grad(losses.sum(), leaf)[0]
    return pull


Layers = Iterator[tuple[list[int], Iterator[Pass]]]
"""The places of the sublayers of a layer, and what is seen of them in each batch; then the next layer."""


def climb(calibration: Calibration, walk: Walk, below: Shelf | None = None) -> Layers:
    """Run the layers from the one that `walk` has reached up, each on every batch that is measured, without
    gradients.

    Args:
        calibration: The data.
        walk: The model.
        below: Is filled with the states below each layer, by its number and that of the batch, and with those
            on top.
    """
    states, measured = Shelf() if below is None else below, calibration.measured
    for i in measured:
        states[0, i] = walk.states[i]

    def passes(number: int, positions: range) -> Iterator[Pass]:
        targets = [walk.sublayers[position] for position in positions]
        for i, batch in measured.items():
            with torch.no_grad(), calibration.autocast(), probed(targets) as features:
                states[number + 1, i] = walk.run_layer(i, positions, states[number, i])
            if below is None:
                states.drop((number, i))
            result = Pass(batch)
            for place, tensor in zip(walk.places(positions), features.values(), strict=True):
                result.see(calibration, walk, place, tensor)
            calibration.step(len(targets))
            yield result

    for number, positions in enumerate(walk.layers()):
        yield walk.places(positions), passes(number, positions)


def descend(
    calibration: Calibration, walk: Walk, loss: Knowledge, points: Literal["features", "outputs"]
) -> Layers:
    """Run the layers from the highest to the one that `walk` has reached, forward and backward, each on every
    batch that is measured: as `backward` with draws, for a loss that the head alone decides.
    """
    layers, below = list(enumerate(walk.layers())), Shelf()
    for _, ascent in climb(calibration, walk, below):
        for _ in ascent:
            pass
    pulls = dict[int, dict[str, Tensor]]()
    for i, batch in calibration.measured.items():
        pulls[i] = pulls_on_top(calibration, walk, below[len(layers), i], batch, loss)
        below.drop((len(layers), i))

    def passes(number: int, positions: range) -> Iterator[Pass]:
        for i, batch in calibration.measured.items():
            yield pull_through(calibration, walk, positions, (i, batch), below[number, i], pulls[i], points)
            below.drop((number, i))

    for number, positions in reversed(layers):
        yield walk.places(positions), passes(number, positions)


def pull_through(  # noqa: PLR0913
    calibration: Calibration,
    walk: Walk,
    positions: range,
    batch: tuple[int, Batch],
    state: State,
    pulls: dict[str, Tensor],
    points: Literal["features", "outputs"],
) -> Pass:
    """Run a layer forward and backward on a batch.

    Args:
        calibration: The data.
        walk: The model.
        positions: Those of the sublayers of the layer.
        batch: The batch, after its number.
        state: Below the layer.
        pulls: The gradients to the states of all stacks above the layer. They become those below it.
        points: What gradients are taken to.
    """
    targets, leaves = [walk.sublayers[position] for position in positions], leaves_of(state)
    result, places = Pass(batch[1]), walk.places(positions)
    with (
        torch.enable_grad(),
        calibration.autocast(),
        probed(targets) as features,
        outputs_of(targets if points == "outputs" else ()) as outputs,
    ):
        above = walk.run_layer(batch[0], positions, leaves).inputs
    for place, tensor in features.items():
        result.see(calibration, walk, places[place], tensor)
    # what the layer made: its output, and what it shares with later ones, of which each may be pulled at
    fresh = [name for name, tensor in above.items() if tensor is not leaves.inputs.get(name)]
    pulled = {name: (above[name], pulls.pop(name)) for name in fresh if name in pulls}
    pulled = {name: pair for name, pair in pulled.items() if pair[0].requires_grad}
    if pulled:
        taps = features if points == "features" else outputs
        wanted = {places[place]: parts for place, parts in taps.items()}
        tops, pull = zip(*((tensor, pull.to(tensor.dtype)) for tensor, pull in pulled.values()), strict=True)
        gradients = result.pull(walk, wanted, tops, pull, list(leaves.inputs.values()))
        for name, gradient in zip(leaves.inputs, gradients, strict=True):
            if gradient is not None:  # a decoder reads the encoder in each of its layers
                pulls[name] = pulls[name] + gradient if name in pulls else gradient
    calibration.step(3 * len(targets))
    return result


def leaves_of(state: State) -> State:
    """The same state, its inputs leaves of a graph."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.inputs.items()}
    return State(leaves, state.outputs)


def pulls_on_top(
    calibration: Calibration, walk: Walk, top: State, batch: Batch, loss: Knowledge
) -> dict[str, Tensor]:
    """The gradients, to the states above the highest sublayers of all stacks, of the summed knowledge loss
    against draws from what the model predicts."""
    draws = Draws(calibration.args.seed, batch.rows, batch.counted)
    if loss.per_token and (chunk := chunk_of(walk.model, batch)):
        with calibration.autocast():
            pull = pull_on_top(Head(walk, top), draws, batch, loss, chunk)
        return {walk.sublayers[-1].stack_name: pull}
    leaves = leaves_of(top)
    with torch.enable_grad(), calibration.autocast():
        predicted = Head(walk, leaves, loss)(batch)
    total = loss_on(predicted, draws, batch, loss, calibration.autocast())
    gradients = torch.autograd.grad(total, list(leaves.inputs.values()), allow_unused=True)
    pairs = zip(leaves.inputs, gradients, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}
