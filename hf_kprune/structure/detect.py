"""Describe the layers of a model that families.py does not list.

watch.py observes what they do. Where that leaves a choice (how a fused projection is laid out, which
attributes hold sizes, whether heads can be told apart), variants.py lists the possible descriptions, each is
tried, and proof.py decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import find_layers, plan_of
from ..progress import unwarned
from .coverage import IDLE, family_of
from .facts import evaluation_copy, example_inputs, masks_frames, to_model
from .families import FAMILIES, REFUSED, Block, Stack
from .proof import implementations, prove, prove_cuts, prove_saving, step, trial_masks
from .sublayers import find_sublayers
from .units import UNITS
from .variants import HeadNames, head_names, variants
from .watch import PROJECTIONS, Observation, Watch


Families = Mapping[str, tuple[Stack, ...]]
"""The stacks of a model by its path, `""` or that of a tower in it."""


@dataclass(frozen=True)
class Detected:
    """The layers of a model, as far as they could be described.

    Args:
        families: The stacks that were described.
        rest: What stays as it is, path to reason.
    """

    families: Families
    rest: Mapping[str, str]


GUESSED = (
    " That was tried on inputs made up from its config; on a batch like those that it is used with it may go "
    "otherwise: KPrunePruner(model, args, calibration_dataset), hf_kprune.describe(model, batch), or "
    "hf-kprune inspect MODEL --batch FILE.safetensors."
)
"""What is said of a failure where the caller gave no inputs."""

NOT_RUN = "it does not run on the inputs it was tried on"

MakeBatch = Callable[[], Mapping[str, object] | None]
"""Makes what a model is called with, of the caller's data; None if there are none."""

OBSTACLE = "its heads cannot be cut one by one"


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
    detected = Detected({}, {})
    guessed = inputs is None
    try:
        unknown = "its modules or its config are of a kind that is not known, as the error above shows"
        with unwarned(), step("detection", unknown):
            if any(plan_of(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)):
                raise UnsupportedArchitectureError(
                    "it was pruned before, and its checkpoint tells sizes alone"
                )
            inputs = example_inputs(model) if inputs is None else inputs
            detected = detect(model, inputs, leave=FAMILIES, idle=idle_towers(model, inputs))
        with step("", "its modules are of a kind that cannot be proved, as the error above shows"):
            detected = _proved(model, detected, inputs, head_unit)
    except UnsupportedArchitectureError as error:
        remark = GUESSED if guessed else ""
        raise UnsupportedArchitectureError(way_out(model, detected.families, error, remark)) from error
    keep(model, detected)


def describe_on(model: PreTrainedModel, batch: MakeBatch, head_unit: str) -> None:
    """As `describe` does, and, where inputs that are made up do not prove a model or do not run all of it, on
    those that it is to be used with.

    Args:
        model: Dense; not changed.
        batch: Makes them, once they are needed.
        head_unit: `KPruneArguments.head_unit`.

    Raises:
        UnsupportedArchitectureError: If its layers cannot be described or the proof fails on both.
    """
    failure: UnsupportedArchitectureError | None = None
    try:
        describe(model, head_unit=head_unit)
    except UnsupportedArchitectureError as error:
        if model.config.model_type in {*FAMILIES, *REFUSED}:
            raise
        failure = error
    rest = model.__dict__.get(IDLE, {})
    inputs = batch() if failure or NOT_RUN in rest.values() else None
    if inputs is None:
        if failure:
            raise failure
        return
    families = {
        name: m.__dict__["kprune_family"]
        for name, m in model.named_modules()
        if "kprune_family" in m.__dict__
    }
    keep(model, Detected({}, {}))
    try:
        describe(model, inputs, head_unit)
    except UnsupportedArchitectureError as error:
        if failure:
            raise
        why = f"on the calibration rows {error.__cause__}"  # without the way out
        keep(model, Detected(families, {p: why if r == NOT_RUN else r for p, r in rest.items()}))


