"""Describe the layers of a model that families.py does not list.

watch.py sees what they do. Where that leaves a choice (how a fused projection is laid out, which attributes hold sizes,
whether heads can be told apart) each is tried, and proof.py decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import plan_of
from .configs import read
from .facts import evaluation_copy, example_inputs, masks_frames, to_model
from .families import FAMILIES, REFUSED, Block, Stack
from .proof import implementations, plans, prove, prove_cuts, quiet, step
from .sublayers import find_sublayers
from .units import UNITS
from .watch import PROJECTIONS, Seen, Watch


Families = Mapping[str, tuple[Stack, ...]]
"""What was detected: the stacks of a model by its path, `""` or that of a tower in it."""

WHOLE = "cutting one of its heads changes others"


def describe(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, head_unit: str = "group"
) -> None:
    """See to it that hf_kprune knows where the heads and neurons of `model` are.

    Nothing is done if its model type is listed. Else its layers are detected, the description is proved, and only then
    kept, on this model and its copies: others of the type have to be proved for themselves.

    Args:
        model: Dense; not changed.
        inputs: A small batch that runs all of it, with several tokens in each sample. Default: `example_inputs(model)`.
        head_unit: `KPruneArguments.head_unit`.

    Raises:
        UnsupportedArchitectureError: What cannot be told or failed, with a description to start from if there is one.
    """
    try:
        with step("", f"{type(model).__name__} is not built as its family says, as the error above shows"):
            find_sublayers(model, head_unit)
        return
    except UnsupportedArchitectureError:
        if model.config.model_type in {*FAMILIES, *REFUSED}:
            raise
    found: Families = {}
    try:
        with (
            quiet(),
            step(
                "detection",
                "its modules or its config are of a kind that is not known, as the error above shows",
            ),
        ):
            if any(plan_of(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)):
                raise UnsupportedArchitectureError(
                    "it was pruned before, and its checkpoint tells sizes alone"
                )
            inputs = example_inputs(model) if inputs is None else inputs
            found = detect(model, inputs, leave=FAMILIES)
        with step("", "its modules are of a kind that cannot be proved, as the error above shows"):
            prove(keep(evaluation_copy(model), found), inputs, head_unit)
    except UnsupportedArchitectureError as error:
        start = "".join(
            f"\n\n{as_code(_at(model, path).config.model_type, stacks)}" for path, stacks in found.items()
        )
        raise UnsupportedArchitectureError(
            f"no family describes model_type {model.config.model_type!r} ({type(model).__name__}), and it was not found out "
            f"what its layers do; {error}. Describe one of them in ten lines with hf_kprune.register_family: "
            f"docs/add_a_family.md{' has the steps; to start from:' if start else ''}{start}"
        ) from error
    keep(model, found)


def keep(model: PreTrainedModel, families: Families) -> PreTrainedModel:
    """Note on `model` what was detected in it, where `find_sublayers` looks; its copies have it too."""
    for path, stacks in families.items():
        _at(model, path).__dict__["kprune_family"] = stacks
    return model


def _at(model: PreTrainedModel, path: str) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_submodule(path))


# ---------------------------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Layers:
    """A list of layers: where, of which model, what they were seen to do, and how they are described so far."""

    name: str
    owner: str
    path: str
    config: Any
    watches: list[Watch]
    seen: tuple[Seen, ...] = ()
    stack: Stack = Stack("", ())


def detect(model: PreTrainedModel, inputs: Mapping[str, Any], leave: Collection[str] = ()) -> Families:
    """Describe the layers of `model`. Each sublayer is tried by itself; `prove` tries all of it.

    Args:
        model: Of any model type; not changed.
        inputs: A small batch that runs all of it.
        leave: Model types of towers that are not looked at.

    Raises `UnsupportedArchitectureError` if its layers are not made of attentions and FFNs whose weights are projections.
    """
    dense = evaluation_copy(model)
    inputs = to_model(inputs, dense)
    found = [_layers(dense, name, layers) for name, layers in _layer_lists(dense).items()]
    found = [layers for layers in found if layers.config.model_type not in leave]
    with ExitStack() as hooks, torch.enable_grad(), torch.random.fork_rng():
        for hook in (hook for layers in found for watch in layers.watches for hook in watch.hooks()):
            hooks.callback(hook.remove)
        with step(
            "watching it run", "it does not run while its layers are watched, as the error above shows"
        ):
            dense(**inputs)
    for layers in found:
        layers.seen = _merged(layers)
    for layers in found:
        layers.stack = _first_guess(dense, inputs, layers, found)
    for layers in found:
        _settle(dense, inputs, layers, found)
    return _families(found)


def _families(found: Sequence[_Layers]) -> Families:
    return {
        owner: tuple(layers.stack for layers in found if layers.owner == owner)
        for owner in (f.owner for f in found)
    }


def _layer_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of one class that hold projections. Nothing of their kind may lie elsewhere."""
    lists: dict[str, nn.ModuleList] = {}
    holding = {id(m) for m in model.modules() if any(isinstance(p, PROJECTIONS) for p in m.modules())}
    rest = {name: m for name, m in model.named_modules() if id(m) in holding}
    for name, module in rest.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not name.startswith(
            tuple(f"{outer}." for outer in lists)
        ):
            if all(isinstance(m, PROJECTIONS) for m in module if id(m) in holding):
                continue
            if isinstance(module, nn.Sequential) or len({type(m) for m in module}) > 1:
                raise UnsupportedArchitectureError(
                    f"{name} holds layers and is no nn.ModuleList of modules of one class"
                )
            lists[name] = module
    if not lists:
        raise UnsupportedArchitectureError("it has no nn.ModuleList of layers that hold nn.Linear")
    inside = {type(m) for layers in lists.values() for m in layers.modules() if id(m) in holding} - {
        *PROJECTIONS
    }
    inside = {kind for kind in inside if not kind.__module__.startswith("torch.")}
    for name, module in rest.items():
        apart = not any(
            f"{name}.".startswith(f"{path}.") or f".{path}".startswith(f".{name}") for path in lists
        )
        if apart and (type(module) in inside or "attention" in type(module).__name__.lower()):
            raise UnsupportedArchitectureError(
                f"{name} is like what its layers are made of, and lies outside of them"
            )
    return lists


