"""A model is made ready to be pruned: bare of what others have wrapped around it, checked, and described."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from .checks import check_described, check_model, unwrapped
from .describe import MakeBatch, describe_on
from .surroundings import exact_products, plain_modes


def bare_model(model: object) -> PreTrainedModel:
    """The model without what others have wrapped around it.

    Raises:
        UnsupportedModelError: If anything about it forbids to prune it.
    """
    with plain_modes(), exact_products():
        model = unwrapped(model)
        check_model(model)
    return cast(PreTrainedModel, model)


def describe_units(model: PreTrainedModel, head_unit: str, batch: MakeBatch = lambda: None) -> None:
    """See to it that heads and neurons are known and can be cut, and that what is saved can be loaded.

    Args:
        model: Any.
        head_unit: What a unit is where queries are grouped.
        batch: See `describe_on`.
    """
    with plain_modes(), exact_products():
        describe_on(model, batch, head_unit)
        check_described(model, head_unit)
