"""What is noted of the layers of a model whose type no family describes, and how that is written as code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import cast

from transformers import PreTrainedModel

from .coverage import IDLE
from .families import Block, Stack


Families = Mapping[str, tuple[Stack, ...]]
"""The stacks of a model by its path, `""` or that of a tower in it."""


@dataclass(frozen=True)
class Detected:
    """The layers of a model, as far as they could be described.

    Args:
        families: The stacks that were described.
        rest: What stays as it is, path to reason.
    """

    families: Families
    rest: Mapping[str, str]


def keep(model: PreTrainedModel, detected: Detected) -> PreTrainedModel:
    """Note on `model` what was detected in it, where `find_sublayers` looks; its copies have it too."""
    for module in model.modules():
        module.__dict__.pop("kprune_family", None)
    for path, stacks in detected.families.items():
        model_at(model, path).__dict__["kprune_family"] = stacks
    model.__dict__[IDLE] = dict(detected.rest)
    return model


def model_at(model: PreTrainedModel, path: str) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_submodule(path))


def as_code(model_type: str, stacks: Sequence[Stack]) -> str:
    """A description as one would write it."""

    def written(value: object, indent: str) -> str:
        deeper = f"{indent}    "
        if isinstance(value, (Block, Stack)):
            defaults = {
                f.name: f.default if f.default_factory is MISSING else f.default_factory()
                for f in fields(value)
            }
            values = {
                name: getattr(value, name)
                for name, default in defaults.items()
                if getattr(value, name) != default
            }
            shown = "".join(f"{deeper}{name}={written(v, deeper)},\n" for name, v in values.items())
            return f"{type(value).__name__}(\n{shown}{indent})"
        if isinstance(value, tuple) and any(isinstance(v, Block) for v in value):
            return "(\n" + "".join(f"{deeper}{written(v, deeper)},\n" for v in value) + f"{indent})"
        return repr(value)

    lines = "".join(f"    {written(stack, '    ')},\n" for stack in stacks)
    return f"register_family(\n    {model_type!r},\n{lines})"
