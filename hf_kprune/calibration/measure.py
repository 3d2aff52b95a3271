"""What is measured of each sublayer, summed over the calibration data.

All that takes gradients is one backward pass (`backward`) with two consumers: the knowledge of K-prune, which
compares a student with its teacher, and the Fisher information of the dense model, which is compared with
draws from what it predicts itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..methods.base import Statistics
from ..methods.least_squares import Centred, add_products, gram_of
from ..processes import together
from ..structure.hooks import State, resumed
from ..structure.probes import outputs_of, probed
from ..structure.runs import run_to_top
from ..structure.sublayers import Sublayer
from ..structure.surgery import in_unit_order
from ..structure.walk import Walk
from .batches import Batch, Calibration, in_float32, losses_of, narrowed, untimed
from .knowledge import Draws, Knowledge


GRAPH_LAYERS = 3
"""Layers whose activations a backward pass may hold for a whole batch. A deeper model takes the batch in
slices, so that memory does not grow with depth."""

GRADIENTS = "gradients of the knowledge loss to the output"


# -----------------------------------------------------------------------------------------------------------
# One backward pass
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """The head of a model, on a state above the highest sublayer."""

    walk: Walk
    state: State

    def __call__(self, batch: Batch, chunk: int = 0, start: int = 0) -> Any:
        """Its outputs in float32, of all tokens or of `chunk` tokens from `start` on."""
        model, sublayers = self.walk.model, self.walk.sublayers
        with resumed(sublayers, len(sublayers), self.state), narrowed(model, chunk, start):
            return in_float32(model(**batch.inputs, return_dict=True))


@dataclass
class Pass:
    """One forward and backward pass on a slice of a batch.

    Args:
        batch: The slice.
        features: Inputs of the output projections, (B, T, C), by place among the sublayers that were run.
        gradients: Gradients of the summed loss to the features or to the outputs, as was asked for, (B, T, C)
            or (B, T, D), by place. Those that the loss does not depend on are missing.
    """

    batch: Batch
    features: dict[int, Tensor]
    gradients: dict[int, Tensor]


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
    slices = -(-len(targets) // (2 * GRAPH_LAYERS)) if loss is not None else 1
    device, half = calibration.accelerator.device.type, args.measure_dtype == "bfloat16"
    for i, batch, start, samples in slices_of(calibration, slices):
        stop = start + batch.samples
        chunk = calibration.chunk(model, batch) if loss is not None and loss.per_token else 0
        autocast = torch.autocast(device, torch.bfloat16, enabled=half)
        with (
            torch.set_grad_enabled(loss is not None),
            autocast,
            walk.part(i, start, stop, samples),
            probed(targets) as features,
            outputs_of(targets if points == "outputs" else ()) as outputs,
        ):
            top = run_to_top(model, batch.inputs, walk.sublayers) if chunk else None
            predicted = model(**batch.inputs, return_dict=True) if top is None else None
        result = Pass(batch, {}, {})
        for place, tensor in features.items():
            a = batch.by_token(tensor.detach(), targets[place].stack_name)
            calibration.check_finite(targets[place], (a[batch.tokens(targets[place], a)].sum(),))
            result.features[place] = a
        if loss is not None:
            reference: Head | Draws = Draws(args.seed, batch.rows, batch.counted)
            if teacher is not None and (above := tops[i]) is not None:
                reference = Head(teacher, above.part(start, stop, samples))
            pull: Tensor | None = None
            if top is None:
                total = loss_on(in_float32(predicted), reference, batch, loss, autocast)
            else:
                with autocast:
                    total, pull = pull_on_top(Head(walk, top), reference, batch, loss, chunk)
            leaves = features if points == "features" else outputs
            gradients = torch.autograd.grad(total, list(leaves.values()), pull, allow_unused=True)
            for place, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    result.gradients[place] = batch.by_token(gradient, targets[place].stack_name)
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


def pull_on_top(
    student: Head, reference: Head | Draws, batch: Batch, loss: Knowledge, chunk: int
) -> tuple[Tensor, Tensor]:
    """The hidden states below the student's head, (B, T, D), and the gradient of the summed knowledge loss to
    them.

    The heads run on `chunk` tokens at a time, so that not all logits of a large vocabulary exist at once.
    The loss is against a teacher's head, or against draws from what the student predicts.
    """
    name = student.walk.sublayers[-1].stack_name
    hidden, counts = student.state.inputs[name], batch.counted.sum(1)
    leaf, pull = hidden.detach().requires_grad_(), torch.zeros_like(hidden)
    top = Head(student.walk, State({**student.state.inputs, name: leaf}))
    noise = reference.uniform_of_tokens() if isinstance(reference, Draws) else None
    for start in range(0, hidden.shape[1], chunk):
        counted = batch.counted[:, start : start + chunk]
        with torch.enable_grad():
            predicted = top(batch, chunk, start)
        if noise is not None:
            expected = loss.draw(predicted, {"logits": noise[:, start : start + chunk]}, counted)
        elif isinstance(reference, Head):
            with torch.no_grad():
                expected = reference(batch, chunk, start)
        losses = loss(predicted, expected, counted) * counted.sum(1) / counts.clamp(min=1)
        pull += torch.autograd.grad(losses.sum(), leaf)[0]
    return hidden, pull


# -----------------------------------------------------------------------------------------------------------
# Its two consumers
# -----------------------------------------------------------------------------------------------------------


def measure_knowledge(
    calibration: Calibration,
    student: Walk,
    teacher: Walk,
    tops: Sequence[State | None],
    loss: Knowledge,
    costs: Sequence[float],
) -> list[Statistics]:
    """Measure the knowledge of all units of the sublayers from the one that `student` has reached up
    (K-prune, part a).

    Args:
        calibration: The data.
        student: The model as pruned so far.
        teacher: The dense model, whose head turns `tops` into the outputs that the student's are compared
            with.
        tops: States of the teacher above its highest sublayer, see `tops_of`.
        loss: The predictive knowledge, which is zero, and not measured, as long as the student does not
            differ.
        costs: Cost of one unit of each sublayer of the model.
    """
    targets, costs = student.rest, costs[student.position :]
    columns = [target.weight.shape[1] for target in targets]
    energy, linear, total, square = ([calibration.zeros(c) for c in columns] for _ in range(4))
    samples, tokens = calibration.zeros(1), calibration.zeros(len(targets))
    predictive = loss if student.differs else None
    with together(calibration.accelerator):
        for result in backward(calibration, student, predictive, "features", teacher, tops):
            batch, count = result.batch, result.batch.samples
            samples += count
            for place, a in result.features.items():
                valid = batch.tokens(targets[place], a)
                energy[place] += a[valid].float().square().sum(0)
                linear[place] += a[valid].float().sum(0)
                tokens[place] += valid.sum()
            for place, gradient in result.gradients.items():
                a = result.features[place].float()
                by_mask = torch.einsum("btc,btc->bc", a, gradient.float()).double()
                # of several sequences per sample (choices), one mask serves all
                g = by_mask.view(count, len(by_mask) // count, by_mask.shape[1]).sum(1)
                total[place] += g.sum(0)
                square[place] += g.square().sum(0)
    calibration.reduce([*energy, *linear, *total, *square, samples, tokens])
    for target, squares in zip(targets, energy, strict=True):
        calibration.check_finite(target, (squares,))
    # NaN goes on downwards
    for target, *gradients in reversed(list(zip(targets, total, square, strict=True))):
        calibration.check_finite(target, gradients, GRADIENTS)
    names = ("energy", "feature_sum", "gradient_sum", "gradient_square")
    return [
        statistics_of(target, costs[i], float(tokens[i]), float(samples), dict(zip(names, sums, strict=True)))
        for i, (target, *sums) in enumerate(zip(targets, energy, linear, total, square, strict=True))
    ]


def fisher_information(
    calibration: Calibration, dense: Walk, loss: Knowledge, needs: Collection[str]
) -> list[dict[str, Tensor]]:
    """Fisher information of the output of each sublayer (`"curvature"`), and of its units' masks
    (`"fisher"`): see `Statistics`."""
    sums: list[dict[str, Tensor]] = [{} for _ in dense.sublayers]
    for sublayer, each in zip(dense.sublayers, sums, strict=True):
        width, units = len(sublayer.weight), sublayer.num_units
        if "curvature" in needs:
            each["metric"] = calibration.zeros(width, width)
        if "fisher" in needs:
            each |= {"fisher": calibration.zeros(units, units), "absolute": calibration.zeros(units)}
    with together(calibration.accelerator):
        for result in backward(calibration, dense, loss, "outputs"):
            for place, gradient in result.gradients.items():
                sublayer, g = dense.sublayers[place], gradient.float()
                valid = result.batch.tokens(sublayer, g)
                if "fisher" in needs:
                    a = result.features[place].float()
                    by_sample = mask_gradients(sublayer, a, g * valid.unsqueeze(-1), result.batch.samples)
                    sums[place]["fisher"] += by_sample.T @ by_sample
                    sums[place]["absolute"] += by_sample.abs().sum(0)
                if "curvature" in needs:
                    g = g[valid].to(calibration.dtype)
                    sums[place]["metric"] += gram_of(g)
    calibration.reduce([tensor for each in sums for tensor in each.values()])
    for sublayer, each in reversed(list(zip(dense.sublayers, sums, strict=True))):  # NaN goes on downwards
        calibration.check_finite(sublayer, list(each.values()), GRADIENTS)
    return sums


def mask_gradients(sublayer: Sublayer, a: Tensor, g: Tensor, samples: int) -> Tensor:
    """Gradients to the units' masks, (samples, U), of features (B, T, C) and gradients to the output (B, T,
    D)."""
    by_column = torch.einsum("btc,btc->bc", a, g @ sublayer.weight.float()).double()
    by_unit = by_column[:, sublayer.columns.to(a.device)].sum(2)
    return by_unit.view(samples, len(by_unit) // samples, by_unit.shape[1]).sum(1)


# -----------------------------------------------------------------------------------------------------------
# Without gradients
# -----------------------------------------------------------------------------------------------------------


def measure_dense(
    calibration: Calibration, dense: Walk, needs: Collection[str], loss: Knowledge, costs: Sequence[float]
) -> Iterator[Statistics]:
    """Measure the dense model for a one-shot method, sublayer by sublayer. Only Fisher information grows with
    depth.

    Args:
        calibration: The data.
        dense: The model, whose weights take no gradients.
        needs: What the method needs, see `Method.needs`.
        loss: The knowledge loss, against draws from which the Fisher information is taken.
        costs: Cost of one unit of each sublayer.
    """
    measured = calibration.only(lambda batch: batch.measured)
    measured.phase = untimed  # the caller takes the time
    dense = measured.walk(dense.model, dense.sublayers)
    fisher: list[dict[str, Tensor]] = [{} for _ in dense.sublayers]
    if {"curvature", "fisher"} & set(needs):
        fisher = fisher_information(measured, dense, loss, needs)
    samples = torch.tensor([sum(batch.samples for batch in measured.batches)], dtype=torch.float64)
    samples = samples.to(measured.accelerator.device)
    measured.reduce([samples])
    for position, sublayer in enumerate(dense.sublayers):
        columns = sublayer.weight.shape[1]
        sums = {name: measured.zeros(columns) for name in ("energy", "feature_sum")}
        sums["tokens"] = measured.zeros()
        if "curvature" in needs:
            sums["gram"] = measured.zeros(columns, columns)
        with together(measured.accelerator):
            for i, batch in enumerate(measured.batches):
                tap = dense.step(i)
                a = tap.features[batch.tokens(sublayer, tap.output)]
                sums["energy"] += a.double().square().sum(0)
                sums["feature_sum"] += a.sum(0, dtype=torch.float64)
                sums["tokens"] += len(a)
                if "gram" in sums:
                    centred = Centred.of(a, measured.dtype)
                    add_products(sums["gram"], centred, centred)
                measured.step(1)
        measured.advance(dense)
        measured.reduce(list(sums.values()))
        measured.check_finite(sublayer, list(sums.values()))
        tokens = float(sums.pop("tokens"))
        yield statistics_of(sublayer, costs[position], tokens, float(samples), sums | fisher[position])


def statistics_of(
    sublayer: Sublayer, cost: float, tokens: float, samples: float, sums: dict[str, Tensor]
) -> Statistics:
    """The statistics of a sublayer, their columns in the order of the units."""
    order = sublayer.order
    by_column = {name: sums[name][order] for name in sums.keys() - {"metric", "fisher", "absolute", "gram"}}
    by_two = {"gram": sums["gram"][order][:, order]} if "gram" in sums else {}
    return Statistics(
        sublayer.unit.has_heads,
        sublayer.unit_width,
        cost,
        in_unit_order(sublayer),
        sublayer.bias is not None,
        sublayer.magnitude,
        tokens=round(tokens),
        samples=round(samples),
        **{**sums, **by_column, **by_two},
    )


def tops_of(calibration: Calibration, teacher: Walk) -> list[State | None]:
    """The states of the teacher above its highest sublayer, of the batches that are measured."""
    with calibration.phase("measure"), together(calibration.accelerator):
        return [teacher.top(i) if batch.measured else None for i, batch in enumerate(calibration.batches)]
