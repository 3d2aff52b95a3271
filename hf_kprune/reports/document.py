"""What is to be shown, apart from how: lines of plain text, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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


Document = Sequence[Sequence[str] | Table]
"""Paragraphs, each a list of lines, and tables."""
