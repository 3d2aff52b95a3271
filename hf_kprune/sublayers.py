"""The live sublayers of a model: find them, count their cost, cut them, write their sizes into the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedArchitectureError, UnsupportedModelError
from .families import FAMILIES, Block, Stack
from .modeling_kprune import FORMAT, HOW_TO_LOAD, digest, find_layers, shrink_layer
from .version import __version__


@dataclass(frozen=True)
class Sublayer:
    """One attention or FFN sublayer of a live model.

    `plan` is this block's entry in `config.kprune` (shared by the layers of the stack) and `index` the layer's place in it.
    A unit is `head_dim * group` columns of the output projection wide: a head and its group of query heads, or a neuron
    (1 * 1).
    """

    name: str
    layers: nn.ModuleList
    stack: Stack
    block: Block
    plan: dict[str, Any]
    index: int
    head_dim: int
    group: int

    @property
    def layer(self) -> nn.Module:
        return self.layers[self.index]

    @property
    def kind(self) -> str:
        return self.block.kind

    @property
    def is_last_of_layer(self) -> bool:
        return self.block is self.stack.blocks[-1]

    @property
    def unit_width(self) -> int:
        return self.head_dim * self.group

    @property
    def output(self) -> nn.Linear:
        """The output projection, whose input columns are the units' features: weight (D, U * unit_width)."""
        return cast(nn.Linear, self.layer.get_submodule(self.block.output))

    @property
    def num_units(self) -> int:
        return self.output.in_features // self.unit_width

    def unit_flops(self, tokens: float) -> float:
        """FLOPs of one unit for one sequence of `tokens` tokens, a multiply-add counted as 2 (METHOD: F_head, F_neuron).

        F_head = 8 s d d_h + 4 s^2 d_h,  F_neuron = 4 s d  for plain attention and FFN; here from the shapes, so that
        gated FFNs and grouped queries come out right.
        """
        entries = self.unit_width * self.output.out_features
        for path, width in self.plan["rows"].items():
            if self.num_units:
                entries += width * cast(nn.Linear, self.layer.get_submodule(path)).in_features
        mixing = 4 * tokens**2 * self.unit_width if self.kind == "attention" else 0
        return 2 * tokens * entries + mixing


def row_indices(layout: str, num_units: int, head_dim: int, group: int) -> Tensor:
    """Rows of a projection that belong to each unit, (num_units, rows per unit). See `Block.inputs` for the layouts.

    `head_dim` and `group` are 1 for FFN neurons. The columns of an output projection are laid out as `"q"`.
    """
    q, kv = head_dim * group, head_dim
    parts = {"q": [q], "kv": [kv], "qkv": [q, kv, kv], "qkv:perhead": [q + 2 * kv], "f": [1], "2f": [1, 1]}[layout]
    starts = [num_units * sum(parts[:p]) for p in range(len(parts))]
    units = torch.arange(num_units).unsqueeze(1)
    return torch.cat([s + units * w + torch.arange(w) for s, w in zip(starts, parts, strict=True)], dim=1)


