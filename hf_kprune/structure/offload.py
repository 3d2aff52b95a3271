"""What accelerate has spread over devices, memory and disk: where its tensors are, and how to read them."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..files.scratch import Scratch, remove, scratch


Model = TypeVar("Model", bound=nn.Module)

MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate replaces in a model that it has dispatched."""


class Source:
    """A tensor that is not in memory.

    Args:
        load: Reads it.
        owner: What must live as long as this.
    """

    def __init__(self, load: Callable[[], Tensor], owner: object = None):
        self.load, self.owner = load, owner

    def __deepcopy__(self, memo: object) -> Source:
        return self


class Folder:
    """A temporary folder of tensors, which is gone when nobody needs it any more."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.scratch: Scratch | None = None
        self.count = 0

    def __deepcopy__(self, memo: object) -> Folder:
        return self

    def place(self) -> Path:
        """The path of the folder, which is there from now on."""
        if self.path is None:
            self.scratch = scratch()
            self.path = self.scratch.folder()
            weakref.finalize(self, remove, self.path, os.getpid())
        return self.path

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
        """Write tensors to a new file, and say where each is."""
        file = self.place() / f"{self.count:06}.safetensors"
        self.count += 1
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        return {name: Source(partial(read, file, name), self) for name in tensors}


def read(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file."""
    with safe_open(file, "pt") as tensors:
        return cast(Tensor, tensors.get_tensor(name))


class Weights(dict[str, Source]):
    """Tensors that are read when they are asked for, by name."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name).load()


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate has spread a model over devices, memory and disk."""
    return hasattr(model, "hf_device_map") and any(hasattr(each, "_hf_hook") for each in model.modules())


def device_map(
    model: nn.Module, stacks: Collection[nn.Module], place: str, rest: str | int
) -> dict[str, str | int]:
    """A `device_map` that puts stacks of layers of a model in one place, and all else in another."""
    places = dict[str, str | int]()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if any(module is stack for stack in stacks):
            places |= {f"{path}.{name}": place for name, _ in module.named_children()}
        elif path and not any(inner is stack for inner in module.modules() for stack in stacks):
            places[path] = rest
        else:
            prefix = f"{path}." if path else ""
            pending += [(prefix + name, child) for name, child in module.named_children()]
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            places |= {prefix + name: rest for name, _ in tensors}
    return places


def read_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by name, read one at a time if they are not in memory.

    Raises:
        UnsupportedModelError: If one is nowhere.
    """
    sources = sources_of(model)
    for name, parameter in model.named_parameters():
        try:
            tensor = sources[id(parameter)].load() if id(parameter) in sources else parameter
        except KeyError as error:
            raise UnsupportedModelError(
                f"{name} is neither in memory nor in the files that {type(model).__name__} is read from; "
                "load the model with the class that it was saved by, or without a device_map, with which "
                "such a tensor is random"
            ) from error
        yield name, tensor


def read_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the state dictionary of a model holds, read one at a time if it is not in memory."""
    sources, parameters = sources_of(model), dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        source = sources.get(id(parameters.get(name)))
        yield name, tensor if source is None else source.load()


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that a module has."""
    hook = getattr(module, "_hf_hook", None)
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook] if hook is not None else []


def moves_weights(module: nn.Module) -> bool:
    """Whether all that accelerate does at a module is to bring weights and inputs to a device."""
    return all(type(hook) is AlignDevicesHook for hook in hooks_of(module))


def sources_of(model: nn.Module) -> dict[int, Source]:
    """Where the tensors are that accelerate has taken out of memory, by `id` of what is in their place."""
    sources = dict[int, Source]()
    for module in model.modules():
        for each in hooks_of(module):
            if isinstance(each, AlignDevicesHook) and each.offload and each.weights_map is not None:
                for name, tensor in module.named_parameters(recurse=each.place_submodules):
                    if tensor.device.type == "meta":
                        sources[id(tensor)] = Source(partial(each.weights_map.__getitem__, name))
    return sources


def plain_memo(model: nn.Module) -> dict[int, Any]:
    """A memo for `duplicate` that leaves the hooks of accelerate uncopied."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    return {id(hook): hook for hook in hooks}


def duplicate(model: Model, memo: Mapping[int, Any] | None = None) -> Model:
    """A copy of a model by `copy.deepcopy`.

    Hooks of modules that are methods of objects that `model` does not hold stay those, which see the copy
    then, as they have seen the model; tensors that its last run has put into its modules, as recurrent ones
    do, come without their graphs, which cannot be copied.

    Args:
        model: The model.
        memo: What else stands for parts of it in the copy, by their ids.
    """
    modules = list(model.modules())
    parts = [part for module in modules for part in (module, *vars(module).values())]
    inside = set(map(id, parts))
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for module in modules for name in names for hook in getattr(module, name).values()]
    instead: dict[int, Any] = {}
    for hook in hooks:
        owner = getattr(hook, "__self__", hook)
        if id(owner) not in inside and not isinstance(owner, partial):
            instead[id(hook)] = hook
    states = [part for part in parts if isinstance(part, Tensor) and not part.is_leaf]
    instead |= {id(tensor): tensor.detach() for tensor in states}
    return copy.deepcopy(model, {**instead, **(memo or {})})


def rebind(model: nn.Module) -> None:
    """Let what accelerate has put on a model, whose attributes were another's, call this one."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        for name in ("_old_forward", "forward"):
            model.__dict__.pop(name, None)
        add_hook_to_module(model, hook)


def without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that accelerate has dispatched, made a plain one in place; tensors stay where they
    are."""
    for module in model.modules():
        if module.__dict__.pop("_hf_hook", None) is not None:
            original = module.__dict__.pop("_old_forward", None)
            module.__dict__.pop("forward", None)
            if original is not None and getattr(original, "__func__", None) is not type(module).forward:
                module.__dict__["forward"] = original
    for name in (*MOVERS, "hf_device_map"):
        model.__dict__.pop(name, None)
    return model
