"""The errors of hf_kprune. Each is also a `ValueError`, restates what was passed, and says the way out.

    KPruneError
    |-- ArgumentError                   an option, or a combination of options, that cannot be
    |-- BudgetError                     a sparsity that the model and the options cannot reach
    |-- CalibrationError                calibration data that cannot be used
    |-- CheckpointError                 a saved model that contradicts itself
    `-- UnsupportedModelError           a model that cannot be pruned as it is
        `-- UnsupportedArchitectureError    a model whose layers are not described

CheckpointError lives in modeling_kprune.py, which travels alone and cannot know its base. It is looked up
there and given it when it is asked for, so that this module takes no library.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .modeling_kprune import CheckpointError


__all__ = [
    "ArgumentError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "KPruneError",
    "UnsupportedArchitectureError",
    "UnsupportedModelError",
]


class KPruneError(ValueError):
    """Base of what hf_kprune raises for input it refuses."""

    __slots__ = ()  # so that it can become the base of a class that was made with ValueError as its base


class ArgumentError(KPruneError):
    """An option, or a combination of options, that cannot be."""


class BudgetError(KPruneError):
    """A sparsity that the model and the options cannot reach."""


class CalibrationError(KPruneError):
    """Calibration data that cannot be used."""


class UnsupportedModelError(KPruneError):
    """A model that cannot be pruned as it is: quantised, wrapped by PEFT, in an integer dtype, ..."""


class UnsupportedArchitectureError(UnsupportedModelError):
    """A model whose layers no family describes."""


def __getattr__(name: str) -> Any:
    if name != "CheckpointError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .modeling_kprune import CheckpointError

    CheckpointError.__bases__ = (KPruneError,)
    return CheckpointError
