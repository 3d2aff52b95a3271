"""What an option is: a field with a default and a help text; and what is said of a value that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import ArgumentError
from .validation import hints_of, show


CHOICES = {
    "head_unit": ["group", "query"],
    "expert_unit": ["neuron", "expert"],
    "measure_dtype": ["float32", "bfloat16"],
    "pooling": ["mean", "cls", "pooler", "none"],
    "statistics_dtype": ["float64", "float32"],
}
"""The values that options may have."""


@dataclass(frozen=True)
class Bound:
    """What a number must be beside a number, for `typing.Annotated`.

    Args:
        words: What is expected, in an error.
        holds: Whether a number is so.
    """

    words: str
    holds: Callable[[float], bool]


def at_least(least: float) -> Bound:
    """Bound of an option that may be `least`, and more."""
    return Bound(f"at least {least}", lambda value: value >= least)


def over(least: float, remark: str = "") -> Bound:
    """Bound of an option that is more than `least`; an error ends with the remark."""
    return Bound(f"over {least}{remark}", lambda value: value > least)


class Unasked(float):
    """The default of an option, which gives way to what excludes it.

    `dataclasses.replace` passes defaults on as if they had been asked for; this one can be told from what
    was.
    """


def option(default: object, help: str, **kwargs: object) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its value if none is passed. A list is copied.
        help: What it does, in sentences.
        kwargs: What a command line has to know beside that, such as `choices`.
    """
    metadata = {"help": help, **kwargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def expect(options: object, name: str, holds: bool, wish: str) -> None:
    """Raise `ArgumentError` with what is expected of an option, if something does not hold."""
    if not holds:
        raise ArgumentError(f"{name} is {show(getattr(options, name))}, expected {wish}")


def has_size(text: str) -> bool:
    """Whether a text is a size over 0 as `save_pretrained` itself reads it, such as 5GB."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=text)
        return float(text.strip()[:-2]) > 0
    except (OverflowError, ValueError):
        return False


def check_values(options: object) -> None:
    """Raise `ArgumentError` for an option with a value that the bound in its annotation or `CHOICES` does not
    allow.
    """
    cls: Any = type(options)
    for name, kind in hints_of(cls, include_extras=True).items():
        value = getattr(options, name)
        for bound in getattr(kind, "__metadata__", ()):
            expect(options, name, value is None or bound.holds(value), bound.words)
        if name in CHOICES and value is not None:
            *others, last = CHOICES[name]
            expect(options, name, value in (*others, last), f"{', '.join(others)} or {last}")


def from_json(
    name: str, value: dict[str, object] | str | None, example: str = '{"mu": 64}'
) -> dict[str, Any]:
    """The options in a dict, or in one that is JSON, as a command line has it. None is no options.

    Raises:
        ArgumentError: If the text is no JSON of a dict.
    """
    if not isinstance(value, str):
        return dict(value or {})
    try:
        options = json.loads(value)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ArgumentError(f"{name} is {show(value)}, expected a dict, or one as JSON, such as '{example}'")
    return options
