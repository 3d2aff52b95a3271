"""What `config.kprune` holds of a block: one entry for all layers of a stack whose units are alike.

In most models that is one for all. Where heads are of another size in some layers (Gemma 4), or FFNs of
another width (OpenELM), each kind of layers has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import BlockPlan, get_size, has, stacks_of
from . import experts
from .configs import at_layer
from .coverage import has_block
from .families import Block, Stack
from .projections import oriented, shape_of
from .units import BORROWED, UNITS, Unit


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
    config: Any, stack: Stack, layers: nn.ModuleList, block: Block, head_unit: str | None
) -> Iterator[tuple[Block, Unit, BlockPlan]]:
    """The entries of a block, each with the block and what a unit is, from the lowest layer up.

    Args:
        config: The config of the model that owns the stack.
        stack: How its family describes it.
        layers: All its layers.
        block: One of its blocks.
        head_unit: With grouped queries, what a unit is, see `Unit.of`. None: as the model was pruned before,
            or `"group"`.
    """
    saved = [b for entry in stacks_of(config) if entry["layers"] == stack.layers for b in entry["blocks"]]
    alike = [p for p in saved if block.output in p["columns"] or p["kind"] == block.kind == "experts"]
    names = (stack.heads, stack.kv_heads, stack.head_dim)
    groups: dict[object, Group] = {}
    for index, layer in enumerate(layers):
        columns = _columns(layer, block)
        if columns is None or (block.stays and get_size(layer, block.stays)):
            continue
        before = next((plan for plan in alike if plan["kept"][index] is not None), None)
        chosen = before.get("by", "group") if before else "group"
        if before is None and stack.shares and UNITS[block.kind].has_heads and not _makes_keys(layer, block):
            chosen = BORROWED
        if head_unit is not None and chosen != BORROWED:
            chosen = head_unit
        unit = UNITS[block.kind].of(at_layer(config, index, names), stack, block, chosen)
        key = (unit, columns) if before is None else id(before)
        groups.setdefault(key, Group(unit, chosen, before)).indices.append(index)
    for group in groups.values():
        yield block, group.unit, _block_plan(layers, block, group)


def _block_plan(layers: nn.ModuleList, block: Block, group: Group) -> BlockPlan:
    """The entry of `config.kprune` for a block, with the sizes that the layers of a group have now."""
    unit, head_unit, before = group.unit, group.head_unit, group.before
    if before is not None and unit.heads > 1 and before["by"] != head_unit:
        raise UnsupportedArchitectureError(
            f"head_unit is {head_unit!r}, but this model was pruned by {before['by']!r} before; keep to that"
        )
    columns = [
        _columns(layer, block) if index in group.indices else None for index, layer in enumerate(layers)
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
        "columns": {} if unit.in_experts else {block.output: unit.width},
        "heads": unit.heads,
        "sizes": {path: unit.sizes[size] for path, size in block.sizes.items() if unit.sizes[size]},
        "core": block.core,
        "returns": list(block.returns) if isinstance(block.returns, tuple) else block.returns,
        "table": {block.table: unit.heads} if block.table else {},
        "slices": {
            path: [int(dim), value.shape[int(dim)] // units]
            for path, dim in block.slices.items()
            for layer, units in live
            if units and (value := get_size(layer, path)) is not None
        },
        "select": {
            argument: [str(where), [list(range((units or 0) * unit.heads)) for units in kept]]
            for argument, where in block.select.items()
        },
    }
    if not block.weights:
        plan["weights"] = False
    if before is not None:
        plan["of"], plan["select"] = before["of"], before["select"]
        plan["rows"], plan["slices"] = before["rows"], before["slices"]
    return plan


def _makes_keys(layer: nn.Module, block: Block) -> bool:
    """Whether an attention makes keys and values, and does not find those of an earlier layer."""
    return any(layout != "q" and has(layer, path) for path, layout in block.inputs.items())


def _columns(layer: nn.Module, block: Block) -> int | None:
    """Columns of the output projection of a block, of experts those of each; None if a layer lacks it."""
    if not has_block(layer, block):
        return None
    output = layer.get_submodule(block.output)
    return experts.size_of(output)[1] if UNITS[block.kind].in_experts else shape_of(output)[1]


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
