"""`Workbench`: layers that lie in 16 bits, on another device or on disk, and come to the device in float32,
one at a time.

What is measured and fitted is computed in float32 on one device. A model that lies there as a whole needs no
workbench. Of another one everything around the layers is brought there once and for all (`on_workbench`), and
each layer when it is run, until the next one is. So is the head over a vocabulary; a table of words stays in
16 bits, and what is looked up there goes on in float32.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from .offload import Folder, Source, Weights, duplicate, is_dispatched, plain_memo, sources_of, without_hooks
from .sublayers import Sublayer


BENCH = "kprune_workbench"
"""Attribute of a model that has a workbench."""

HALF_PRECISION = (torch.float16, torch.bfloat16)

APART = 2**22
"""Bytes from which a tensor is given back to the system as soon as it is free."""

LARGEST = 2**25
"""The bytes to which glibc raises that size by itself; it keeps twice as many at the end of its heap."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""The numbers by which glibc's malloc.h calls both, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD."""


def in_half_precision(value: PreTrainedModel | Tensor) -> bool:
    """Whether a model or a tensor is of 16 bits a number."""
    return value.dtype in HALF_PRECISION


class Workbench:
    """Brings layers to the device in float32, one at a time.

    A layer that was not changed gets its tensors back. One that was cut or tuned is stored as it was before,
    in its dtype, and on disk if it came from there.

    Args:
        layers: All layers of a model, and its head over a vocabulary.
        device: Where they are worked on.
        sources: Of those tensors that are not in memory, by number of the layer and name.
        to_disk: Whether the layers that have such tensors are stored on disk again, or else in memory.
        tables: Of words, see `words_of`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        device: torch.device,
        sources: Mapping[tuple[int, str], Source],
        to_disk: bool,
        tables: Sequence[nn.Module] = (),
    ):
        self.layers, self.device, self.sources = list(layers), device, dict(sources)
        self.folder = Folder()
        self.on_disk = {number for number, _ in self.sources} if to_disk else set()
        self.current: int | None = None
        self.away: dict[str, Tensor] = {}
        self.here: dict[str, weakref.ref[Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self.on_run, prepend=True)
        self.tables = list(tables)
        for table in self.tables:
            table.register_forward_hook(as_float32)

    def on_run(self, layer: nn.Module, _args: object) -> None:
        """Bring a layer that is about to run, unless it is only to pass its input on."""
        if "forward" not in layer.__dict__:
            self.bring(layer)

    def bring(self, layer: nn.Module) -> None:
        """Bring a layer to the device, and put the one that is there away."""
        number = next(i for i, each in enumerate(self.layers) if each is layer)
        if number == self.current:
            return
        self.put_away()
        self.current = number
        for name, slot, key, tensor in slots(layer):
            source = self.sources.get((number, name))
            value = on_device(tensor if source is None else source.load(), self.device)
            slot[key] = value if value is tensor else as_stored(value, tensor)
            # what is cut away goes: only whether a tensor is still the same one is to be known
            self.away[name], self.here[name] = tensor, weakref.ref(slot[key])

    def put_away(self) -> None:
        """Put the layer that is on the device where it came from."""
        if self.current is None:
            return
        number, layer = self.current, self.layers[self.current]
        dtypes = [tensor.dtype for tensor in self.away.values() if in_half_precision(tensor)]
        changed = dict[str, Tensor]()
        for name, slot, key, tensor in slots(layer):
            here = self.here.get(name)
            if here is not None and here() is tensor:
                slot[key] = self.away[name]
                continue
            before = self.away.get(name, tensor)
            dtype = before.dtype if name in self.away else [*dtypes, tensor.dtype][0]
            device = torch.device("cpu") if before.device.type == "meta" else before.device
            changed[name] = slot[key] = as_stored(tensor.detach().to(device, dtype), tensor)
            self.sources.pop((number, name), None)
        if number in self.on_disk:
            # buffers stay in memory, where accelerate looks for them
            heavy = {name: t for name, t in changed.items() if t.numel() and isinstance(t, nn.Parameter)}
            new = self.folder.write(heavy)
            for name, slot, key, tensor in slots(layer):
                if name in new:
                    self.sources[number, name] = new[name]
                    slot[key] = as_stored(tensor.detach().to("meta"), tensor)
        self.current, self.away, self.here = None, {}, {}
        give_back_memory()

    def leave(self) -> None:
        """Put all layers away, and take the hooks off them."""
        self.put_away()
        for layer in self.layers:
            for key, hook in list(layer._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del layer._forward_pre_hooks[key]
        for table in self.tables:
            for key, lift in list(table._forward_hooks.items()):
                if lift is as_float32:
                    del table._forward_hooks[key]


def as_float32(_table: nn.Module, _words: object, rows: Tensor) -> Tensor:
    """Rows of a table of 16 bits, as if the table were in float32."""
    return rows.float() if in_half_precision(rows) else rows


def give_back_memory() -> None:
    """Give memory that is free back to the system, where the C library would keep it.

    What stays comes to lie in the gaps that a layer leaves, so that the next layer or matrix does not fit
    there any more, and glibc's heap would grow with every layer.
    """
    if (trim := c_function("malloc_trim")) is not None:
        trim(0)


@contextmanager
def large_tensors_apart() -> Iterator[None]:
    """Within this context each large tensor is given back to the system as soon as it is free, where the C
    library is glibc and nobody has chosen otherwise.

    glibc raises the size from which it does so to that of the largest tensor that was freed, up to `LARGEST`.
    Smaller ones then come to lie in a heap, whose gaps stay with the process. To ask for memory anew each
    time takes longer, so afterwards the size is what glibc would have raised it to.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    by_user = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in tunables
    mallopt = None if by_user else c_function("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, APART)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)


def c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library of Linux, if it has one of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Where the tensors of a module and of those in it are: the name of each, the dictionary that has it, its
    key in there, and the tensor."""
    for path, inner in list(module.named_modules()):
        for slot in (inner._parameters, inner._buffers):
            for key, tensor in list(slot.items()):
                if tensor is not None:
                    yield f"{path}.{key}" if path else key, cast(dict[str, Any], slot), key, tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, floats of 16 bits in float32."""
    dtype = torch.float32 if in_half_precision(tensor) else tensor.dtype
    return tensor if is_on(tensor, device) and tensor.dtype == dtype else tensor.detach().to(device, dtype)


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device, which may be named without a number."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """A value as a parameter without a gradient, or as a buffer, whichever `like` is."""
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


def layers_of(sublayers: Sequence[Sublayer]) -> list[nn.Module]:
    """All layers of the stacks of a model, those without sublayers of ours among them."""
    stacks = {id(sublayer.layers): sublayer.layers for sublayer in sublayers}
    return [layer for stack in stacks.values() for layer in stack]


def words_of(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The tables of words of a model, and its head over them: what need not be in float32 all the time. None,
    if it has no such head, or a class of its own takes the same weights."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return [], []
    weights = {id(head.weight), id(getattr(model.get_input_embeddings(), "weight", None))}
    owners = [m for m in model.modules() if any(id(tensor) in weights for tensor in m._parameters.values())]
    tables = [owner for owner in owners if owner is not head]
    return (tables, [head]) if all(type(table) is nn.Embedding for table in tables) else ([], [])


def needs_workbench(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model is not on the device as a whole, or has weights of 16 bits."""
    tensors = [*model.parameters(), *model.buffers()]
    return any(not is_on(tensor, device) or in_half_precision(tensor) for tensor in tensors)


def on_workbench(
    model: PreTrainedModel, sublayers: Sequence[Sublayer], device: torch.device
) -> PreTrainedModel:
    """A copy of a model that computes in float32 on one device, and shares the weights of the layers.

    Args:
        model: The model, on any devices.
        sublayers: Its sublayers.
        device: Where the copy computes.
    """
    sources, layers = sources_of(model), layers_of(sublayers)
    inside = {id(tensor) for layer in layers for _, _, _, tensor in slots(layer)}
    tables, head = words_of(model)
    words = {id(tensor) for module in tables + head for _, _, _, tensor in slots(module)}
    memo: dict[int, Any] = plain_memo(model)
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
        if id(tensor) not in inside:
            source = sources.get(id(tensor))
            value = tensor.detach() if source is None else source.load()
            value = value.to(device) if id(tensor) in words else on_device(value, device)
            memo[id(tensor)] = as_stored(value, tensor)
    copied = without_hooks(duplicate(model, memo))
    names = {id(module): name for name, module in model.named_modules()}
    elsewhere = {
        (number, name): sources[id(tensor)]
        for number, layer in enumerate(layers)
        for name, _, _, tensor in slots(layer)
        if id(tensor) in sources
    }
    to_disk = "disk" in getattr(model, "hf_device_map", {}).values()
    copies, copies_of_tables = (
        [copied.get_submodule(names[id(module)]) for module in modules] for modules in (layers + head, tables)
    )
    copied.__dict__[BENCH] = Workbench(copies, device, elsewhere, to_disk, copies_of_tables)
    return copied


def off_workbench(student: PreTrainedModel, model: PreTrainedModel) -> None:
    """Make a student, changed in place, lie where the model does that it is a copy of: in the same modules in
    memory, on other devices or on disk."""
    bench = leave_workbench(student)
    if bench is None or not is_dispatched(model):
        return
    places = cast(dict[str, Any], model.hf_device_map)
    names = {id(module): name for name, module in student.named_modules()}
    weights = Weights()
    for (number, name), source in bench.sources.items():
        weights[f"{names[id(bench.layers[number])]}.{name}"] = source
    main = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
    for path, place in places.items():
        if place == "disk" or (place == "cpu" and main != "cpu"):
            around = student.get_submodule(path).named_parameters(path)
            rest = {name: tensor for name, tensor in around if name not in weights}
            weights |= {name: Source(partial(Tensor.detach, tensor)) for name, tensor in rest.items()}
            if place == "disk":
                weights |= bench.folder.write(
                    {name: tensor for name, tensor in rest.items() if tensor.numel()}
                )
    skip = getattr(student, "_skip_keys_device_placement", None)
    dispatch_model(student, dict(places), main, weights, offload_index={}, skip_keys=skip, force_hooks=True)


def clear_workbench(model: PreTrainedModel) -> None:
    """Put the layer away that is on the workbench of a model, if the model is on one."""
    if (bench := workbench_of(model)) is not None:
        bench.put_away()


def leave_workbench(model: PreTrainedModel) -> Workbench | None:
    """Take a model off its workbench, if it is on one, which is returned."""
    bench = workbench_of(model)
    if bench is not None:
        bench.leave()
        del model.__dict__[BENCH]
    return bench


def workbench_of(model: nn.Module) -> Workbench | None:
    """The workbench of a model, if it needs one."""
    return cast("Workbench | None", model.__dict__.get(BENCH))
