"""What an option is: a field with a default and a help text; and what is said of a value that cannot be."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from .errors import ArgumentError
from .validation import show


PER_DEVICE = ("per_device_batch_size", "per_device_eval_batch_size")

CHOICES = {
    "head_unit": ["group", "query"],
    "measure_dtype": ["float32", "bfloat16"],
    "pooling": ["mean", "cls", "pooler", "none"],
    "statistics_dtype": ["float64", "float32"],
}
"""The values that options may have."""

LEAST = dict.fromkeys(("min_heads", "min_neurons", "lambda_pred", "ridge"), 0) | dict.fromkeys(
    ("flops_length", "max_seq_length", "num_tokens", "latency_batch_size", "round_to", *PER_DEVICE), 1
)
"""The least values that options may have."""

POSITIVE = {
    **dict.fromkeys(("target_flops", "target_params", "target_bytes", "target_latency"), ""),
    **dict.fromkeys(("target_speedup", "temperature"), ""),
    "lambda_rep": ": the first sublayer, below which nothing differs, has no other score",
    "mu": ", or None for the head size",
}
"""Options that are over 0, and what an error says behind that."""


class Unasked(float):
    """The default of an option, which gives way to what excludes it.

    `dataclasses.replace` passes defaults on as if they had been asked for; this one can be told from what
    was.
    """


def option(default: Any, help: str, **kwargs: Any) -> Any:
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


def expect(options: Any, name: str, holds: bool, wish: str) -> None:
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


def check_values(options: Any) -> None:
    """Raise `ArgumentError` for an option of `POSITIVE`, `LEAST` or `CHOICES` with a value that it may not
    have.
    """
    for name, more in POSITIVE.items():
        value = getattr(options, name)
        expect(options, name, value is None or value > 0, f"over 0{more}")
    for name, least in LEAST.items():
        value = getattr(options, name)
        expect(options, name, value is None or value >= least, f"at least {least}")
    for name, (*others, last) in CHOICES.items():
        value, wish = getattr(options, name), f"{', '.join(others)} or {last}"
        expect(options, name, value in (None, *others, last), wish)
    expect(options, "seed", 0 <= options.seed < 2**32, "from 0 to 2**32 - 1")
