"""Describe the layers of a model that families.py does not list.

watch.py observes what they do. Where that leaves a choice (how a fused projection is laid out, which
attributes hold sizes, whether heads can be told apart), variants.py lists the possible descriptions, each is
tried, and proof.py decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import plan_of
from ..progress import unwarned
from .coverage import IDLE, family_of
from .facts import evaluation_copy, example_inputs, masks_frames, to_model
from .families import FAMILIES, REFUSED, Block, Stack
from .proof import implementations, prove, prove_cuts, step, trial_masks
from .sublayers import find_sublayers
from .units import UNITS
from .variants import HeadNames, head_names, variants
from .watch import PROJECTIONS, Observation, Watch


Families = Mapping[str, tuple[Stack, ...]]
"""What was detected: the stacks of a model by its path, `""` or that of a tower in it."""

GUESSED = (
    " That was tried on inputs made up from its config; on a batch like those that it is used with it may go "
    "otherwise: hf_kprune.describe(model, batch), or hf-kprune inspect MODEL --batch FILE.safetensors."
)
"""What is said of a failure where the caller gave no inputs."""

OBSTACLE = "cutting one of its heads changes others"


def describe(
    model: PreTrainedModel, inputs: Mapping[str, object] | None = None, head_unit: str = "group"
) -> None:
    """Make sure that hf_kprune knows where the heads and neurons of `model` are.

    Nothing is done if a family describes its model type. Else its layers are detected, the description is
    proved, and only then noted, on this model and its copies: others of the type have to be proved for
    themselves.

    Args:
        model: Dense; not changed.
        inputs: A small batch that runs all of it, with several tokens in each sample. Default:
            `example_inputs(model)`.
        head_unit: `KPruneArguments.head_unit`.

    Raises:
        UnsupportedArchitectureError: If its layers cannot be described or the proof fails, with a description
            to start from if there is one.

    Example:

        >>> from transformers import BertConfig, BertModel
        >>> from hf_kprune import describe
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> describe(BertModel(config))
    """
    try:
        with step("", f"{type(model).__name__} is not built as its family says, as the error above shows"):
            find_sublayers(model, head_unit)
        return
    except UnsupportedArchitectureError:
        if model.config.model_type in {*FAMILIES, *REFUSED}:
            raise
    families: Families = {}
    guessed = inputs is None
    try:
        unknown = "its modules or its config are of a kind that is not known, as the error above shows"
        with unwarned(), step("detection", unknown):
            if any(plan_of(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)):
                raise UnsupportedArchitectureError(
                    "it was pruned before, and its checkpoint tells sizes alone"
                )
            inputs = example_inputs(model) if inputs is None else inputs
            idle = idle_towers(model, inputs)
            model.__dict__[IDLE] = idle
            families = detect(model, inputs, leave=FAMILIES)
        with step("", "its modules are of a kind that cannot be proved, as the error above shows"):
            prove(keep(evaluation_copy(model), families), inputs, head_unit)
    except UnsupportedArchitectureError as error:
        model.__dict__.pop(IDLE, None)
        remark = GUESSED if guessed else ""
        raise UnsupportedArchitectureError(way_out(model, families, error, remark)) from error
    keep(model, families)


def idle_towers(model: PreTrainedModel, inputs: Mapping[str, object]) -> dict[str, str]:
    """The models inside `model` that do not run on these inputs and that no family describes, such as a tower
    of images on texts, path to reason. They stay as they are.

    Raises:
        UnsupportedArchitectureError: If the model does not run on them.
    """
    dense, ran = evaluation_copy(model), set[int]()
    inner = {name: m for name, m in dense.named_modules() if name and isinstance(m, PreTrainedModel)}
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng():
        for module in dense.modules():
            hooks.callback(module.register_forward_hook(lambda m, *_: ran.add(id(m))).remove)
        with step("running it", "it does not run on these inputs, as the error above shows"):
            dense(**to_model(inputs, dense))
    kept = ran | {id(m) for m in dense.modules() if isinstance(m, PreTrainedModel) and family_of(m)}
    idle = [name for name, m in inner.items() if not any(id(part) in kept for part in m.modules())]
    outermost = [name for name in idle if not any(name.startswith(f"{other}.") for other in idle)]
    return dict.fromkeys((f"{name}." for name in outermost), "it does not run on the inputs it was tried on")


def way_out(model: PreTrainedModel, families: Families, error: Exception, remark: str = "") -> str:
    """What to do about a model whose layers could not be described for this error, of which there may be a
    remark: describe one by hand, from what was detected."""
    start = "".join(
        f"\n\n{as_code(_at(model, path).config.model_type, stacks)}" for path, stacks in families.items()
    )
    return (
        f"no family describes model_type {model.config.model_type!r} ({type(model).__name__}), and it "
        f"was not found out what its layers do; {error}.{remark} Describe one of them in ten lines with "
        "hf_kprune.register_family: "
        f"docs/add_a_family.md{' has the steps; to start from:' if start else ''}{start}"
    )


def keep(model: PreTrainedModel, families: Families) -> PreTrainedModel:
    """Note on `model` what was detected in it, where `find_sublayers` looks; its copies have it too."""
    for path, stacks in families.items():
        _at(model, path).__dict__["kprune_family"] = stacks
    return model


def _at(model: PreTrainedModel, path: str) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_submodule(path))


# ------------------------------------------------------------------------------------------------------------
# Detection
# ------------------------------------------------------------------------------------------------------------


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
    """

    name: str
    owner: str
    path: str
    config: Any
    watches: list[Watch]
    observations: tuple[Observation, ...] = ()
    stack: Stack = Stack("", ())


