"""How long models take here, side by side."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ..structure.facts import in_eval_mode, to_model
from ..structure.sublayers import find_sublayers
from ..structure.surgery import cut_twin


WARM_UP = 1
"""Rounds that are not counted."""

PATIENCE = 10.0
"""Seconds that the timed passes are to take together, where nobody says how many there are to be."""

SHORT = 0.1
"""Seconds under which a pass is timed again at once, as what is in the caches would count."""


def compare(
    models: Sequence[PreTrainedModel], inputs: Mapping[str, object], rounds: int | None = None
) -> list[float]:
    """Seconds of a forward pass of each model, in evaluation mode, on its device.

    The models take turns, and each is related to the first in its round, so that what slows the machine down
    slows both.

    Args:
        models: That take the same inputs.
        inputs: Moved to each model's device, floats to its dtype, before the clock runs.
        rounds: Timed passes of each. None: as many as take about `PATIENCE` seconds, from 3 to 20.

    Returns:
        The median of the first; of the others the median of their ratio to it, times that.
    """
    taken = take_turns(models, inputs, rounds)
    first = statistics.median(seconds[0] for seconds in taken)
    return [
        first * statistics.median(seconds[i] / seconds[0] for seconds in taken) for i in range(len(models))
    ]


@torch.no_grad()  # inference mode would leave behind tables of positions that no gradient may pass
def take_turns(
    models: Sequence[PreTrainedModel], inputs: Mapping[str, object], rounds: int | None = None
) -> list[list[float]]:
    """Seconds of a forward pass of each model in each round, without the rounds that warm up, see
    `compare`.
    """
    taken: list[list[float]] = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(in_eval_mode(model))
        each = [to_model(inputs, model) for model in models]
        while len(taken) < WARM_UP + (rounds or 20):
            taken.append([])
            for model, arguments in zip(models, each, strict=True):
                begin = _now(model.device)
                model(**arguments)
                if (
                    _now(model.device) - begin < SHORT
                ):  # else the caches that the model before it has left would count
                    begin = _now(model.device)
                    model(**arguments)
                taken[-1].append(_now(model.device) - begin)
            if rounds is None:
                rounds = max(3, min(20, int(PATIENCE / max(sum(taken[0]), 1e-9))))
    del taken[:WARM_UP]
    return taken


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    elif torch.get_num_threads() == 1 and sys.platform != "win32":  # where it is too coarse
        return time.thread_time()  # stands still while another program has the core
    return time.perf_counter()


def time_model(model: PreTrainedModel, inputs: Mapping[str, object], repeats: int | None = None) -> float:
    """Median seconds of a forward pass, see `compare`."""
    return compare([model], inputs, repeats)[0]


def cut_to(model: PreTrainedModel, counts: Sequence[int], head_unit: str = "group") -> PreTrainedModel:
    """A copy that keeps `counts` units of each sublayer, as fast as any that keeps as many. Others are
    shared."""
    sublayers = find_sublayers(model, head_unit)
    masks = [s.numbers < n // s.parts for s, n in zip(sublayers, counts, strict=True)]
    return cut_twin(model, masks, head_unit)
