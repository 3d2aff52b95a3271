"""The live sublayers of a model: find them, count their cost, cut them, write their sizes into the config."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import (
    FORMAT,
    HOW_TO_LOAD,
    SIZES,
    digest,
    find_layers,
    get_size,
    has,
    kind_of,
    own_tables,
    plan_of,
    set_slices,
    shrink_layer,
)
from ..version import __version__
from .families import FAMILIES, REFUSED, Block, Stack


@dataclass(frozen=True)
class Unit:
    """What one unit holds: rows of query and of key (or value) projections, `head_dim` apart where `strided`.

    A neuron is (1, 1). A head is (d, d), with g query heads to a key-value head (g d, d). One query head out of each of
    the k groups is (k d, 0): the heads of a unit are spread over the groups, and keys and values stay whole.
    """

    q: int
    kv: int
    head_dim: int
    strided: bool = False


NEURON = Unit(1, 1, 1)

LEFT_ALONE = "kprune_left_alone"
"""Where a model is noted, while it is pruned, which of its towers are not: by their paths. See reach.py."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or FFN sublayer of a live model.

    `plan` is this block's entry in `config.kprune` (shared by the layers of the stack) and `index` the layer's place in it.
    `owner` is the model whose config holds it: the model itself, or a tower inside it.
    """

    name: str
    owner: PreTrainedModel = field(repr=False)
    layers: nn.ModuleList = field(repr=False)
    stack: Stack
    block: Block
    plan: dict[str, Any]
    index: int
    unit: Unit

    @property
    def layer(self) -> nn.Module:
        return self.layers[self.index]

    @property
    def kind(self) -> str:
        return self.block.kind

    @property
    def stack_name(self) -> str:
        """Path of the list of layers."""
        return self.name.rsplit(".", 2)[0]

    @property
    def reads(self) -> str:
        """The stack that keys and values come from: another one in cross-attention."""
        if self.kind != "cross_attention":
            return self.stack_name
        return self.stack_name.removesuffix(self.stack.layers) + self.stack.reads

    @property
    def unit_width(self) -> int:
        """Columns of a unit in the output projection."""
        return self.unit.q

    @property
    def output(self) -> nn.Module:
        """The output projection, whose input columns are the units' features."""
        return self.layer.get_submodule(self.block.output)

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection, (D, U * unit_width), a view."""
        return oriented(self.output)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the output projection, (D,)."""
        return cast("Tensor | None", self.output.bias)

    @property
    def input_projections(self) -> list[str]:
        """Paths of the projections whose rows are the units'; none if no unit is left."""
        return [path for path in self.block.inputs if self.num_units and has(self.layer, path)]

    @property
    def columns(self) -> Tensor:
        """Columns of each unit in the output projection, (U, unit_width)."""
        return row_indices("q", self.num_units, self.unit)

    @property
    def magnitude(self) -> Tensor:
        """Sum of the squares of all weights of each unit, (U,), float64."""
        total = self.weight.double().square().sum(0)[self.columns.to(self.weight.device)].sum(1)
        for path in self.input_projections:
            if path in self.plan["rows"]:
                rows = row_indices(self.block.inputs[path], self.num_units, self.unit).to(total.device)
                total += oriented(self.layer.get_submodule(path)).double().square().sum(1)[rows].sum(1)
        return total

    @property
    def num_units(self) -> int:
        return self.weight.shape[1] // self.unit_width

    @property
    def residual(self) -> float:
        """What the output is multiplied by before it joins the stream."""
        return float(getattr(self.owner.config, self.stack.residual)) if self.stack.residual else 1.0

    @property
    def unit_parameters(self) -> int:
        """Parameters of one unit."""
        count = self.unit_width * len(self.weight)
        for path in self.input_projections:
            width, _ = self.plan["rows"].get(path, (0, 0))
            projection = self.layer.get_submodule(path)
            count += width * (oriented(projection).shape[1] + (projection.bias is not None))
        return count

    def unit_flops(self, lengths: Mapping[str, float]) -> float:
        """FLOPs of one unit for one sequence, a multiply-add counted as 2 (METHOD: F_head, F_neuron).

        F_head = 8 s d d_h + 4 s^2 d_h,  F_neuron = 4 s d  for plain attention and FFN; here from the shapes, so that
        gated FFNs, grouped queries and cross-attention, whose keys and values are those of the other stack's tokens,
        come out right.

        Args:
            lengths: Tokens of a sequence, for each stack.
        """
        tokens, read = lengths[self.stack_name], lengths[self.reads]
        entries = tokens * self.unit_width * self.weight.shape[0]
        for path, layout in self.block.inputs.items():
            width, _ = self.plan["rows"].get(path, (0, 0))
            if self.num_units and has(self.layer, path):
                length = read if layout == "kv" else tokens
                entries += length * width * oriented(self.layer.get_submodule(path)).shape[1]
        return 2 * entries + self.unit_products(lengths)

    def unit_products(self, lengths: Mapping[str, float]) -> float:
        """FLOPs of one unit between tokens, where no weight takes part: of queries with keys, and of those with values."""
        return (
            0 if self.kind == "ffn" else 4 * lengths[self.stack_name] * lengths[self.reads] * self.unit_width
        )


