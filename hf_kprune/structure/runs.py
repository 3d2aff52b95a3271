"""Run a part of a model: a sublayer, a layer, all below or above one. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import fill, parameter_names
from .hooks import (
    State,
    Stop,
    answer,
    by_token,
    carried,
    featured,
    first,
    form_of,
    forward_as,
    hidden_states,
    hooked,
    in_turn,
    note_form,
    outlet,
    passing,
    resumed,
    shared_in,
)
from .projections import features_of, output_of
from .sublayers import Sublayer


@dataclass
class Tap:
    """What one sublayer did with a batch of B sequences of T tokens, those of each time that it ran one after
    the other.

    Args:
        stream: Residual input X of the sublayer, (B, T, D), in units of `output`; zero if that
            does not simply join the stream.
        features: Input of the output projection, (B, T, C).
        output: Output of the output projection with its bias, Sub(X), (B, T, D).
        above: The state above the sublayer.
        reads: What each of its input projections has read, each time it ran, by path, (B, T, ...).
        entry: What the output projection was called with: the features in the shape in which it read them, or
            what experts were.
        runs: What its layer read each time that it ran, (B, T, D).
    """

    stream: Tensor
    features: Tensor
    output: Tensor
    above: State
    reads: dict[str, list[Tensor]]
    entry: tuple[Tensor, ...]
    runs: list[Tensor]


def stops(model: nn.Module, inputs: Mapping[str, object]) -> bool:
    """Run a model; whether a hook has stopped it."""
    try:
        model(**inputs)
    except Stop:
        return True
    return False


def run(model: nn.Module, inputs: Mapping[str, object]) -> None:
    if not stops(model, inputs):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} does not reach on inputs of {', '.join(inputs)} a sublayer that was "
            "asked for; give inputs on which all of its layers run, or mend the family that describes it"
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
    runs, streams, features, outputs = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    reads: dict[str, list[Tensor]] = {}
    entries: list[tuple[Tensor, ...]] = []

    def on_entry(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        runs.append(carried(sublayer, first(args, kwargs)))
        tensors["input"] = runs[0]

    def on_stream(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if len(streams) < len(runs):
            streams.append(first(args, kwargs))

    def on_features(read: Tensor) -> Tensor:
        features.append(read)
        return read

    def on_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entries.append(args)
        outputs.append(output.clone())  # some models go on in place
        last = len(outputs) == sublayer.uses
        if last and following is not None and following.layer is sublayer.layer:
            raise Stop

    def on_layer(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
        note_form(sublayer, output)

    with ExitStack() as hooks, resumed(sublayers, position, state):
        hooks.enter_context(hooked(sublayer.layer.register_forward_pre_hook(on_entry, with_kwargs=True)))
        hooks.enter_context(hooked(sublayer.layer.register_forward_hook(on_layer)))
        for path in [] if block.stream is None else block.stream.split("|"):
            reader = sublayer.layer.get_submodule(path)
            hooks.enter_context(hooked(reader.register_forward_pre_hook(on_stream, with_kwargs=True)))
        hooks.enter_context(featured(sublayer, on_features))
        hooks.enter_context(hooked(sublayer.output.register_forward_hook(on_output)))
        hooks.enter_context(_reading(sublayer, sublayer.input_projections, reads))
        hooks.enter_context(_stopping_above(sublayer, following, tensors))
        hooks.enter_context(passing(sublayers, position, state))
        run(model, inputs)

    output, feature, stream = (
        in_turn([by_token(tensor, tensors["input"]) for tensor in each])
        for each in (outputs, features, streams or map(torch.zeros_like, outputs))
    )
    if streams:
        stream = stream / sublayer.residual + _beside(sublayers, position, state)
    tensors["output"] = outputs[0]
    above = _state_above(sublayer, state, tensors)
    return Tap(stream, feature, output, above, reads, entries[0], runs)


def run_layer(
    model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer], places: range, state: State
) -> State:
    """The state above a layer of `model` from the state below some of its sublayers, those at `places`, the
    highest of the layer among them. With gradients enabled it is part of the graph."""
    sublayer, above = sublayers[places[-1]], places[-1] + 1
    following, tensors = sublayers[above] if above < len(sublayers) else None, dict[str, Tensor]()
    with (
        resumed(sublayers, places[0], state),
        passing(sublayers, places[0], state),
        _stopping_above(sublayer, following, tensors),
    ):
        run(model, inputs)
    return _state_above(sublayer, state, tensors)


@torch.no_grad()
def run_above(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sublayers: Sequence[Sublayer],
    position: int,
    state: State,
    entry: tuple[Tensor, ...],
) -> State:
    """The state above one sublayer of `model` from the state below it and what its output projection is
    called with (`Tap.entry`). Only this projection runs, and what comes after it."""
    sublayer = sublayers[position]
    following = sublayers[position + 1] if position + 1 < len(sublayers) else None
    features = features_of(sublayer.output, entry)
    output, tensors = output_of(sublayer.output, features), dict[str, Tensor]()

    with ExitStack() as hooks, resumed(sublayers, position, state):
        hooks.enter_context(passing(sublayers, position, state))
        if following is not None and following.layer is sublayer.layer:
            below = state.inputs.get(sublayer.stack_name)
            tensors["input"] = run_to_layer(model, inputs, sublayer) if below is None else below
            tensors["output"] = output
            return _state_above(sublayer, state, tensors)
        hooks.enter_context(_stopping_above(sublayer, following, tensors))
        answer(hooks, sublayer, output)
        run(model, inputs)
    return _state_above(sublayer, state, tensors)


@contextmanager
def _stopping_above(
    sublayer: Sublayer, following: Sublayer | None, tensors: dict[str, Tensor]
) -> Iterator[None]:
    """Stop where the layer of a sublayer is left, with what comes there as the tensor `"above"`. Where the
    following sublayer is in the same layer, nothing stops."""

    def on_next(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors["above"] = carried(sublayer, first(args, kwargs))
        tensors.update(shared_in(sublayer, kwargs))
        raise Stop

    times = count(1)

    def on_end(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
        if next(times) == sublayer.runs[-1]:
            tensors["above"] = carried(sublayer, hidden_states(sublayer.stack.returns, output))
            raise Stop

    with ExitStack() as hooks:
        if following is None or following.layers is not sublayer.layers:
            hooks.enter_context(hooked(sublayer.layers[-1].register_forward_hook(on_end)))
        elif following.layer is not sublayer.layer:
            before = following.layer.register_forward_pre_hook(on_next, with_kwargs=True, prepend=True)
            hooks.enter_context(hooked(before))
        yield


def _beside(sublayers: Sequence[Sublayer], position: int, state: State) -> Tensor | int:
    """What the sublayers beside a sublayer that have run add to its stream, (B, T, D)."""
    below = sublayers[:position] if sublayers[position].stack.parallel else ()
    return sum(state.outputs[s.name] for s in below if s.name in state.outputs)


def _state_above(sublayer: Sublayer, state: State, tensors: Mapping[str, Tensor]) -> State:
    """The state above a sublayer, from that below it and what hooks saw of its input, its output and what
    comes next."""
    top = (
        sublayer.layer is sublayer.layers[-1] and "above" in tensors
    )  # nothing reads any more what was shared
    further = {n: t for n, t in state.inputs.items() if not (top and n.startswith(f"{sublayer.stack_name}/"))}
    shared = {n: t for n, t in tensors.items() if n.startswith(f"{sublayer.stack_name}/")}
    inputs = {**further, **shared, sublayer.stack_name: tensors["above" if "above" in tensors else "input"]}
    if "above" in tensors:
        if sublayer.index in sublayer.outlets:
            inputs[outlet(sublayer.stack_name, sublayer.index)] = tensors["above"]
        return State(inputs)
    # of a layer that runs several times, the next sublayer needs all of it to run again
    return State(inputs, {**state.outputs, sublayer.name: tensors["output"]} if sublayer.uses == 1 else {})


@contextmanager
def _reading(
    sublayer: Sublayer, paths: Sequence[str], reads: dict[str, list[Tensor]], stop: bool = False
) -> Iterator[None]:
    """Collect what the input projections of `sublayer` at `paths` read, and, if told to, `stop` once each has
    been reached each time."""
    with ExitStack() as hooks:
        for path in paths:

            def see(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                reads.setdefault(path, []).append(args[0])
                if stop and len(reads) == len(paths) and min(map(len, reads.values())) >= sublayer.uses:
                    raise Stop

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
    """What the input projections at `paths` of one sublayer of `model` read on the state below it, (B, T,
    ...): first, of several ends that they serve."""
    reads: dict[str, list[Tensor]] = {}
    with resumed(sublayers, position, state), _reading(sublayers[position], paths, reads, stop=True):
        run(model, inputs)
    return {path: in_turn(tensors[: sublayers[position].uses]) for path, tensors in reads.items()}


@torch.no_grad()
def calls_of_layers(
    model: nn.Module, inputs: Mapping[str, object], sublayer: Sublayer, count: int
) -> list[dict[str, Any]]:
    """What each of the first `count` layers of the stack of `sublayer` is called with, by name, hidden states
    first, where those below pass on what they read without computing anything."""
    calls: list[dict[str, Any]] = []

    def note(names: Sequence[str], *args: object, **kwargs: object) -> object:
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})
        if len(calls) == count:
            raise Stop
        return fill(form_of(sublayer), first(args, kwargs), {})

    with ExitStack() as hooks:
        for layer in list(sublayer.layers)[:count]:
            hooks.enter_context(forward_as(layer, partial(note, parameter_names(layer))))
        run(model, inputs)
    return calls


def run_to_bottom(model: nn.Module, inputs: Mapping[str, object], sublayer: Sublayer) -> Tensor:
    """What the first layer of the stack of `sublayer` reads, (B, T, D)."""
    (call,) = calls_of_layers(model, inputs, sublayer, 1)
    return carried(sublayer, first((), call))


def run_to_layer(model: nn.Module, inputs: Mapping[str, object], sublayer: Sublayer) -> Tensor:
    """What the layer of `sublayer` reads when the model runs, (B, T, D)."""
    reads: list[Tensor] = []

    def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        reads.append(carried(sublayer, first(args, kwargs)))
        raise Stop

    with hooked(sublayer.layer.register_forward_pre_hook(note, with_kwargs=True)):
        run(model, inputs)
    return reads[0]


@torch.no_grad()
def run_to_memory(model: nn.Module, inputs: Mapping[str, object], sublayer: Sublayer) -> Tensor:
    """What the keys of `sublayer`, a cross-attention, are made of, (B, T, D)."""
    path = next(path for path in sublayer.input_projections if sublayer.source_of(path) == sublayer.reads)
    reads: dict[str, list[Tensor]] = {}
    with _reading(sublayer, [path], reads, stop=True):
        run(model, inputs)
    return reads[path][0]


def run_to_top(model: nn.Module, inputs: Mapping[str, object], sublayers: Sequence[Sublayer]) -> State:
    """Run `model` to the top of its last stack: the state for the head alone."""
    tops: dict[str, Tensor] = {}
    stacks = {s.stack_name: s for s in sublayers}

    def on_end(name: str, sublayer: Sublayer) -> Callable[..., None]:
        times = count(1)

        def see(_: nn.Module, _args: tuple[object, ...], output: object) -> None:
            if next(times) < sublayer.runs[-1]:
                return
            note_form(sublayer, output)
            tops[name] = carried(sublayer, hidden_states(sublayer.stack.returns, output))
            if stacks.keys() <= tops.keys():
                raise Stop

        return see

    with ExitStack() as hooks:
        for name, sublayer in stacks.items():
            ends = {outlet(name, index): sublayer.layers[index] for index in sublayer.outlets}
            for end, layer in {**ends, name: sublayer.layers[-1]}.items():
                hooks.enter_context(hooked(layer.register_forward_hook(on_end(end, sublayer))))
        if stops(model, inputs):
            return State(tops)
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} does not run {' and '.join(name for name in stacks if name not in tops)} to "
        f"the end on inputs of {', '.join(inputs)}; give inputs on which all of these layers run"
    )
