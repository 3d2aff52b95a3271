"""Values as datasets hold them: lists in lists, arrays and tensors, of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor


Row = dict[str, Any]
"""The columns of a calibration row: lists, arrays, tensors, or what is made into those."""


PLAIN = frozenset({int, float, bool, str, type(None)})
"""Types of most values, which are told apart at once as there are so many of them."""


def depth(value: object) -> int:
    """Dimensions of a tensor or array, or of lists in lists, as the first at each level tells them."""
    if type(value) in PLAIN:
        return 0
    if hasattr(value, "ndim"):
        return int(value.ndim)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return 1 + (depth(value[0]) if len(value) else 0)
    return 0


def flat(value: Any) -> Iterator[Any]:
    """The numbers in a list, array or tensor, or in lists of them of any lengths (choices)."""
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        if depth(entry):
            yield from flat(entry)
        else:
            yield entry


def plain(value: object) -> Any:
    """A list of tensors or arrays of one number each as a list of plain numbers; anything else as it is."""
    if isinstance(value, (list, tuple)) and any(
        hasattr(entry, "ndim") and not depth(entry) for entry in value
    ):
        return [entry.item() if hasattr(entry, "item") else entry for entry in value]
    return value


def strays(value: Any, dims: int) -> Iterator[tuple[Any]]:
    """What is no whole number in lists or tensors of `dims` dimensions, each in a tuple as it may be None."""
    if dims == 0 or not depth(value):
        if dims or isinstance(value, bool) or not isinstance(value, Integral):
            yield (value,)
        return
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        if dims > 1 or type(entry) is not int:
            yield from strays(entry, dims - 1) if dims > 1 or depth(entry) else strays(entry, 0)


def shape_of(value: Any) -> tuple[int, ...]:
    """The length of a list, and those of the lists in it."""
    return (len(value), *(map(len, value) if depth(value) > 1 else ())) if depth(value) else ()


def floats(value: object) -> Tensor | None:
    """An input of floats as a float32 tensor, many times smaller than a list; None for other inputs."""
    if not hasattr(value, "dtype"):
        if not hasattr(value, "__len__") or not isinstance(next(flat(value), None), float):
            return None
        value = np.asarray(value, dtype=np.float32)
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.float() if tensor.is_floating_point() else None