def _layers(model: PreTrainedModel, name: str, layers: nn.ModuleList) -> _Layers:
    """With the model whose config describes them, and their path in it as `find_layers` looks for it."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
    models = {path: m for path in parents if isinstance(m := model.get_submodule(path), PreTrainedModel)}
    inner = list(models.values())[-1].config.model_type
    owner = next(path for path, m in models.items() if m.config.model_type == inner)
    path = name.removeprefix(f"{owner}.").removeprefix(f"{models[owner].base_model_prefix}.")
    watches = [Watch(f"{name}.{i}", layer) for i, layer in enumerate(layers)]
    return _Layers(name, owner, path, models[owner].config, watches)


def _merged(layers: _Layers) -> tuple[Seen, ...]:
    """The sublayers of all layers of a list, of which each may lack some."""
    merged: dict[str, Seen] = {}
    most = max(layers.watches, key=lambda w: len(w.sublayers))
    for watch in layers.watches:
        if not watch.runs:
            raise UnsupportedArchitectureError(f"{watch.name} does not run on these inputs")
        full = len(watch.sublayers) == len(most.sublayers)
        if not watch.sublayers or watch.returns != most.returns or (full and watch.parallel != most.parallel):
            raise UnsupportedArchitectureError(
                f"{watch.name} has no sublayers, or is built otherwise than {most.name}"
            )
        if "y" not in str(watch.returns):
            raise UnsupportedArchitectureError(f"{watch.name} returns no hidden states, alone or in a tuple")
        for seen in watch.sublayers:
            known = merged.setdefault(seen.block.output, seen)
            stream = seen.block.stream if seen.block.stream == known.block.stream else None
            same = replace(known, block=replace(known.block, stream=stream))
            if replace(same.block, stream=None) != replace(seen.block, stream=None):
                raise UnsupportedArchitectureError(
                    f"{seen.block.output} of {watch.name} is not fed as in other layers"
                )
            merged[seen.block.output] = same
    return tuple(merged.values())


def _first_guess(
    model: PreTrainedModel, inputs: Mapping[str, Any], layers: _Layers, found: Sequence[_Layers]
) -> Stack:
    """All that the run has shown, with the first of the variants of each sublayer."""
    watch, names = max(layers.watches, key=lambda w: len(w.sublayers)), next(_names(layers))
    memory = max(s.memory for s in layers.seen)
    reads, mask = "", ""
    if memory:
        others = [
            f.path
            for f in found
            if f is not layers and f.owner == layers.owner and f.watches[0].tokens == memory
        ]
        if not others:
            raise UnsupportedArchitectureError(
                f"what {layers.name} makes keys of comes from no layers of its model"
            )
        reads = others[0]
    elif masks_frames(model):
        mask = "attention_mask"
    for prefix in ("", "decoder_") if memory else ("",):
        ids = inputs.get(f"{prefix}input_ids")
        mask = f"{prefix}attention_mask" if ids is not None and ids.shape[-1] == watch.tokens else mask
    blocks = tuple(next(_variants(s, layers.config, names)) for s in layers.seen)
    return Stack(layers.path, blocks, watch.returns, watch.parallel, mask=mask, reads=reads, **names)


def _settle(
    dense: PreTrainedModel, inputs: Mapping[str, Any], layers: _Layers, found: Sequence[_Layers]
) -> None:
    """Choose, of the descriptions of the layers, one by which cutting any one of their sublayers is masking it."""
    wrong: dict[str, str] = {}

    def right(stack: Stack, block: Block) -> bool:
        layers.stack = _with(stack, block)
        try:
            with step(f"{layers.name}.*.{block.output}"):
                _try(keep(dense, _families(found)), inputs, layers.name, block)
        except UnsupportedArchitectureError as error:
            wrong.setdefault(block.output, str(error))
            return False
        return True

    settled: list[tuple[int, Stack, list[Block]]] = []
    for names in _names(layers):
        stack, left = replace(layers.stack, **names), []
        for seen in layers.seen:
            block = next((b for b in _variants(seen, layers.config, names) if right(stack, b)), None)
            stack = _with(stack, block or seen.block)
            left += [] if block else [seen.block]
        settled.append((len(left), stack, left))
        if not left:
            break
    _, stack, left = min(settled, key=lambda entry: entry[0])
    for block in left:
        block = replace(block, whole=WHOLE)
        if not UNITS[block.kind].has_heads or not right(stack, block):
            raise UnsupportedArchitectureError(
                f"of all that was tried, nothing was right: {wrong[block.output]}"
            )
        stack = _with(stack, block)
    layers.stack = stack


def _with(stack: Stack, block: Block) -> Stack:
    return replace(stack, blocks=tuple(block if b.output == block.output else b for b in stack.blocks))


def _try(dense: PreTrainedModel, inputs: Mapping[str, Any], name: str, block: Block) -> None:
    """Cut one block of the layers at `name`, and nothing else."""
    sublayers, layers = find_sublayers(dense), dense.get_submodule(name)
    mine = [s.layers is layers and s.block.output == block.output for s in sublayers]
    for what, masks in list(plans([s.num_units for s in sublayers]).items())[:3]:
        masks = [mask if cut else torch.ones_like(mask) for mask, cut in zip(masks, mine, strict=True)]
        for attention in implementations(dense):
            prove_cuts(attention, inputs, {what: masks}, generate=False)


# ---------------------------------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------------------------------


def _names(layers: _Layers) -> Iterator[dict[str, Any]]:
    """The config attributes that may tell numbers and size of the heads of the layers: those that fit the shapes."""
    attentions, config = [s for s in layers.seen if UNITS[s.block.kind].has_heads], layers.config
    if not attentions:
        yield {}
        return
    told = {**config.to_dict(), **{name: read(config, name) for name in config.attribute_map}}
    told = {name: value for name, value in told.items() if isinstance(value, int)}
    side = next((side for side in ("encoder", "decoder") if side in layers.path), "")
    heads: dict[int, str] = {}
    for name in sorted(told, key=lambda n: (side not in n, n != "num_attention_heads", n)):
        if (
            "head" in name
            and type(told[name]) is int
            and not any(w in name for w in ("dim", "size", "kv", "key", "hidden"))
        ):
            heads.setdefault(told[name], name)

    def telling(value: float, usual: str, default: int, *words: str) -> list[str]:
        others = [name for name in told if any(word in name for word in words)]
        return [name for name in (usual, "", *others) if (read(config, name) or default) == value][:1]

    fits = False
    for number, name in heads.items():
        sizes = {s.columns / number for s in attentions if number}
        groups = {_groups(s, number) for s in attentions}
        if len(sizes) == len(groups) == 1:
            kv_heads = telling(
                groups.pop(), "num_key_value_heads", number, "kv", "key_value", "query", "group"
            )
            head_dim = telling(
                sizes.pop(), "head_dim", (read(config, "hidden_size") or 0) // number, "head", "kv"
            )
            for kv, dim in product(kv_heads, head_dim):
                fits = True
                yield {"heads": name, "kv_heads": kv, "head_dim": dim}
    if not fits:
        shapes = ", ".join(f"{path} gives {rows}" for s in attentions for path, rows in s.rows.items())
        raise UnsupportedArchitectureError(
            f"no attributes of {type(config).__name__} tell a number and size of heads that fit {layers.name}, where {shapes}"
        )


def _groups(seen: Seen, heads: int) -> float:
    """Key-value heads of an attention with so many heads; not a number if its shapes are not of an attention."""
    d = seen.columns / heads if heads else float("nan")
    if len(seen.rows) == 1:
        return (next(iter(seen.rows.values())) / d - heads) / 2
    kv = {seen.rows[path] for path, layout in seen.block.inputs.items() if layout == "kv"}
    q = {seen.rows[path] for path, layout in seen.block.inputs.items() if layout == "q"}
    return kv.pop() / d if len(kv) == 1 and q == {seen.columns} else float("nan")


def _variants(seen: Seen, config: Any, names: Mapping[str, str]) -> Iterator[Block]:
    """The ways in which a sublayer may have to be described, plain ones first."""
    if not UNITS[seen.block.kind].has_heads:
        yield seen.block
        return
    core, width, heads = seen.block.core, seen.columns, read(config, names["heads"])
    kv_heads = int(_groups(seen, heads))
    counts = {"heads": heads, "kv_heads": kv_heads, "groups": heads // kv_heads}
    sizes: dict[str, str] = {}
    doubtful: dict[str, str] = {}
    given: dict[str, str] = {}
    for path, value in seen.numbers.items():
        name = path.rpartition(".")[2]
        size = "groups" if "group" in name else "kv_heads" if "kv" in name or "key_value" in name else "heads"
        if (
            value == counts[size]
            and ("head" in name or size == "groups")
            and not any(w in name for w in ("dim", "size"))
        ):
            sizes[path] = size
        elif value == width:  # which may also be that of the hidden states
            (doubtful if name in ("d_model", "dim", "embed_dim", "hidden_size", "n_embd") else sizes)[
                path
            ] = "width"
    views = {
        f"{core}.config.{names[size]}": size for size in ("heads", "kv_heads") if hasattr(config, names[size])
    }
    for argument, shape in seen.given.items():
        places = {"1": len(shape) == 4 and shape[1] == heads, "0": shape[0] == heads != seen.batch}
        places["0:batch"] = shape[0] == heads * seen.batch
        where = next((where for where, fits in places.items() if fits and len(shape) > 2), "")
        given |= {argument: where} if where else {}
    held = {
        path: str(dim)
        for path, shape in seen.weights.items()
        for dim, size in reversed(list(enumerate(shape[:2])))
        if size in {heads, kv_heads, width, kv_heads * width // heads} - {1}
    }
    own = {path: dim for path, dim in held.items() if path.rpartition(".")[0] == core}
    layouts = [dict(seen.block.inputs)] + [{path: "qkv:perhead"} for path in seen.rows if len(seen.rows) == 1]
    told = [sizes, {**sizes, **doubtful}, {**sizes, **views}, {**sizes, **doubtful, **views}]
    yielded = []
    for layout, sizes, select, slices in product(layouts, told, (given, {}), ({}, own, held)):
        block = replace(seen.block, inputs=layout, sizes=sizes, select=select, slices=slices)
        if block not in yielded:
            yielded.append(block)
            yield block


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


def as_code(model_type: str, stacks: Sequence[Stack]) -> str:
    """A description as one would write it."""

    def written(value: Any, indent: str) -> str:
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
