"""Run a model from one sublayer to another: forward hooks, owned by contexts that always remove them. Torch only.

A model is carried upwards one sublayer at a time. What is carried is the *stream*: before a layer its input, inside a
layer the residual sum so far. To go on from there the model's own forward is called, with everything below passing the
stream through, so masks, positions and heads stay the model's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .sublayers import Sublayer


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass once what it was run for has been seen."""


@dataclass
class Tap:
    """What one sublayer did with a batch of B sequences of T tokens.

    Args:
        stream: Residual input of the sublayer, X in METHOD 1.2, (B, T, D).
        features: Input of the output projection, (B, T, C).
        output: Output of the output projection with its bias, Sub(X), (B, T, D).
        above: The stream above the sublayer, (B, T, D).
    """

    stream: Tensor
    features: Tensor
    output: Tensor
    above: Tensor


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


@contextmanager
def _hook(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
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


def _silence(stack: ExitStack, sublayer: Sublayer, stream: Tensor) -> None:
    """Let a sublayer that has already run add zero, without computing it."""
    silent = torch.zeros_like(stream)
    block = sublayer.block
    if block.core:
        y = silent if block.output.startswith(block.core + ".") else stream[..., :0]
        returns = tuple(y if entry == "y" else None for entry in block.returns)
        stack.enter_context(_forward(sublayer.layer.get_submodule(block.core), lambda *_, **__: returns))
    stack.enter_context(_forward(sublayer.output, lambda *_, **__: silent))


@contextmanager
def resumed(sublayers: Sequence[Sublayer], position: int, stream: Tensor | None) -> Iterator[None]:
    """Within this context the model of `sublayers` computes from `sublayers[position]` up only.

    Args:
        sublayers: All sublayers of the model, bottom to top.
        position: The first that is to be computed; `len(sublayers)` for the head alone.
        stream: The stream below it, (B, T, D); None runs the whole model.
    """
    with ExitStack() as stack:
        if stream is not None:
            layer = sublayers[position].layer if position < len(sublayers) else None
            for below in sublayers[:position]:
                if below.layer is layer:
                    _silence(stack, below, stream)
                elif below.is_last_of_layer:
                    passed = (stream,) if below.stack.returns_tuple else stream
                    stack.enter_context(_forward(below.layer, lambda *_, result=passed, **__: result))
            if layer is not None:

                def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                    return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

                stack.enter_context(_hook(layer.register_forward_pre_hook(replace, with_kwargs=True)))
        yield


@contextmanager
def _tapped(sublayer: Sublayer, seen: dict[str, Tensor]) -> Iterator[None]:
    """Fill `seen`, by the names in `Tap`, during the next forward pass and end that pass above `sublayer`."""

    def on_stream(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["stream"] = _first(args, kwargs)

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["features"], seen["output"] = args[0], output
        if not sublayer.is_last_of_layer:
            seen["above"] = seen["stream"] + output
            raise _Stop

    def on_layer(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["above"] = output[0] if sublayer.stack.returns_tuple else output
        raise _Stop

    reader = sublayer.layer.get_submodule(sublayer.block.stream)
    with ExitStack() as stack:
        stack.enter_context(_hook(reader.register_forward_pre_hook(on_stream, with_kwargs=True)))
        stack.enter_context(_hook(sublayer.output.register_forward_hook(on_output)))
        stack.enter_context(_hook(sublayer.layer.register_forward_hook(on_layer)))
        yield


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        model(**inputs)
    except _Stop:
        return
    raise RuntimeError(f"{type(model).__name__} never reached the sublayer asked for; is its family described right?")


@torch.no_grad()
def run_sublayer(
    model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer], position: int, stream: Tensor
) -> Tap:
    """Run one sublayer of `model` on the stream below it, and nothing else of any layer."""
    seen: dict[str, Tensor] = {}
    with resumed(sublayers, position, stream), _tapped(sublayers[position], seen):
        _run(model, inputs)
    return Tap(**seen)


@torch.no_grad()
def run_to_bottom(model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer]) -> Tensor:
    """The stream below the first sublayer, (B, T, D)."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_first(args, kwargs))
        raise _Stop

    with _hook(sublayers[0].layer.register_forward_pre_hook(stop, with_kwargs=True)):
        _run(model, inputs)
    return seen[0]


@torch.no_grad()
def run_to_top(model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer], stream: Tensor) -> Tensor:
    """The stream above the last sublayer, (B, T, D), from the one below the first."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if sublayers[-1].stack.returns_tuple else output)
        raise _Stop

    with resumed(sublayers, 0, stream), _hook(sublayers[-1].layer.register_forward_hook(stop)):
        _run(model, inputs)
    return seen[0]


@contextmanager
def probed(sublayers: Sequence[Sublayer]) -> Iterator[dict[int, Tensor]]:
    """Collect the features (B, T, C) of each sublayer in the next forward pass, by its place in `sublayers`.

    With gradients enabled they are part of the graph. As the features a_tc enter multiplied by a mask m_c = 1, the gradient
    to that mask is sum_t a_tc dL/da_tc: no mask is needed, and no gradient of any weight.
    """
    features: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for place, sublayer in enumerate(sublayers):

            def show(_: nn.Module, args: tuple[Any, ...], place: int = place) -> tuple[Any, ...]:
                tensor = args[0]
                if torch.is_grad_enabled() and not tensor.requires_grad:  # the lowest one, where the graph begins
                    tensor = tensor.detach().requires_grad_()
                features[place] = tensor
                return (tensor, *args[1:])

            stack.enter_context(_hook(sublayer.output.register_forward_pre_hook(show)))
        yield features