def oriented(projection: nn.Module) -> Tensor:
    """Weight of a linear module, (rows, columns); a `Conv1D` holds it the other way round."""
    weight = cast(Tensor, projection.weight)
    return weight if kind_of(projection) == "linear" else weight.T


def set_projection(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear module another weight (rows, columns), of any size, and bias."""
    turned = kind_of(projection) != "linear"
    for name, value in (("weight", weight.T if turned else weight), ("bias", bias)):
        if value is not None:
            old = cast(Tensor, getattr(projection, name))
            setattr(projection, name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
    for attribute, size in zip(SIZES[kind_of(projection)], weight.shape, strict=True):
        if hasattr(projection, attribute):
            setattr(projection, attribute, size)


def row_indices(layout: str, num_units: int, unit: Unit) -> Tensor:
    """Rows of a projection that belong to each unit, (num_units, rows per unit). See `Block.inputs` for the layouts.

    The columns of an output projection are laid out as `"q"`.
    """
    units, d = torch.arange(num_units).unsqueeze(1), unit.head_dim
    if unit.strided:
        groups = torch.arange(unit.q // d).view(1, -1, 1)
        if layout not in ("q", "qkv", "qkv:perhead"):
            return torch.zeros(num_units, 0, dtype=torch.long)
        group_size = num_units * d + (2 * d if layout == "qkv:perhead" else 0)
        return (groups * group_size + units.unsqueeze(2) * d + torch.arange(d)).flatten(1)
    q, kv = unit.q, unit.kv
    parts = {"q": [q], "kv": [kv], "qkv": [q, kv, kv], "qkv:perhead": [q + 2 * kv], "f": [1], "2f": [1, 1]}[
        layout
    ]
    starts = [num_units * sum(parts[:p]) for p in range(len(parts))]
    return torch.cat([s + units * w + torch.arange(w) for s, w in zip(starts, parts, strict=True)], dim=1)


def head_unit(config: Any, stack: Stack, block: Block, by: str) -> Unit:
    """What a unit of an attention is, from the dense model's config, which stays as it is after pruning.

    Args:
        config: Of the model that owns the stack.
        stack: Names the attributes.
        block: Of the stack.
        by: `"group"`, a key-value head with its query heads, or `"query"`, one query head of every group. With a single
            key-value head for all (multi-query attention), and equal ones, a query head.
    """
    heads = read(config, stack.heads)
    d = read(config, stack.head_dim) or (read(config, "hidden_size") or 0) // (heads or 1)
    if not heads or not d:
        raise UnsupportedArchitectureError(
            f"{type(config).__name__} has {stack.heads} of {heads} and a head size ({stack.head_dim}) of {d}, by which its "
            "family tells heads; expected both over 0. Describe this variant: docs/add_a_family.md"
        )
    kv_heads = ask(config, stack.kv_heads) or heads
    if block.whole and getattr(config, block.whole, True):
        return Unit(heads * d, kv_heads * d, d)
    if kv_heads < heads and (by == "query" or kv_heads == 1):
        return Unit(kv_heads * d, 0, d, strided=True)
    return Unit(heads // kv_heads * d, d, d)


def ask(config: Any, name: str) -> Any:
    """The value of a config attribute, None if there is none; of `"flag ? this : that"`, that of the one the flag chooses."""
    flag, _, names = name.partition(" ? ")
    return read(config, names.split(" : ")[not read(config, flag)] if names else name)


def read(config: Any, name: str) -> Any:
    """The value of a config attribute, None if there is none.

    Raises `UnsupportedArchitectureError` if the config tells none for all layers at once.
    """
    try:
        return getattr(config, name, None)
    except Exception as error:  # such attributes raise what they like
        raise UnsupportedArchitectureError(
            f"the layers differ in {name}, for which {type(config).__name__} has no one value"
        ) from error


def text_config(config: Any) -> Any:
    """The part of a config that is about texts; all of it if it has several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def family_of(model: PreTrainedModel) -> tuple[Stack, ...] | None:
    """What describes the layers of `model` itself: what was detected in it (detect.py), or the entry of its model type."""
    return model.__dict__.get("kprune_family") or FAMILIES.get(model.config.model_type)


def described(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The models whose layers a family describes, with their paths: `model` itself, or else those inside it."""
    if family_of(model):
        return [("", model)]
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer) for outer, _ in found)
        if isinstance(module, PreTrainedModel) and family_of(module) and not inside:
            found.append((name + ".", module))
    return found


def find_sublayers(model: PreTrainedModel, by: str | None = None) -> list[Sublayer]:
    """The sublayers of `model`, bottom to top, as its family in `families.py` describes them.

    Args:
        model: Any.
        by: With grouped queries, what a unit is, see `head_unit`. None: as the model was pruned before, or `"group"`.

    Raises `UnsupportedArchitectureError` if there is no family for its `model_type`, or if the family does not describe
    every projection of every layer.
    """
    owners = described(model)
    if not owners:
        reason = REFUSED.get(model.config.model_type)
        raise UnsupportedArchitectureError(
            f"{model.config.model_type!r} ({type(model).__name__}) cannot be pruned: {reason}"
            if reason
            else f"no family describes model_type {model.config.model_type!r} ({type(model).__name__}); known: "
            f"{', '.join(sorted(FAMILIES))}. Describe one of its layers in ten lines with hf_kprune.register_family: "
            "docs/add_a_family.md"
        )
    found = {path: _sublayers_of(path, owner, by) for path, owner in owners}
    _check_nothing_left_out(model, [s for sublayers in found.values() for s in sublayers])
    left_alone = model.__dict__.get(LEFT_ALONE, ())
    return [s for path, sublayers in found.items() for s in sublayers if path not in left_alone]


def _sublayers_of(path: str, owner: PreTrainedModel, by: str | None) -> list[Sublayer]:
    stacks = family_of(owner) or ()
    for flag, why in ((flag, why) for stack in stacks for flag, why in stack.refuses.items()):
        if read(owner.config, flag):
            raise UnsupportedArchitectureError(
                f"{type(owner).__name__} with {flag}=True cannot be pruned: {why}"
            )
    old = {stack["layers"]: stack for stack in (plan_of(owner.config) or {"stacks": []})["stacks"]}
    found: list[Sublayer] = []
    lists = [(stack, find_layers(owner, stack.layers)) for stack in stacks]
    if not any(layers for _, layers in lists):
        raise UnsupportedArchitectureError(
            f"{type(owner).__name__} has no list of layers at {' or '.join(repr(s.layers) for s in stacks)}, where its family "
            f"{owner.config.model_type!r} says; describe this variant with hf_kprune.register_family: docs/add_a_family.md"
        )
    for stack, layers in lists:
        if layers is None:  # an encoder without its decoder
            continue
        for layer in layers:
            _check_described(owner, layer, stack)
        before = {path: b for b in old.get(stack.layers, {"blocks": []})["blocks"] for path in b["columns"]}
        units, plans = [], []
        for block in stack.blocks:
            then = before.get(block.output)
            unit_is = by or (then or {}).get("by", "group")
            units.append(NEURON if block.kind == "ffn" else head_unit(owner.config, stack, block, unit_is))
            plans.append(_plan_of(layers, block, units[-1], then, unit_is))
        for index in range(len(layers)):
            for block, plan, unit in zip(stack.blocks, plans, units, strict=True):
                alone = (
                    block.kind == "cross_attention" and find_layers(owner, stack.reads) is None
                )  # it reads nothing
                if alone and path:
                    raise UnsupportedArchitectureError(
                        f"the {type(owner).__name__} inside this model has cross-attention to another model's output, which "
                        "no family describes: docs/add_a_family.md"
                    )
                if plan["kept"][index] is not None and not alone:
                    alike = sum(
                        s.layers is layers and s.index == index and s.kind == block.kind for s in found
                    )
                    name = f"{path}{stack.layers}.{index}.{block.kind}" + (f"_{alike + 1}" if alike else "")
                    found.append(Sublayer(name, owner, layers, stack, block, plan, index, unit))
    return found


def _plan_of(
    layers: nn.ModuleList, block: Block, unit: Unit, before: dict[str, Any] | None, by: str
) -> dict[str, Any]:
    """The entry of `config.kprune` for a block, with the sizes that the layers have now."""
    if before is not None and block.kind != "ffn" and unit.q > unit.head_dim and before["by"] != by:
        raise UnsupportedArchitectureError(
            f"head_unit is {by!r}, but this model was pruned by {before['by']!r} before; keep to that"
        )
    kept = [
        oriented(layer.get_submodule(block.output)).shape[1] // unit.q if has(layer, block.output) else None
        for layer in layers
    ]
    odd = {oriented(la.get_submodule(block.output)).shape[1] for la in layers if has(la, block.output)}
    if odd := {columns for columns in odd if columns % unit.q}:
        raise UnsupportedArchitectureError(
            f"{block.output} reads {min(odd)} features, which heads of {unit.q} do not make up; the config tells another size "
            "of heads than the layers have"
        )
    rows, heads = {}, unit.q // unit.head_dim
    for path, layout in block.inputs.items():
        width = row_indices(layout, 1, unit).shape[1]
        sizes = {
            oriented(layer.get_submodule(path)).shape[0] - units * width
            for layer, units in zip(layers, kept, strict=True)
            if units is not None and has(layer, path)
        }
        if width and sizes:
            if len(sizes) > 1:
                raise UnsupportedArchitectureError(
                    f"the layers differ in the size of {path} beyond what their heads or neurons account for, "
                    "which no description covers: docs/add_a_family.md"
                )
            (fixed,) = sizes
            rows[path] = [width, fixed]
    slices = {
        path: [int(dim), value.shape[int(dim)] // units]
        for path, dim in block.slices.items()
        for layer, units in zip(layers, kept, strict=True)
        if units and (value := get_size(layer, path)) is not None
    }
    factors = {
        "heads": heads,
        "kv_heads": unit.kv // unit.head_dim,
        "width": unit.q,
        "groups": int(unit.strided),
    }
    plan = {
        "kind": block.kind,
        "by": by,
        "of": max((units for units in kept if units is not None), default=0),
        "kept": kept,
        "rows": rows,
        "columns": {block.output: unit.q},
        "heads": heads,
        "sizes": {path: factors[size] for path, size in block.sizes.items() if factors[size]},
        "core": block.core,
        "returns": list(block.returns) if isinstance(block.returns, tuple) else block.returns,
        "table": {block.table: heads} if block.table else {},
        "slices": slices,
        "select": {
            a: [where, [list(range((k or 0) * heads)) for k in kept]] for a, where in block.select.items()
        },
    }
    if not block.weights:
        plan["weights"] = False
    if before is not None:
        plan |= {key: before[key] for key in ("of", "select", "rows", "slices")}
    return plan


def _check_described(model: PreTrainedModel, layer: nn.Module, stack: Stack) -> None:
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
    if projections - listed or (missing and not any(has(layer, block.output) for block in stack.blocks)):
        raise UnsupportedArchitectureError(
            f"a layer of {type(model).__name__} has the projections {sorted(projections)}; its family "
            f"{model.config.model_type!r} describes {sorted(listed)}. Describe this variant with "
            "hf_kprune.register_family: docs/add_a_family.md"
        )


def _check_nothing_left_out(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> None:
    """A budget is meant for the whole model: refuse if there are layers that no stack names."""
    inside = {id(module) for layers in {s.layers for s in sublayers} for module in layers.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside and len(module) > 0:
            if any(isinstance(m, (nn.Linear, Conv1D)) for m in module.modules()) and not isinstance(
                module[0], nn.Linear
            ):
                raise UnsupportedArchitectureError(
                    f"{type(model).__name__} has layers at {name!r} that its family {model.config.model_type!r} does not "
                    "describe; describe all of them with hf_kprune.register_family: docs/add_a_family.md"
                )


@torch.no_grad()
def cut(sublayer: Sublayer, keep: Tensor) -> None:
    """Keep only the units in `keep`, boolean (U,), of a sublayer, in place."""
    layer, plan, num_units, unit = sublayer.layer, sublayer.plan, sublayer.num_units, sublayer.unit
    kept = keep.nonzero().flatten().cpu()
    if len(kept) == num_units:
        return
    for path, layout in sublayer.block.inputs.items():
        if path in plan["rows"] and has(layer, path):
            projection = layer.get_submodule(path)
            weight, bias = oriented(projection), cast("Tensor | None", projection.bias)
            gone = set(range(num_units)) - set(kept.tolist())
            dropped = row_indices(layout, num_units, unit)[sorted(gone)].flatten()
            stays = torch.ones(len(weight), dtype=torch.bool).index_fill(0, dropped, False)
            rows = (
                stays.nonzero().flatten().to(weight.device)
            )  # numbers, as masks do not index what has no memory
            set_projection(projection, weight[rows], None if bias is None else bias[rows])
    for path, (dim, width) in plan["slices"].items():
        part = Unit(width, 0, width * unit.head_dim // unit.q, unit.strided)
        set_slices(layer, path, dim, row_indices("q", num_units, part)[kept].flatten().sort().values)
    columns = row_indices("q", num_units, unit)[kept].flatten().sort().values
    set_projection(sublayer.output, sublayer.weight[:, columns.to(sublayer.weight.device)], None)
    heads = columns[:: unit.head_dim] // unit.head_dim
    own_tables(sublayer.layers, plan)
    for path in plan["table"]:
        table = cast(nn.Embedding, layer.get_submodule(path))
        table.weight = nn.Parameter(
            table.weight[:, heads.to(table.weight.device)], table.weight.requires_grad
        )
        table.embedding_dim = len(heads)
    plan["kept"][sublayer.index] = len(kept)
    for _, indices in plan["select"].values():
        indices[sublayer.index] = [indices[sublayer.index][i] for i in heads.tolist()]
    shrink_layer(layer, plan, sublayer.index)


def in_unit_order(sublayer: Sublayer) -> Tensor:
    """The output weight, (D, C), with the columns of each unit side by side."""
    weight = sublayer.weight
    return weight[:, sublayer.columns.flatten().to(weight.device)] if sublayer.unit.strided else weight


@torch.no_grad()
def set_output(sublayer: Sublayer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give the output projection a weight (D, C), columns unit by unit, and a bias (D,); None: the one it has."""
    old = sublayer.weight
    back = sublayer.columns.flatten().argsort().to(old.device)
    given = None if bias is None or sublayer.bias is None else bias.to(old)
    set_projection(sublayer.output, weight.to(old)[:, back], given)


def has_bias(sublayer: Sublayer, paths: Sequence[str]) -> bool:
    """Whether the first of these projections has a bias."""
    return sublayer.layer.get_submodule(paths[0]).bias is not None


@torch.no_grad()
def correct_inputs(sublayer: Sublayer, paths: Sequence[str], matrix: Tensor, shift: Tensor) -> None:
    """Let these input projections read  M x + c  for x: M (D, D), c (D,), which is zero for those without a bias."""
    for path in paths:
        projection = sublayer.layer.get_submodule(path)
        weight, bias = oriented(projection), cast("Tensor | None", projection.bias)
        exact = weight.to(matrix.dtype)
        moved = None if bias is None else (bias + exact @ shift).to(bias.dtype)
        set_projection(projection, (exact @ matrix).to(weight.dtype), moved)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the tensors of `model`; cutting it replaces them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def frozen(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """A copy of `model` that takes no gradients and shares its memory, or, on the device `meta`, has shapes alone."""
    tensors = {id(t): t.detach().to(device or t.device) for t in (*model.parameters(), *model.buffers())}
    parameters = {id(p): nn.Parameter(tensors[id(p)], requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**tensors, **parameters})


def with_own_tables(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or, if its layers share a table of positions, a twin of the same weights in which each has its own (T5).

    Then every layer can run by itself.
    """
    if not any(s.plan["table"] for s in find_sublayers(model)):
        return model
    made = twin(model)
    for sublayer in find_sublayers(made):
        own_tables(sublayer.layers, sublayer.plan)
        shrink_layer(sublayer.layer, sublayer.plan, sublayer.index)
    return made


def write_plan(model: PreTrainedModel, sublayers: list[Sublayer]) -> None:
    """Write the sizes of `sublayers`, all those of `model`, into its config; none if nothing is pruned."""
    for owner in {id(s.owner): s.owner for s in sublayers}.values():
        stacks: dict[int, dict[str, Any]] = {}
        for sublayer in sublayers:
            if sublayer.owner is owner:
                entry = stacks.setdefault(
                    id(sublayer.layers), {"layers": sublayer.stack.layers, "blocks": []}
                )
                if sublayer.plan not in entry["blocks"]:
                    entry["blocks"].append(sublayer.plan)
                sublayer.layers.__dict__["kprune_stack"] = entry
        blocks = [plan for entry in stacks.values() for plan in entry["blocks"]]
        if all(units in (None, plan["of"]) for plan in blocks for units in plan["kept"]):
            if plan_of(owner.config) is not None:
                del owner.config.kprune
            continue
        history = (plan_of(owner.config) or {}).get("history")
        owner.config.kprune = {
            **({"history": history} if history else {}),
            "format": FORMAT,
            "created_by": f"hf_kprune {__version__}",
            "how_to_load": HOW_TO_LOAD,
            "sha256": digest(list(stacks.values())),
            "stacks": list(stacks.values()),
        }


def uniform_names(sublayers: Sequence[Sublayer], heads: bool, ffn: bool) -> list[tuple[int, str]]:
    """For each sublayer, whose config and which attribute of it tell its size: those that share it must be alike.

    Raises `UnsupportedArchitectureError` if the config cannot tell what is to be pruned (`heads`, `ffn`).
    """
    names = []
    for s in sublayers:
        if plan_of(s.owner.config) is not None:
            raise UnsupportedArchitectureError(
                f"uniform is True, but {type(s.owner).__name__} was pruned unevenly before; start from the dense model"
            )
        key, wanted, other = ("ffn", ffn, "prune_ffn") if s.kind == "ffn" else ("heads", heads, "prune_heads")
        if wanted and (key not in s.stack.uniform or s.kind == "cross_attention"):
            what = (
                "another FFN width"
                if key == "ffn"
                else "fewer heads of the same size, which it derives from their number"
            )
            raise UnsupportedArchitectureError(
                f"uniform is True, but {type(s.owner.config).__name__} cannot say {what}, so stock transformers could not "
                f"load the result; pass {other}=False to prune the rest, or uniform=False"
            )
        names.append((id(s.owner), s.stack.uniform.get(key, s.stack_name + s.kind)))
    return names


def uniform_choices(sublayer: Sublayer) -> list[int] | None:
    """Numbers of heads that the stock config accepts (many want a divisor of the hidden size); None for an FFN."""
    if sublayer.kind == "ffn":
        return None
    accepted = []
    for units in range(1, sublayer.num_units + 1):
        config = copy.deepcopy(sublayer.owner.config)
        _set_stock_size(config, sublayer, units)
        try:
            type(config).from_dict(config.to_dict())
        except (ValueError, StrictDataclassError):
            continue
        accepted.append(units)
    return accepted


def _set_stock_size(config: Any, sublayer: Sublayer, units: int) -> None:
    names, unit = sublayer.stack.uniform, sublayer.unit
    if sublayer.kind == "ffn" and "ffn" in names:
        setattr(config, names["ffn"], units)
    elif sublayer.kind == "attention" and "heads" in names:
        setattr(config, sublayer.stack.head_dim, unit.head_dim)
        setattr(config, names["heads"], units * unit.q // unit.head_dim)
        if "kv_heads" in names and not unit.strided:
            setattr(config, names["kv_heads"], units * unit.kv // unit.head_dim)


def write_stock_config(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> None:
    """Write the sizes of `sublayers`, alike in all layers, where the stock config has them; nothing else is needed then."""
    for s in sublayers:
        _set_stock_size(s.owner.config, s, s.num_units)
        for module in s.layer.modules():
            view = module.__dict__.get("config")
            if hasattr(view, "kprune_config"):
                module.__dict__["config"] = s.owner.config
