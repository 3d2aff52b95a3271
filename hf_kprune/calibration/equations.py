"""The sums over the calibration data that fit a student to its teacher by least squares, see
`NormalEquations`, and the tokens on which its errors are told."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..methods.least_squares import NormalEquations
from ..processes import together
from ..structure.experts import shares
from ..structure.hooks import in_turn
from ..structure.projections import oriented
from ..structure.runs import Tap
from ..structure.sublayers import Sublayer
from ..structure.walk import Walk
from .batch import Batch
from .batches import Calibration


SAMPLE = 1_000
"""About how many tokens the errors of a sublayer are told on, of all rows; all, where there are no more."""


BLOCK = 1024
"""Tokens that are added to sums together, if batches have fewer: adding to the sums takes as long for any
number."""


class Collector:
    """Adds tokens to normal equations, those of several small batches together.

    Args:
        sums: What is added to.
        dtype: Precision of the products.
    """

    def __init__(self, sums: NormalEquations, dtype: torch.dtype):
        self.sums, self.dtype, self.waiting = sums, dtype, list[tuple[Tensor, Tensor]]()

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add tokens as `NormalEquations.add` does, at once or later."""
        self.waiting.append((features, target))
        if sum(len(tokens) for tokens, _ in self.waiting) >= BLOCK:
            self.total()

    def total(self) -> NormalEquations:
        """The sums over all tokens so far."""
        if self.waiting:
            several = len(self.waiting) > 1
            features, target = map(torch.cat, zip(*self.waiting, strict=True)) if several else self.waiting[0]
            self.waiting = []
            self.sums.add(features, target, self.dtype)
        return self.sums


class Reference:
    """What students are fitted to: their teacher on the way over one sublayer, which each batch takes once.

    Args:
        teacher: It has reached the sublayer.
        shared: Whether there are several students, so that what is read is not given away.
    """

    def __init__(self, teacher: Walk, shared: bool = False):
        self.teacher, self.shared = teacher, shared
        self._streams: dict[int, Tensor] = {}
        self._reads: dict[int, dict[str, Tensor]] = {}
        self._runs: dict[int, list[Tensor]] = {}

    def _step(self, batch: int) -> None:
        """Carry a batch of the teacher above the sublayer, unless it is there."""
        if batch not in self._streams:
            tap = self.teacher.step(batch)
            self._streams[batch] = tap.stream + tap.output
            uses = self.teacher.sublayer.uses
            self._runs[batch] = tap.runs if uses > 1 else []
            self._reads[batch] = {path: in_turn(tensors[:uses]) for path, tensors in tap.reads.items()}

    def reads(self, batch: int) -> dict[str, Tensor]:
        """What the input projections read of a batch, (B, T, ...), by path."""
        self._step(batch)
        return self._reads[batch] if self.shared else self._reads.pop(batch)

    def runs(self, batch: int) -> list[Tensor]:
        """What a layer that runs several times reads of a batch each time, (B, T, D); else nothing.

        Students are fitted on it: what their own layer gives before it is tuned is not what it will read.
        """
        self._step(batch)
        return self._runs[batch]

    def stream(self, batch: int) -> Tensor:
        """X_T + Sub_T(X_T) of a batch, (B, T, D)."""
        self._step(batch)
        if self.shared:
            return self._streams[batch]
        for of_batches in (self._reads, self._runs):
            of_batches.pop(batch, None)
        return self._streams.pop(batch)


