"""Calibration rows: how long they are, and those that were drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ArgumentError
from .nested import Row, depth, flat


TokensPerRow = Callable[[Row], int]
"""Tokens that the model makes of a row without `input_ids`: patches of an image, frames of sound."""


def row_tokens(row: Row, tokens_per_row: TokensPerRow | None = None) -> int:
    """Tokens of a row that are not padding (of all its choices, for multiple choice)."""
    if "input_ids" not in row:
        return row_length(row, tokens_per_row)
    return (
        sum(flat(row["attention_mask"]))
        if "attention_mask" in row
        else sum(1 for _ in flat(row["input_ids"]))
    )


def row_length(row: Row, tokens_per_row: TokensPerRow | None = None) -> int:
    """Positions that a row takes, padding included."""
    if "input_ids" in row:
        return max(map(len, row["input_ids"]), default=0) if has_choices(row) else len(row["input_ids"])
    if tokens_per_row is None:
        raise ArgumentError(
            f"a row of {sorted(row)} does not tell how many tokens it makes; pass tokens_per_row"
        )
    return tokens_per_row(row)


def has_choices(row: Row) -> bool:
    """Whether a row holds several sequences (multiple choice)."""
    return depth(row.get("input_ids", ())) > 1


@dataclass
class Rows:
    """The rows that were drawn, in the order of the draw.

    Args:
        rows: Each row has the inputs of the model by name.
        measured: So many of the first rows serve for measuring too.
        tokens: Tokens of all rows that are not padding.
        fingerprint: What the report says of the rows.
    """

    rows: list[Row]
    measured: int
    tokens: int
    fingerprint: dict[str, Any]

    @property
    def held_out(self) -> range:
        """The rows on which students of trials are compared. They are tuned on the first half of the measured
        rows.

        These are the next rows after the measured ones, half as many, as scores fit what they were measured
        on; where a quarter as many are not there, the last quarter of the measured ones.
        """
        beyond = min(len(self.rows) - self.measured, self.measured // 2)
        if beyond < self.measured // 4:
            return range(self.measured - self.measured // 4, self.measured)
        return range(self.measured, self.measured + beyond)

    def first(self, tokens: int, tokens_per_row: TokensPerRow | None = None) -> int:
        """How many measured rows, from the first on, hold no more than so many tokens; at least one."""
        sums = itertools.accumulate(row_tokens(row, tokens_per_row) for row in self.rows[: self.measured])
        return max(1, sum(total <= tokens for total in sums))

    @cached_property
    def sequences(self) -> int:
        """Sequences of all rows, which are more than the rows where a row holds several choices."""
        return sum(len(row["input_ids"]) if has_choices(row) else 1 for row in self.rows)
