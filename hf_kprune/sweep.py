"""Many budgets from one measurement: a table, a plot, and the smallest model that is good enough. Data
only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .charts import front
from .errors import ArgumentError
from .reports import Chart, Document, Table, draw, fragment, to_html, to_markdown


@dataclass
class SweepPoint:
    """One model of a sweep; the first is the dense one.

    Args:
        asked: The budget, by the name of its option; none for the dense model.
        sparsity: Fraction of the prunable FLOPs that is gone.
        flops: Prunable FLOPs of a sequence of mean length.
        parameters: All of them.
        distance: Knowledge loss on calibration rows, which needs no labels. Without an evaluation dataset
            nothing was fitted on those rows.
        speedup: How many times as fast as the dense model, on one batch of the calibration data, both in turn
            in one run.
        metrics: Of `evaluate()`; none without an evaluation dataset.
        path: Where it was saved, if it was.
    """

    asked: dict[str, float]
    sparsity: float
    flops: float
    parameters: int
    distance: float
    speedup: float
    metrics: dict[str, float] = field(default_factory=dict)
    path: str | None = None


@dataclass
class Sweep:
    """The points of a sweep, the dense model first, then by sparsity. `print(sweep)` gives a Markdown table.

    Args:
        points: See `SweepPoint`.
        metric: Name of the metric that models are compared by; None: their distance, the less the better.
        greater_is_better: Of the metric.
        best: Place in `points` of the smallest model that is good enough, if that was asked for.
    """

    points: list[SweepPoint]
    metric: str | None = None
    greater_is_better: bool = True
    best: int | None = None

    def quality(self, point: SweepPoint) -> float:
        """What models are compared by, the greater the better."""
        if self.metric is None:
            return -point.distance
        return point.metrics[self.metric] if self.greater_is_better else -point.metrics[self.metric]

    def pareto(self) -> list[bool]:
        """For each point, whether no other is both at least as small, in FLOPs, and better."""
        return [
            not any(
                p.flops <= q.flops and self.quality(p) > self.quality(q) for p in self.points if p is not q
            )
            for q in self.points
        ]

    def to_markdown(self) -> str:
        return to_markdown([self.table()])

    def table(self) -> Table:
        """A row for each point, the best one marked."""
        rows = []
        for point, optimal in zip(self.points, self.pareto(), strict=True):
            quality = point.distance if self.metric is None else point.metrics[self.metric]
            size = f"{point.parameters:,}", f"{point.flops / 1e9:.4g}", f"{point.speedup:.2f}x"
            rows.append((f"{point.sparsity:.1%}", f"{quality:.4f}", *size, "x" * optimal, point.path or ""))
        columns = (
            "removed",
            self.metric or "distance",
            "parameters",
            "GFLOPs",
            "speed-up",
            "Pareto",
            "saved",
        )
        marks = {} if self.best is None else {(self.best, 1): "best"}
        return Table(columns, rows, "rrrrrcl", marks)

    def charts(self) -> list[Chart]:
        """Quality against FLOPs and against speed."""
        name, best = self.metric or "distance", self.pareto()
        values = [p.distance if self.metric is None else p.metrics[self.metric] for p in self.points]
        sizes, speeds = [p.flops / 1e9 for p in self.points], [p.speedup for p in self.points]
        axes = ("size", "prunable GFLOPs of a sequence", sizes), ("speed", "speed-up", speeds)
        return [
            front(f"{name} against {what}", label, name, list(zip(numbers, values, strict=True)), best)
            for what, label, numbers in axes
        ]

    def document(self) -> Document:
        """A title, the table and the charts."""
        return [[f"{len(self.points)} models, the dense one first"], self.table(), *self.charts()]

    def to_html(self) -> str:
        """A page that shows the sweep with pictures, which take matplotlib. It needs no network."""
        return to_html(self.document())

    def _repr_html_(self) -> str:
        return fragment(self.document())

    def __str__(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str) -> None:
        """Quality against FLOPs and against speed, as a picture. Needs matplotlib (`pip install matplotlib`).

        Args:
            path: File to write, in the format of its ending.
        """
        Path(path).write_bytes(draw(self.charts(), Path(path).suffix[1:] or None))


def check_plot(path: str) -> None:
    """Raise `ArgumentError` for a file that `Sweep.plot` could not write, before there is anything to
    draw.
    """
    try:
        draw(Sweep([]).charts(), Path(path).suffix[1:] or None)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
        wrong = "there is a directory of that name" if Path(path).is_dir() else ""
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        wrong = str(error)
    if wrong:
        raise ArgumentError(
            f"plot is {path!r}, expected a file that can be written, such as sweep.svg: {wrong}"
        )


def smallest_within(
    evaluate: Callable[[float], SweepPoint],
    sweep: Sweep,
    sparsities: list[float],
    max_drop: float,
    refine: int,
) -> None:
    """Evaluate at `sparsities`, then `refine` times between the sparsest good enough and the next, and set
    `sweep.best`.

    Args:
        evaluate: Makes the point of a sparsity.
        sweep: Holds the dense model's point; the others are added.
        sparsities: To begin with.
        max_drop: How much worse than the dense model's quality may be, in the units of the metric.
        refine: Steps of bisection.

    Raises:
        ArgumentError: If no sparsity is given.
    """
    if not sparsities:
        raise ArgumentError("no sparsity to sweep over; give at least one")
    least = sweep.quality(sweep.points[0]) - max_drop
    points = {0.0: sweep.points[0]}
    for sparsity in sorted(sparsities):
        points[sparsity] = evaluate(sparsity)

    def good(sparsity: float) -> bool:
        return sweep.quality(points[sparsity]) >= least

    for _ in range(refine):
        low = max(filter(good, points))
        above = [sparsity for sparsity in points if sparsity > low]
        if not above:
            break
        middle = (low + min(above)) / 2
        points[middle] = evaluate(middle)
    sweep.points[:] = [points[sparsity] for sparsity in sorted(points)]
    sweep.best = sweep.points.index(points[max(filter(good, points))])
