"""What hooks see of a forward pass: features, outputs, the order of sublayers, FLOPs. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import kind_of
from .hooks import featured, hooked
from .runs import run_to_top
from .sublayers import Sublayer


@torch.no_grad()
def matrix_flops(model: nn.Module, inputs: Mapping[str, object]) -> float:
    """FLOPs of the projections, convolutions and experts of `model` on these inputs, a multiply-add counted
    as 2.

    Experts that lie in one tensor, (E, ..., ...), count for the tokens that are sent to them: a module that
    holds such tensors is told by an integer argument where each token goes, or gets a row for each. What
    multiplies no weights is not counted.
    """
    total = 0.0

    def count(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Any) -> None:
        nonlocal total
        arguments = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or kind_of(module) == "conv1d":
            total += (
                2 * cast(Tensor, weight).numel() * arguments[0].shape[:-1].numel()
            )  # routers give more than a product
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            result = output if isinstance(output, Tensor) else output[0]  # some give a mask beside it
            total += 2 * module.weight.numel() * result.numel() / module.out_channels
        elif arguments and (
            banks := [p for p in module.parameters(recurse=False) if p.dim() == 3 and len(p) > 1]
        ):
            routes = [value for value in arguments if value.dtype in (torch.int64, torch.int32)]
            rows = routes[0].numel() if routes else arguments[0][..., 0].numel()
            total += sum(2 * bank.numel() / len(bank) * rows for bank in banks)

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None and not isinstance(
                module, nn.Embedding
            ):
                hooks.enter_context(hooked(module.register_forward_hook(count, with_kwargs=True)))
        model(**inputs)
    return total


@torch.no_grad()
def check_order(model: nn.Module, inputs: Mapping[str, object], sublayers: Sequence[Sublayer]) -> None:
    """Raise `UnsupportedArchitectureError` unless the sublayers of each stack run in their order, and as
    often as their family says."""
    ran: list[int] = []
    with ExitStack() as hooks:
        for place, sublayer in enumerate(sublayers):
            hooks.enter_context(
                hooked(sublayer.output.register_forward_hook(lambda *_, place=place: ran.append(place)))
            )
        run_to_top(model, inputs, sublayers)
    for stack in dict.fromkeys(s.stack_name for s in sublayers):
        places = [place for place, s in enumerate(sublayers) if s.stack_name == stack]
        layers = [list(layer) for _, layer in groupby(places, key=lambda place: sublayers[place].index)]
        expected = [place for layer in layers for place in layer * sublayers[layer[0]].uses]
        order = [place for place in ran if sublayers[place].stack_name == stack]
        if order != expected:
            place, due = next((ran, due) for ran, due in zip_longest(order, expected) if ran != due)
            runs = "nothing more" if place is None else sublayers[place].name
            where = "its layers end" if due is None else f"{sublayers[due].name} is due"
            what = f"{type(model).__name__} runs {runs} of {stack} where {where}"
            if "kprune_family" in sublayers[expected[0]].owner.__dict__:
                raise UnsupportedArchitectureError(
                    f"{what}; only layers are pruned that all run their attentions and FFNs in one order"
                )
            raise UnsupportedArchitectureError(
                f"{what}, as its family says. Does it need other inputs for some of them, or does the family "
                "name its blocks in another order? docs/add_a_family.md"
            )


@contextmanager
def only_tokens(module: nn.Module, start: int, stop: int) -> Iterator[None]:
    """Let `module`, which takes (B, T, D), see the tokens from `start` to `stop` only."""

    def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, start:stop].contiguous(), *args[1:])  # one product, not one a row

    with hooked(module.register_forward_pre_hook(narrow)):
        yield


@contextmanager
def probed(sublayers: Sequence[Sublayer]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect the features, (B, T, C) or (B * T, C), of each sublayer in the next forward pass, each time
    that it runs, by its place in `sublayers`.

    With gradients enabled they are part of the graph. As the features a_tc enter multiplied by a mask m_c =
    1, the gradient to that mask is sum_t a_tc dL/da_tc: no mask is needed, and no gradient of any weight.
    """
    features: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        for place, sublayer in enumerate(sublayers):

            def show(tensor: Tensor, place: int = place) -> Tensor:
                if (
                    torch.is_grad_enabled() and not tensor.requires_grad
                ):  # the lowest one, where the graph begins
                    tensor = tensor.detach().requires_grad_()
                features.setdefault(place, []).append(tensor)
                return tensor

            stack.enter_context(featured(sublayer, show))
        yield features


@contextmanager
def outputs_of(sublayers: Sequence[Sublayer]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect what the output projections give, (B, T, D) or (B * T, D), in the next forward pass, each time
    that they run, by place in `sublayers`."""
    outputs: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        for place, sublayer in enumerate(sublayers):

            def note(_: nn.Module, _args: tuple[object, ...], output: Tensor, place: int = place) -> None:
                outputs.setdefault(place, []).append(output)

            stack.enter_context(hooked(sublayer.output.register_forward_hook(note)))
        yield outputs
