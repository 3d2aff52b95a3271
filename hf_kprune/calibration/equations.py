"""The sums over the calibration data that fit a student to its teacher by least squares: see
`NormalEquations`."""

from __future__ import annotations

from torch import Tensor

from ..methods.least_squares import NormalEquations
from ..processes import together
from ..structure.hooks import Tap
from ..structure.sublayers import oriented
from ..structure.walk import Walk
from .batches import Calibration


class Reference:
    """What a student is fitted to: its teacher on the way over one sublayer, which each batch takes once.

    Args:
        teacher: It has reached the sublayer.
    """

    def __init__(self, teacher: Walk):
        self.teacher = teacher
        self.streams: dict[int, Tensor] = {}

    def step(self, batch: int) -> Tap:
        """Carry a batch of the teacher above the sublayer."""
        tap = self.teacher.step(batch)
        self.streams[batch] = tap.stream + tap.output
        return tap

    def stream(self, batch: int) -> Tensor:
        """X_T + Sub_T(X_T) of a batch, (B, T, D), which is given once."""
        if batch not in self.streams:
            self.step(batch)
        return self.streams.pop(batch)


def normal_equations(calibration: Calibration, student: Walk, reference: Reference) -> NormalEquations:
    """The sums that fit the student's sublayer to the teacher's, for the columns that it still has, unit by
    unit."""
    sublayer = student.sublayer
    rows, columns = sublayer.weight.shape
    equations = NormalEquations.zeros(columns, rows, calibration.accelerator.device)
    with together(calibration.accelerator):
        for i, batch in enumerate(calibration.batches):
            if not batch.fitted:
                continue
            stream, tap = reference.stream(i), student.tap(i)
            valid = batch.tokens(sublayer, stream)
            features, target = tap.features[valid][:, sublayer.order], stream[valid]
            equations.add(features, target - tap.stream[valid], target, calibration.dtype)
            calibration.step(2)
    calibration.reduce(equations.tensors())
    calibration.check_finite(sublayer, equations.tensors())
    return equations


def input_equations(
    calibration: Calibration, student: Walk, reference: Reference
) -> list[tuple[list[str], NormalEquations]]:
    """The sums that fit what the student's input projections read to what the teacher's read.

    There is one entry for each tensor that is read: the paths of the projections that read it, all with or
    all without a bias, and the sums.
    """
    sublayer, groups = student.sublayer, calibration.readers[student.position]
    widths = [oriented(sublayer.layer.get_submodule(paths[0])).shape[1] for paths in groups]
    device = calibration.accelerator.device
    sums = [NormalEquations.zeros(width, width, device) for width in widths]
    first = [paths[0] for paths in groups]
    with together(calibration.accelerator):
        for i, batch in enumerate(calibration.batches):
            if not (groups and batch.fitted):
                continue
            teacher_reads, student_reads = reference.step(i).reads, student.reads(i, first)
            for path, equations in zip(first, sums, strict=True):
                stack = sublayer.reads if sublayer.block.inputs[path] == "kv" else sublayer.stack_name
                x, y = (batch.by_token(read, stack) for read in (student_reads[path], teacher_reads[path][0]))
                valid = batch.tokens(sublayer, x, stack)
                equations.add(x[valid], y[valid], y[valid], calibration.dtype)
            calibration.step(2)
    calibration.reduce([tensor for equations in sums for tensor in equations.tensors()])
    for equations in sums:
        calibration.check_finite(sublayer, equations.tensors())
    return list(zip(groups, sums, strict=True))