class Sample:
    """Some tokens, about `SAMPLE` of all rows, on which the errors of a sublayer are told.

    The error of a token is relative to what leaves the teacher's sublayer at that token, as in some models
    the stream of one token of a text is a hundred times as long as that of others: of the tokens together
    its error would be nearly all.

    Args:
        calibration: The data.
        sublayer: The sublayer.
    """

    def __init__(self, calibration: Calibration, sublayer: Sublayer):
        self.calibration, self.sublayer = calibration, sublayer
        stack = sublayer.stack_name
        tokens = sublayer.uses * calibration.lengths[stack] * calibration.rows.sequences
        self.stride = max(1, round(tokens / SAMPLE))
        self.tokens = list[tuple[Tensor, Tensor, Tensor]]()

    def add(self, batch: Batch, valid: Tensor, features: Tensor, stream: Tensor, reference: Tensor) -> None:
        """Take those that are in a batch, the same whatever else is in it.

        Args:
            batch: The batch.
            valid: Its tokens that are no padding, (B, T).
            features: Of the student, (B, T, C).
            stream: X_S, below the sublayer, (B, T, D).
            reference: X_T + Sub_T(X_T), (B, T, D).
        """
        rows = torch.tensor(batch.rows).repeat_interleave(len(valid) // batch.samples).unsqueeze(1)
        place = (rows + torch.arange(valid.shape[1])) % self.stride == 0
        chosen = valid & place.to(valid.device)
        target = reference[chosen].double()
        scale = target.square().sum(1).clamp(min=torch.finfo(target.dtype).tiny)
        features = features[chosen][:, self.sublayer.order]
        self.tokens.append((features, target - stream[chosen], scale))

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The root of the mean over the tokens of  ||y - W a - b||^2 / ||x_T + Sub_T(x_T)||^2,  over all
        processes, of output weights W (D, C), unit by unit, and a bias b (D,)."""
        sums = self.calibration.zeros(2)
        for features, target, scale in self.tokens:
            rest = target - features.double() @ weight.double().T - (0.0 if bias is None else bias.double())
            sums[0] += (rest.square().sum(1) / scale).sum()
            sums[1] += len(scale)
        self.calibration.reduce([sums])
        return float((sums[0] / sums[1]).sqrt()) if sums[1] else 0.0


def normal_equations(
    calibration: Calibration,
    student: Walk,
    reference: Reference,
    halved: bool = False,
    sample: Sample | None = None,
) -> list[NormalEquations]:
    """The sums that fit the student's sublayer to the teacher's, for the columns that it still has, unit by
    unit: of experts those of each.

    Args:
        calibration: The data.
        student: It has reached the sublayer.
        reference: The teacher at the same sublayer.
        halved: Whether the sums over each half of the rows are kept, so that a ridge can be chosen by them.
        sample: Takes the tokens on which errors are told.
    """
    sublayer = student.sublayer
    width, columns = sublayer.shape
    sums = [
        [
            Collector(each, calibration.dtype)
            for each in zeros(calibration, columns // sublayer.experts, width, halved)
        ]
        for _ in range(sublayer.experts)
    ]
    with together(calibration.accelerator):
        for i, batch in enumerate(calibration.batches):
            if not batch.fitted:
                continue
            tap = student.tap(i, reference.runs(i))
            stream = reference.stream(i)
            valid = batch.tokens(sublayer, stream)
            if sample is not None:
                sample.add(batch, valid, tap.features, tap.stream, stream)
            masks = [mask.flatten() for mask in halves(batch, valid, halved)]
            for parts, (features, target, rows) in zip(
                sums, targets(sublayer, reference, tap, stream), strict=True
            ):
                for part, mask in zip(parts, masks, strict=True):
                    tokens = mask[rows]
                    part.add(features[tokens], target[tokens])
            calibration.step(2)
    fits = [total_of(calibration, parts) for parts in sums]
    for equations in fits:
        calibration.check_finite(sublayer, equations.tensors())
    return fits


def targets(
    sublayer: Sublayer, reference: Reference, tap: Tap, stream: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | slice]]:
    """What a sublayer is fitted to on a batch, n of its tokens: features (n, C), X_T + Sub_T(X_T) - X_S (n,
    D), and which tokens; of experts for each those that are sent to it, and its share of the target.

    Args:
        sublayer: It has run on the batch.
        reference: The teacher at the same sublayer.
        tap: What the sublayer did.
        stream: X_T + Sub_T(X_T), (B, T, D).
    """
    features, target = tap.features.flatten(0, 1), (stream - tap.stream).flatten(0, 1)
    if not sublayer.is_mixture:
        yield features[:, sublayer.order], target, slice(None)
        return
    before = sublayer.output  # of whole experts, those that stay are as they were
    if sublayer.unit.in_experts:
        reference.teacher.bring(reference.teacher.position)
        before = reference.teacher.sublayer.output
    parts = features.unflatten(1, (sublayer.experts, -1)).unbind(1)
    for part, (rows, share) in zip(parts, shares(before, tap.entry, target), strict=True):
        yield part[rows], share, rows


def input_equations(
    calibration: Calibration, student: Walk, reference: Reference, halved: bool = False
) -> list[tuple[list[str], NormalEquations]]:
    """The sums that fit what the student's input projections read to what the teacher's read.

    There is one entry for each tensor that is read: the paths of the projections that read it, all with or
    all without a bias, and the sums.

    Args:
        calibration: The data.
        student: It has reached the sublayer.
        reference: The teacher at the same sublayer.
        halved: As for `normal_equations`.
    """
    sublayer, groups = student.sublayer, calibration.readers[student.position]
    widths = [oriented(sublayer.layer.get_submodule(paths[0])).shape[1] for paths in groups]
    sums = [
        [Collector(each, calibration.dtype) for each in zeros(calibration, width, width, halved)]
        for width in widths
    ]
    first = [paths[0] for paths in groups]
    with together(calibration.accelerator):
        for i, batch in enumerate(calibration.batches):
            if not (groups and batch.fitted):
                continue
            teacher_reads, student_reads = reference.reads(i), student.reads(i, first, reference.runs(i))
            for path, parts in zip(first, sums, strict=True):
                stack = sublayer.source_of(path)
                x, y = (batch.by_token(read, stack) for read in (student_reads[path], teacher_reads[path]))
                for part, tokens in zip(
                    parts, halves(batch, batch.tokens(sublayer, x, stack), halved), strict=True
                ):
                    part.add(x[tokens], y[tokens])
            calibration.step(2)
    fits = [total_of(calibration, parts) for parts in sums]
    for equations in fits:
        calibration.check_finite(sublayer, equations.tensors())
    return list(zip(groups, fits, strict=True))


def zeros(calibration: Calibration, columns: int, width: int, halved: bool) -> list[NormalEquations]:
    """Sums to add to: over all rows, or over each half of them."""
    device = calibration.accelerator.device
    return [NormalEquations.zeros(columns, width, device) for _ in range(2 if halved else 1)]


def halves(batch: Batch, tokens: Tensor, halved: bool) -> list[Tensor]:
    """Tokens, boolean (B, T), as they are, or those of each half of the rows."""
    return batch.halves(tokens) if halved else [tokens]


def joined(parts: list[NormalEquations]) -> NormalEquations:
    """The sums over all rows, with those over the first half of them if halves were taken."""
    return parts[0] if len(parts) == 1 else parts[1].join(parts[0])


def total_of(calibration: Calibration, parts: list[Collector]) -> NormalEquations:
    """What was added to the sums by all processes."""
    sums = [part.total() for part in parts]
    calibration.reduce([tensor for each in sums for tensor in each.tensors()])
    return joined(sums)
