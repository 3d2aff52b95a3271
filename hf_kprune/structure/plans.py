"""What `config.kprune` holds of a block: one entry for all layers of a stack whose units are alike.

In most models that is one for all. Where heads are of another size in some layers (Gemma 4), or FFNs of
another width (OpenELM), each kind of layers has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import BORROWED, WHOLE, BlockPlan, Layers, get_size, has, stacks_of
from . import experts
from .configs import at_layer
from .coverage import has_block
from .families import Block, Dimension, Stack
from .projections import oriented, shape_of
from .units import UNITS, Expert, Unit


@dataclass
class Group:
    """Layers of a stack that share an entry.

    Args:
        unit: What one of their units is.
        head_unit: What decides that where queries are grouped.
        before: The entry that the config has already; None for a dense model.
        indices: The places of the layers in the list.
    """

    unit: Unit
    head_unit: str
    before: BlockPlan | None
    indices: list[int] = field(default_factory=list)


def plans_of(
    config: Any,
    stack: Stack,
    layers: Layers,
    block: Block,
    head_unit: str | None,
    expert_unit: str | None,
) -> Iterator[tuple[Block, Unit, BlockPlan]]:
    """The entries of a block, each with the block and what a unit is, from the lowest layer up.

    Args:
        config: The config of the model that owns the stack.
        stack: How its family describes it.
        layers: All its layers.
        block: One of its blocks.
        head_unit: With grouped queries, what a unit is, see `Unit.of`. None: as the model was pruned before,
            or `"group"`.
        expert_unit: What a unit of a mixture of experts is, `"neuron"` or `"expert"`. None: as before, or
            `"neuron"`.
    """
    saved = [b for entry in stacks_of(config) if entry["layers"] == stack.layers for b in entry["blocks"]]
    alike = [p for p in saved if block.output in p["columns"] or p["kind"] == block.kind == "experts"]
    names = (stack.heads, stack.kv_heads, stack.head_dim)
    groups: dict[object, Group] = {}
    for index, layer in enumerate(layers):
        columns = _columns(layer, block)
        if columns is None or stays_in(layer, block):
            continue
        before = next((plan for plan in alike if plan["kept"][index] is not None), None)
        here, has_heads = at_layer(config, index, names), UNITS[block.kind].has_heads
        if block.kind == "experts":
            unit, before = _unit_of_experts(here, stack, layer, block, expert_unit, before)
            chosen = WHOLE if isinstance(unit, Expert) else "group"
        else:
            chosen = before.get("by", "group") if before else "group"
            if before is None and stack.shares and has_heads and not _makes_keys(layer, block):
                chosen = BORROWED
            if head_unit is not None and chosen != BORROWED:
                chosen = head_unit
            unit = UNITS[block.kind].of(here, stack, block, chosen)
        key = (unit, columns) if before is None else id(before)
        groups.setdefault(key, Group(unit, chosen, before)).indices.append(index)
    for group in groups.values():
        yield block, group.unit, _block_plan(layers, block, group)


def _unit_of_experts(
    config: Any,
    stack: Stack,
    layer: nn.Module,
    block: Block,
    expert_unit: str | None,
    before: BlockPlan | None,
) -> tuple[Unit, BlockPlan | None]:
    """What a unit of the experts of a layer is, and the entry that the config has already and that goes on:
    one of which nothing was cut binds to nothing."""
    earlier = None if before is None else "expert" if before.get("by") == WHOLE else "neuron"
    asked = expert_unit or earlier or "neuron"
    if before is not None and asked != earlier:
        if any(units not in (None, before["of"]) for units in before["kept"]):
            raise UnsupportedArchitectureError(
                f"expert_unit is {asked!r}, but the experts of this model were pruned by {earlier!r} before; "
                "keep to that"
            )
        before = None
    if asked == "neuron":
        return UNITS["experts"].of(config, stack, block, ""), before
    if not any(get_size(layer, path) is not None for path in block.router):
        raise UnsupportedArchitectureError(
            f"expert_unit is 'expert', but the block of experts at {block.output!r} names no weights of a "
            "router that are there, so the row of an expert cannot go with it; name them in "
            "Block(router=...), or pass expert_unit='neuron'"
        )
    count, neurons, _ = experts.size_of(module := layer.get_submodule(block.output))
    whole = replace(Expert.of(config, stack), inner=neurons + bool(module.has_bias))
    if count % whole.groups:
        raise UnsupportedArchitectureError(
            f"expert_unit is 'expert', but the {count} experts of {block.output} do not make up the "
            f"{whole.groups} groups of which {type(config).__name__} tells ({stack.groups[0]}); pass "
            "expert_unit='neuron'"
        )
    return whole, before


def _block_plan(layers: Layers, block: Block, group: Group) -> BlockPlan:
    """The entry of `config.kprune` for a block, with the sizes that the layers of a group have now."""
    unit, head_unit, before = group.unit, group.head_unit, group.before
    if before is not None and unit.heads > 1 and before["by"] != head_unit:
        raise UnsupportedArchitectureError(
            f"head_unit is {head_unit!r}, but this model was pruned by {before['by']!r} before; keep to that"
        )
    columns = [
        _columns(layer, block, unit.in_experts) if index in group.indices else None
        for index, layer in enumerate(layers)
    ]
    if odd := {count for count in columns if count and count % unit.width}:
        raise UnsupportedArchitectureError(
            f"{block.output} reads {min(odd)} features, which heads of {unit.width} do not make up; the "
            "config tells another size of heads than the layers have"
        )
    kept = [None if count is None else count // unit.width for count in columns]
    live = [(layer, units) for layer, units in zip(layers, kept, strict=True) if units is not None]
    plan: BlockPlan = {
        "kind": block.kind,
        "by": head_unit,
        "of": max((units for _, units in live), default=0),
        "kept": kept,
        "rows": _rows(live, block, unit),
        "columns": {} if block.kind == "experts" else {block.output: unit.width},
        "heads": unit.heads,
        "sizes": {path: unit.sizes[size] for path, size in block.sizes.items() if unit.sizes[size]},
        "core": block.core,
        "returns": list(block.returns) if isinstance(block.returns, tuple) else block.returns,
        "table": {block.table: unit.heads} if block.table else {},
        "slices": {
            path: [int(dim), value.shape[int(dim)] // units]
            for path, dim in _slices(block, unit).items()
            for layer, units in live
            if units and (value := get_size(layer, path)) is not None
        },
        "select": {
            argument: [str(where), [list(range((units or 0) * unit.heads)) for units in kept]]
            for argument, where in block.select.items()
        },
    }
    if stays := [i for i, layer in enumerate(layers) if has_block(layer, block) and stays_in(layer, block)]:
        plan["stays"] = stays
    if block.norm:
        plan["norm"] = block.norm
    if not block.weights:
        plan["weights"] = False
    if isinstance(unit, Expert):
        plan["router"] = _router(live[0][0], block)
    if before is not None:
        plan["of"], plan["select"] = before["of"], before["select"]
        plan["rows"], plan["slices"] = before["rows"], before["slices"]
    return plan


def _slices(block: Block, unit: Unit) -> Mapping[str, Dimension]:
    """The tensors that hold slices for units, and where: of whole experts all tensors of theirs."""
    if not isinstance(unit, Expert):
        return block.slices
    own = (*block.slices, f"{block.output}.gate_up_proj_bias", f"{block.output}.up_proj_bias")
    return {**dict.fromkeys((*own, f"{block.output}.down_proj_bias"), 0), **block.router}


def _router(layer: nn.Module, block: Block) -> str:
    """Path of the module that chooses among the experts of a layer: it lies beside them."""
    around = block.output.rpartition(".")[0]
    path = next(path for path in block.router if get_size(layer, path) is not None)
    name = path.removeprefix(f"{around}.").partition(".")[0]
    return f"{around}.{name}" if around else name


def stays_in(layer: nn.Module, block: Block) -> bool:
    """Whether a layer keeps a block as it is, see `Block.stays`."""
    return bool(block.stays and get_size(layer, block.stays))


def _makes_keys(layer: nn.Module, block: Block) -> bool:
    """Whether an attention makes keys and values, and does not find those of an earlier layer."""
    return any(layout != "q" and has(layer, path) for path, layout in block.inputs.items())


def _columns(layer: nn.Module, block: Block, of_each: bool = False) -> int | None:
    """Columns of the output projection of a block, or neurons of each of its experts; None if a layer lacks
    it."""
    if not has_block(layer, block):
        return None
    output = layer.get_submodule(block.output)
    return experts.size_of(output)[1] if of_each else shape_of(output)[1]


def _rows(live: Sequence[tuple[nn.Module, int]], block: Block, unit: Unit) -> dict[str, list[int]]:
    """For each input projection of a block, its rows for each unit, and those that are there for none.

    Args:
        live: The layers that have the block, each with the units that it has now.
        block: Its `inputs` name the projections.
        unit: What a unit is.
    """
    rows = {}
    for path, layout in block.inputs.items():
        width = unit.rows(layout, 1).shape[1]
        fixed = {
            oriented(layer.get_submodule(path)).shape[0] - units * width
            for layer, units in live
            if has(layer, path)
        }
        if width and len(fixed) > 1:
            raise UnsupportedArchitectureError(
                f"the layers differ in the size of {path} beyond what their heads or neurons account for, "
                "which no description covers: docs/add_a_family.md"
            )
        if width and fixed:
            rows[path] = [width, fixed.pop()]
    return rows