def detect(model: PreTrainedModel, inputs: Mapping[str, object], leave: Collection[str] = ()) -> Families:
    """Describe the layers of `model`. Each sublayer is tried by itself; `prove` tries all of it.

    Args:
        model: Of any model type; not changed.
        inputs: A small batch that runs all of it.
        leave: Model types of towers that are not looked at.

    Raises:
        UnsupportedArchitectureError: If its layers are not made of attentions and FFNs whose weights are
            projections.
    """
    dense = evaluation_copy(model)
    inputs, idle = to_model(inputs, dense), tuple(dense.__dict__.get(IDLE, ()))
    lists = [_layer_list(dense, name, layers) for name, layers in _module_lists(dense, idle).items()]
    lists = [layers for layers in lists if layers.config.model_type not in leave]
    with ExitStack() as hooks, torch.enable_grad(), torch.random.fork_rng():
        for hook in (hook for layers in lists for watch in layers.watches for hook in watch.hooks()):
            hooks.callback(hook.remove)
        with step(
            "watching it run", "it does not run while its layers are watched, as the error above shows"
        ):
            dense(**inputs)
    for layers in lists:
        layers.observations = _merge(layers)
    for layers in lists:
        layers.stack = _first_guess(dense, inputs, layers, lists)
    for layers in lists:
        _settle(dense, inputs, layers, lists)
    return _families(lists)


def _families(lists: Sequence[LayerList]) -> Families:
    """The descriptions so far."""
    owners = [layers.owner for layers in lists]
    return {owner: tuple(layers.stack for layers in lists if layers.owner == owner) for owner in owners}


def _module_lists(model: PreTrainedModel, idle: tuple[str, ...]) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of one class that hold projections. None may lie elsewhere, but in
    `idle` towers."""
    lists: dict[str, nn.ModuleList] = {}
    holding = {id(m) for m in model.modules() if any(isinstance(p, PROJECTIONS) for p in m.modules())}
    rest = {
        name: m for name, m in model.named_modules() if id(m) in holding and not f"{name}.".startswith(idle)
    }
    for name, module in rest.items():
        outermost = not name.startswith(tuple(f"{outer}." for outer in lists))
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and outermost:
            if all(isinstance(m, PROJECTIONS) for m in module if id(m) in holding):
                continue
            if isinstance(module, nn.Sequential) or len({type(m) for m in module}) > 1:
                raise UnsupportedArchitectureError(
                    f"{name} holds layers and is no nn.ModuleList of modules of one class"
                )
            lists[name] = module
    if not lists:
        raise UnsupportedArchitectureError("it has no nn.ModuleList of layers that hold nn.Linear")
    parts = {type(m) for layers in lists.values() for m in layers.modules() if id(m) in holding}
    parts = {kind for kind in parts - {*PROJECTIONS} if not kind.__module__.startswith("torch.")}
    for name, module in rest.items():
        apart = not any(
            f"{name}.".startswith(f"{path}.") or f".{path}".startswith(f".{name}") for path in lists
        )
        if apart and (type(module) in parts or "attention" in type(module).__name__.lower()):
            raise UnsupportedArchitectureError(
                f"{name} is like what its layers are made of, and lies outside of them"
            )
    return lists


def _layer_list(model: PreTrainedModel, name: str, layers: nn.ModuleList) -> LayerList:
    """The list of layers at `name`, with the outermost model that has the config of its own one."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
    models = {path: m for path in parents if isinstance(m := model.get_submodule(path), PreTrainedModel)}
    inner = list(models.values())[-1].config.model_type
    owner = next(path for path, m in models.items() if m.config.model_type == inner)
    path = name.removeprefix(f"{owner}.").removeprefix(f"{models[owner].base_model_prefix}.")
    watches = [Watch(f"{name}.{i}", layer) for i, layer in enumerate(layers)]
    return LayerList(name, owner, path, models[owner].config, watches)


