"""What goes: numbers in, masks and weights out. `METHODS` names the pruning methods.

To add a method, derive a class from `Method` and register it under the name that
`KPruneArguments(method=...)` is to take.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from inspect import signature

from ..errors import ArgumentError
from .base import Method, Statistics
from .baselines import FLAP, Magnitude, Random, Taylor, WandaSP
from .kprune import KPrune
from .mask_tuning import KCM, Kwon
from .surgeon import Surgeon


__all__ = ["METHODS", "Method", "Statistics", "register_method"]

METHODS: dict[str, type[Method]] = {
    "surgeon": Surgeon,
    "kprune": KPrune,
    "kwon": Kwon,
    "kcm": KCM,
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
    "flap": FLAP,
    "wanda_sp": WandaSP,
}
"""Pruning methods by name."""


def register_method(name: str, method: type[Method]) -> None:
    """Let `KPruneArguments(method=name)` take a method of your own.

    Args:
        name: The name, which none of the methods has yet.
        method: The class, derived from `Method`.

    Raises:
        ArgumentError: If the name is taken, the class is none of `Method`, its `kwargs_class` is no
            dataclass of which every field has a default, or it `needs` what is not measured for such a
            method.

    Example:

        >>> from hf_kprune import Method, register_method
        >>> class Loudest(Method):
        ...     def score(self, statistics):
        ...         return statistics.energy.view(-1, statistics.unit_width).mean(1) / statistics.cost
        >>> register_method("loudest", Loudest)
    """
    if name in METHODS and METHODS[name] is not method:
        raise ArgumentError(f"method {name!r} is {METHODS[name].__name__} already; choose another name")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ArgumentError(f"{method!r} is no class derived from hf_kprune.Method")
    kwargs = method.kwargs_class
    if not is_dataclass(kwargs) or any(p.default is p.empty for p in signature(kwargs).parameters.values()):
        raise ArgumentError(
            f"{kwargs!r} is no dataclass whose fields have defaults: method {name!r} needs one"
        )
    measured = {"curvature", "fisher"} if method.one_shot else {"knowledge"}
    if not method.needs <= measured:
        raise ArgumentError(
            f"method {name!r} needs {', '.join(sorted(method.needs))}; with one_shot = {method.one_shot} "
            f"it can have {' and '.join(sorted(measured))}"
        )
    METHODS[name] = method
