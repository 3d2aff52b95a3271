"""Describe the layers of a model that families.py does not list.

watch.py observes what they do, and layer_lists.py puts that together. Where it leaves a choice (how a fused
projection is laid out, which attributes hold sizes, whether heads can be told apart), variants.py lists the
possible descriptions, each is tried, and proof.py decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .coverage import IDLE
from .descriptions import Detected, Families, keep
from .facts import evaluation_copy, masks_frames, to_model
from .families import Block
from .layer_lists import (
    LayerList,
    apart,
    head_names_of,
    innermost,
    nested,
    outermost,
    reasons_of,
    surroundings,
)
from .proof import implementations, plain_reason, prove_cuts, prove_saving, step, trial_masks
from .sublayers import find_sublayers
from .units import UNITS
from .variants import HeadNames, variants


NO_LAYERS = (
    "it has no list of layers that hold nn.Linear, and only heads and neurons in such layers are pruned"
)
OBSTACLE = "its heads cannot be cut one by one"


def detect(
    model: PreTrainedModel,
    inputs: Mapping[str, object],
    leave: Collection[str] = (),
    idle: Mapping[str, str] = {},
) -> Detected:
    """Describe the layers of `model`. Each sublayer is tried by itself; `prove` tries all of it.

    Args:
        model: Of any model type; not changed.
        inputs: A small batch that runs all of it.
        leave: Model types of towers that are not looked at.
        idle: Paths of models inside it that are not looked at either, with the reason.

    Raises:
        UnsupportedArchitectureError: If no layers of it are made of attentions or FFNs whose weights are
            projections.
    """
    dense, rest = evaluation_copy(model), dict(idle)
    inputs = to_model(inputs, dense)
    types = {name: m.config.model_type for name, m in dense.named_modules() if isinstance(m, PreTrainedModel)}
    listed = tuple(f"{name}.".lstrip(".") for name, kind in types.items() if kind in leave)
    with torch.random.fork_rng():
        lists = innermost(dense, inputs, outermost(dense, (*rest, *listed)), rest)
    rest |= apart(dense, lists, (*rest, *listed))
    rest |= nested(lists)
    lists = [layers for layers in lists if f"{layers.name}." not in rest]
    for layers in lists:
        layers.stack = surroundings(inputs, layers, lists, masks_frames(dense))
    settled: list[LayerList] = []
    for place, layers in enumerate(lists):
        dense.__dict__[IDLE] = rest | {f"{waiting.name}.": "" for waiting in lists[place + 1 :]}
        _settle(dense, inputs, layers, settled)
        if layers.stack.blocks:
            settled.append(layers)
        else:
            why = reasons_of(layers.rest)
            rest[f"{layers.name}."] = f"nothing of its layers can be cut: {why}"
    lists = settled
    if not lists and not any(kind in leave for kind in types.values()):
        raise UnsupportedArchitectureError(reasons_of(rest) if outermost(dense, ()) else NO_LAYERS)
    return Detected(_families(lists), rest)


def _families(lists: Sequence[LayerList]) -> Families:
    """The descriptions so far."""
    owners = [layers.owner for layers in lists]
    return {owner: tuple(layers.stack for layers in lists if layers.owner == owner) for owner in owners}


def _settle(
    dense: PreTrainedModel, inputs: Mapping[str, object], layers: LayerList, below: Sequence[LayerList]
) -> None:
    """Choose a description of the layers by which cutting any one of their sublayers equals masking it. What
    has none stays as it is.

    Args:
        dense: The model, on which it is noted what stays as it is.
        inputs: A batch that runs all of it.
        layers: The layers.
        below: The lists that are described already.
    """
    errors: dict[str, str] = {}

    def right(names: HeadNames, chosen: Mapping[str, Block], block: Block) -> bool:
        layers.describe(names, {**chosen, block.output: block})
        trial = Detected(_families([*below, layers]), dense.__dict__[IDLE])
        try:
            with step(f"{layers.name}.*.{block.output}"):
                _try(keep(dense, trial), inputs, layers.name, block)
        except UnsupportedArchitectureError as error:
            errors.setdefault(block.output, plain_reason(error))
            return False
        return True

    candidates: list[tuple[HeadNames, dict[str, Block]]] = []
    for names in head_names_of(layers):
        chosen: dict[str, Block] = {}
        candidates.append((names, chosen))
        for observation in layers.observations:
            tried = variants(observation, layers.config, names)
            chosen |= {b.output: b for b in islice((b for b in tried if right(names, chosen, b)), 1)}
        if len(chosen) == len(layers.observations):
            break
    names, chosen = max(candidates, key=lambda candidate: len(candidate[1]))
    for observation in [o for o in layers.observations if o.block.output not in chosen]:
        whole = replace(next(variants(observation, layers.config, names)), obstacle=OBSTACLE)
        if UNITS[whole.kind].has_heads and right(names, chosen, whole):
            chosen[whole.output] = whole
        else:
            layers.leave(observation, f"of all that was tried, nothing was right: {errors[whole.output]}")
    layers.describe(names, chosen)


def _try(dense: PreTrainedModel, inputs: Mapping[str, object], name: str, block: Block) -> None:
    """Prove that cutting one block of the layers at `name`, and nothing else, equals masking it, and that
    what is left can be saved."""
    sublayers, layers = find_sublayers(dense), dense.get_submodule(name)
    mine = [s.layers is layers and s.block.output == block.output for s in sublayers]
    for what, masks in list(trial_masks(sublayers).items())[:3]:
        masks = [mask if cut else torch.ones_like(mask) for mask, cut in zip(masks, mine, strict=True)]
        for attention in implementations(dense, inputs):
            prove_cuts(attention, inputs, {what: masks}, generate=False)
    prove_saving(dense, mine)
