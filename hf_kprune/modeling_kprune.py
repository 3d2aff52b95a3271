"""Load a K-pruned checkpoint: build the stock model, then shrink its layers to the sizes in `config.kprune`.

This file travels inside every K-pruned checkpoint, so that

    AutoModelFor....from_pretrained(checkpoint, trust_remote_code=True)

works where `hf_kprune` is not installed; `import hf_kprune` runs the same code for the stock classes themselves. It needs
torch and transformers only and knows no architecture: which modules are narrower, and by how much, is data in the config:

    "kprune": {"format": 1, "sha256": "1f3c...", "stacks": [{"layers": "encoder.layer", "blocks": [
        {"kind": "attention", "of": 12, "kept": [5, 0, ...],          units before pruning, and kept in each layer
         "rows": {"attention.self.query": 32, ...},                    output rows of a projection per kept unit
         "columns": {"attention.output.dense": 32},                    input columns of a projection per kept unit
         "sizes": {"attention.self.num_attention_heads": 1, ...},      attributes per kept unit
         "core": "attention.self", "returns": ["y", null],             what is replaced where no unit is kept
         "select": {}}, ...]}]}
"""

import hashlib
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
MISFIT = "the plan in config.json (kprune) and the weight files do not belong together"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
    """Give the linear module at `path` this many of its output rows or input columns.

    The loader overwrites the values; a fresh model (`from_config`) keeps those it was initialised with.
    """
    linear = layer.get_submodule(path)
    for size, name, dim in ((rows, "out_features", 0), (columns, "in_features", 1)):
        if size is None or getattr(linear, name) == size:
            continue
        for key, old in list(linear.named_parameters(recurse=False)):
            if dim < old.dim():
                part = old.detach().narrow(dim, 0, size).clone()
                setattr(linear, key, nn.Parameter(part, requires_grad=old.requires_grad))
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


def digest(stacks: list[dict[str, Any]]) -> str:
    """Checksum of the plan: some edits, such as other kept heads, would leave all sizes as they are."""
    return hashlib.sha256(json.dumps(stacks, sort_keys=True).encode()).hexdigest()


def check_plan(stack: dict[str, Any], layers: nn.ModuleList) -> None:
    """Refuse a stack of the plan that does not fit the dense `layers`, before anything is built from it."""
    where = f"config.json: the kprune plan of {stack['layers']}"
    for block in stack["blocks"]:
        kept, of, kind = block["kept"], block["of"], block["kind"]
        if len(kept) != len(layers):
            raise CheckpointError(f"{where} lists {len(kept)} layers for {kind}, the model has {len(layers)}")
        for index, layer in enumerate(layers):
            sizes = [(path, "out_features", width) for path, width in block["rows"].items()]
            sizes += [(path, "in_features", width) for path, width in block["columns"].items()]
            sizes += [(*path.rpartition(".")[::2], factor) for path, factor in block["sizes"].items()]
            for path, attribute, width in sizes:
                found = getattr(layer.get_submodule(path), attribute)
                if found != of * width:
                    raise CheckpointError(
                        f"{where} prunes {of!r} {kind} units of size {width!r} of {path}.{attribute}, which is {found} in the "
                        "model that the rest of the config describes"
                    )
            if type(kept[index]) is not int or not 0 <= kept[index] <= of:
                raise CheckpointError(
                    f"{where} keeps {kept[index]!r} {kind} units in layer {index}, expected a whole number from 0 to {of}"
                )


def shrink(model: nn.Module) -> nn.Module:
    """Shrink `model`, built at its dense sizes, to the plan in `model.config.kprune`, in place. Does nothing twice.

    Raises `CheckpointError` if the plan is of a later format, does not fit the model or contradicts itself.
    """
    plan = getattr(model.config, "kprune", None)
    if plan is None:
        return model
    try:
        if plan["format"] != FORMAT:
            raise CheckpointError(f"config.json: kprune format is {plan['format']!r}, expected {FORMAT}; upgrade hf_kprune")
        todo = []
        for stack in plan["stacks"]:
            layers = find_layers(model, stack["layers"])
            if layers is None:
                raise CheckpointError(
                    f"config.json: {type(model).__name__} lacks {stack['layers']}, which the kprune plan names"
                )
            if getattr(layers, "kprune_stack", None) != stack:
                check_plan(stack, layers)
                todo.append((stack, layers))
        if digest(plan["stacks"]) != plan["sha256"]:
            raise CheckpointError(
                "config.json: the kprune plan was changed after it was saved; restore the config.json that was"
            )
        for stack, layers in todo:
            for index, layer in enumerate(layers):
                for block in stack["blocks"]:
                    shrink_layer(layer, block, index)
            layers.__dict__["kprune_stack"] = stack
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"config.json: the kprune plan cannot be followed: {type(error).__name__}: {error}") from error
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
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # adapters are saved without config
    if config.get("kprune") is not None:
        config["transformers_weights"] = HOW_TO_LOAD
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checked(load: Any, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Call `load` (a `from_pretrained`) and refuse a K-pruned model of which a pruned layer was not in the files."""
    try:
        model, info = load(name, *args, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or name is None:
            raise
        config = kwargs.pop("config", None) or name
        if not isinstance(config, PreTrainedConfig):
            config = PreTrainedConfig.get_config_dict(config, **kwargs)[0]
        if (config if isinstance(config, dict) else config.to_dict()).get("kprune") is None:
            raise
        raise CheckpointError(f"{name}: {MISFIT}, see the table above") from error
    plan = getattr(model.config, "kprune", None) or {"stacks": []}
    random = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    lost = [key for key in random if any(f"{stack['layers']}." in key for stack in plan["stacks"])]
    if lost:
        raise CheckpointError(f"{name}: {MISFIT}: {len(lost)} tensors are missing or of another size, such as {min(lost)}")
    return (model, info) if output_loading_info else model


class KPruneMixin(PreTrainedModel):
    """What a stock model class needs to load and save a K-pruned checkpoint by itself."""

    def post_init(self) -> None:
        shrink(self)
        super().post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if not isinstance(config, PreTrainedConfig):
            hub_options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
            source = config or name
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub_options, **kwargs)
            kwargs.update(hub_options)
        return load_checked(super().from_pretrained, name, *args, config=unseal(config), **kwargs)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        auto_map = getattr(self.config, "auto_map", None) or {}  # of a Hub model: "repository--modeling_kprune.BertModel"
        self.config.auto_map = {auto: target.split("--")[-1] for auto, target in auto_map.items()}
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            seal(save_directory)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        seal(working_dir)  # save_pretrained(push_to_hub=True) uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # the class is the stock one but for sizes: the stock conversions of weight names apply

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        stock: Any = next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
        return bool(stock._can_set_attn_implementation())  # reads the source file of the class it is asked of


def __getattr__(name: str) -> Any:
    """`modeling_kprune.BertModel` and the like: the stock class of that name with `KPruneMixin`, made when asked for."""
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (KPruneMixin, stock) + ((GenerationMixin,) if issubclass(stock, GenerationMixin) else ())
    made = type(name, bases, {"__module__": __name__, "__doc__": stock.__doc__})
    globals()[name] = made
    return made
