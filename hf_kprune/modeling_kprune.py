"""Load a pruned checkpoint: build the stock model, then shrink its layers to the sizes in `config.kprune`.

This file travels inside every pruned checkpoint, so that

    AutoModelFor....from_pretrained(checkpoint, trust_remote_code=True)

works where `hf_kprune` is not installed; `import hf_kprune` runs the same code for the stock classes
themselves. It needs torch, transformers and the safetensors of that only, and knows no architecture: which
modules are narrower, and by how much, is data in the config, of the form that `Plan` describes:

    "kprune": {"format": 1, "sha256": "1f3c...", "stacks": [{"layers": "encoder.layer", "blocks": [
        {"kind": "attention", "of": 12, "kept": [5, 0, ...], "heads": 1,
         "rows": {"attention.self.query": [32, 0], ...},
         "columns": {"attention.output.dense": 32},
         "sizes": {"attention.self.num_attention_heads": 1, ...},
         "table": {}, "select": {}, "slices": {},
         "core": "attention.self", "returns": ["y", null]},
        ...]}]}
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file


FORMAT = 1
HOW_TO_LOAD = (
    "this checkpoint is pruned: install the package hf_kprune and `import hf_kprune` before from_pretrained, "
    "or pass trust_remote_code=True to an AutoModel class"
)
SEALS = ("this checkpoint is pruned", "this checkpoint is K-pruned")  # of today and of earlier releases
NOTICE = f"no file is damaged or missing; {HOW_TO_LOAD}"
RECORD = "kprune_weights"
MISFIT = "the plan in config.json (kprune) and the weight files do not belong together"
LEGACY = (
    "its heads were pruned by an older transformers (pruned_heads in config.json): load it with "
    "hf_kprune.from_legacy"
)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


ALIGNED = 8
"""Experts of a width that is no multiple of it are computed one by one, as transformers does by itself: the
kernels that compute all at once read rows of whole 16 bytes."""

WHOLE = "expert"
"""What the units of a mixture of experts are where whole experts have gone: `BlockPlan.by`."""

Layers = nn.ModuleList | nn.Sequential

BORROWED = "borrowed"
"""What the units of an attention are whose keys and values are another layer's: `BlockPlan.by`."""

Returns = str | Sequence[str | None] | None
"""What a module returns: `"y"` is its output, `"y+x"` that with its argument `x` added, `"[y]"` a list of it,
None is None."""


class BlockPlan(TypedDict):
    """What is kept of one block of a layer, in all layers of a stack. All paths are seen from the layer."""

    kind: str
    """`"attention"`, `"cross_attention"`, `"ffn"` or `"experts"`."""
    by: str
    """What its units are where queries are grouped, `"group"` or `"query"`; `"borrowed"` where keys and
    values are another layer's; `"expert"` where they are whole experts."""
    of: int
    """Units of each layer before pruning."""
    kept: list[int | None]
    """Units that each layer has, neurons each expert of it; None in one that lacks the block."""
    heads: int
    """Query heads in a unit."""
    rows: dict[str, list[int]]
    """Output rows of a projection for each kept unit, and those that are there for none."""
    columns: dict[str, int]
    """Input columns of a projection for each kept unit."""
    sizes: dict[str, int]
    """What an attribute of a module is, for each kept unit."""
    table: dict[str, int]
    """Columns of an embedding of positions for each kept unit."""
    slices: dict[str, list[int]]
    """The dimension of a parameter or buffer that has slices for each unit, and its entries for each kept
    unit."""
    select: dict[str, list[Any]]
    """Where an argument of the core has slices, see `SelectHeads`, and the heads that each layer keeps."""
    core: str
    """The module that is replaced where no unit is kept; `""` if there is none."""
    returns: Returns
    """What the core returns."""
    norm: NotRequired[str]
    """The module of the core that reads the sum of the output and the core's first argument, if there is
    one."""
    stays: NotRequired[list[int]]
    """The numbers of layers that have the block and keep it as it is."""
    weights: NotRequired[bool]
    """Whether the model can take the attention weights of no heads. Default: True."""
    router: NotRequired[str]
    """The module that chooses among whole experts, whose logits it returns first."""


