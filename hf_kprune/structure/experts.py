"""The experts of a layer as one projection, of the features of all of them side by side. Torch only.

Transformers holds the experts of a layer in three-dimensional parameters of one module. With r_te the weight
by which the router sends the token t to the expert e, zero where it does not, the module gives

    y_t = sum_e W_e x_te ,   x_te = r_te a_te ,

a_te the neurons of e. So it is a linear projection of the features x (N, E c), whose weight has the columns
of all W_e side by side, (D, E c). Where experts have a bias, it is the last of their columns, of the feature
r_te.

Shapes: N tokens, E experts of F neurons and c = F or, with a bias, F + 1 columns each, D residual width, k
experts that a token is sent to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..modeling_kprune import set_parameter


def are_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in three-dimensional parameters, as Transformers describes them."""
    return hasattr(module, "is_transposed") and "down_proj" in {**module._parameters, **module._buffers}


def size_of(experts: Any) -> tuple[int, int, int]:
    """E, F and D."""
    count, *sides = experts.down_proj.shape
    neurons, width = sides if experts.is_transposed else sides[::-1]
    return count, neurons, width


def columns_of(experts: Any) -> Tensor:
    """The column of each neuron, the experts one after the other, (E F, 1)."""
    count, neurons, _ = size_of(experts)
    columns = torch.arange(count * (neurons + experts.has_bias)).view(count, -1)
    return columns[:, :neurons].reshape(-1, 1)


def weight_of(experts: Any) -> Tensor:
    """The columns of all experts side by side, (D, E c), a copy."""
    down = experts.down_proj.transpose(1, 2) if experts.is_transposed else experts.down_proj
    if experts.has_bias:
        down = torch.cat([down, experts.down_proj_bias.unsqueeze(2)], 2)
    weight: Tensor = down.permute(1, 0, 2).flatten(1)
    return weight


def weight_of_one(experts: Any, expert: int) -> Tensor:
    """The columns of one expert, (D, c), where it has no bias a view."""
    down: Tensor = experts.down_proj[expert].T if experts.is_transposed else experts.down_proj[expert]
    return torch.cat([down, experts.down_proj_bias[expert].unsqueeze(1)], 1) if experts.has_bias else down


def set_weight(experts: Any, weight: Tensor) -> None:
    """Give the experts the columns of a weight (D, E c)."""
    count, neurons, _ = size_of(experts)
    banks = weight.unflatten(1, (count, -1)).permute(1, 0, 2)
    down = banks[:, :, :neurons]
    values = {"down_proj": down.transpose(1, 2) if experts.is_transposed else down}
    if experts.has_bias:
        values["down_proj_bias"] = banks[:, :, neurons]
    for name, value in values.items():
        _replace(experts, name, value)


def neurons_of(experts: Any, expert: int, tokens: Tensor) -> Tensor:
    """The neurons of one expert on some tokens (n, D), (n, F)."""
    weight, bias = _entry(experts)
    matrix = weight[expert].T if experts.is_transposed else weight[expert]
    inner = linear(tokens, matrix, None if bias is None else bias[expert])
    result: Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return result


