"""Change a live model: cut units, replace weights, copy without copying tensors, write the sizes into the
config.

Shapes: U units of a sublayer, C columns of its output projection, D the width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling_kprune import (
    FORMAT,
    HOW_TO_LOAD,
    SIZES,
    Plan,
    StackPlan,
    digest,
    give_tables,
    has,
    kind_of,
    plan_of,
    set_parameter,
    set_slices,
    shrink_layer,
)
from ..version import __version__
from . import experts
from .offload import duplicate, plain_memo
from .projections import oriented
from .sublayers import Sublayer, find_sublayers
from .workbench import clear_workbench, leave_workbench, off_workbench


# ------------------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------------------


def set_projection(projection: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear module another weight (rows, columns), of any size, and a bias; None keeps the old. Of
    experts, the weight keeps its size."""
    if experts.are_experts(projection):
        experts.set_weight(projection, weight)
        return
    transposed = kind_of(projection) != "linear"
    for name, value in (("weight", weight.T if transposed else weight), ("bias", bias)):
        if value is not None:
            old = cast(Tensor, getattr(projection, name))
            set_parameter(projection, name, value.contiguous(), old.requires_grad)
    for attribute, size in zip(SIZES[kind_of(projection)], weight.shape, strict=True):
        if hasattr(projection, attribute):
            setattr(projection, attribute, size)


@torch.no_grad()
def cut(sublayer: Sublayer, keep: Tensor) -> None:
    """Keep only the units in `keep`, boolean (U,), of a sublayer, in place."""
    layer, plan, unit, num_units = sublayer.layer, sublayer.plan, sublayer.unit, sublayer.num_units
    kept = keep.nonzero().flatten().cpu()
    if len(kept) == num_units:
        return
    if unit.in_experts:
        cut_experts(sublayer, keep)
        return
    columns = sublayer.columns[kept].flatten().sort().values
    for path, layout in sublayer.block.inputs.items():
        if path in plan["rows"] and has(layer, path):
            _keep_rows(layer.get_submodule(path), unit.rows(layout, num_units), kept)
    for path, (dim, width) in plan["slices"].items():
        set_slices(layer, path, dim, unit.columns(num_units, width)[kept].flatten().sort().values)
    if not sublayer.is_mixture:  # whose columns are among its slices
        set_projection(sublayer.output, sublayer.weight[:, columns.to(sublayer.weight.device)], None)
    heads = columns[:: unit.head_dim] // unit.head_dim
    give_tables(sublayer.layers, plan)
    for path in plan["table"]:
        table = cast(nn.Embedding, layer.get_submodule(path))
        weight = table.weight[:, heads.to(table.weight.device)]
        set_parameter(table, "weight", weight, table.weight.requires_grad)
        table.embedding_dim = len(heads)
    plan["kept"][sublayer.index] = len(kept)
    for _, indices in plan["select"].values():
        indices[sublayer.index] = [indices[sublayer.index][i] for i in heads.tolist()]
    shrink_layer(layer, plan, sublayer.index)


def cut_experts(sublayer: Sublayer, keep: Tensor) -> None:
    """Keep only the neurons in `keep`, boolean (U,), of the experts of a layer, in place: in each expert as
    many."""
    each = keep.cpu().view(sublayer.parts, -1)
    (count,) = set(each.sum(1).tolist())
    experts.keep_neurons(sublayer.output, each.nonzero()[:, 1].view(len(each), count))
    sublayer.plan["kept"][sublayer.index] = count
    shrink_layer(sublayer.layer, sublayer.plan, sublayer.index)


def _keep_rows(projection: nn.Module, rows: Tensor, kept: Tensor) -> None:
    """Drop the rows of a projection that belong to units which are not kept.

    Args:
        projection: Any linear module.
        rows: Its rows that belong to each unit, (U, rows of a unit).
        kept: Numbers of the units that are kept.
    """
    weight, bias = oriented(projection), cast("Tensor | None", projection.bias)
    gone = torch.ones(len(rows), dtype=torch.bool).index_fill(0, kept, False)
    stays = torch.ones(len(weight), dtype=torch.bool).index_fill(0, rows[gone].flatten(), False)
    places = stays.nonzero().flatten().to(weight.device)  # numbers: a mask cannot index what has no memory
    set_projection(projection, weight[places], None if bias is None else bias[places])


def in_unit_order(sublayer: Sublayer) -> Tensor:
    """The output weight, (D, C), with the columns of each unit side by side."""
    return sublayer.weight[:, sublayer.order] if sublayer.unit.strided else sublayer.weight