class StackPlan(TypedDict):
    """What is kept of a list of layers."""

    layers: str
    """Path of the list, seen from the base model."""
    blocks: list[BlockPlan]


class Plan(TypedDict):
    """`config.kprune`."""

    format: int
    created_by: str
    how_to_load: str
    sha256: str
    """`digest` of the stacks."""
    stacks: list[StackPlan]
    history: NotRequired[list[dict[str, Any]]]
    """The cuts that were made before, the oldest first. Loading does not read them."""


class FileRecord(TypedDict):
    """What a weight file was when it was saved."""

    sha256: str
    tensors: dict[str, list[Any]]
    """Dtype and shape of each tensor."""


class CheckpointError(ValueError):
    """A pruned checkpoint whose plan, config or weights contradict each other."""


def fill(returns: Returns, y: Tensor, arguments: dict[str, Any]) -> Any:
    """What a module returns that gives y for these arguments."""
    if returns is None:
        return None
    if not isinstance(returns, str):
        return tuple(fill(entry, y, arguments) for entry in returns)
    if returns == "[y]":
        return [y]
    name, _, added = returns.partition("+")
    assert name == "y"
    return y + arguments[added] if added else y


def with_weights(result: object, weights: Tensor | None, appended: bool) -> Any:
    """What an attention returned, with its attention weights in their place, the last empty one.

    If there is none, and the module was asked for weights (`appended`), they come after all else.
    """
    if weights is None or not isinstance(result, (tuple, list)):
        return result
    places = [place for place, entry in enumerate(result) if entry is None]
    if places:
        return (*result[: places[-1]], weights, *result[places[-1] + 1 :])
    return type(result)((*result, weights)) if appended else result


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the arguments that `module` takes by position."""
    stood_for = getattr(module, "parameter_names", None)
    return stood_for or list(inspect.signature(type(module).forward).parameters)[1:]


class EmptyAttention(nn.Module):
    """Stands in for an attention without heads: adds nothing to the residual stream but its output bias.

    An instance is also one of the class that it stands in for, by which transformers finds the modules whose
    attention weights it collects: those of no heads, (B, 0, T, keys), where that class returns weights.
    """

    is_kprune_stand_in = True

    def __init__(self, attention: nn.Module, block: BlockPlan, output: str | None):
        nn.Module.__init__(self)
        for name, value in vars(
            attention
        ).items():  # flags that the layer around it reads, such as is_sliding
            if isinstance(value, (bool, int, float, str)) and name != "training":
                setattr(self, name, value)
        self.kind, self.returns, self.has_weights = (
            block["kind"],
            block["returns"],
            block.get("weights", True),
        )
        self.output, self.parameter_names = output, parameter_names(attention)
        self.norm = block.get("norm", "").removeprefix(f"{block['core']}.")
        self.borrows = block.get("by") == BORROWED
        self.config = vars(attention).get("config")
        self.dispatches = hasattr(sys.modules.get(type(attention).__module__), "ALL_ATTENTION_FUNCTIONS")
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            getattr(self, hooks).update(
                getattr(attention, hooks)
            )  # transformers hooks what it collects from only once
        self._is_hf_initialized = True  # the initialisation of its class would look for projections
        if output is not None:  # the projection keeps its name, so its bias keeps its key in the state dict
            self.add_module(output, attention.get_submodule(output))
        if self.norm:
            self.add_module(self.norm, attention.get_submodule(self.norm))

    def __reduce__(self) -> Any:
        return empty_like, (type(self).__bases__[1],), self.__dict__

    def forward(self, *args: object, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        hidden = arguments[self.parameter_names[0]]
        sources = [arguments.get(name) for name in ("key_value_states", "encoder_hidden_states")]
        keys = next((source for source in sources if source is not None), hidden).shape[1]
        for value in arguments.values():
            if isinstance(value, Cache) and not self.borrows:  # its keys are in another layer's slot
                keys = self.keep_in_step(value, hidden) or keys
        y = hidden[..., :0] if self.output is None else getattr(self, self.output)(hidden[..., :0])
        y = getattr(self, self.norm)(hidden + y) if self.norm else y
        asked = arguments.get("output_attentions", True)
        if self.dispatches:  # then it is the implementation that decides whether there are weights
            asked = getattr(self.config, "_attn_implementation", "eager") == "eager"
        elif arguments.get("output_attentions") and not self.has_weights:
            raise NotImplementedError(
                f"output_attentions is True, but {type(self).__name__} cannot return attention weights where "
                "no head is left, as in this pruned model; leave output_attentions out"
            )
        weights = hidden.new_zeros(hidden.shape[0], 0, hidden.shape[1], keys) if asked else None
        return with_weights(fill(self.returns, y, arguments), weights, "output_attentions" in arguments)

    def keep_in_step(self, cache: Any, hidden: Tensor) -> int | None:
        """Fill this layer's slot with zeros: models read the number of cached tokens from any of the slots.

        Returns how many keys the attention would see; None if they are not those of the cache.
        """
        index: Any = getattr(self, "layer_idx", None)
        index = getattr(self, "layer_id", None) if index is None else index
        if self.kind == "cross_attention":  # filled once, and not counted
            if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(index):
                zeros = hidden.new_zeros(hidden.shape[0], 1, 1, 1)
                cache.cross_attention_cache.update(zeros, zeros, index)
                cache.is_updated[index] = True
            return None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        slot = cache.layers[index] if index < len(cache.layers) else None
        keys = slot.keys if slot is not None and getattr(slot, "is_initialized", False) else None
        if keys is not None and keys.dim() != 4:  # a slot may be there before anything is in it
            keys = None
        heads, width = (1, 1) if keys is None else (keys.shape[1], keys.shape[-1])
        zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], width)
        return int(cache.update(zeros, zeros, index)[0].shape[-2])


@functools.cache
def empty_attention(replaced: Any) -> Any:
    """The class of stand-ins for the modules of another class."""
    return type(replaced.__name__, (EmptyAttention, replaced), {"__module__": __name__})


def empty_like(replaced: object) -> EmptyAttention:
    """A stand-in without anything in it, which `copy` and `pickle` fill."""
    empty: EmptyAttention = object.__new__(empty_attention(replaced))
    return empty


class EmptyProjection(nn.Module):
    """Stands in for a `Conv1D` without inputs, which it cannot multiply: has its bias, by the same name."""

    is_kprune_stand_in = True

    def __init__(self, projection: Any):
        super().__init__()
        self.nx, self.nf = 0, projection.nf
        set_parameter(self, "weight", projection.weight[:0].detach().clone())
        self.bias = projection.bias

    def forward(self, hidden: Tensor) -> Tensor:
        bias: Tensor = self.bias
        return bias.expand(*hidden.shape[:-1], -1)


class EmptyLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """A linear module without inputs or outputs. Quantisers leave its class alone, as nothing is in it."""

    is_kprune_empty = True

    def forward(self, hidden: Tensor) -> Tensor:
        y = hidden.new_zeros(*hidden.shape[:-1], self.out_features)  # a product of nothing would be in graphs
        return y if self.bias is None else y + self.bias.to(hidden.dtype)


def spare_empty(model: PreTrainedModel) -> None:
    """Have what loads `model` pass over tensors without elements, which were saved by earlier versions, and
    what quantises it over modules without inputs or outputs."""
    empty = {f"{re.escape(name)}$" for name, value in model.named_buffers() if not value.numel()}
    if empty:
        model._keys_to_ignore_on_load_unexpected = empty | set(model._keys_to_ignore_on_load_unexpected or ())
    if getattr(model.config, "quantization_config", None) is not None:
        empty = {name for name, module in model.named_modules() if getattr(module, "is_kprune_empty", False)}
        model._keep_in_fp32_modules = set(model._keep_in_fp32_modules or ()) | empty


class ConfigView:
    """A config with a few values of its own, for a module that reads sizes from it. All else is live."""

    def __init__(self, config: Any, values: dict[str, Any]):
        self.__dict__.update(values, kprune_config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "kprune_config":
            raise AttributeError(name)
        return getattr(self.kprune_config, name)


class SelectHeads:
    """Pre-forward hook: of an argument that carries one slice per head, pass the kept heads on.

    `where` they lie: `"1"` or `"0"`, that dimension; `"0:batch"`, dimension 0 with the batch folded in before
    the heads; `"none"`: None is passed instead.
    """

    def __init__(self, argument: str, where: str, of: int, heads: list[int]):
        self.argument, self.where, self.of, self.heads = argument, where, of, heads

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Any, dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        value = bound.arguments.get(self.argument)
        if value is not None:
            bound.arguments[self.argument] = self.select(value)
        return bound.args, bound.kwargs

    def select(self, value: Any) -> Any:
        if self.where == "none":
            return None
        if self.where == "0:batch":
            return value.unflatten(0, (-1, self.of))[:, self.heads].flatten(0, 1)
        if value.shape[int(self.where)] == 1:  # one for all heads
            return value
        return value.index_select(int(self.where), torch.tensor(self.heads, device=value.device))


def padded(of: int, _: nn.Module, __: object, output: Any) -> Any:
    """What a router returns, with logits of so many experts: those that have gone come last, with -inf."""
    logits, *rest = output
    gone = logits.new_full((*logits.shape[:-1], of - logits.shape[-1]), float("-inf"))
    return torch.cat([logits, gone], -1), *rest


def pad_logits(router: nn.Module, of: int | None) -> None:
    """Let a router give logits of so many experts, as models compare those of all layers, or of its own."""
    for key in [key for key, hook in router._forward_hooks.items() if getattr(hook, "func", None) is padded]:
        del router._forward_hooks[key]
    if of is not None:
        router.register_forward_hook(functools.partial(padded, of))


def find_layers(model: nn.Module, path: str) -> Layers | None:
    """The list of layers at `path` in `model`, or in the base model inside it; None if there is none."""
    prefixes = ["", getattr(model, "base_model_prefix", "") + "."]
    for (
        name,
        inner,
    ) in model.named_children():  # a head that does not name the model it is on: CLIP's in some versions
        if isinstance(inner, PreTrainedModel) and isinstance(
            inner.config, type(getattr(model, "config", None))
        ):
            prefixes.append(name + ".")
    for prefix in prefixes:
        try:
            layers = model.get_submodule(prefix + path)
        except AttributeError:
            continue
        if isinstance(layers, (nn.ModuleList, nn.Sequential)):
            return layers
    return None


def set_parameter(module: nn.Module, name: str, value: Tensor, requires_grad: bool = True) -> None:
    """Give a module a parameter or, if it has no elements, a buffer, which no checkpoint holds."""
    if value.numel():
        setattr(module, name, nn.Parameter(value, requires_grad=requires_grad))
        return
    module._parameters.pop(name, None)
    module.register_buffer(name, value, persistent=False)


def resize(layer: nn.Module, path: str, rows: int | None = None, columns: int | None = None) -> None:
    """Give the linear module, `Conv1D` or embedding at `path` this many output rows or input columns.

    The loader overwrites the values; a fresh model (`from_config`) keeps those it was initialised with.
    """
    module = layer.get_submodule(path)
    out, inner = SIZES[kind_of(module)]
    turned = kind_of(module) != "linear"  # the weight is (in, out)
    for size, name, dim in ((rows, out, 0), (columns, inner, 1)):
        if size is None or getattr(module, name) == size:
            continue
        for key, old in list(module.named_parameters(recurse=False)):
            if old.dim() == 1 and dim == 1:
                continue
            part = old.detach().narrow(1 - dim if turned and old.dim() == 2 else dim, 0, size).clone()
            set_parameter(module, key, part, old.requires_grad)
        setattr(module, name, size)
    if isinstance(module, nn.Linear) and 0 in (module.in_features, module.out_features):
        module.__class__ = EmptyLinear
        cast(Any, module)._is_hf_initialized = True  # some models scale by the number of inputs
    if columns == 0 and kind_of(module) == "conv1d" and not getattr(module, "is_kprune_stand_in", False):
        layer.set_submodule(path, EmptyProjection(module))


SIZES = {
    "linear": ("out_features", "in_features"),
    "conv1d": ("nf", "nx"),
    "embedding": ("embedding_dim", "num_embeddings"),
}


def kind_of(module: nn.Module) -> str:
    return (
        "conv1d" if hasattr(module, "nf") else "embedding" if hasattr(module, "embedding_dim") else "linear"
    )


def give_tables(layers: Layers, block: BlockPlan) -> None:
    """Give every layer its own table of relative positions, of which the dense model has one for all (T5)."""
    for path in block["table"]:
        owner, _, name = path.rpartition(".")
        holders = [layer.get_submodule(owner) for layer in layers]
        table = next((getattr(holder, name) for holder in holders if hasattr(holder, name)), None)
        for holder in holders:
            if not hasattr(holder, name) and not getattr(holder, "is_kprune_stand_in", False):
                setattr(holder, name, copy.deepcopy(table))
                holder.__dict__["has_relative_attention_bias"] = True


def set_size(layer: nn.Module, path: str, value: int | str) -> None:
    """Set an attribute of a module in `layer`; of its config, for that module alone."""
    owner, _, attribute = path.rpartition(".")
    if owner.split(".")[-1] != "config":
        setattr(layer.get_submodule(owner), attribute, value)
        return
    module: Any = layer.get_submodule(owner.rpartition(".")[0])
    if hasattr(module.config, "kprune_config"):
        module.config.__dict__[attribute] = value
    else:
        module.config = ConfigView(module.config, {attribute: value})


def get_size(layer: nn.Module, path: str) -> Any:
    """The value that `set_size` sets; None if there is no such module or attribute."""
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def set_slices(layer: nn.Module, path: str, dim: int, indices: torch.Tensor) -> None:
    """Keep these indices of a dimension of the parameter or buffer at `path`; nothing if there is none."""
    old = get_size(layer, path)
    if old is not None:
        owner, _, name = path.rpartition(".")
        part = old.detach().index_select(dim, indices.to(old.device))
        module = layer.get_submodule(owner)
        if isinstance(old, nn.Parameter):
            set_parameter(module, name, part, old.requires_grad)
        else:
            setattr(module, name, part)


def shrink_layer(layer: nn.Module, block: BlockPlan, index: int) -> None:
    """Set the modules of one block in layer number `index` to the sizes of `block["kept"][index]` units."""
    kept = block["kept"][index]
    core = layer.get_submodule(block["core"]) if block["core"] and kept is not None else None
    if kept is None or getattr(core, "is_kprune_stand_in", False):
        return
    for path, (width, fixed) in block["rows"].items():
        if has(layer, path):
            resize(layer, path, rows=kept * width + fixed)
    for path, width in block["table"].items():
        resize(layer, path, rows=kept * width)
    for path, width in block["columns"].items():
        resize(layer, path, columns=kept * width)
    for path, (dim, width) in block["slices"].items():
        set_slices(layer, path, dim, torch.arange(kept * width, device="cpu"))
    for path, factor in block["sizes"].items():
        if get_size(layer, path) is not None:
            set_size(layer, path, kept * factor)
    if block["kind"] == "experts":
        adapt_experts(layer, block, kept)
    if core is None:
        return
    if kept == 0:
        (output,) = block["columns"]
        within = output.removeprefix(block["core"] + ".") if output.startswith(block["core"] + ".") else None
        inside = within and within.partition(".")[0]  # it may lie in a module that clips what it gives
        replaced: Any = type(core)
        layer.set_submodule(block["core"], empty_attention(replaced)(core, block, inside))
    else:
        select_heads(core, block, index)


def adapt_experts(layer: nn.Module, block: BlockPlan, kept: int) -> None:
    """Let what runs the experts of a layer, or reads what their router gives, take those that are left."""
    if block.get("by") == WHOLE:
        pad_logits(layer.get_submodule(block["router"]), block["of"])
    elif kept == 0 or kept % ALIGNED:
        set_size(layer, f"{output_of(block)}.config._experts_implementation", "eager")


def output_of(block: BlockPlan) -> str:
    """Path of the module that gives the output of a block: a projection, or all experts of a layer."""
    experts = (path.removesuffix(".down_proj") for path in block["slices"] if path.endswith(".down_proj"))
    return next(experts, "") if block["kind"] == "experts" else next(iter(block["columns"]), "")


def select_heads(core: nn.Module, block: BlockPlan, index: int) -> None:
    """Pass on to the attention `core` of layer number `index` only what is for the heads that it keeps."""
    for key in [key for key, hook in core._forward_pre_hooks.items() if getattr(hook, "argument", None)]:
        del core._forward_pre_hooks[key], core._forward_pre_hooks_with_kwargs[key]
    for argument, (where, heads) in block["select"].items():
        select = SelectHeads(argument, where, block["of"] * block["heads"], heads[index])
        core.register_forward_pre_hook(select, with_kwargs=True)


def has(layer: nn.Module, path: str) -> bool:
    """Whether there is a module at `path`."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def digest(stacks: list[StackPlan]) -> str:
    """Checksum of the plan: some edits, such as other kept heads, would leave all sizes as they are."""
    return hashlib.sha256(json.dumps(stacks, sort_keys=True).encode()).hexdigest()


