"""Make a model compute a part of itself: forward hooks, owned by contexts that always remove them. Torch
only. What is run by them is in runs.py.

A model is carried upwards one sublayer at a time. What is carried is a `State`: for each stack the input of
the layer that has been reached, and inside that layer the outputs of the sublayers that have run. To go on
from there the model's own forward is called, with the layers below passing the input on and those sublayers
answering with their outputs, so masks, positions, the way outputs join, and heads stay the model's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..modeling_kprune import fill, parameter_names
from .projections import features_of, oriented, output_of
from .sublayers import Sublayer


class Stop(Exception):  # noqa: N818
    """Ends a forward pass once what it was run for has been seen."""


def part_of(tensor: Tensor, start: int, stop: int, samples: int) -> Tensor:
    """What belongs to the samples from `start` to `stop` out of `samples`, each of which may be several
    entries."""
    return tensor[start * len(tensor) // samples : stop * len(tensor) // samples]


@dataclass(frozen=True)
class State:
    """How far a batch of B sequences has been carried. At first nowhere: then the model begins by itself.

    Args:
        inputs: For each stack (by the path of its layers) what its current layer reads, or, above it, what it
            gave: (B, T, D). And what layers below have made for later ones, see `shared_in`, or have given
            to the model, see `outlet`.
        outputs: Outputs of the sublayers of the current layer that have run, by name, (B, T, D).
        later: Of a layer that runs several times, what it is to read instead of what it gave before, each
            time after the first, (B, T, D). Where it is run by itself, there is none.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    later: Sequence[Tensor] = ()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *self.outputs.values()))

    @property
    def device(self) -> torch.device:
        """Where it is; nowhere yet is in the machine's memory."""
        tensors = [*self.inputs.values(), *self.outputs.values()]
        return tensors[0].device if tensors else torch.device("cpu")

    def part(self, start: int, stop: int, samples: int) -> State:
        """That of the samples from `start` to `stop` out of `samples`, which may be several sequences
        each."""

        def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: part_of(tensor, start, stop, samples) for name, tensor in tensors.items()}

        return State(of(self.inputs), of(self.outputs))