@torch.no_grad()
def set_output(sublayer: Sublayer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give the output projection a weight (D, C), unit by unit, and a bias (D,); None keeps the old one."""
    old = sublayer.weight
    new_bias = None if bias is None or sublayer.bias is None else bias.to(old)
    if sublayer.unit.strided:
        weight = weight[:, sublayer.columns.flatten().argsort().to(weight.device)]
    set_projection(sublayer.output, weight.to(old), new_bias)


def has_bias(sublayer: Sublayer, paths: Sequence[str]) -> bool:
    """Whether the first of these projections has a bias."""
    return sublayer.layer.get_submodule(paths[0]).bias is not None


@torch.no_grad()
def correct_inputs(sublayer: Sublayer, paths: Sequence[str], matrix: Tensor, shift: Tensor) -> None:
    """Let these input projections read  M x + c  for x: M (D, D), c (D,), zero for those without a bias."""
    for path in paths:
        projection = sublayer.layer.get_submodule(path)
        weight, bias = oriented(projection), cast("Tensor | None", projection.bias)
        exact = weight.to(matrix.dtype)
        new_bias = None if bias is None else (bias + exact @ shift).to(bias.dtype)
        set_projection(projection, (exact @ matrix).to(weight.dtype), new_bias)


def weights_of(sublayer: Sublayer) -> dict[str, Tensor]:
    """Weights and biases of its projections by path, as their modules hold them: all that tuning changes."""
    return {
        f"{path}.{name}": weight
        for path in dict.fromkeys((sublayer.block.output, *sublayer.input_projections))
        for name, weight in sublayer.layer.get_submodule(path).named_parameters(recurse=False)
    }


def set_weights(sublayer: Sublayer, weights: Mapping[str, Tensor]) -> None:
    """Give the projections of a sublayer, cut already, the weights that `weights_of` gave."""
    for path, weight in weights.items():
        projection, _, name = path.rpartition(".")
        module = sublayer.layer.get_submodule(projection)
        old = cast(Tensor, getattr(module, name))
        set_parameter(module, name, weight.to(old), old.requires_grad)


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the tensors of `model`; cutting it replaces them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return duplicate(model, {**plain_memo(model), **shared})


def frozen(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """A copy of `model` without gradients that shares its memory or, on the device meta, has no values."""
    clear_workbench(model)
    tensors = {id(t): t.detach().to(device or t.device) for t in (*model.parameters(), *model.buffers())}
    parameters = {id(p): nn.Parameter(tensors[id(p)], requires_grad=False) for p in model.parameters()}
    copied = duplicate(model, {**tensors, **parameters})
    if device is not None:
        leave_workbench(copied)
    return copied


def restore(student: PreTrainedModel, model: PreTrainedModel, modes: dict[str, bool]) -> None:
    """Give the modules of a student the modes of the model's, and its tensors their dtypes and flags.

    Args:
        student: A pruned copy, changed in place.
        model: The one that it is a copy of.
        modes: Whether each module of the model was in training mode, by name.
    """
    clear_workbench(student)
    for name, module in student.named_modules():
        module.training = modes.get(name, modes[""])
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        original = originals.get(name)  # a table of positions of its own has none
        tensor.data = tensor.data.to(model.dtype if original is None else original.dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(original is None or original.requires_grad)
    off_workbench(student, model)


def empty(layer: nn.Module) -> None:
    """Let go of the weights of a layer, in place; tensors that other models share stay theirs."""
    for module in layer.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.new_empty(0), requires_grad=False))


def with_table_per_layer(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or, if its layers share a table of positions, a twin of the same weights in which each has its
    own (T5).

    Then every layer can run by itself.
    """
    if not any(s.plan["table"] for s in find_sublayers(model)):
        return model
    copied = twin(model)
    for sublayer in find_sublayers(copied):
        give_tables(sublayer.layers, sublayer.plan)
        shrink_layer(sublayer.layer, sublayer.plan, sublayer.index)
    return copied


def cut_twin(
    model: PreTrainedModel,
    masks: Sequence[Tensor],
    head_unit: str = "group",
    expert_unit: str | None = None,
) -> PreTrainedModel:
    """A twin in evaluation mode that keeps the units in `masks`, boolean (U,), one for each sublayer."""
    student = twin(model).eval()
    sublayers = find_sublayers(student, head_unit, expert_unit)
    for sublayer, mask in zip(sublayers, masks, strict=True):
        cut(sublayer, mask)
    write_plan(sublayers)
    return student


def write_plan(sublayers: Sequence[Sublayer]) -> None:
    """Write the sizes of all sublayers of a model into its config; none if nothing is pruned."""
    for owner in {id(s.owner): s.owner for s in sublayers}.values():
        stacks: dict[int, StackPlan] = {}
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
        before = plan_of(owner.config)
        plan: Plan = {
            "format": FORMAT,
            "created_by": f"hf_kprune {__version__}",
            "how_to_load": HOW_TO_LOAD,
            "sha256": digest(list(stacks.values())),
            "stacks": list(stacks.values()),
        }
        if before is not None and before.get("history"):
            plan["history"] = before["history"]
        owner.config.kprune = plan
