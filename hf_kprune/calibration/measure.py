"""What is measured of each sublayer, summed over the calibration data: the knowledge of K-prune, which
compares a student with its teacher, and the Fisher information of the dense model, which is compared with
draws from what it predicts itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..methods.base import BY_TWO, Statistics
from ..methods.least_squares import Centred, add_gram, add_products
from ..processes import together
from ..structure.experts import fisher_by_token
from ..structure.hooks import State
from ..structure.sublayers import Sublayer
from ..structure.surgery import in_unit_order
from ..structure.units import Expert
from ..structure.walk import Walk
from ..structure.workbench import give_back_memory
from .backward import Pass, backward, climb, descend
from .batches import Calibration, untimed
from .knowledge import Knowledge


CURVATURE = ("gram", "weighted_sum", "total_weight", "metric")
"""Sums that are the curvature of the loss in a sublayer's output weights."""

OF_GRADIENTS = {*CURVATURE, "fisher", "absolute", "fisher_by_token"}
"""Sums in which gradients are; the others are of features alone."""

KNOWLEDGE = ("gradient_sum", "gradient_square")
"""Sums of gradients to each column's mask."""

GRADIENTS = "gradients of the knowledge loss to the output"


# -----------------------------------------------------------------------------------------------------------
# One backward pass
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
    columns = [target.shape[1] for target in targets]
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
    statistics = []
    for i, (target, *sums) in enumerate(zip(targets, energy, linear, total, square, strict=True)):
        student.bring(student.position + i)
        by_name = dict(zip(names, sums, strict=True))
        statistics.append(statistics_of(target, costs[i], float(tokens[i]), float(samples), by_name))
    return statistics


