"""How much there is to do, and how many seconds it takes on this device, told by a plan before it begins."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .algorithm import interval
from .calibration.batch import Batch
from .calibration.batches import Calibration, untimed
from .calibration.distance import Judge
from .calibration.equations import joined, zeros
from .calibration.knowledge import Knowledge
from .methods import Method
from .methods.least_squares import Fit, NormalEquations, correct_drift
from .structure.projections import oriented
from .structure.sublayers import Sublayer
from .structure.surgery import has_bias


OVERHEAD = 0.5
"""The part of a pass over a sublayer that does not shrink with its units."""

CARRY = 0.5
"""What it takes to carry a batch on over a sublayer whose features are at hand, as a part of a pass."""

READ = 0.25
"""What it takes to see what input projections read, as a part of a pass."""

SHORT = 0.1
"""Seconds under which a fit is timed again, as what runs for the first time takes longer."""


@dataclass(frozen=True)
class Seconds:
    """Seconds that a run takes, by phase. They are an estimate."""

    phases: dict[str, float]

    @property
    def total(self) -> float:
        """Those of all phases, which follow each other."""
        return sum(self.phases.values())

    def __str__(self) -> str:
        most = max(self.phases, key=self.phases.__getitem__)
        return f"about {self.total:,.0f} s on this device, most of them to {most}"


def measuring_steps(method: Method, batches: float, sublayers: int, dry: bool) -> float:
    """About how many passes over a sublayer measuring takes, one backward for two.

    Args:
        method: It decides which units stay.
        batches: How many batches, or tokens, are measured.
        sublayers: How many sublayers there are.
        dry: Whether a plan is made, in which a method that decides in turn takes no losses.
    """
    if method.one_shot or dry:
        return batches * sublayers * (4 if method.one_shot and method.needs else 1)
    every = interval(method, sublayers)
    # the teacher, and the student as long as it does not differ, go up without a way back
    again = sum(sublayers - position for position in range(every, sublayers, every))
    return batches * (2 * sublayers + 3 * again)


def steps_of(
    method: Method, calibration: Calibration, sublayers: int, measured: bool, tune: bool, dry: bool
) -> float:
    """About how many steps a student takes, each a pass of a batch over a sublayer.

    Args:
        method: It decides which units stay.
        calibration: It has the batches.
        sublayers: How many sublayers there are.
        measured: Whether the dense model was measured for an earlier student, as one-shot methods do once.
        tune: Whether weights are tuned.
        dry: Whether the student is planned only.
    """
    batches = calibration.batches
    few = sum(batch.sampled if dry else batch.measured for batch in batches)
    tried, compared = sum(batch.tried for batch in batches), sum(batch.held_out for batch in batches)
    correct = (4 if method.tune_inputs else 2) if tune and method.tunes else 0
    measuring = 0.0
    if not (measured and method.one_shot):
        scoring = 2 * few * sublayers if method.needs and (method.one_shot or dry) else 0
        measuring = scoring + measuring_steps(method, few, sublayers, dry)
    if dry:
        return measuring
    trials = len(method.exponents) if len(method.exponents) > 1 and compared else 0
    fitting = (trials * tried + len(batches)) * sublayers * (1 + correct)
    return measuring + fitting + trials * 2 * compared * sublayers


@dataclass
class Pace:
    """Seconds that the parts of tuning take on this device: those of passes per token, of all sublayers.

    Args:
        forward: A pass of the dense model.
        sums: Adding up normal equations.
        fits: Solving them, with a ridge that is chosen if none is given.
        quick_fits: Solving them with a ridge that is given, as trials do.
        judging: Comparing the outputs of a model above its highest sublayer.
    """

    forward: float = 0.0
    sums: float = 0.0
    fits: float = 0.0
    quick_fits: float = 0.0
    judging: float = 0.0

    def add(self, seconds: tuple[float, float, float], count: int) -> None:
        """Add what `time_fit` says of as many sublayers."""
        self.sums += count * seconds[0]
        self.fits += count * seconds[1]
        self.quick_fits += count * seconds[2]


def pace_of(
    calibration: Calibration,
    method: Method,
    loss: Knowledge,
    teacher: PreTrainedModel,
    references: Sequence[Sublayer],
    left: Sequence[Sublayer],
) -> Pace:
    """Time the parts of tuning: passes of the dense model over the batches of a plan, and, on random numbers,
    one fit of each kind of sublayer.

    Args:
        calibration: The data.
        method: The pruning method.
        loss: The knowledge loss.
        teacher: The dense model.
        references: Its sublayers.
        left: Those of a student as it will be.
    """
    few, device = calibration.only(lambda batch: batch.sampled), calibration.accelerator.device
    few.batches = [replace(batch, held_out=True) for batch in few.batches]
    few.step, few.phase = (lambda _: None), untimed
    tokens, pace = max(tokens_in(few, lambda _: True), 1), Pace()
    walk, begin = few.walk(teacher, references), now(device)
    while walk.rest:
        few.advance(walk)
    pace.forward = (now(device) - begin) / tokens
    if len(method.exponents) > 1:
        judge, begin = Judge(few, walk, loss), now(device)
        judge.distance(walk)
        pace.judging = (now(device) - begin) / tokens
    alike = defaultdict[object, list[Sublayer]](list)
    for sublayer in left:
        if sublayer.num_units:
            alike[sublayer.stack_name, sublayer.kind].append(sublayer)
    count = max(1, tokens // max(len(few.batches), 1))
    for sublayers in alike.values():
        s = sublayers[0]
        columns = sum(each.shape[1] for each in sublayers) / len(sublayers) / s.experts
        units = max(round(columns / s.unit_width), 1)
        bias = None if s.bias is None else torch.zeros(s.shape[0], dtype=torch.float64, device=device)

        def fit(equations: NormalEquations, s: Sublayer = s, bias: Tensor | None = bias) -> Fit:
            return method.tune(equations, torch.zeros_like(equations.cross.T), bias, s.unit_width)

        shape = count, units * s.unit_width, s.shape[0]
        sums, slow, quick = time_fit(calibration, method, shape, fit)
        pace.add((s.share * sums, slow, quick), len(sublayers) * s.experts)
    reads = defaultdict[tuple[int, bool], int](int)
    for sublayer, groups in zip(references, calibration.readers, strict=True):
        for paths in groups if method.tune_inputs else ():
            width = oriented(sublayer.layer.get_submodule(paths[0])).shape[1]
            reads[width, has_bias(sublayer, paths)] += 1
    for (width, biased), number in reads.items():

        def correct(equations: NormalEquations, biased: bool = biased) -> Fit:
            return correct_drift(equations, method.ridge, biased)

        pace.add(time_fit(calibration, method, (count, width, width), correct), number)
    return pace


def time_fit(
    calibration: Calibration,
    method: Method,
    shape: tuple[int, int, int],
    fit: Callable[[NormalEquations], Fit],
) -> tuple[float, float, float]:
    """Seconds of adding a token to normal equations, of solving them with a ridge that the method chooses,
    and with one that is given.

    Args:
        calibration: The data, of which the precision and the device are read.
        method: The pruning method.
        shape: How many tokens a batch has, columns and width.
        fit: Solves them.
    """
    device, (count, columns, width) = calibration.accelerator.device, shape
    draws = torch.Generator().manual_seed(0)
    features, target = (torch.rand(count, size, generator=draws).to(device) for size in (columns, width))

    def spend(halved: bool) -> tuple[float, float]:
        parts, begin = zeros(calibration, columns, width, halved), now(device)
        for part, rows in zip(parts, torch.arange(count, device=device).chunk(len(parts)), strict=False):
            part.add(features[rows], target[rows], calibration.dtype)
        middle = now(device)
        for part in parts:  # the same work, whatever the numbers are, but no singular ones
            part.gram.diagonal().add_(float(count))
        equations, start = joined(parts), now(device)
        fit(equations)
        return middle - begin, now(device) - start

    halved, seconds = method.ridge is None, []
    for with_halves in {False: (False,), True: (True, False)}[halved]:
        seconds.append(spend(with_halves))
        if sum(seconds[-1]) < SHORT:
            seconds[-1] = spend(with_halves)
    return seconds[0][0] / count, seconds[0][1], seconds[-1][1]


def tokens_in(calibration: Calibration, chosen: Callable[[Batch], bool]) -> int:
    """Tokens, padding among them, of the batches that are chosen, in all stacks."""
    return sum(v.numel() for batch in calibration.batches if chosen(batch) for v in batch.valid.values())


def seconds_beyond(
    calibration: Calibration, method: Method, pace: Pace | None, passes: float, share: float, alone: bool
) -> dict[str, float]:
    """Seconds that `prune()` takes beyond those of a plan, by phase.

    Args:
        calibration: The data.
        method: The pruning method.
        pace: That of tuning; None: weights are not tuned.
        passes: Seconds of the plan's passes over the dense model, without scoring.
        share: Of the FLOPs that a student keeps.
        alone: Whether students of trials go up one by one.
    """
    sampled, measured, tried, compared, every = (
        tokens_in(calibration, chosen)
        for chosen in (
            lambda batch: batch.sampled,
            lambda batch: batch.measured,
            lambda batch: batch.tried,
            lambda batch: batch.held_out,
            lambda _: True,
        )
    )
    depth = len(calibration.sublayers)
    ratio = measuring_steps(method, measured, depth, False) / measuring_steps(
        method, max(sampled, 1), depth, True
    )
    more = {"measure": passes * (ratio - 1)}
    if pace is not None:
        carrying = pace.forward * (OVERHEAD + (1 - OVERHEAD) * share)
        fitting = (1 + CARRY) * carrying + pace.sums
        fitting += READ * pace.forward if method.tune_inputs else 0.0
        more["tune"] = every * (pace.forward + fitting) + pace.fits
        trials = len(method.exponents) if compared else 1
        if trials > 1:
            teachers = (trials if alone else 1) * pace.forward * (tried + compared) + pace.forward * compared
            each = tried * fitting + compared * (carrying + pace.judging) + pace.quick_fits
            more["search"] = teachers + trials * each
    return more


def now(device: torch.device) -> float:
    """The clock, once the device has done all it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