def _proved(
    model: PreTrainedModel, detected: Detected, inputs: Mapping[str, object], head_unit: str
) -> Detected:
    """What of it can be proved: all, or those lists of layers that can be by themselves."""

    def holds(part: Detected) -> str:
        try:
            prove(keep(evaluation_copy(model), part), inputs, head_unit)
        except UnsupportedArchitectureError as error:
            return str(error)
        return ""

    every = [stack for stacks in detected.families.values() for stack in stacks]
    why = holds(detected)
    if why and len(every) > 1:
        failures = [holds(_only(model, detected, [stack], "")) for stack in every]
        right = [stack for stack, failure in zip(every, failures, strict=True) if not failure]
        part = _only(model, detected, right, next((failure for failure in failures if failure), why))
        if right and len(right) < len(every) and not holds(part):
            return part
    if why:
        raise UnsupportedArchitectureError(why)
    return detected


def _only(model: PreTrainedModel, detected: Detected, chosen: Sequence[Stack], why: str) -> Detected:
    """Some of the stacks that were detected, with those whose tokens they read; the others stay, as is
    said."""
    kept, rest = dict[str, tuple[Stack, ...]](), dict(detected.rest)
    for owner, stacks in detected.families.items():
        mine = [stack for stack in stacks if any(stack is other for other in chosen)]
        reads = {stack.reads for stack in mine}
        mine = [stack for stack in stacks if stack in mine or stack.layers in reads]
        kept |= {owner: tuple(mine)} if mine else {}
        gone = [find_layers(_at(model, owner), stack.layers) for stack in stacks if stack not in mine]
        rest |= {f"{name}.": why for name, m in model.named_modules() if any(m is layers for layers in gone)}
    return Detected(kept, rest)


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
    return dict.fromkeys((f"{name}." for name in outermost), NOT_RUN)


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


def keep(model: PreTrainedModel, detected: Detected) -> PreTrainedModel:
    """Note on `model` what was detected in it, where `find_sublayers` looks; its copies have it too."""
    for module in model.modules():
        module.__dict__.pop("kprune_family", None)
    for path, stacks in detected.families.items():
        _at(model, path).__dict__["kprune_family"] = stacks
    model.__dict__[IDLE] = dict(detected.rest)
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
        lists = _innermost(dense, inputs, _outermost(dense, (*rest, *listed)), rest)
    rest |= _apart(dense, lists, (*rest, *listed))
    rest |= _nested(lists)
    lists = [layers for layers in lists if f"{layers.name}." not in rest]
    for layers in lists:
        layers.stack = _surroundings(inputs, layers, lists, masks_frames(dense))
    settled: list[LayerList] = []
    for place, layers in enumerate(lists):
        dense.__dict__[IDLE] = rest | {f"{waiting.name}.": "" for waiting in lists[place + 1 :]}
        _settle(dense, inputs, layers, settled)
        if layers.stack.blocks:
            settled.append(layers)
        else:
            why = "; ".join(dict.fromkeys(layers.rest.values()))
            rest[f"{layers.name}."] = f"nothing of its layers can be cut: {why}"
    lists = settled
    if not lists and not any(kind in leave for kind in types.values()):
        raise UnsupportedArchitectureError(
            "; ".join(dict.fromkeys(rest.values())) or "it has no list of layers that hold nn.Linear"
        )
    return Detected(_families(lists), rest)


def _families(lists: Sequence[LayerList]) -> Families:
    """The descriptions so far."""
    owners = [layers.owner for layers in lists]
    return {owner: tuple(layers.stack for layers in lists if layers.owner == owner) for owner in owners}


