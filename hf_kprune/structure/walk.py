"""`Walk`: a model on its way up, sublayer by sublayer, with every batch of the calibration data.

It is the one place from which single sublayers and layers are run for the algorithm, by runs.py. Layers
that are not on the device come there when they run (workbench.py), and `states` wait on a shelf
(shelf.py). A run that is resumed (resumption/) walks up again with the weights below, from which `states`
follow. Whole models run in a few more places: for the knowledge of K-prune (`calibration.backward`), for
outputs that are compared (`Walk.top`, `calibration.distance.predictor`), for FLOPs
(`Calibration.all_flops`), and in the checks before any work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .hooks import State, resumed
from .runs import Tap, run_above, run_layer, run_sublayer, run_to_inputs, run_to_top
from .shelf import Shelf, room_on
from .sublayers import Sublayer
from .surgery import cut, empty
from .workbench import workbench_of


ENTRIES = 2
"""A walk keeps features from a tap to the step over the same sublayer, so many times the bytes of states that
a shelf keeps. Those of further batches are computed again."""


class Walk:
    """A model that is being walked: its sublayers, the one that has been reached, and the state of every
    batch below it.

    Args:
        model: The model, in evaluation mode.
        sublayers: Its sublayers, from the lowest to the highest. Those that are cut must be these very
            objects.
        inputs: The inputs of each batch.
    """

    def __init__(
        self, model: PreTrainedModel, sublayers: Sequence[Sublayer], inputs: Sequence[Mapping[str, Any]]
    ):
        self.model, self.sublayers, self.inputs = model, list(sublayers), list(inputs)
        self.position = 0
        self.states = Shelf()
        for batch in range(len(self.inputs)):
            self.states[batch] = State()
        self.differs = False
        """Whether a unit has been cut, so that the model is no longer what it was."""
        self._ahead: set[int] = set()
        self._entries: dict[int, tuple[Tensor, ...]] = {}
        self.keeps_layers = True
        """Whether a layer keeps its weights when all batches are above it. Those of a trial do not."""

    @property
    def sublayer(self) -> Sublayer:
        """The sublayer that has been reached."""
        return self.sublayers[self.position]

    @property
    def rest(self) -> list[Sublayer]:
        """The sublayers that have not been passed yet, from the one that has been reached up."""
        return self.sublayers[self.position :]

    def tap(self, batch: int, runs: Sequence[Tensor] = ()) -> Tap:
        """Run the sublayer on a batch, which stays below it.

        Its features are kept for `lift`, so until then nothing but the output projection may change.

        Args:
            batch: Number of the batch.
            runs: Of a layer that runs several times, what it is to read each time after the first, see
                `Tap.runs`. None: what it gave.
        """
        tap = self._run(batch, runs)
        if self.sublayer.uses > 1:  # what it reads the second time hangs on its output projection
            return tap
        entries = [*self._entries.values(), tap.entry]
        room = ENTRIES * room_on(tap.entry[0].device)
        if sum(tensor.nbytes for entry in entries for tensor in entry) <= room:
            self._entries[batch] = tap.entry
        return tap

    def step(self, batch: int) -> Tap:
        """Run the sublayer on a batch, and carry the batch above it; it then waits there for the others."""
        tap = self._run(batch)
        self.states[batch] = tap.above
        self._ahead.add(batch)
        return tap

    def lift(self, batch: int) -> None:
        """Carry a batch above the sublayer, with the features of an earlier tap if they are at hand."""
        if batch not in self._entries:
            self.step(batch)
            return
        entry, about = self._entries.pop(batch), (self.sublayers, self.position, self.states[batch])
        self.states[batch] = run_above(self.model, self.inputs[batch], *about, entry)
        self._ahead.add(batch)

    def _run(self, batch: int, runs: Sequence[Tensor] = ()) -> Tap:
        state = self._led(batch, runs)
        return run_sublayer(self.model, self.inputs[batch], self.sublayers, self.position, state)

    def _led(self, batch: int, runs: Sequence[Tensor]) -> State:
        """The state of a batch in which its layer reads these `runs` after the first."""
        state = self.states[batch]
        if not runs:
            return state
        # below the lowest layer there is no state yet, and the first run reads what that of any model does
        return replace(state, inputs={self.sublayer.stack_name: runs[0], **state.inputs}, later=runs[1:])

    @property
    def behind(self) -> list[int]:
        """The batches that are still below the sublayer."""
        return [batch for batch in range(len(self.inputs)) if batch not in self._ahead]

    def advance(self) -> None:
        """Carry the batches that are still below the sublayer above it, and reach the next sublayer."""
        for batch in self.behind:
            self.lift(batch)
        self._ahead.clear()
        self._entries.clear()
        layer = self.sublayer.layer
        self.position += 1
        if not (self.keeps_layers or (self.rest and self.sublayer.layer is layer)):
            empty(layer)

    def follow(self, other: Walk) -> None:
        """Stand where `other` stands. This holds as long as both models compute the same."""
        self.position, self.states = other.position, other.states.copy()

    def reads(self, batch: int, paths: Sequence[str], runs: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """What the input projections of the sublayer at `paths` read of a batch, (B, T, ...); `runs` as for
        `tap`."""
        state = self._led(batch, runs)
        return run_to_inputs(self.model, self.inputs[batch], self.sublayers, self.position, state, paths)

    def layers(self) -> list[range]:
        """The positions of the sublayers that have not been passed yet, layer by layer."""
        positions, count = range(self.position, len(self.sublayers)), len(self.sublayers)
        inside = {p for p in positions[1:] if self.sublayers[p].layer is self.sublayers[p - 1].layer}
        return [range(*ends) for ends in pairwise([*(p for p in positions if p not in inside), count])]

    def places(self, positions: range) -> list[int]:
        """The numbers of sublayers among those that have not been passed yet."""
        return [position - self.position for position in positions]

    def run_layer(self, batch: int, positions: range, state: State) -> State:
        """The state of a batch above a layer, from that below the sublayers at `positions`, the highest of
        the layer among them. It is part of the graph where gradients are enabled; the walk stays."""
        return run_layer(self.model, self.inputs[batch], self.sublayers, positions, state)

    @torch.no_grad()
    def top(self, batch: int) -> State:
        """The state of a batch above the highest sublayer, computed by the model as a whole."""
        return run_to_top(self.model, self.inputs[batch], self.sublayers)

    @contextmanager
    def part(self, batch: int, start: int, stop: int, samples: int) -> Iterator[None]:
        """Within this context the model computes from the sublayer up only, for some samples of a batch.

        Args:
            batch: Number of the batch.
            start: The first of its samples.
            stop: The one after the last.
            samples: How many the batch has, which may be several sequences each.
        """
        state = self.states[batch].part(start, stop, samples)
        with resumed(self.sublayers, self.position, state):
            yield

    def bring(self, position: int) -> None:
        """See to it that a sublayer has its weights on the device, as it has anyway when it has just run."""
        bench = workbench_of(self.model)
        if bench is not None:
            bench.bring(self.sublayers[position].layer)

    def cut(self, keep: Tensor) -> None:
        """Keep only the units in `keep`, boolean (U,), of the sublayer."""
        self.bring(self.position)
        cut(self.sublayer, keep)
        self.differs = self.differs or not bool(keep.all())