def dense_sizes(layer: nn.Module, block: BlockPlan) -> Iterator[tuple[str, Any, int, int]]:
    """What a block narrows in a dense layer: path, size, how much each unit has, how much belongs to none."""
    for path, (width, fixed) in block["rows"].items():
        if has(layer, path):
            name = f"{path}.{SIZES[kind_of(layer.get_submodule(path))][0]}"
            yield name, get_size(layer, name), width, fixed
    for path, width in block["columns"].items():
        name = f"{path}.{SIZES[kind_of(layer.get_submodule(path))][1]}"
        yield name, get_size(layer, name), width, 0
    for path, width in block["sizes"].items():
        if (size := get_size(layer, path)) is not None:
            yield path, size, width, 0
    for path, (dim, width) in block["slices"].items():
        if (parameter := get_size(layer, path)) is not None:
            yield path, parameter.shape[dim], width, 0


def check_plan(stack: StackPlan, layers: Layers) -> None:
    """Refuse a stack of the plan that does not fit the dense `layers`, before anything is built from it."""
    where = f"config.json: the kprune plan of {stack['layers']}"
    for block in stack["blocks"]:
        kept, of, kind = block["kept"], block["of"], block["kind"]
        if len(kept) != len(layers):
            raise CheckpointError(f"{where} lists {len(kept)} layers for {kind}, the model has {len(layers)}")
        for index, (layer, units) in enumerate(zip(layers, kept, strict=True)):
            others = (b for b in stack["blocks"] if b is not block and output_of(b) == output_of(block))
            apart = any(other["kept"][index : index + 1] not in ([], [None]) for other in others)
            paths = (output_of(block), *block["rows"])
            stays = apart or index in block.get("stays", ())
            if units is None and (stays or not all(has(layer, path) for path in paths)):
                continue
            for path, size, width, fixed in dense_sizes(layer, block):
                if size != of * width + fixed:
                    raise CheckpointError(
                        f"{where} prunes {of!r} {kind} units of size {width!r} of {path}, which is {size} in "
                        "the model that the rest of the config describes"
                    )
            if type(units) is not int or not 0 <= units <= of:
                raise CheckpointError(
                    f"{where} keeps {units!r} {kind} units in layer {index}, expected a whole number from 0 "
                    f"to {of}"
                )


