"""How much memory pruning takes beyond the model, told before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from .calibration.batch import Batch
from .calibration.batches import Calibration
from .calibration.equations import BLOCK, SAMPLE
from .calibration.knowledge import Knowledge
from .calibration.outputs import logits_at_once
from .errors import CalibrationError
from .methods import Method
from .structure.offload import is_dispatched
from .structure.shelf import room_on
from .structure.sublayers import Sublayer
from .structure.walk import ENTRIES
from .structure.workbench import layers_of, needs_workbench, slots, words_of


SLACK = 1.1
"""What an allocator takes beyond what it is asked for."""

SURE = 1.25
"""How far the estimate may be off: what is over that is refused."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at most beyond the model, by phase."""

    phases: dict[str, int]

    @property
    def total(self) -> int:
        """Those of the phase that takes most."""
        return max(self.phases.values())

    def __str__(self) -> str:
        most = max(self.phases, key=self.phases.__getitem__)
        return f"about {self.total / 2**20:,.0f} MiB of memory beyond the model, most of it to {most}"

    def check(self, device: torch.device) -> None:
        """Raise `CalibrationError` if the device has clearly less than that."""
        free = (
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        )
        if self.total > SURE * free:
            raise CalibrationError(
                f"pruning takes {self}, and {free / 2**20:,.0f} MiB are free on {device}; lower "
                "per_device_batch_size (the result is the same), num_measure_tokens or num_tokens, or leave "
                'the layers on disk with offload="disk"'
            )


def memory_of(  # noqa: PLR0913
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    calibration: Calibration,
    method: Method,
    loss: Knowledge,
    tunes: bool,
) -> Memory:
    """What a run takes on this process.

    Args:
        model: The dense model.
        sublayers: Its sublayers.
        calibration: The data of this process.
        method: The pruning method.
        loss: The knowledge loss.
        tunes: Whether weights are tuned.
    """
    device = calibration.accelerator.device
    lifts, batches, room = needs_workbench(model, device), calibration.batches, room_on(device)
    layers = [sum(t.numel() for _, _, _, t in slots(layer)) for layer in layers_of(sublayers)]
    width, columns = (max(s.shape[axis] for s in sublayers) for axis in (0, 1))
    layer = 4 * max(layers) if lifts else 0
    tables, head = words_of(model)
    words = {id(tensor): tensor.numel() for each in tables + head for _, _, _, tensor in slots(each)}
    around = sum(p.numel() for p in model.parameters()) - sum(layers) - sum(words.values())
    over = sum(tensor.numel() for each in head for _, _, _, tensor in slots(each))
    around, over = (4 * around, 4 * over) if lifts else (0, 0)
    weights = sum(s.num_units * s.unit_parameters * s.itemsize for s in sublayers)
    # a student's weights are less by what goes, which other budgets do not say beforehand
    share = 1 - (calibration.args.sparsity or 0.0)
    changed = 0 if is_dispatched(model) else int(share * weights)

    def stream(chosen: Callable[[Batch], bool]) -> int:
        """Bytes of the states of the batches that are chosen, below one layer."""
        widths = {s.stack_name: s.shape[0] for s in sublayers}
        return sum(4 * b.valid[name].numel() * d for b in batches if chosen(b) for name, d in widths.items())

    tokens = max((sum(v.numel() for v in batch.valid.values()) for batch in batches), default=0)
    in_runs = tokens * max(s.uses for s in sublayers)  # all runs of a layer are there at once
    rows, narrow = max((b.samples for b in batches), default=0), 4 * in_runs * (6 * width + 3 * columns)
    waiting = 2 * 4 * BLOCK * (2 * width * max(s.experts for s in sublayers) + columns)
    vocabulary = model.get_output_embeddings()
    count = len(vocabulary.weight) if vocabulary is not None and loss.per_token else 0
    logits = over + 10 * 4 * min(max(logits_at_once(device), rows * count), tokens * count)
    curved = "curvature" in method.needs
    graph = 2 * narrow if method.needs else narrow
    states = min(room, stream(lambda b: b.measured) * (len(layers) + 1)) if method.needs else 0
    # of experts there is a square for each
    square, flat = 8 * max(s.shape[1] ** 2 // s.experts for s in sublayers), 8 * columns * width
    sums, scoring = (square + 8 * width**2, 2 * square + 3 * flat) if curved else (0, 0)
    phases = {"measure": states + layer + max(logits, graph + sums, scoring)}
    if tunes:
        every = stream(lambda _: True) * max(s.uses for s in sublayers)
        halves = 2 if method.ridge is None else 1
        collecting = 2 * layer + narrow + waiting + halves * (square + flat)
        fitting = layer + (halves + 1) * square + 4 * flat
        features = min(ENTRIES * room, every // width * columns) + 4 * SAMPLE * (columns + 2 * width)
        phases["tune"] = 2 * min(room, every) + 2 * every + changed + features + max(collecting, fitting)
    if tunes and len(method.exponents) > 1:
        few, students = stream(lambda b: b.tried or b.held_out), 1 if lifts else len(method.exponents)
        each, fit = min(room, few) + 4 * max(layers), waiting + 2 * square + 4 * flat
        phases["try splits"] = (students + 1) * each + 2 * few + max(narrow + fit, logits)
    return Memory({name: int(SLACK * (around + size)) for name, size in phases.items()})