def first(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """The hidden states in what a layer is called with."""
    return cast(Tensor, args[0] if args else kwargs[name_of_first(kwargs)])


def with_first(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with other hidden states."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, name_of_first(kwargs): hidden})


def name_of_first(kwargs: Mapping[str, object]) -> str:
    """The name of the hidden states of a layer that gets them by name: the usual one, or that which comes
    first."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def by_token(tensor: Tensor, like: Tensor) -> Tensor:
    """(B, T, C) from what some models flatten to (B * T, C), or arrange as the picture that it is of, or as
    windows on that.

    Args:
        tensor: (B, T, C), (B * T, C), (B, height, width, C), (B * height, width, C) or (B * windows, height,
            width, C).
        like: Of the same samples, (B, ...).
    """
    in_rows = like.dim() == 4 and tensor.shape[:2] == (like.shape[:2].numel(), like.shape[2])
    if tensor.dim() == 3 and not in_rows:
        return tensor
    return tensor.reshape(len(like), tensor.shape[:-1].numel() // len(like), tensor.shape[-1])


def in_turn(parts: Sequence[Tensor]) -> Tensor:
    """What was seen of a sublayer each time that it ran, (B, T, ...), one after the other: (B, T * times,
    ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def hidden_states(returns: Any, output: Any) -> Tensor:
    """The hidden states in what a layer returned, see `Stack.returns`."""
    return cast(Tensor, output if isinstance(output, Tensor) else output[list(returns).index("y")])


def carried(sublayer: Sublayer, hidden: Tensor) -> Tensor:
    """What a layer of the stack of `sublayer` reads or gives, as it is carried: (B, T, D) as it is, the V
    versions of it that some hand on, (V, B, T, D), side by side, (B, T, V * D), and one sequence without a
    batch, (T, D), as a batch of one."""
    if sublayer.stack.packed:
        return hidden.unsqueeze(0)
    return hidden.permute(1, 2, 0, 3).flatten(2) if sublayer.stack.versions else hidden


def handed(sublayer: Sublayer, hidden: Tensor) -> Tensor:
    """What a layer of the stack of `sublayer` reads or gives, from how it is carried."""
    if sublayer.stack.packed:
        return hidden.squeeze(0)
    if not sublayer.stack.versions:
        return hidden
    count = getattr(sublayer.owner.config, sublayer.stack.versions)  # its weights may be gone
    return cast(Tensor, hidden.unflatten(2, (count, -1))).permute(2, 0, 1, 3)


def note_form(sublayer: Sublayer, output: Any) -> None:
    """Note what a layer of the stack of `sublayer` has returned, where it is not what its family says.

    Releases of transformers differ in whether the hidden states come alone or in a tuple.
    """
    declared = sublayer.stack.returns
    if isinstance(output, Tensor):
        form: Any = "y"
    elif isinstance(declared, tuple) and len(output) == len(declared):
        form = declared
    else:
        form = ("y", *[None] * (len(output) - 1))
    sublayer.layers.__dict__["kprune_form"] = form


def form_of(sublayer: Sublayer) -> Any:
    """What a layer of the stack of `sublayer` returns: as the last one that ran did, or else as its family
    says."""
    return sublayer.layers.__dict__.get("kprune_form", sublayer.stack.returns)


def outlet(stack: str, index: int) -> str:
    """The name in a state of what the layer of a stack has given to the model, where it reads that too."""
    return f"{stack}#{index}"


def stack_of(name: str) -> str:
    """The stack that what has this name in a state is of."""
    return name.partition("#")[0]


def shared_in(sublayer: Sublayer, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What layers have made for later ones of their stack (`Stack.shares`), tensor by tensor, by names that
    begin with that of the stack."""
    states = kwargs.get(sublayer.stack.shares)
    if not isinstance(states, Mapping):
        states = {} if states is None else {sublayer.stack.shares: (states,)}
    return {
        f"{sublayer.stack_name}/{name}/{place}": tensor
        for name, tensors in states.items()
        for place, tensor in enumerate(tensors)
    }


def share(sublayer: Sublayer, kwargs: dict[str, Any], state: State) -> None:
    """Give the layers of a stack what those below them have made, as `shared_in` has seen it."""
    shared: dict[str, list[Tensor]] = {}
    for path, tensor in state.inputs.items():
        stack, *names = path.split("/")
        if stack == sublayer.stack_name and names:
            shared.setdefault(names[0], []).append(tensor)
    for name, tensors in shared.items():
        if name == sublayer.stack.shares:  # a tensor by itself
            (kwargs[name],) = tensors
        else:
            kwargs[sublayer.stack.shares][name] = tuple(tensors)


@contextmanager
def hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., object]) -> Iterator[None]:
    """Let `module` compute `function` instead of its own forward."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def featured(sublayer: Sublayer, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `function` see what the output projection of a sublayer reads, (B, T, C) or (B * T, C), and give
    what it is to read instead."""
    output = sublayer.output
    if sublayer.is_mixture:  # nothing in a forward pass of theirs reads the features of all of them

        def forward(*arguments: Tensor) -> Tensor:
            return output_of(output, function(features_of(output, arguments)))

        with forward_as(output, forward):
            yield
        return

    def replace(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (function(args[0]), *args[1:])

    with hooked(output.register_forward_pre_hook(replace)):
        yield


def answer(stack: ExitStack, sublayer: Sublayer, output: Tensor) -> None:
    """Let a sublayer that has already run answer with its `output`, without computing it."""
    block = sublayer.block
    inside = bool(block.core) and not block.norm  # what the core gives follows from this output alone
    if not inside:
        for path in sublayer.input_projections:
            projection = sublayer.layer.get_submodule(path)
            rows, zero = len(oriented(projection)), output.new_zeros(())

            def nothing(x: Tensor, *, rows: int = rows, zero: Tensor = zero) -> Tensor:
                return zero.expand(*x.shape[:-1], rows)

            stack.enter_context(forward_as(projection, nothing))
    if inside:
        core = sublayer.layer.get_submodule(block.core)
        names = parameter_names(core)
        y = output if block.output.startswith(block.core + ".") else output[..., :0]

        def core_output(*args: object, **kwargs: object) -> Any:
            return fill(block.returns, y.clone(), {**dict(zip(names, args, strict=False)), **kwargs})

        stack.enter_context(forward_as(core, core_output))
    stack.enter_context(forward_as(sublayer.output, lambda *_, **__: output.clone()))


@contextmanager
def resumed(sublayers: Sequence[Sublayer], position: int, state: State) -> Iterator[None]:
    """Within this context the model of `sublayers` computes from `sublayers[position]` up only.

    Args:
        sublayers: All sublayers of the model, bottom to top.
        position: The first that is to be computed; `len(sublayers)` for the head alone.
        state: Below it.
    """
    target = sublayers[position] if position < len(sublayers) else None
    stacks = {s.stack_name: s for s in sublayers[: position + 1]}
    with ExitStack() as stack:
        for name, sublayer in stacks.items():
            if name not in state.inputs:  # the model comes to its first layer by itself
                continue
            stream, layers = handed(sublayer, state.inputs[name]), list(sublayer.layers)
            spare = stream.detach().clone()  # some models write into what a layer gave
            if target is not None and name == target.stack_name:
                layers, times = layers[: target.index], count()

                def replace(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, object],
                    stream: Tensor = stream,
                    sublayer: Sublayer = sublayer,
                    times: Iterator[int] = times,
                    uses: int = target.uses,
                ) -> tuple[Any, dict[str, Any]]:
                    if run := next(times) % uses:
                        if not state.later:  # it reads what it gave
                            return args, kwargs
                        stream = handed(sublayer, state.later[run - 1])
                    share(sublayer, kwargs, state)
                    return with_first(args, kwargs, stream)

                stack.enter_context(hooked(target.layer.register_forward_pre_hook(replace, with_kwargs=True)))
            for index, layer in enumerate(layers):
                end = state.inputs.get(outlet(name, index))
                if end is None and len(layers) < len(sublayer.layers):
                    result = fill(form_of(sublayer), spare, {})
                    stack.enter_context(forward_as(layer, lambda *_, result=result, **__: result))
                    continue
                above = stream if end is None else handed(sublayer, end)
                stack.enter_context(forward_as(layer, partial(_give, form_of(sublayer), above)))
        for below in sublayers[:position]:
            if below.name in state.outputs:
                answer(stack, below, state.outputs[below.name])
        yield


def _give(form: Any, above: Tensor, *_: object, **__: object) -> Any:
    """Return a copy of what a layer has given, in the form in which it returns it."""
    return fill(form, above.clone(), {})


@contextmanager
def passing(sublayers: Sequence[Sublayer], position: int, state: State) -> Iterator[None]:
    """Let the layers of stacks that run earlier, but are not reached yet, pass their input on."""
    sublayer = sublayers[position]
    with ExitStack() as stack:
        others = {s.stack_name: s for s in sublayers[position:] if s.layers is not sublayer.layers}
        for later in (other for name, other in others.items() if name not in state.inputs):
            template = form_of(later)
            for layer in later.layers:

                def skip(*args: object, template: Any = template, **kwargs: object) -> Any:
                    return fill(template, first(args, kwargs), {})

                stack.enter_context(forward_as(layer, skip))
        yield
