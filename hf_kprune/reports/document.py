"""What is to be shown, apart from how: lines of plain text, tables, and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Args:
        columns: Titles of the columns.
        rows: The cells of each row.
        align: A letter for each column: l(eft), c(entre) or r(ight).
        marks: Words that are emphasised behind a cell, by the places of its row and of its column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Numbers that are drawn.

    Args:
        title: What it shows, in a sentence.
        x: What lies along the horizontal axis.
        y: What lies along the vertical axis.
        series: Numbers along both axes, by what they are numbers of. A horizontal position may be a word.
        form: Whether they are drawn as bars side by side, as lines, or, of a front, the first as a line and
            others as points.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Sequence[float | str], Sequence[float]]]
    form: Literal["bars", "line", "front"] = "line"


Document = Sequence[Sequence[str] | Table | Chart]
"""Paragraphs, each a list of lines, tables, and charts. The first paragraph is the title."""
