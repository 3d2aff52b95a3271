"""What people pass as calibration data, one row after the other; and which of its columns hold the texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import ArgumentError


TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("content",),
    ("document",),
    ("article",),
    ("dialogue",),
    ("tokens",),
    ("words",),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "context"),
    ("question", "passage"),
    ("question", "sentence"),
    ("question1", "question2"),
)
"""Names under which datasets hold texts or pairs of texts: those of GLUE and SuperGLUE, SQuAD, and usual ones."""

TARGET_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
)
"""Names under which datasets hold sources with their targets, for models whose decoder is given a target."""


def text_columns(columns: Collection[str], names: Sequence[str] | None, targets: bool) -> tuple[str, ...]:
    """Names of the columns that hold the texts, in the order in which they are read; none if it is not known.

    Args:
        columns: All that there are.
        names: Those that the caller chose (`KPruneArguments.text_columns`), or None.
        targets: Whether a pair is a source and a target.

    Raises:
        ArgumentError: If a chosen column is missing, or if several choices fit.
    """
    if names is not None:
        missing = [name for name in names if name not in columns]
        if missing:
            raise ArgumentError(
                f"no column {', '.join(missing)} in the data, which has: {', '.join(columns)}; text_columns names those that "
                "hold the texts"
            )
        return tuple(names)
    single = [entry for entry in TEXT_COLUMNS if len(entry) == 1]
    known = [entry for entry in (*TARGET_COLUMNS, *single) if targets] or TEXT_COLUMNS
    fitting = [entry for entry in known if set(entry) <= set(columns)]
    largest = [entry for entry in fitting if not any(set(entry) < set(other) for other in fitting)]
    if len(largest) > 1:
        choices = " or ".join(str(list(entry)) for entry in largest)
        raise ArgumentError(f"the data may hold the texts in the columns {choices}; choose with text_columns")
    return largest[0] if largest else ()