def shrink(model: nn.Module) -> nn.Module:
    """Shrink `model`, built at its dense sizes, to the plan in its config, in place. Twice is as once.

    A stack that `model` lacks is passed over: an encoder alone has a part of the layers.

    Raises `CheckpointError` if the plan is of a later format, does not fit the model or contradicts itself.
    """
    plan = plan_of(model.config)
    if plan is None:
        return model
    try:
        if plan["format"] != FORMAT:
            raise CheckpointError(
                f"config.json: kprune format is {plan['format']!r}, expected {FORMAT}; upgrade hf_kprune"
            )
        todo = []
        for stack in plan["stacks"]:
            layers = find_layers(model, stack["layers"])
            if layers is not None and getattr(layers, "kprune_stack", None) != stack:
                check_plan(stack, layers)
                todo.append((stack, layers))
        if digest(plan["stacks"]) != plan["sha256"]:
            raise CheckpointError(
                "config.json: the kprune plan was changed after it was saved; restore the config.json that "
                "was"
            )
        for stack, layers in todo:
            for block in stack["blocks"]:
                give_tables(layers, block)
                for index, layer in enumerate(layers):
                    shrink_layer(layer, block, index)
            layers.__dict__["kprune_stack"] = stack
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"config.json: the kprune plan cannot be followed: {type(error).__name__}: {error}"
        ) from error
    return model


