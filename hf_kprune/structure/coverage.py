"""Whether a family describes all of a model: its projections, its lists of layers, what stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import find_layers, get_size, has
from .experts import are_experts
from .families import FAMILIES, PARTS, REFUSED, Block, Stack


IDLE = "kprune_idle"
"""Where a model is noted which models inside it do not run on the inputs on which it was proved: path to
reason."""


def family_of(model: PreTrainedModel) -> tuple[Stack, ...] | None:
    """What describes the layers of `model` itself: what detect.py noted in it, or the entry of its type."""
    return model.__dict__.get("kprune_family") or FAMILIES.get(model.config.model_type)


def described(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The models whose layers can be pruned as a family describes them, by path: `model` itself, or else
    those inside it; both, those inside it first, where that was detected."""
    own = [("", model)] if _has_layers(model) else []
    if own and not _is_detected(model):
        return own
    parts = {path: tower for path, tower in _towers(model) if path not in _alike(model)}
    kind = model.config.model_type if own else ""  # an encoder and a decoder have copies of the config
    return [(path, tower) for path, tower in parts.items() if tower.config.model_type != kind] + own


def untouched(model: PreTrainedModel) -> dict[str, str]:
    """The towers of a model that stay as they are, by path, and why."""
    towers = {
        name + ".": REFUSED[module.config.model_type]
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config.model_type in REFUSED
    }
    owners = {"": model, **dict(described(model))}
    towers |= {f"{path}{part}": why for path, m in owners.items() for part, why in parts_above(m).items()}
    towers |= model.__dict__.get(IDLE, {})
    return towers if _has_layers(model) and not _is_detected(model) else towers | _alike(model)


def parts_above(model: PreTrainedModel) -> dict[str, str]:
    """The parts of `model` itself that read what its layers give and stay as they are, by path, and why."""
    parts = PARTS.get(model.config.model_type, {})
    paths = {
        f"{prefix}{path}": why
        for prefix in ("", f"{model.base_model_prefix}.")
        for path, why in parts.items()
    }
    return {f"{path}.": why for path, why in paths.items() if has(model, path)}


def _has_layers(model: PreTrainedModel) -> bool:
    """Whether a family describes layers of `model` itself, and not only of models inside it."""
    stacks = family_of(model) or ()
    return bool(stacks) and (any(find_layers(model, stack.layers) for stack in stacks) or not _towers(model))


def _is_detected(model: PreTrainedModel) -> bool:
    """Whether the layers of `model` itself were described by detect.py."""
    return "kprune_family" in model.__dict__


def _towers(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The outermost models inside `model` that a family describes, by path, in the order in which they run:
    the decoder reads what the others give, also where it comes first among the modules."""
    towers: list[tuple[str, PreTrainedModel]] = []
    idle = tuple(model.__dict__.get(IDLE, {}))
    for name, module in model.named_modules():
        inside = any(name.startswith(outer) for outer, _ in towers) or f"{name}.".startswith(idle)
        other = isinstance(module, PreTrainedModel) and module.config is not model.config
        if other and family_of(module) and not inside:
            towers.append((name + ".", module))
    decoder = model.get_decoder() if len(towers) > 1 and model.can_generate() else None
    return sorted(towers, key=lambda tower: tower[1] is decoder)


def _alike(model: PreTrainedModel) -> dict[str, str]:
    """The towers that have one config together, which can say the sizes of one of them only, and so much."""
    reason = "it has one config with another part of the model, which can say the sizes of one only"
    users = Counter(id(tower.config) for _, tower in _towers(model))
    return {path: reason for path, tower in _towers(model) if users[id(tower.config)] > 1}


def has_block(layer: nn.Module, block: Block) -> bool:
    """Whether a layer has a block: its output and, of an attention, what makes keys, unless it is emptied."""
    keys = [path for path, layout in block.inputs.items() if "kv" in layout]
    emptied = get_size(layer, f"{block.core}.is_kprune_stand_in")
    borrows = bool(block.stays)  # of such a block some layers make keys for the others
    there = not keys or emptied or borrows or any(has(layer, path) for path in keys)
    return has(layer, block.output) and bool(there)


def check_projections(model: PreTrainedModel, layer: nn.Module, stack: Stack) -> None:
    """Refuse a layer with projections that its family does not name, or without those that it does."""
    apart = tuple(f"{path}." for path in stack.untouched)
    projections = {
        name
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not f"{name}.".startswith(apart)
    }
    listed = {path for block in stack.blocks for path in (*block.inputs, block.output)}
    missing = {
        block.output for block in stack.blocks if block.kind == "attention" and not has(layer, block.output)
    }
    described = (*(block.output for block in stack.blocks), *stack.untouched)
    others = [
        (block.output, type(layer.get_submodule(block.output)).__name__)
        for block in stack.blocks
        if block.kind != "experts" and block.output not in projections and has(layer, block.output)
    ]
    for path, name in others:
        if not getattr(layer.get_submodule(path), "is_kprune_stand_in", False):
            raise UnsupportedArchitectureError(
                f"{path} of {type(model).__name__} is a {name}, where its family {model.config.model_type!r} "
                "expects an nn.Linear; such a variant cannot be pruned"
            )
    if projections - listed or (missing and not any(has(layer, path) for path in described)):
        raise UnsupportedArchitectureError(
            f"a layer of {type(model).__name__} has the projections {sorted(projections)}; its family "
            f"{model.config.model_type!r} describes {sorted(listed)}. Describe this variant with "
            "hf_kprune.register_family: docs/add_a_family.md"
        )


def check_experts(layer: nn.Module, stack: Stack) -> None:
    """Refuse experts whose weights are not where their description says, so that they could not be cut."""
    for block in stack.blocks:
        if block.kind != "experts" or not has(layer, block.output):
            continue
        if not block.slices:
            raise UnsupportedArchitectureError(
                f"the block of experts at {block.output!r} has no slices; name the parameters that hold "
                "neurons there, and in which dimension: docs/add_a_family.md"
            )
        if not are_experts(module := layer.get_submodule(block.output)):
            raise UnsupportedArchitectureError(
                f"the experts at {block.output!r} are a {type(module).__name__}, which does not hold the "
                "weights of all of them together in plain parameters, as the experts of transformers do; "
                "replace it by what transformers loads, without quantisation or parametrisation"
            )


def check_nothing_left_out(model: PreTrainedModel, stacks: set[int]) -> None:
    """A budget is meant for the whole model: refuse if there are layers that no stack names, which have these
    ids."""
    for name, layers in _lists_beside(stacks, model):
        holds_projections = any(isinstance(m, (nn.Linear, Conv1D)) for m in layers.modules())
        if not holds_projections or isinstance(layers[0], nn.Linear):
            continue
        if not f"{name}.".startswith(tuple(untouched(model))):
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} has layers at {name!r} that its family {model.config.model_type!r} "
                "does not describe; describe all of them with hf_kprune.register_family: docs/add_a_family.md"
            )


def _lists_beside(stacks: set[int], module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules in a module, with their paths, beside those with these ids."""
    for name, child in module.named_children():
        if id(child) not in stacks:
            holds_stacks = any(id(module) in stacks for module in child.modules())
            if isinstance(child, nn.ModuleList) and len(child) and not holds_stacks:
                yield path + name, child
            yield from _lists_beside(stacks, child, f"{path}{name}.")