def head_geometry(config: Any) -> tuple[int, int]:
    """(head size, query heads per key-value head) of the dense model, which its config keeps after pruning."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim, heads // (getattr(config, "num_key_value_heads", None) or heads)


def find_sublayers(model: PreTrainedModel) -> list[Sublayer]:
    """The sublayers of `model`, bottom to top, as its family in `families.py` describes them.

    Raises `UnsupportedArchitectureError` if there is no family for its `model_type`, or if the family does not describe
    every projection of every layer.
    """
    stacks = FAMILIES.get(model.config.model_type)
    if stacks is None:
        raise UnsupportedArchitectureError(
            f"no family describes model_type {model.config.model_type!r} ({type(model).__name__}); known: "
            f"{', '.join(sorted(FAMILIES))}. Describe one of its layers in ten lines with hf_kprune.register_family: "
            "docs/add_a_family.md"
        )
    head_dim, group = head_geometry(model.config)
    old = {stack["layers"]: stack for stack in (getattr(model.config, "kprune", None) or {"stacks": []})["stacks"]}
    found = []
    for stack in stacks:
        layers = find_layers(model, stack.layers)
        if layers is None:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} has no list of layers at {stack.layers!r}, where its family "
                f"{model.config.model_type!r} says; describe this variant with hf_kprune.register_family: docs/add_a_family.md"
            )
        for layer in layers:
            _check_described(model, layer, stack)
        plans = []
        for number, block in enumerate(stack.blocks):
            d, g = (head_dim, group) if block.kind == "attention" else (1, 1)
            width = d * g
            kept = [cast(nn.Linear, layer.get_submodule(block.output)).in_features // width for layer in layers]
            before = old[stack.layers]["blocks"][number] if stack.layers in old else None
            plans.append(
                {
                    "kind": block.kind,
                    "of": before["of"] if before else max(kept),
                    "kept": kept,
                    "rows": {path: row_indices(layout, 1, d, g).shape[1] for path, layout in block.inputs.items()},
                    "columns": {block.output: width},
                    "sizes": {p: {"heads": g, "kv_heads": 1, "width": width}[s] for p, s in block.sizes.items()},
                    "core": block.core,
                    "returns": list(block.returns),
                    "select": before["select"] if before else {a: [list(range(k)) for k in kept] for a in block.select},
                }
            )
        for index in range(len(layers)):
            for block, plan in zip(stack.blocks, plans, strict=True):
                found.append(
                    Sublayer(
                        name=f"{stack.layers}.{index}.{block.kind}",
                        layers=layers,
                        stack=stack,
                        block=block,
                        plan=plan,
                        index=index,
                        head_dim=head_dim if block.kind == "attention" else 1,
                        group=group if block.kind == "attention" else 1,
                    )
                )
    return found


def _check_described(model: PreTrainedModel, layer: nn.Module, stack: Stack) -> None:
    projections = {name for name, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    listed = {path for block in stack.blocks for path in (*block.inputs, block.output)}
    gone = {
        path
        for block in stack.blocks
        if block.core and getattr(layer.get_submodule(block.core), "is_kprune_stand_in", False)
        for path in block.inputs
    }
    if projections != listed - gone:
        raise UnsupportedArchitectureError(
            f"a layer of {type(model).__name__} has the projections {sorted(projections)}; its family "
            f"{model.config.model_type!r} describes {sorted(listed - gone)}. Describe this variant with "
            "hf_kprune.register_family: docs/add_a_family.md"
        )


def check_model(model: PreTrainedModel) -> None:
    """Refuse, with the way out, a model that must not be cut as it is."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters, which would not fit the pruned layers; merge them first: "
            "model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, expected a transformers PreTrainedModel or the name or path of one"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised; prune it in float32, float16 or bfloat16 first and quantise the result"
        )
    if model.config.model_type in FAMILIES and getattr(model.config, "chunk_size_feed_forward", None):
        raise UnsupportedModelError(
            f"config.chunk_size_feed_forward is {model.config.chunk_size_feed_forward}: feed-forward layers that run in "
            "chunks cannot be measured; load the model with chunk_size_feed_forward=0 and set it again afterwards"
        )
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in floats:
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}, in which least squares cannot be solved; load the model with "
                "dtype=torch.float32 (or float16, bfloat16)"
            )
        if parameter.device.type == "meta":
            raise UnsupportedModelError(f"{name} is not in memory (device meta); load the model without device_map")


@torch.no_grad()
def cut(sublayer: Sublayer, keep: Tensor) -> None:
    """Keep only the units in `keep`, boolean (U,), of a sublayer, in place."""
    layer, plan, output, num_units = sublayer.layer, sublayer.plan, sublayer.output, sublayer.num_units
    kept = keep.nonzero().flatten().cpu()
    if len(kept) == num_units:
        return
    for path, layout in sublayer.block.inputs.items():
        rows = row_indices(layout, num_units, sublayer.head_dim, sublayer.group)[kept]
        linear = cast(nn.Linear, layer.get_submodule(path))
        index = rows.flatten().sort().values.to(linear.weight.device)  # part after part, and unit after unit in each
        linear.weight = nn.Parameter(linear.weight[index], requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[index], requires_grad=linear.bias.requires_grad)
        linear.out_features = len(index)
    columns = row_indices("q", num_units, sublayer.head_dim, sublayer.group)[kept].flatten().to(output.weight.device)
    output.weight = nn.Parameter(output.weight[:, columns].contiguous(), requires_grad=output.weight.requires_grad)
    output.in_features = len(columns)
    plan["kept"][sublayer.index] = len(kept)
    for heads in plan["select"].values():
        heads[sublayer.index] = [heads[sublayer.index][i] for i in kept.tolist()]
    shrink_layer(layer, plan, sublayer.index)


def write_plan(model: PreTrainedModel, sublayers: list[Sublayer]) -> None:
    """Write the sizes of `sublayers`, all those of `model`, into `model.config.kprune`; none if nothing is pruned."""
    stacks: dict[int, dict[str, Any]] = {}
    for sublayer in sublayers:
        layers = sublayer.layers
        entry = stacks.setdefault(
            id(layers),
            {
                "layers": sublayer.stack.layers,
                "blocks": [],
            },
        )
        if sublayer.plan not in entry["blocks"]:
            entry["blocks"].append(sublayer.plan)
        layers.__dict__["kprune_stack"] = entry
    if all(units == plan["of"] for entry in stacks.values() for plan in entry["blocks"] for units in plan["kept"]):
        if getattr(model.config, "kprune", None) is not None:
            del model.config.kprune
        return
    model.config.kprune = {
        "format": FORMAT,
        "created_by": f"hf_kprune {__version__}",
        "how_to_load": HOW_TO_LOAD,
        "sha256": digest(list(stacks.values())),
        "stacks": list(stacks.values()),
    }
