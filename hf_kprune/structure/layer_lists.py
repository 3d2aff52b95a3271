"""The lists of layers of a model: watched while it runs (watch.py), merged, and described as far as their
config leaves no choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .families import Block, Stack
from .proof import step
from .units import UNITS
from .variants import HeadNames, head_names
from .watch import PROJECTIONS, Observation, Watch


REASONS = 4
"""As many reasons are written out where a model is refused for many."""


@dataclass
class LayerList:
    """A list of layers, and how it is described so far.

    Args:
        name: Its path in the whole model.
        owner: Path of the model whose config describes it.
        path: Its path in that model, as `find_layers` looks for it.
        config: The config of that model.
        watches: The hooks on its layers.
        observations: The sublayers of its layers, of which each may lack some.
        stack: Its description.
        rest: What else its layers have, by its path in a layer, with the reason why it stays.
    """

    name: str
    owner: str
    path: str
    config: Any
    watches: list[Watch]
    observations: tuple[Observation, ...] = ()
    stack: Stack = Stack("", ())
    rest: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many sublayers its layers have."""
        outputs = {o.block.output for o in self.observations}
        return sum(s.block.output in outputs for watch in self.watches for s in watch.sublayers)

    def leave(self, observation: Observation, why: str) -> None:
        """Leave a sublayer as it is."""
        self.observations = tuple(o for o in self.observations if o is not observation)
        self.rest.update(dict.fromkeys(sorted(observation.projections), why))

    def describe(self, names: HeadNames, chosen: Mapping[str, Block]) -> None:
        """Describe those sublayers of which there is a block, by its output, and leave the others."""
        outputs = [o.block.output for o in self.observations]
        others = [o for o in self.observations if o.block.output not in chosen]
        rest = self.rest | {path: "" for o in others for path in o.projections}
        blocks = tuple(chosen[output] for output in outputs if output in chosen)
        parallel = len(blocks) > 1 and max(self.watches, key=lambda w: len(w.sublayers)).parallel
        self.stack = replace(self.stack, blocks=blocks, parallel=parallel, untouched=rest, **names)


def innermost(
    model: PreTrainedModel, inputs: Mapping[str, object], names: Sequence[str], rest: dict[str, str]
) -> list[LayerList]:
    """The lists of layers at these paths, or, where more sublayers are seen in those, lists inside them. What
    has none is added to the `rest`."""
    if not names:
        return []
    outer = [_layer_list(model, name) for name in names]
    _watch(model, inputs, outer)
    failures = {layers.name: why for layers in outer if (why := _trouble(layers))}
    doubtful = [layers.name for layers in outer if layers.name in failures or layers.rest]
    inner = {name: outermost(model.get_submodule(name), (), name) for name in doubtful}
    below = dict[str, str]()
    lower = innermost(model, inputs, [name for names in inner.values() for name in names], below)
    lists: list[LayerList] = []
    for layers in outer:
        inside = [other for other in lower if other.name.startswith(f"{layers.name}.")]
        if sum(map(len, inside)) > len(layers):
            lists += inside
            rest |= {name: why for name, why in below.items() if name.startswith(f"{layers.name}.")}
        elif layers.name in failures:
            rest[f"{layers.name}."] = failures[layers.name]
        else:
            lists.append(layers)
    return lists


def outermost(module: nn.Module, rest: tuple[str, ...], path: str = "") -> list[str]:
    """The paths of the outermost lists of modules that hold projections, beside itself in the module at
    `path`, and not in the `rest`."""
    names: list[str] = []
    for name, child in module.named_modules(prefix=path):
        inside = child is module or name.startswith(tuple(f"{outer}." for outer in names))
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and not inside:
            # some lists have gaps, which are no children
            holding = [m for m in child.children() if any(isinstance(p, PROJECTIONS) for p in m.modules())]
            if all(isinstance(m, PROJECTIONS) for m in holding) or f"{name}.".startswith(rest):
                continue
            names.append(name)
    return names


def _watch(model: PreTrainedModel, inputs: Mapping[str, object], lists: Sequence[LayerList]) -> None:
    """Run the model while its layers are watched."""
    with ExitStack() as hooks, torch.enable_grad():
        for hook in (hook for layers in lists for watch in layers.watches for hook in watch.hooks()):
            hooks.callback(hook.remove)
        with step(
            "watching it run", "it does not run while its layers are watched, as the error above shows"
        ):
            model(**inputs)


def _trouble(layers: LayerList) -> str:
    """Why a list of layers that has been watched cannot be described; `""` if it can, and then it is noted
    what its layers have."""
    troubles = [watch.trouble for watch in layers.watches if watch.trouble]
    most = max(layers.watches, key=lambda w: len(w.sublayers))
    others = [w for w in layers.watches if w.sublayers]
    troubles += [
        f"{w.name} returns something else than {most.name}" for w in others if w.returns != most.returns
    ]
    if len({w.parallel for w in others if len(w.sublayers) == len(most.sublayers)}) > 1:
        troubles.append(
            f"in some layers of {layers.name}, and not in all, one attention or FFN reads what another gives"
        )
    if "y" not in str(most.returns):
        troubles.append(f"{most.name} returns no hidden states, alone or in a tuple")
    if len({w.packed for w in others}) > 1:
        troubles.append(f"some layers of {layers.name} read all samples as one sequence, and some do not")
    if not troubles and not others:
        why = reasons_of({path: why for w in layers.watches for path, why in w.rest.items()})
        troubles.append(f"in {layers.name} no attention and no FFN of nn.Linear can be cut by itself: {why}")
    if not troubles:
        _merge(layers)
    return troubles[0] if troubles else ""


