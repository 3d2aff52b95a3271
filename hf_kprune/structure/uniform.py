"""Uniform sizes: models with layers all alike, which a stock config can describe and stock classes load."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import ALIGNED, pad_logits, plan_of
from .sublayers import Sublayer


def uniform_names(sublayers: Sequence[Sublayer], options: object) -> list[tuple[int, str]]:
    """For each sublayer, whose config and which attribute of it tell its size: those that share it must be
    alike.

    Args:
        sublayers: All those of a model.
        options: `KPruneArguments`, of which those are read that say what is pruned at all.

    Raises:
        UnsupportedArchitectureError: If the config cannot tell what is to be pruned.
    """
    names = []
    for s in sublayers:
        if plan_of(s.owner.config) is not None:
            raise UnsupportedArchitectureError(
                f"uniform is True, but {type(s.owner).__name__} was pruned unevenly before; start from the "
                "dense model"
            )
        if getattr(options, s.unit.prunes) and not _has_attribute(s):
            raise UnsupportedArchitectureError(
                f"uniform is True, but {type(s.owner.config).__name__} cannot say {s.unit.uniform_change}, "
                f"so stock transformers could not load the result; pass {s.unit.prunes}=False to prune the "
                "rest, towers to prune other parts alone, or uniform=False"
            )
        attribute = s.stack.uniform.get(s.unit.uniform, s.stack_name + s.kind)
        names.append((id(s.owner), attribute if _has_attribute(s) else s.name))  # without one all stay
    return names


def uniform_choices(sublayer: Sublayer) -> list[int] | None:
    """Numbers of units that the stock config accepts; None if it accepts any."""
    if sublayer.unit.any_number:
        return None
    accepted = []
    step = ALIGNED * sublayer.experts if sublayer.unit.in_experts else sublayer.parts
    for units in (*range(step, sublayer.num_units, step), sublayer.num_units):
        config = copy.deepcopy(sublayer.owner.config)
        _set_stock_size(config, sublayer, units)
        try:
            type(config).from_dict(config.to_dict())
        except (ValueError, StrictDataclassError):
            continue
        accepted.append(units)
    return accepted


def write_stock_config(sublayers: Sequence[Sublayer]) -> None:
    """Write the sizes of `sublayers`, alike in all layers, into the stock config; they need nothing else."""
    for s in sublayers:
        _set_stock_size(s.owner.config, s, s.num_units)
        for module in s.layer.modules():
            view = module.__dict__.get("config")
            if hasattr(view, "kprune_config"):
                module.__dict__["config"] = s.owner.config
        if "router" in s.plan:
            pad_logits(s.layer.get_submodule(s.plan["router"]), None)
            if hasattr(s.owner, "num_experts"):  # by which models balance their experts
                s.owner.num_experts = s.num_units


def _has_attribute(sublayer: Sublayer) -> bool:
    """Whether the config has an attribute for the size of a sublayer; none has one for cross-attention."""
    return sublayer.unit.in_stock(sublayer.stack) and sublayer.kind != "cross_attention"


def _set_stock_size(config: object, sublayer: Sublayer, units: int) -> None:
    if _has_attribute(sublayer):
        each = units // sublayer.experts if sublayer.unit.in_experts else units
        for name, value in sublayer.unit.stock_sizes(sublayer.stack, each).items():
            setattr(config, name, value)