def mask_gradients(sublayer: Sublayer, a: Tensor, g: Tensor, samples: int) -> Tensor:
    """Gradients to the units' masks, (samples, U), of features (B, T, C) and gradients to the output (B, T,
    D)."""
    by_column = torch.einsum("btc,btc->bc", a, g @ sublayer.weight.float()).double()
    by_unit = by_column[:, sublayer.columns.to(a.device)].sum(2)
    return by_unit.view(samples, len(by_unit) // samples, by_unit.shape[1]).sum(1)


def measure_dense(
    calibration: Calibration, dense: Walk, needs: Collection[str], loss: Knowledge, costs: Sequence[float]
) -> Iterator[tuple[int, Statistics]]:
    """Measure the dense model for a one-shot method, layer by layer: the position of each sublayer, and its
    statistics.

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
    samples = torch.tensor([sum(batch.samples for batch in measured.batches)], dtype=torch.float64)
    samples = samples.to(measured.accelerator.device)
    measured.reduce([samples])
    if not {"curvature", "fisher"} & set(needs):
        layers = climb(measured, dense)
    elif loss.kinds is None:  # it may read what lower layers give
        layers = iter([(list(range(len(dense.sublayers))), backward(measured, dense, loss, "outputs"))])
    else:
        layers = descend(measured, dense, loss, "outputs")
    for places, passes in layers:
        sums = {place: sums_of(measured, dense.sublayers[place], needs) for place in places}
        with together(measured.accelerator):
            for result in passes:
                for place, each in sums.items():
                    add_pass(measured, dense.sublayers[place], each, result, place)
        measured.reduce([tensor for each in sums.values() for tensor in each.values()])
        for place, each in reversed(sums.items()):  # NaN goes on downwards
            sublayer, of_gradients = dense.sublayers[place], OF_GRADIENTS & each.keys()
            measured.check_finite(sublayer, [each[name] for name in each.keys() - of_gradients])
            measured.check_finite(sublayer, [each[name] for name in of_gradients], GRADIENTS)
            tokens = float(each.pop("tokens"))
            dense.bring(place)
            give_back_memory()
            yield place, statistics_of(sublayer, costs[place], tokens, float(samples), each)
            sums[place] = {}


def sums_of(calibration: Calibration, sublayer: Sublayer, needs: Collection[str]) -> dict[str, Tensor]:
    """Zeros to add what a method needs to, see `Statistics`."""
    (width, columns), units = sublayer.shape, sublayer.num_units
    sums = {name: calibration.zeros(columns) for name in ("energy", "feature_sum")}
    sums["tokens"] = calibration.zeros()
    if "curvature" in needs and isinstance(sublayer.unit, Expert):
        sums["fisher_by_token"] = calibration.zeros(units)
    elif "curvature" in needs:
        count, each = sublayer.experts, columns // sublayer.experts
        sums |= {"gram": calibration.zeros(count, each, each), "metric": calibration.zeros(width, width)}
        sums |= {"weighted_sum": calibration.zeros(columns), "total_weight": calibration.zeros()}
    if "fisher" in needs:
        count, each = sublayer.parts, units // sublayer.parts
        sums |= {"fisher": calibration.zeros(count, each, each), "absolute": calibration.zeros(units)}
    return sums


def add_pass(
    calibration: Calibration, sublayer: Sublayer, sums: dict[str, Tensor], result: Pass, place: int
) -> None:
    """Add what was seen of the sublayer at `place` in a batch: its features, and the Fisher information of
    its output (`"metric"`) and of its units' masks (`"fisher"`)."""
    batch, features, gradient = result.batch, result.features[place], result.gradients.get(place)
    valid = batch.tokens(sublayer, features)
    a = features[valid]
    sums["energy"] += a.double().square().sum(0)
    sums["feature_sum"] += a.sum(0, dtype=torch.float64)
    sums["tokens"] += len(a)
    if gradient is None:
        return
    g = gradient.float()
    if "gram" in sums:
        weights = g[valid].square().sum(1)
        parts = zip(
            sums["gram"],
            sums["weighted_sum"].view(len(sums["gram"]), -1),
            a.float().unflatten(1, (len(sums["gram"]), -1)).unbind(1),
            strict=True,
        )
        for gram, weighted_sum, part in parts:
            there = part.any(1) if sublayer.unit.in_experts else slice(None)
            centred = Centred.of(part[there], calibration.dtype, weights[there])
            add_products(gram, centred, centred)
            weighted_sum += centred.total()
        sums["total_weight"] += weights.sum(dtype=torch.float64)
    if "fisher" in sums:
        by_sample = mask_gradients(sublayer, features.float(), g * valid.unsqueeze(-1), batch.samples)
        parts = by_sample.unflatten(1, (sublayer.parts, -1))
        sums["fisher"] += torch.einsum("beu,bev->euv", parts, parts)
        sums["absolute"] += by_sample.abs().sum(0)
    if "fisher_by_token" in sums:
        sums["fisher_by_token"] += fisher_by_token(sublayer.output, a.float(), g[valid])
    if "metric" in sums:
        add_gram(sums["metric"], g[valid].to(calibration.dtype))


def statistics_of(
    sublayer: Sublayer, cost: float, tokens: float, samples: float, sums: dict[str, Tensor]
) -> Statistics:
    """The statistics of a sublayer, their columns in the order of the units."""
    order, first, weight, count = sublayer.order, sublayer.order, in_unit_order(sublayer), sublayer.parts
    if sublayer.unit.in_experts:  # of which a bias is a column, but no unit
        order = sublayer.columns.flatten().to(weight.device)
        first, weight = slice(None, len(order) // count), weight[:, order]
    names = ("energy", "feature_sum", "weighted_sum", *KNOWLEDGE)
    by_column = {name: sums[name][order] for name in names if name in sums}
    by_two = {name: sums[name] for name in BY_TWO if name in sums}
    if "gram" in sums:  # which is not to be there twice
        by_two["gram"] = sums.pop("gram")[:, first][:, :, first]
    by_two = {name: each[0] if len(each) == 1 else each for name, each in by_two.items()}
    statistics = Statistics(
        sublayer.unit.has_heads,
        sublayer.unit_width,
        cost,
        weight,
        sublayer.bias is not None,
        sublayer.magnitude,
        tokens=round(tokens),
        samples=round(samples),
        experts=count,
        **{**sums, **by_column, **by_two},
    )
    warn_unreached(sublayer, statistics)
    return statistics


def warn_unreached(sublayer: Sublayer, statistics: Statistics) -> None:
    """Warn of experts to which no token was sent."""
    energies = statistics.energy.view(sublayer.experts, -1)
    idle = [str(number) for number, each in enumerate(energies) if len(each) and not each.any()]
    if idle and sublayer.is_mixture:
        neurons = "the neurons of largest weights stay there, as they are"
        fate = neurons if sublayer.unit.in_experts else "methods that look at features let it go first"
        warnings.warn(
            f"no token that was measured is sent to expert {', '.join(idle)} of {sublayer.name}: {fate}; "
            "give more rows, or others, like those that the model is to see",
            stacklevel=2,
        )


def tops_of(calibration: Calibration, teacher: Walk) -> list[State | None]:
    """The states of the teacher above its highest sublayer, of the batches that are measured."""
    with calibration.phase("measure"), together(calibration.accelerator):
        return [teacher.top(i) if batch.measured else None for i, batch in enumerate(calibration.batches)]
