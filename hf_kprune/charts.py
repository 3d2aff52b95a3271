"""What charts show of a run and of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .entries import SublayerReport
from .reports import Chart
from .structure.units import KINDS


def units_kept(sublayers: Sequence[SublayerReport]) -> list[Chart]:
    """Which share of the heads and of the neurons of each layer is left; a chart for each stack of layers."""
    stacks: dict[str, list[SublayerReport]] = {}
    for s in sublayers:
        stacks.setdefault(stack_and_layer(s)[0], []).append(s)
    return [
        Chart(
            "Heads and neurons that are left in each layer" + (f" of {stack}" if len(stacks) > 1 else ""),
            "layer",
            "left, %",
            {
                title: (
                    [stack_and_layer(s)[1] for s in members if s.kind == kind],
                    [100 * len(s.kept) / max(s.units, 1) for s in members if s.kind == kind],
                )
                for kind, (title, _) in KINDS.items()
                if any(s.kind == kind for s in members)
            },
            "bars",
        )
        for stack, members in stacks.items()
    ]


def stack_and_layer(sublayer: SublayerReport) -> tuple[str, str]:
    """The name of its stack of layers, and the number of its layer there, as `encoder.layer` and `3`."""
    stack, _, layer = sublayer.name.rpartition(".")[0].rpartition(".")
    return stack, layer


def reconstruction_errors(sublayers: Sequence[SublayerReport]) -> list[Chart]:
    """How far each sublayer is from the dense model, after its cut and after it was tuned."""
    series = {}
    for title, attribute in (("after the cut", "error_before"), ("after tuning", "error_after")):
        errors = [(i, getattr(s, attribute)) for i, s in enumerate(sublayers)]
        known = [(i, error) for i, error in errors if error is not None]
        if known:
            series[title] = [i for i, _ in known], [error for _, error in known]
    title = "Distance from the dense model by depth, relative to its length"
    return [Chart(title, "sublayer, from the bottom", "relative error", series)] if series else []


def losses_of_trials(trials: Mapping[str, float]) -> list[Chart]:
    """The knowledge loss of each way to split the budget over depth that was tried."""
    if len(trials) < 2:
        return []
    title = "Knowledge loss on rows held out, by how the budget was split over depth"
    splits = {"": (list(trials), list(trials.values()))}
    return [Chart(title, "exponent of the split, or heads of a layer", "loss", splits, "bars")]


def front(title: str, x: str, y: str, points: Sequence[tuple[float, float]], best: Sequence[bool]) -> Chart:
    """Points of which some are the best of their size: the Pareto front, and what lies behind it.

    Args:
        title: What it shows.
        x: What lies along the horizontal axis.
        y: What lies along the vertical axis.
        points: The numbers along both axes.
        best: For each point, whether it is on the front.
    """
    series = {}
    for name, on_front in (("Pareto front", True), ("others", False)):
        chosen = sorted(point for point, good in zip(points, best, strict=True) if good is on_front)
        if chosen:
            series[name] = [p[0] for p in chosen], [p[1] for p in chosen]
    return Chart(title, x, y, series, "front")