def plan_of(config: object) -> Plan | None:
    """The plan in a config or its dictionary; None without, also if `kprune` is another library's field."""
    plan = config.get("kprune") if isinstance(config, dict) else getattr(config, "kprune", None)
    if isinstance(plan, dict) and len({"format", "sha256", "stacks"} & plan.keys()) > 1:
        return cast(Plan, plan)
    return None


def stacks_of(config: object) -> list[StackPlan]:
    """The stacks of the plan in a config; none if there is no plan."""
    plan = plan_of(config)
    return plan["stacks"] if plan else []


def is_pruned(config: Any) -> bool:
    """Whether a config, or one inside it (a tower of CLIP's), has a plan; of a config or its dictionary."""
    values = config if isinstance(config, dict) else config.to_dict()
    return plan_of(values) is not None or any(
        is_pruned(value) for value in values.values() if isinstance(value, dict)
    )


def unseal(config: Any) -> Any:
    """Drop the notice that keeps plain transformers from loading this checkpoint at its dense sizes."""
    if any(words in str(getattr(config, "transformers_weights", "")) for words in SEALS):
        if not is_pruned(config):
            raise CheckpointError(
                "config.json says that this checkpoint is pruned, but its kprune plan is missing or no "
                "plan; restore the config.json that was saved"
            )
        del config.transformers_weights
    return config


