"""Run a model from one sublayer to another: forward hooks, owned by contexts that always remove them. Torch
only.

A model is carried upwards one sublayer at a time. What is carried is a `State`: for each stack the input of
the layer that has been reached, and inside that layer the outputs of the sublayers that have run. To go on
from there the model's own forward is called, with the layers below passing the input on and those sublayers
answering with their outputs, so masks, positions, the way outputs join, and heads stay the model's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import fill, parameter_names
from .sublayers import Sublayer, oriented


class _Stop(Exception):  # noqa: N818
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
            gave: (B, T, D).
        outputs: Outputs of the sublayers of the current layer that have run, by name, (B, T, D).
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, start: int, stop: int, samples: int) -> State:
        """That of the samples from `start` to `stop` out of `samples`, which may be several sequences
        each."""

        def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: part_of(tensor, start, stop, samples) for name, tensor in tensors.items()}

        return State(of(self.inputs), of(self.outputs))


@dataclass
class Tap:
    """What one sublayer did with a batch of B sequences of T tokens.

    Args:
        stream: Residual input X of the sublayer, (B, T, D), in units of `output`; zero if that
            does not simply join the stream.
        features: Input of the output projection, (B, T, C).
        output: Output of the output projection with its bias, Sub(X), (B, T, D).
        above: The state above the sublayer.
        reads: What each of its input projections has read, each time it ran, by path, (B, T, ...).
        entry: The features in the shape in which the output projection read them.
    """

    stream: Tensor
    features: Tensor
    output: Tensor
    above: State
    reads: dict[str, list[Tensor]]
    entry: Tensor


def _first(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


def by_token(tensor: Tensor, like: Tensor) -> Tensor:
    """(B, T, ...) from what some models flatten to (B * T, ...)."""
    return tensor if tensor.dim() == like.dim() else tensor.view(*like.shape[:2], *tensor.shape[1:])


@contextmanager
def hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward(module: nn.Module, function: Callable[..., object]) -> Iterator[None]:
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


def _answer(stack: ExitStack, sublayer: Sublayer, output: Tensor) -> None:
    """Let a sublayer that has already run answer with its `output`, without computing it."""
    block = sublayer.block
    if not block.core:
        for path in sublayer.input_projections:
            projection = sublayer.layer.get_submodule(path)
            rows, zero = len(oriented(projection)), output.new_zeros(())

            def nothing(x: Tensor, *, rows: int = rows, zero: Tensor = zero) -> Tensor:
                return zero.expand(*x.shape[:-1], rows)

            stack.enter_context(_forward(projection, nothing))
    if block.core:
        core = sublayer.layer.get_submodule(block.core)
        names = parameter_names(core)
        y = output if block.output.startswith(block.core + ".") else output[..., :0]

        def answer(*args: object, **kwargs: object) -> Any:
            return fill(block.returns, y.clone(), {**dict(zip(names, args, strict=False)), **kwargs})

        stack.enter_context(_forward(core, answer))
    stack.enter_context(_forward(sublayer.output, lambda *_, **__: output.clone()))


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
            stream, layers = state.inputs[name], list(sublayer.layers)
            if target is not None and name == target.stack_name:
                layers = layers[: target.index]

                def replace(
                    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object], stream: Tensor = stream
                ) -> tuple[Any, dict[str, Any]]:
                    return (
                        ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})
                    )

                stack.enter_context(hooked(target.layer.register_forward_pre_hook(replace, with_kwargs=True)))
            for layer in layers:
                result = fill(form_of(sublayer), stream, {})
                stack.enter_context(_forward(layer, lambda *_, result=result, **__: result))
        for below in sublayers[:position]:
            if below.name in state.outputs:
                _answer(stack, below, state.outputs[below.name])
        yield


def _run(model: nn.Module, inputs: Mapping[str, object]) -> None:
    try:
        model(**inputs)
    except _Stop:
        return
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} never reached the sublayer asked for; is its family described right?"
    )


@torch.no_grad()
def run_sublayer(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sublayers: Sequence[Sublayer],
    position: int,
    state: State,
) -> Tap:
    """Run one sublayer of `model` on the state below it, with what lies between it and the next, and nothing
    else."""
    sublayer = sublayers[position]
    following = sublayers[position + 1] if position + 1 < len(sublayers) else None
    block = sublayer.block
    tensors: dict[str, Tensor] = {}
    reads: dict[str, list[Tensor]] = {}

    def on_entry(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors["input"] = _first(args, kwargs)

    def on_stream(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors.setdefault("stream", _first(args, kwargs))

    def on_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tensors["features"], tensors["output"] = args[0], output.clone()  # some models go on in place
        if following is not None and following.layer is sublayer.layer:
            raise _Stop

    def on_layer(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
        note_form(sublayer, output)

    with ExitStack() as hooks, resumed(sublayers, position, state):
        hooks.enter_context(hooked(sublayer.layer.register_forward_pre_hook(on_entry, with_kwargs=True)))
        hooks.enter_context(hooked(sublayer.layer.register_forward_hook(on_layer)))
        for path in [] if block.stream is None else block.stream.split("|"):
            reader = sublayer.layer.get_submodule(path)
            hooks.enter_context(hooked(reader.register_forward_pre_hook(on_stream, with_kwargs=True)))
        hooks.enter_context(hooked(sublayer.output.register_forward_hook(on_output)))
        hooks.enter_context(_reading(sublayer, sublayer.input_projections, reads))
        hooks.enter_context(_stopping_above(sublayer, following, tensors))
        hooks.enter_context(_passing(sublayers, position, state))
        _run(model, inputs)

    output = by_token(tensors["output"], tensors["input"])
    stream = _stream_below(sublayers, position, state, tensors, output)
    features = by_token(tensors["features"], tensors["input"])
    return Tap(stream, features, output, _state_above(sublayer, state, tensors), reads, tensors["features"])


@torch.no_grad()
def run_above(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sublayers: Sequence[Sublayer],
    position: int,
    state: State,
    features: Tensor,
) -> State:
    """The state above one sublayer of `model` from the state below it and what its output projection reads,
    in the shape in which it does (`Tap.entry`). Only this projection runs, and what comes after it."""
    sublayer = sublayers[position]
    following = sublayers[position + 1] if position + 1 < len(sublayers) else None
    output, tensors = sublayer.output(features), dict[str, Tensor]()

    with ExitStack() as hooks, resumed(sublayers, position, state):
        hooks.enter_context(_passing(sublayers, position, state))
        if following is not None and following.layer is sublayer.layer:
            below = state.inputs.get(sublayer.stack_name)
            tensors["input"] = run_to_bottom(model, inputs, sublayer) if below is None else below
            tensors["output"] = output
            return _state_above(sublayer, state, tensors)
        hooks.enter_context(_stopping_above(sublayer, following, tensors))
        _answer(hooks, sublayer, output)
        _run(model, inputs)
    return _state_above(sublayer, state, tensors)


@contextmanager
def _stopping_above(
    sublayer: Sublayer, following: Sublayer | None, tensors: dict[str, Tensor]
) -> Iterator[None]:
    """Stop where the layer of a sublayer is left, with what comes there as the tensor `"above"`. Where the
    following sublayer is in the same layer, nothing stops."""

    def on_next(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors["above"] = _first(args, kwargs)
        raise _Stop

    def on_end(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
        tensors["above"] = hidden_states(sublayer.stack.returns, output)
        raise _Stop

    with ExitStack() as hooks:
        if following is None or following.layers is not sublayer.layers:
            hooks.enter_context(hooked(sublayer.layers[-1].register_forward_hook(on_end)))
        elif following.layer is not sublayer.layer:
            hooks.enter_context(hooked(following.layer.register_forward_pre_hook(on_next, with_kwargs=True)))
        yield


def _stream_below(
    sublayers: Sequence[Sublayer], position: int, state: State, tensors: Mapping[str, Tensor], output: Tensor
) -> Tensor:
    """The residual input of a sublayer in units of its output, (B, T, D), see `Tap.stream`."""
    if "stream" not in tensors:
        return torch.zeros_like(output)
    sublayer = sublayers[position]
    below = sublayers[:position] if sublayer.stack.parallel else ()
    earlier = [state.outputs[s.name] for s in below if s.name in state.outputs]
    return by_token(tensors["stream"], tensors["input"]) / sublayer.residual + sum(earlier)


def _state_above(sublayer: Sublayer, state: State, tensors: Mapping[str, Tensor]) -> State:
    """The state above a sublayer, from that below it and what hooks saw of its input, its output and what
    comes next."""
    inputs = {**state.inputs, sublayer.stack_name: tensors["above" if "above" in tensors else "input"]}
    return State(inputs, {} if "above" in tensors else {**state.outputs, sublayer.name: tensors["output"]})


@contextmanager
def _passing(sublayers: Sequence[Sublayer], position: int, state: State) -> Iterator[None]:
    """Let the layers of stacks that run earlier, but are not reached yet, pass their input on."""
    sublayer = sublayers[position]
    with ExitStack() as stack:
        others = {s.stack_name: s for s in sublayers[position:] if s.layers is not sublayer.layers}
        for later in (other for name, other in others.items() if name not in state.inputs):
            template = form_of(later)
            for layer in later.layers:

                def skip(*args: object, template: Any = template, **kwargs: object) -> Any:
                    return fill(template, _first(args, kwargs), {})

                stack.enter_context(_forward(layer, skip))
        yield


@contextmanager
def _reading(
    sublayer: Sublayer, paths: Sequence[str], reads: dict[str, list[Tensor]], stop: bool = False
) -> Iterator[None]:
    """Collect what the input projections of `sublayer` at `paths` read, and, if told to, `stop` once each has
    been reached."""
    with ExitStack() as hooks:
        for path in paths:

            def see(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                reads.setdefault(path, []).append(args[0])
                if stop and len(reads) == len(paths):
                    raise _Stop

            hooks.enter_context(hooked(sublayer.layer.get_submodule(path).register_forward_pre_hook(see)))
        yield


@torch.no_grad()
def run_to_inputs(
    model: nn.Module,
    inputs: Mapping[str, object],
    sublayers: Sequence[Sublayer],
    position: int,
    state: State,
    paths: Sequence[str],
) -> dict[str, Tensor]:
    """What the input projections at `paths` of one sublayer of `model` read first on the state below it, (B,
    T, ...)."""
    reads: dict[str, list[Tensor]] = {}
    with resumed(sublayers, position, state), _reading(sublayers[position], paths, reads, stop=True):
        _run(model, inputs)
    return {path: tensors[0] for path, tensors in reads.items()}


def hidden_states(returns: Any, output: Any) -> Tensor:
    """The hidden states in what a layer returned, see `Stack.returns`."""
    return cast(Tensor, output if isinstance(output, Tensor) else output[list(returns).index("y")])


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


@torch.no_grad()
def run_to_bottom(model: nn.Module, inputs: Mapping[str, object], sublayer: Sublayer) -> Tensor:
    """What the first layer of the stack of `sublayer` reads, (B, T, D)."""
    streams: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        streams.append(_first(args, kwargs))
        raise _Stop

    with hooked(sublayer.layers[0].register_forward_pre_hook(stop, with_kwargs=True)):
        _run(model, inputs)
    return streams[0]


def run_to_top(model: nn.Module, inputs: Mapping[str, object], sublayers: Sequence[Sublayer]) -> State:
    """Run `model` to the top of its last stack: the state for the head alone."""
    tops: dict[str, Tensor] = {}
    stacks = {s.stack_name: s for s in sublayers}

    def on_end(name: str, sublayer: Sublayer) -> Callable[..., None]:
        def see(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
            note_form(sublayer, output)
            tops[name] = hidden_states(sublayer.stack.returns, output)
            if len(tops) == len(stacks):
                raise _Stop

        return see

    with ExitStack() as hooks:
        for name, sublayer in stacks.items():
            hooks.enter_context(hooked(sublayer.layers[-1].register_forward_hook(on_end(name, sublayer))))
        _run(model, inputs)
    return State(tops)