def _merge(layers: LayerList) -> tuple[Observation, ...]:
    """The sublayers of all layers of a list, of which each may lack some."""
    merged: dict[str, Observation] = {}
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
        for observation in watch.sublayers:
            block = observation.block
            first = merged.setdefault(block.output, observation)
            if replace(first.block, stream=None) != replace(block, stream=None):
                raise UnsupportedArchitectureError(
                    f"{block.output} of {watch.name} is not fed as in other layers"
                )
            if first.block.stream != block.stream:
                merged[block.output] = replace(first, block=replace(first.block, stream=None))
    return tuple(merged.values())


def _first_guess(
    model: PreTrainedModel, inputs: Mapping[str, Any], layers: LayerList, lists: Sequence[LayerList]
) -> Stack:
    """The description that the run gives, with the first of the variants of each sublayer."""
    watch, names = max(layers.watches, key=lambda w: len(w.sublayers)), next(_head_names(layers))
    memory = max(o.memory for o in layers.observations)
    reads, mask = "", ""
    if memory:
        others = [
            other.path
            for other in lists
            if other is not layers and other.owner == layers.owner and other.watches[0].tokens == memory
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
    blocks = tuple(next(variants(o, layers.config, names)) for o in layers.observations)
    return Stack(layers.path, blocks, watch.returns, watch.parallel, mask=mask, reads=reads, **names)


def _settle(
    dense: PreTrainedModel, inputs: Mapping[str, object], layers: LayerList, lists: Sequence[LayerList]
) -> None:
    """Choose a description of the layers by which cutting any one of their sublayers equals masking it."""
    errors: dict[str, str] = {}

    def right(stack: Stack, block: Block) -> bool:
        layers.stack = _with(stack, block)
        try:
            with step(f"{layers.name}.*.{block.output}"):
                _try(keep(dense, _families(lists)), inputs, layers.name, block)
        except UnsupportedArchitectureError as error:
            errors.setdefault(block.output, str(error))
            return False
        return True

    candidates: list[tuple[Stack, list[Block]]] = []  # each with the blocks of which no variant is right
    for names in _head_names(layers):
        stack, failures = replace(layers.stack, **names), []
        for observation in layers.observations:
            block = next((b for b in variants(observation, layers.config, names) if right(stack, b)), None)
            stack = _with(stack, block or observation.block)
            failures += [] if block else [observation.block]
        candidates.append((stack, failures))
        if not failures:
            break
    stack, failures = min(candidates, key=lambda candidate: len(candidate[1]))
    for block in failures:
        block = replace(block, obstacle=OBSTACLE)
        if not UNITS[block.kind].has_heads or not right(stack, block):
            raise UnsupportedArchitectureError(
                f"of all that was tried, nothing was right: {errors[block.output]}"
            )
        stack = _with(stack, block)
    layers.stack = stack


def _head_names(layers: LayerList) -> Iterator[HeadNames]:
    return head_names(layers.name, layers.path, layers.config, layers.observations)


def _with(stack: Stack, block: Block) -> Stack:
    """A stack in which a block takes the place of the one with the same output."""
    return replace(stack, blocks=tuple(block if b.output == block.output else b for b in stack.blocks))


def _try(dense: PreTrainedModel, inputs: Mapping[str, object], name: str, block: Block) -> None:
    """Prove that cutting one block of the layers at `name`, and nothing else, equals masking it."""
    sublayers, layers = find_sublayers(dense), dense.get_submodule(name)
    mine = [s.layers is layers and s.block.output == block.output for s in sublayers]
    for what, masks in list(trial_masks([s.numbers for s in sublayers]).items())[:3]:
        masks = [mask if cut else torch.ones_like(mask) for mask, cut in zip(masks, mine, strict=True)]
        for attention in implementations(dense):
            prove_cuts(attention, inputs, {what: masks}, generate=False)


# ------------------------------------------------------------------------------------------------------------
# Help
# ------------------------------------------------------------------------------------------------------------


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