def features_of(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The features of all experts, (N, E c), zero where a token is not sent.

    Args:
        experts: The module.
        hidden: The tokens, (N, D).
        index: The experts that each is sent to, (N, k).
        weights: With which weights, (N, k).
    """
    count, neurons, _ = size_of(experts)
    features = hidden.new_zeros(len(hidden), count, neurons + experts.has_bias)
    for expert in range(count):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if len(tokens):
            share = weights[tokens, place, None]
            columns = neurons_of(experts, expert, hidden[tokens]) * share
            if experts.has_bias:
                columns = torch.cat([columns, share.to(columns.dtype)], 1)
            features[tokens, expert] = columns.to(features.dtype)
    return features.flatten(1)


def output_of(experts: Any, features: Tensor) -> Tensor:
    """What the experts give together for features (N, E c): (N, D)."""
    count, _, width = size_of(experts)
    nothing = features[:, :0].sum(1, keepdim=True)  # part of the graph, even where no expert has neurons
    output = features.new_zeros(len(features), width) + nothing
    for expert, part in enumerate(features.chunk(count, 1)):
        tokens = part.any(1).nonzero().flatten()
        if len(tokens):
            result = linear(part[tokens], weight_of_one(experts, expert))
            output.index_add_(0, tokens, result.to(output.dtype))
    return output


@torch.no_grad()
def shares(dense: Any, entry: Sequence[Tensor], target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What of a target each expert is to give: what it gave before it was cut, and, of what all of them
    lacked, its share by the weights of the router, so that the shares add up to the target:

        y_te = W_e x_te + r_te / (sum_e' r_te') (y_t - sum_e' W_e' x_te')

    Args:
        dense: The experts as they were.
        entry: What they are called with, see `features_of`.
        target: y, (N, D).

    Yields:
        For each expert the tokens that are sent to it, (n,), and what it is to give for them, (n, D).
    """
    hidden, index, weights = entry
    count, _, _ = size_of(dense)
    features = features_of(dense, hidden, index, weights)
    rest = target - output_of(dense, features)
    routes = weights.new_zeros(len(hidden), count).scatter_add_(1, index, weights)
    total = routes.sum(1, keepdim=True)
    routes = (routes / total.where(total != 0, 1)).to(rest.dtype)
    for expert, part in enumerate(features.chunk(count, 1)):
        tokens = (index == expert).any(1).nonzero().flatten()
        lack = routes[tokens, expert, None] * rest[tokens]
        yield tokens, linear(part[tokens], weight_of_one(dense, expert)) + lack


def fisher_by_token(experts: Any, features: Tensor, gradients: Tensor) -> Tensor:
    """The sum over tokens of  (g_t^T W_e x_te)^2  for each expert, (E,), float64: of squared gradients to its
    mask at one token each.

    Args:
        experts: The module.
        features: x, (N, E c).
        gradients: g, those to the output, (N, D).
    """
    sums = []
    for expert, part in enumerate(features.chunk(size_of(experts)[0], 1)):
        tokens = part.any(1)
        by_column = gradients[tokens] @ weight_of_one(experts, expert).to(gradients) * part[tokens]
        sums.append(by_column.double().sum(1).square().sum())
    return torch.stack(sums)


def magnitude_of(experts: Any) -> Tensor:
    """Sum of the squares of the weights by which each neuron reads, (E F,), float64."""
    weight, bias = _entry(experts)
    total = weight.double().square().sum(1 if experts.is_transposed else 2)
    if bias is not None:
        total = total + bias.double().square()
    rows = _rows(experts, _all(experts))
    return total.gather(1, rows.flatten(1)).view_as(rows).sum(2).flatten()


def entries_of(experts: Any, biases: bool = False) -> int:
    """Weights of one neuron of one expert, and biases too if asked for."""
    rows = 1 + bool(experts.has_gate)
    return size_of(experts)[2] * (1 + rows) + (rows if biases and experts.has_bias else 0)


def keep_neurons(experts: Any, kept: Tensor) -> None:
    """Keep these neurons of each expert, (E, n) in rising order, in place."""
    rows = _rows(experts, kept.to(experts.down_proj.device)).flatten(1).sort(1).values
    name = _entry_name(experts)
    _take(experts, name, rows, 2 if experts.is_transposed else 1)
    if experts.has_bias:
        _take(experts, f"{name}_bias", rows, 1)
    _take(experts, "down_proj", kept, 1 if experts.is_transposed else 2)


def _entry_name(experts: Any) -> str:
    """Name of the weight by which neurons read."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _entry(experts: Any) -> tuple[Tensor, Tensor | None]:
    """The weight by which neurons read, and the bias where there is one."""
    name = _entry_name(experts)
    return getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None


def _all(experts: Any) -> Tensor:
    """The neurons of each expert, (E, F)."""
    count, neurons, _ = size_of(experts)
    return torch.arange(neurons, device=experts.down_proj.device).expand(count, -1)


def _rows(experts: Any, neurons: Tensor) -> Tensor:
    """The rows by which neurons (E, n) of each expert read: of the gate, if there is one, and of what it
    opens, (E, n, rows of a neuron)."""
    if not experts.has_gate:
        return neurons.unsqueeze(2)
    if experts.is_concatenated:
        return torch.stack([neurons, neurons + size_of(experts)[1]], 2)
    return torch.stack([2 * neurons, 2 * neurons + 1], 2)


def _take(experts: Any, name: str, places: Tensor, dim: int) -> None:
    """Keep these places (E, n) of a dimension of a parameter, for each expert its own."""
    old: Tensor = getattr(experts, name)
    index = places.to(old.device)
    if old.dim() == 3:
        shape = list(old.shape)
        shape[dim] = places.shape[1]
        index = index.unsqueeze(3 - dim).expand(shape)
    _replace(experts, name, old.gather(dim, index))


def _replace(experts: Any, name: str, value: Tensor) -> None:
    """Give a parameter another value."""
    old = getattr(experts, name)
    set_parameter(experts, name, value.to(old.dtype).contiguous(), old.requires_grad)
