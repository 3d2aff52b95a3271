"""Load a K-pruned checkpoint: build the stock model, then shrink its layers to the sizes in `config.kprune`.

This file travels inside every K-pruned checkpoint, so that

    AutoModelFor....from_pretrained(checkpoint, trust_remote_code=True)

works where `hf_kprune` is not installed; `import hf_kprune` runs the same code for the stock classes themselves. It needs
torch and transformers only and knows no architecture: which modules are narrower, and by how much, is data in the config:

    "kprune": {"format": 1, "stacks": [{"layers": "encoder.layer", "parameters": 5312256, "blocks": [
        {"kind": "attention", "of": 12, "kept": [5, 0, ...],          units before pruning, and kept in each layer
         "rows": {"attention.self.query": 32, ...},                    output rows of a projection per kept unit
         "columns": {"attention.output.dense": 32},                    input columns of a projection per kept unit
         "sizes": {"attention.self.num_attention_heads": 1, ...},      attributes per kept unit
         "core": "attention.self", "returns": ["y", null],             what is replaced where no unit is kept
         "select": {}}, ...]}]}
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel


FORMAT = 1
HOW_TO_LOAD = (
    "this checkpoint is K-pruned: run `pip install hf_kprune` and `import hf_kprune` before from_pretrained, or pass "
    "trust_remote_code=True to an AutoModel class"
)


class CheckpointError(ValueError):
    """A K-pruned checkpoint whose plan, config or weights contradict each other."""


class EmptyAttention(nn.Module):
    """Stands in for an attention module without heads: adds nothing to the residual stream but its output bias."""

    is_kprune_stand_in = True

    def __init__(self, attention: nn.Module, output: str | None, returns: list[str | None]):
        super().__init__()
        self.output, self.returns = output, returns
        if output is not None:  # the projection keeps its name, so its bias keeps its key in the state dict
            self.add_module(output, attention.get_submodule(output))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden = args[0] if args else kwargs["hidden_states"]
        y = hidden[..., :0] if self.output is None else self.get_submodule(self.output)(hidden[..., :0])
        return tuple(y if entry == "y" else None for entry in self.returns)


class SelectHeads:
    """Pre-forward hook: of an argument that carries one slice per head (dimension 1), pass the kept heads on."""

    def __init__(self, argument: str, heads: list[int]):
        self.argument, self.heads = argument, heads

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        value = bound.arguments.get(self.argument)
        if value is not None:
            bound.arguments[self.argument] = value[:, self.heads]
        return bound.args, bound.kwargs


def find_layers(model: nn.Module, path: str) -> nn.ModuleList | None:
    """The list of layers at `path`, seen from `model` or from the base model inside it; None if there is none."""
    for prefix in ("", getattr(model, "base_model_prefix", "") + "."):
        try:
            found = model.get_submodule(prefix + path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    return None


def resize(layer: nn.Module, path: str, rows: int | None = None, columns: int | None = None) -> None:
    """Give the linear module at `path` this many output rows or input columns. The values are left to the loader."""
    linear = layer.get_submodule(path)
    for size, name, dim in ((rows, "out_features", 0), (columns, "in_features", 1)):
        if size is None or getattr(linear, name) == size:
            continue
        for key, old in list(linear.named_parameters(recurse=False)):
            if dim < old.dim():
                shape = list(old.shape)
                shape[dim] = size
                setattr(linear, key, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
        setattr(linear, name, size)


def shrink_layer(layer: nn.Module, block: dict[str, Any], index: int) -> None:
    """Set the modules of one block in layer number `index` to the sizes of `block["kept"][index]` units."""
    kept = block["kept"][index]
    core = layer.get_submodule(block["core"]) if block["core"] else None
    if getattr(core, "is_kprune_stand_in", False):
        return
    for path, width in block["rows"].items():
        resize(layer, path, rows=kept * width)
    for path, width in block["columns"].items():
        resize(layer, path, columns=kept * width)
    for path, factor in block["sizes"].items():
        owner, _, attribute = path.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, kept * factor)
    if core is None:
        return
    if kept == 0:
        (output,) = block["columns"]
        inside = output.removeprefix(block["core"] + ".") if output.startswith(block["core"] + ".") else None
        layer.set_submodule(block["core"], EmptyAttention(core, inside, block["returns"]))
        return
    for hook in [key for key, hook in core._forward_pre_hooks.items() if getattr(hook, "argument", None)]:
        del core._forward_pre_hooks[hook], core._forward_pre_hooks_with_kwargs[hook]
    for argument, heads in block["select"].items():
        core.register_forward_pre_hook(SelectHeads(argument, heads[index]), with_kwargs=True)


def check_plan(plan: dict[str, Any], stack: dict[str, Any], num_layers: int) -> None:
    """Refuse a stack of the plan that no model can follow, before anything is built from it."""
    for block in stack["blocks"]:
        kept, of = block["kept"], block["of"]
        if len(kept) != num_layers:
            raise CheckpointError(
                f"config.json: the kprune plan of {stack['layers']} lists {len(kept)} layers for {block['kind']}, the "
                f"model has {num_layers}; restore the config that was saved with these weights"
            )
        for layer, units in enumerate(kept):
            if type(units) is not int or not 0 <= units <= of:
                raise CheckpointError(
                    f"config.json: the kprune plan keeps {units!r} {block['kind']} units in layer {layer} of "
                    f"{stack['layers']}, expected a whole number from 0 to {of}"
                )


def shrink(model: nn.Module) -> nn.Module:
    """Shrink `model`, built at its dense sizes, to the plan in `model.config.kprune`, in place. Does nothing twice.

    Raises `CheckpointError` if the plan is of a later format, does not fit the model or contradicts itself.
    """
    plan = getattr(model.config, "kprune", None)
    if plan is None:
        return model
    if plan.get("format") != FORMAT:
        raise CheckpointError(f"config.json: kprune format {plan.get('format')!r}, this file reads {FORMAT}; {HOW_TO_LOAD}")
    for stack in plan["stacks"]:
        layers = find_layers(model, stack["layers"])
        if layers is None:
            raise CheckpointError(f"config.json: the kprune plan names {stack['layers']}, which {type(model).__name__} lacks")
        if getattr(layers, "kprune_stack", None) == stack:
            continue
        check_plan(plan, stack, len(layers))
        for index, layer in enumerate(layers):
            for block in stack["blocks"]:
                shrink_layer(layer, block, index)
        parameters = sum(p.numel() for p in layers.parameters())
        if parameters != stack["parameters"]:
            raise CheckpointError(
                f"config.json: the kprune plan gives {stack['layers']} {parameters:,} parameters, it was saved with "
                f"{stack['parameters']:,}: the config was edited or belongs to other weights"
            )
        layers.__dict__["kprune_stack"] = stack
    return model


def unseal(config: Any) -> Any:
    """Drop the notice that keeps plain transformers from loading this checkpoint at its dense sizes."""
    if getattr(config, "kprune", None) is not None and hasattr(config, "transformers_weights"):
        del config.transformers_weights
    return config


def seal(directory: str | os.PathLike[str]) -> None:
    """Write the notice `HOW_TO_LOAD` where plain transformers stops at it and prints it.

    Without it, plain transformers would build the dense model, and with `ignore_mismatched_sizes=True` fill it with
    random weights.
    """
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = HOW_TO_LOAD
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checked(load: Any, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Call `load` (a `from_pretrained`) and refuse a K-pruned model of which a pruned layer was not in the files."""
    try:
        model, info = load(name, *args, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        config = kwargs.get("config") or PreTrainedConfig.from_pretrained(name)
        if "ignore_mismatched_sizes" not in str(error) or getattr(config, "kprune", None) is None:
            raise
        raise CheckpointError(
            f"{name}: the sizes in config.json (kprune) and in the weight files differ, see the table above; they do "
            "not belong together"
        ) from error
    stacks = getattr(model.config, "kprune", None) or {"stacks": []}
    lost = [key for key in info["missing_keys"] if any(f"{s['layers']}." in key for s in stacks["stacks"])]
    if lost:
        raise CheckpointError(f"{name}: the weight files lack {len(lost)} tensors of pruned layers, such as {min(lost)}")
    return (model, info) if output_loading_info else model


class KPruneMixin(PreTrainedModel):
    """What a stock model class needs to load and save a K-pruned checkpoint by itself."""

    def post_init(self) -> None:
        shrink(self)
        super().post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **kwargs)
        return load_checked(super().from_pretrained, name, *args, config=unseal(config), **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        seal(save_directory)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # the class is the stock one but for sizes: the stock conversions of weight names apply

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        stock: Any = cls.__mro__[2]  # asked of the stock class, whose source file tells
        return bool(stock._can_set_attn_implementation())


def __getattr__(name: str) -> Any:
    """`modeling_kprune.BertModel` and the like: the stock class of that name with `KPruneMixin`, made when asked for."""
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (KPruneMixin, stock) + ((GenerationMixin,) if issubclass(stock, GenerationMixin) else ())
    made = type(name, bases, {"__module__": __name__, "__doc__": stock.__doc__})
    globals()[name] = made
    return made
