"""Documents in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ..text import in_markdown
from .document import Chart, Document, Table


RULES = {"l": "---", "c": ":---:", "r": "---:"}


def to_markdown(document: Document) -> str:
    """A document in Markdown, its blocks apart by an empty line. Charts, and blocks without lines, are left
    out.
    """
    blocks = (
        lines_of(block) if isinstance(block, Table) else list(map(in_markdown, block))
        for block in document
        if not isinstance(block, Chart)
    )
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def lines_of(table: Table) -> list[str]:
    """The lines of a table, in which no cell can end itself, whatever is in it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [list(map(in_markdown, row)) for row in table.rows]
    for (row, column), mark in table.marks.items():
        rows[row][column] += f" **{in_markdown(mark)}**"
    return [
        line(list(map(in_markdown, table.columns))),
        line([RULES[side] for side in table.align]),
        *map(line, rows),
    ]