def reasons_of(reasons: Mapping[str, str]) -> str:
    """The reasons why parts stay as they are, path to reason, in one sentence: the first `REASONS` of them,
    each with the first part of which it is told unless it names one itself."""
    parts: dict[str, str] = {}
    for path, why in reasons.items():
        parts.setdefault(why, path.rstrip("."))
    texts = [f"{path}: {why}" if why.startswith("it ") else why for why, path in parts.items()]
    more = [f"and {len(texts) - REASONS} more reasons"] if len(texts) > REASONS + 1 else []
    return "; ".join([*texts[: REASONS if more else None], *more])


def _merge(layers: LayerList) -> None:
    """Note the sublayers of all layers of a list, of which each may lack some, and what else these have. What
    is a sublayer of one layer alone in the same way as of others stays."""
    merged: dict[str, Observation] = {}
    for watch in layers.watches:
        layers.rest |= watch.rest
    for watch in sorted(layers.watches, key=lambda w: -len(w.sublayers)):
        for observation in watch.sublayers:
            block = observation.block
            first = merged.setdefault(block.output, observation)
            if replace(first.block, stream=None) != replace(block, stream=None):
                why = f"{block.output} is not fed alike in all layers"
                layers.rest.update(dict.fromkeys((*first.rows, *observation.rows, block.output), why))
            elif first.block.stream != block.stream:
                merged[block.output] = replace(first, block=replace(first.block, stream=None))
    layers.observations = tuple(merged.values())
    while mixed := next((o for o in layers.observations if layers.rest.keys() & o.projections), None):
        layers.leave(mixed, next(why for path, why in layers.rest.items() if path in mixed.projections))


def _layer_list(model: PreTrainedModel, name: str) -> LayerList:
    """The list of layers at `name`, with the outermost model that has the config of its own one."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
    models = {path: m for path in parents if isinstance(m := model.get_submodule(path), PreTrainedModel)}
    inner = list(models.values())[-1].config.model_type
    owner = next(path for path, m in models.items() if m.config.model_type == inner)
    path = name.removeprefix(f"{owner}.").removeprefix(f"{models[owner].base_model_prefix}.")
    holding = cast(nn.ModuleList, model.get_submodule(name))
    watches = [Watch(f"{name}.{i}", layer) for i, layer in enumerate(holding)]
    return LayerList(name, owner, path, models[owner].config, watches)


def apart(model: PreTrainedModel, lists: Sequence[LayerList], rest: tuple[str, ...]) -> dict[str, str]:
    """The outermost modules beside the lists, and not in the `rest`, that are like what layers are made
    of."""
    modules = [m for layers in lists for watch in layers.watches for m in watch.layer.modules()]
    parts = {type(m) for m in modules if any(isinstance(p, PROJECTIONS) for p in m.modules())} - {
        *PROJECTIONS
    }
    parts = {kind for kind in parts if not kind.__module__.startswith("torch.")}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        around = any(f"{layers.name}.".startswith(f"{name}." if name else "") for layers in lists)
        inside = f"{name}.".startswith((*reasons, *rest, *(f"{layers.name}." for layers in lists)))
        alike, attends = type(module) in parts, "attention" in type(module).__name__.lower()
        holds = any(isinstance(p, PROJECTIONS) for p in module.modules())
        if (alike or attends) and holds and not around and not inside:
            reasons[f"{name}."] = (
                "it is like what its layers are made of, and lies outside of them"
                if alike
                else "it is an attention that lies outside of all lists of layers"
            )
    return reasons


def nested(lists: Sequence[LayerList]) -> dict[str, str]:
    """The lists of models inside a tower that has lists of its own."""
    owners = tuple(f"{layers.owner}." for layers in lists if layers.owner)
    why = "it is in a model inside a tower that has layers of its own"
    return {f"{layers.name}.": why for layers in lists if layers.owner.startswith(owners)}


def surroundings(
    inputs: Mapping[str, Any], layers: LayerList, lists: Sequence[LayerList], frames: bool
) -> Stack:
    """The description of layers, but for their sublayers. Those attentions stay as they are whose keys come
    from elsewhere, or whose heads the config does not tell."""
    watch, reads, mask = max(layers.watches, key=lambda w: len(w.sublayers)), "", ""
    memory = max((o.memory for o in layers.observations), default=0)
    if memory:
        others = [
            other.path
            for other in lists
            if other is not layers and other.owner == layers.owner and other.watches[0].tokens == memory
        ]
        reads = others[0] if others else ""
        for observation in [o for o in layers.observations if o.memory and not others]:
            of = f" of {layers.owner}" if layers.owner else ""
            why = f"its keys are made of {memory} tokens, and no other layers{of} read as many"
            layers.leave(observation, why)
    elif frames:
        mask = "attention_mask"
    for prefix in ("", "decoder_") if memory else ("",):
        ids = inputs.get(f"{prefix}input_ids")
        mask = f"{prefix}attention_mask" if ids is not None and ids.shape[-1] == watch.tokens else mask
    try:
        next(head_names_of(layers))
    except UnsupportedArchitectureError as error:
        for observation in [o for o in layers.observations if UNITS[o.block.kind].has_heads]:
            layers.leave(observation, str(error))
    return Stack(layers.path, (), watch.returns, mask=mask, reads=reads, packed=watch.packed)


def head_names_of(layers: LayerList) -> Iterator[HeadNames]:
    return head_names(layers.name, layers.path, layers.config, layers.observations)