def _innermost(
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
    inner = {name: _outermost(model.get_submodule(name), (), name) for name in doubtful}
    below = dict[str, str]()
    lower = _innermost(model, inputs, [name for names in inner.values() for name in names], below)
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


def _outermost(module: nn.Module, rest: tuple[str, ...], path: str = "") -> list[str]:
    """The paths of the outermost lists of modules that hold projections, beside itself in the module at
    `path`, and not in the `rest`."""
    names: list[str] = []
    for name, child in module.named_modules(prefix=path):
        inside = child is module or name.startswith(tuple(f"{outer}." for outer in names))
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and not inside:
            holding = [m for m in child if any(isinstance(p, PROJECTIONS) for p in m.modules())]
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
        troubles.append(f"in some layers of {layers.name} alone the sublayers read each other")
    if "y" not in str(most.returns):
        troubles.append(f"{most.name} returns no hidden states, alone or in a tuple")
    if not troubles and not others:
        why = "; ".join(dict.fromkeys(why for w in layers.watches for why in w.rest.values()))
        troubles.append(f"nothing in {layers.name} is an attention or an FFN of nn.Linear: {why}")
    if not troubles:
        _merge(layers)
    return troubles[0] if troubles else ""


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


def _apart(model: PreTrainedModel, lists: Sequence[LayerList], rest: tuple[str, ...]) -> dict[str, str]:
    """The outermost modules beside the lists, and not in the `rest`, that are like what layers are made
    of."""
    modules = [m for layers in lists for watch in layers.watches for m in watch.layer.modules()]
    parts = {type(m) for m in modules if any(isinstance(p, PROJECTIONS) for p in m.modules())} - {
        *PROJECTIONS
    }
    parts = {kind for kind in parts if not kind.__module__.startswith("torch.")}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        around = any(f"{layers.name}.".startswith(f"{name}." if name else "") for layers in lists)
        inside = f"{name}.".startswith((*left, *rest, *(f"{layers.name}." for layers in lists)))
        alike = type(module) in parts or "attention" in type(module).__name__.lower()
        if alike and not around and not inside and any(isinstance(p, PROJECTIONS) for p in module.modules()):
            left[f"{name}."] = "it is like what its layers are made of, and lies outside of them"
    return left


def _nested(lists: Sequence[LayerList]) -> dict[str, str]:
    """The lists of models inside a tower that has lists of its own."""
    owners = tuple(f"{layers.owner}." for layers in lists if layers.owner)
    why = "it is in a model inside a tower that has layers of its own"
    return {f"{layers.name}.": why for layers in lists if layers.owner.startswith(owners)}


def _surroundings(
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
            layers.leave(observation, "what its keys are made of comes from no layers of its model")
    elif frames:
        mask = "attention_mask"
    for prefix in ("", "decoder_") if memory else ("",):
        ids = inputs.get(f"{prefix}input_ids")
        mask = f"{prefix}attention_mask" if ids is not None and ids.shape[-1] == watch.tokens else mask
    try:
        next(_head_names(layers))
    except UnsupportedArchitectureError as error:
        for observation in [o for o in layers.observations if UNITS[o.block.kind].has_heads]:
            layers.leave(observation, str(error))
    return Stack(layers.path, (), watch.returns, mask=mask, reads=reads)


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
            errors.setdefault(block.output, str(error))
            return False
        return True

    candidates: list[tuple[HeadNames, dict[str, Block]]] = []
    for names in _head_names(layers):
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


def _head_names(layers: LayerList) -> Iterator[HeadNames]:
    return head_names(layers.name, layers.path, layers.config, layers.observations)


def _try(dense: PreTrainedModel, inputs: Mapping[str, object], name: str, block: Block) -> None:
    """Prove that cutting one block of the layers at `name`, and nothing else, equals masking it, and that
    what is left can be saved."""
    sublayers, layers = find_sublayers(dense), dense.get_submodule(name)
    mine = [s.layers is layers and s.block.output == block.output for s in sublayers]
    for what, masks in list(trial_masks([s.numbers for s in sublayers]).items())[:3]:
        masks = [mask if cut else torch.ones_like(mask) for mask, cut in zip(masks, mine, strict=True)]
        for attention in implementations(dense):
            prove_cuts(attention, inputs, {what: masks}, generate=False)
    prove_saving(dense, mine)


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
