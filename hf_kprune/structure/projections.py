"""The output projection of a sublayer: a linear module, or the experts of a layer, which are one as well (see
experts.py). Torch only.

Shapes: C columns, D rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ..modeling_kprune import kind_of
from . import experts


def oriented(projection: nn.Module) -> Tensor:
    """Weight of a linear module or of experts, (rows, columns); a `Conv1D` holds it the other way round."""
    if experts.are_experts(projection):
        return experts.weight_of(projection)
    weight = cast(Tensor, projection.weight)
    return weight if kind_of(projection) == "linear" else weight.T


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """Rows and columns of such a weight."""
    if experts.are_experts(projection):
        count, neurons, width = experts.size_of(projection)
        return width, count * (neurons + bool(projection.has_bias))
    rows, columns = oriented(projection).shape
    return rows, columns


def bias_of(projection: nn.Module) -> Tensor | None:
    """Bias of a projection, (D,). Those of experts are among the columns."""
    return None if experts.are_experts(projection) else cast("Tensor | None", projection.bias)


def features_of(projection: nn.Module, arguments: Sequence[Tensor]) -> Tensor:
    """The features that a projection reads, (..., C), when it is called with these arguments."""
    if experts.are_experts(projection):
        return experts.features_of(projection, *arguments)
    return arguments[0]


def output_of(projection: nn.Module, features: Tensor) -> Tensor:
    """What a projection gives for features (..., C), (..., D)."""
    if experts.are_experts(projection):
        return experts.output_of(projection, features)
    return cast(Tensor, projection(features))
