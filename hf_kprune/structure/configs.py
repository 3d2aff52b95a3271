"""Read the config of a model of any type, which may lack a value, or have one for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import ConfigView


def read(config: object, name: str) -> Any:
    """The value of a config attribute, None if there is none.

    Raises:
        UnsupportedArchitectureError: If the config has no one value for all layers.
    """
    try:
        return getattr(config, name, None)
    except Exception as error:  # such attributes raise what they like
        raise UnsupportedArchitectureError(
            f"the layers differ in {name}, for which {type(config).__name__} has no one value"
        ) from error


def at_layer(config: Any, index: int, names: Sequence[str]) -> Any:
    """What a config says of one layer.

    Args:
        config: That of the model.
        index: The number of the layer.
        names: Attributes that may be lists with a value for each layer.
    """
    if getattr(config, "is_heterogeneous", False):  # then Transformers keeps a config for each layer
        return config.per_layer_config[index]
    values = {name: read(config, name) for name in names}
    lists = {name: value[index] for name, value in values.items() if isinstance(value, (list, tuple))}
    return ConfigView(config, lists) if lists else config


def ask(config: object, name: str) -> Any:
    """The value of what `Stack.kv_heads` or `Stack.head_dim` names: an attribute, the one that a flag
    chooses, or a quotient of two; None without."""
    if " / " in name:
        total, parts = (read(config, part) for part in name.split(" / "))
        return total // parts if total and parts else None
    flag, _, names = name.partition(" ? ")
    return read(config, names.split(" : ")[not read(config, flag)] if names else name)


def text_config(config: Any) -> Any:
    """The part of a config that is about texts; all of it if it has several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config