def edit_config(directory: str | os.PathLike[str], **entries: object) -> None:
    """Set entries of the config.json of a pruned model, or delete those that are None. Adapters have none."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if is_pruned(config):
        config = {
            name: value
            for name, value in {**config, **entries}.items()
            if value is not None or name not in entries
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def seal(directory: str | os.PathLike[str]) -> None:
    """Write the notice where plain transformers stops at it and prints it, and take away the record of other
    weights.

    Without the notice, plain transformers would build the dense model, and with
    `ignore_mismatched_sizes=True` fill it with random weights.
    """
    edit_config(directory, transformers_weights=NOTICE, **{RECORD: None})


def tensors_of(file: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Dtype and shape of every tensor in a safetensors file, by name. Only the head of the file is read."""
    with safe_open(file, "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        return {name: [part.get_dtype(), *part.get_shape()] for name, part in slices.items()}


def sha256_of(file: str | os.PathLike[str]) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def record_weights(directory: str | os.PathLike[str]) -> None:
    """Write into config.json what the weight files of a pruned model are: their sha256 and their tensors."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if RECORD not in config and is_pruned(config):
        files = sorted(
            file for file in path.parent.glob("*.safetensors") if not file.name.startswith("adapter_")
        )
        record = {file.name: {"sha256": sha256_of(file), "tensors": tensors_of(file)} for file in files}
        edit_config(directory, **{RECORD: record or None})


def check_record(name: object, record: dict[str, FileRecord], **options: object) -> None:
    """Refuse weight files that lack tensors which were saved in them, or hold others by their names.

    Values are not looked at, which takes about a second for a gigabyte: `hf-kprune inspect --verify` does.

    Args:
        name: Of the checkpoint, as in `from_pretrained`.
        record: Of its config, see `record_weights`.
        options: Of `from_pretrained`, to find the files by.
    """
    options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None} | {
        "local_files_only": True
    }
    for file, entry in record.items():
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path is None:  # of another variant, which was not asked for
            continue
        saved, there = entry["tensors"], tensors_of(path)
        lost = sorted(saved.keys() - there.keys())
        if lost:
            raise CheckpointError(
                f"{name}: {len(lost)} tensors that were saved in {file} are missing from it, such as "
                f"{lost[0]}; get the file again"
            )
        if surplus := sorted(there.keys() - saved.keys()):
            raise CheckpointError(
                f"{name}: {surplus[0]} is in {file}, but was not saved in it; get the file again"
            )
        for key, (dtype, *shape) in saved.items():
            now, *size = there[key]
            if size != shape or ("F" in now) != ("F" in dtype):
                raise CheckpointError(
                    f"{name}: {key} is {now} of {size} in {file}, where {dtype} of {shape} was saved; get "
                    "the file again"
                )


def inner_models(model: nn.Module) -> list[PreTrainedModel]:
    """`model` and the models inside it (its base model, its towers), outermost first."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def load_checked(
    load: Any, name: object, *args: Any, output_loading_info: bool = False, **kwargs: Any
) -> Any:
    """Call `load`, a `from_pretrained`, and refuse a pruned model if the files lack a pruned layer."""
    try:
        model, info = load(name, *args, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or name is None:
            raise
        config = kwargs.pop("config", None) or name
        if not isinstance(config, PreTrainedConfig):
            config = PreTrainedConfig.get_config_dict(config, **kwargs)[0]
        if not is_pruned(config):
            if (config if isinstance(config, dict) else config.to_dict()).get("pruned_heads"):
                raise CheckpointError(f"{name}: {LEGACY}") from error
            raise
        raise CheckpointError(f"{name}: {MISFIT}, see the table above") from error
    stacks = []
    for inner in inner_models(model):
        named = stacks_of(inner.config)
        stacks += named
        if inner is model and named and not any(find_layers(model, stack["layers"]) for stack in named):
            lacked = ", ".join(stack["layers"] for stack in named)
            raise CheckpointError(
                f"config.json: {type(model).__name__} lacks {lacked}, which the kprune plan names"
            )
    random = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    lost = [key for key in random if any(f"{stack['layers']}." in key for stack in stacks)]
    if lost:
        raise CheckpointError(
            f"{name}: {MISFIT}: {len(lost)} tensors are missing or of another size, such as {min(lost)}"
        )
    record = model.config.__dict__.pop(RECORD, None) or {}
    if name is not None and kwargs.get("state_dict") is None:
        check_record(name, record, **kwargs)
    alike = stacks and type(model).__name__ in (model.config.architectures or ())
    if alike and info["missing_keys"] and getattr(model, "hf_quantizer", None) is None:
        lost = sorted(info["missing_keys"])
        raise CheckpointError(f"{name}: {MISFIT}: {len(lost)} tensors are missing, such as {lost[0]}")
    return (model, info) if output_loading_info else model


class KPruneMixin(PreTrainedModel):
    """What a stock model class needs to load and save a pruned checkpoint by itself."""

    def post_init(self) -> None:
        for inner in inner_models(self):
            shrink(inner)
        super().post_init()
        spare_empty(self)

    @classmethod
    def from_pretrained(cls, name: object, *args: object, config: object = None, **kwargs: Any) -> Any:
        if not isinstance(config, PreTrainedConfig):
            hub_options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
            source = config or name
            config, kwargs = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **hub_options, **kwargs
            )
            kwargs.update(hub_options)
        return load_checked(super().from_pretrained, name, *args, config=unseal(config), **kwargs)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: object, **kwargs: object
    ) -> None:
        auto_map = (
            getattr(self.config, "auto_map", None) or {}
        )  # of a Hub model: "repository--modeling_kprune.BertModel"
        self.config.auto_map = {auto: target.split("--")[-1] for auto, target in auto_map.items()}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            seal(save_directory)
            record_weights(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: object, **kwargs: object) -> Any:
        seal(working_dir)  # save_pretrained(push_to_hub=True) uploads before it returns
        record_weights(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """A static cache takes the heads of each layer as it comes."""

    @classmethod
    def dense_class(cls) -> Any:
        """The class that this one is but for sizes."""
        return cls.__mro__[cls.__mro__.index(KPruneMixin) + 1]

    @classmethod
    def is_custom_code(cls) -> bool:
        return bool(
            cls.dense_class().is_custom_code()
        )  # the conversions of weight names of a stock class apply

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(
            cls.dense_class()._can_set_attn_implementation()
        )  # reads the source file of the class it is asked of


def narrowed(dense: Any, module: str) -> Any:
    """The class that loads pruned checkpoints of a model class, of the same name in `module`."""
    bases = (KPruneMixin, dense) + ((GenerationMixin,) if issubclass(dense, GenerationMixin) else ())
    return type(dense.__name__, bases, {"__module__": module, "__doc__": dense.__doc__})


def __getattr__(name: str) -> Any:
    """Make `modeling_kprune.BertModel` and the like, stock classes with `KPruneMixin`, when asked for."""
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = narrowed(stock, __name__)
    return globals()[name]
