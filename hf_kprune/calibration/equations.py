"""The sums over the calibration data that fit a student to its teacher by least squares: see
`NormalEquations`."""

from __future__ import annotations

from ..methods.least_squares import NormalEquations
from ..processes import together
from ..structure.sublayers import oriented
from ..structure.walk import Walk
from .batches import Calibration


def normal_equations(calibration: Calibration, student: Walk, teacher: Walk) -> NormalEquations:
    """The sums that fit the student's sublayer to the teacher's, for the columns that it still has, unit by
    unit.

    The teacher's batches step above the sublayer, as its outputs are at hand.
    """
    sublayer = student.sublayer
    rows, columns = sublayer.weight.shape
    equations = NormalEquations.zeros(columns, rows, calibration.accelerator.device)
    with together(calibration.accelerator):
        for i, batch in enumerate(calibration.batches):
            teacher_tap, student_tap = teacher.step(i), student.tap(i)
            valid = batch.tokens(sublayer, teacher_tap.output)
            reference = (teacher_tap.stream + teacher_tap.output)[valid]
            features, stream = student_tap.features[valid][:, sublayer.order], student_tap.stream[valid]
            equations.add(features, reference - stream, reference, calibration.dtype)
            calibration.step(2)
    calibration.reduce(equations.tensors())
    calibration.check_finite(sublayer, equations.tensors())
    return equations


def input_equations(
    calibration: Calibration, student: Walk, teacher: Walk
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
        for i, batch in enumerate(calibration.batches if groups else []):
            teacher_reads, student_reads = teacher.reads(i, first), student.reads(i, first)
            for path, equations in zip(first, sums, strict=True):
                stack = sublayer.reads if sublayer.block.inputs[path] == "kv" else sublayer.stack_name
                x, y = (batch.by_token(reads[path], stack) for reads in (student_reads, teacher_reads))
                valid = batch.tokens(sublayer, x, stack)
                equations.add(x[valid], y[valid], y[valid], calibration.dtype)
            calibration.step(2)
    calibration.reduce([tensor for equations in sums for tensor in equations.tensors()])
    for equations in sums:
        calibration.check_finite(sublayer, equations.tensors())
    return list(zip(groups, sums, strict=True))
