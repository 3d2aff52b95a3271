"""Charts are drawn, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import ArgumentError
from .document import Chart


HINT = "pictures take matplotlib: pip install matplotlib"
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7")
"""Of series. They can be told apart on white and on black."""
INK = "#808081"
"""Of axes and words. It can be read on white and on black, and a page can put its own in its place."""

MOST_WORDS = 24
"""Words that an axis has room for."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(charts: Sequence[Chart], form: str | None = None, ink: str = INK) -> bytes:
    """A picture of charts, side by side.

    Args:
        charts: At least one.
        form: A format that matplotlib can write, such as `"svg"`. None: PNG.
        ink: Colour of axes and words.

    Raises:
        ArgumentError: If matplotlib is not there.
        ValueError: If it cannot write the format.
    """
    if not can_draw():
        raise ArgumentError(HINT)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    words = {
        "svg.fonttype": "none",
        "svg.hashsalt": charts[0].title,
        "text.color": ink,
        "text.parse_math": False,
    }
    with rc_context({**colours, **words, "font.size": 11}):
        figure = Figure(figsize=(7 if len(charts) == 1 else 10, 3.2), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            draw_on(axes, chart)
        file = io.BytesIO()
        undated = {"metadata": {"Date": None}} if form == "svg" else {}
        figure.savefig(file, format=form, transparent=True, **undated)
    return file.getvalue()


def draw_on(axes: Any, chart: Chart) -> None:
    """Draw one chart on axes of matplotlib."""
    places = list(dict.fromkeys(place for xs, _ in chart.series.values() for place in xs))
    words = any(isinstance(place, str) for place in places)
    width = 0.8 / max(len(chart.series), 1)
    for i, ((name, (xs, ys)), colour) in enumerate(zip(chart.series.items(), COLOURS, strict=False)):
        numbers = [float(places.index(x)) if words else float(x) for x in xs]
        if chart.form == "bars":
            middles = [x + (i - (len(chart.series) - 1) / 2) * width for x in numbers]
            axes.bar(middles, ys, width, color=colour, label=name)
        else:
            style = "o-" if chart.form == "line" or i == 0 else "o"
            axes.plot(numbers, ys, style, color=colour, label=name, markersize=4)
    if words:
        step = -(-len(places) // MOST_WORDS)
        axes.set_xticks(range(0, len(places), step), places[::step])
    elif all(isinstance(place, int) for place in places):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(chart.series) > 1:  # above the axes, where it hides nothing
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(chart.series))
