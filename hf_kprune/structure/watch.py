"""Observe what a layer does: which projections open and close its sublayers, from one forward pass and no
names.

Autograd says so. Every projection's output is cut from the graph while the layer runs, and so is what comes
into the layer; what a projection reads then depends on just those that feed it. One that is fed by others,
and not by what came into the layer, closes a sublayer which those others open. If a token's features depend
on several tokens of an opening projection, that makes keys or values; if on one at most of each, the sublayer
is an FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import parameter_names
from .facts import floats
from .families import Block, Kind, Layout
from .units import UNITS


PROJECTIONS = (nn.Linear, Conv1D)


@dataclass
class Call:
    """One call of a module in the layer.

    Args:
        path: Path of the module, seen from the layer.
        arguments: What it was called with, by name.
        output: What it returned.
        sources: Of a projection, those whose outputs reach its input through no other one; `""` is the
            layer's own input.
        leaf: Of a projection, its output as a leaf of the graph.
    """

    path: str
    arguments: dict[str, Any]
    output: Any = None
    sources: frozenset[str] = frozenset()
    leaf: Tensor | None = None

    @property
    def input(self) -> Any:
        return next(iter(self.arguments.values()), None)


@dataclass(frozen=True)
class Observation:
    """A sublayer that a layer has, and what else may have to be in its description.

    Args:
        block: Its description, with `"qkv"` for what is fused in an attention, whichever its layout.
        rows: How many features each opening projection returns.
        columns: How many features the closing projection reads.
        batch: Samples in the batch.
        memory: Tokens that keys and values come from if another stack has them; else 0.
        numbers: Whole numbers that the modules of the attention hold, by path.
        weights: Shapes of the parameters of the attention that are not of its projections, by path.
        arguments: Shapes of the tensors of floats that the attention takes beside the hidden states, by name.
    """

    block: Block
    rows: Mapping[str, int]
    columns: int
    batch: int
    memory: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    arguments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Watch:
    """Hooks on one layer. Once it has run, they know its sublayers, in their order, and what it returns.

    The forward pass raises `UnsupportedArchitectureError` if the layer does not consist of such sublayers
    alone.

    Args:
        name: Path of the layer in the model.
        layer: The layer.
    """

    def __init__(self, name: str, layer: nn.Module):
        self.name, self.layer = name, layer
        self.runs, self.tokens, self.parallel = 0, 0, False
        self.returns: Any = None
        self.sublayers: list[Observation] = []
        self.calls: list[Call] = []

    def hooks(self) -> Iterator[Any]:
        """Set the hooks on all modules of the layer, and yield their handles."""
        for path, module in self.layer.named_modules():
            yield module.register_forward_pre_hook(partial(self.on_entry, path), with_kwargs=True)
            yield module.register_forward_hook(partial(self.on_exit, path))

    def refuse(self, which: set[str], why: str) -> None:
        """Raise `UnsupportedArchitectureError` if there are modules of which something is wrong."""
        if which:
            raise UnsupportedArchitectureError(f"in {self.name}, {', '.join(sorted(which))} {why}")

    def on_entry(
        self, path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        if path == "":
            if self.runs:
                raise UnsupportedArchitectureError(
                    f"{self.name} runs more than once: its weights are those of several layers"
                )
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] < 2:
                what = f"{tuple(hidden.shape)}, no" if isinstance(hidden, Tensor) else "by that name no"
                raise UnsupportedArchitectureError(
                    f"{self.name} takes {what} hidden_states of (batch, several tokens, width)"
                )
            self.runs, self.tokens, self.calls = self.runs + 1, hidden.shape[1], []
            self.leaf = hidden.detach().requires_grad_()
            hidden = self.leaf.clone()
            args, kwargs = (
                ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            )
        elif not self.runs:
            raise UnsupportedArchitectureError(
                f"{path} of {self.name} runs without it: it is a list of modules, no layer"
            )
        self.calls.append(Call(path, {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}))
        return args, kwargs

    def on_exit(self, path: str, module: nn.Module, _: tuple[object, ...], output: object) -> Any:
        call = next(c for c in reversed(self.calls) if c.path == path and c.output is None)
        call.output = output
        if isinstance(module, PROJECTIONS) and isinstance(output, Tensor):
            call.sources, call.leaf = self.sources(call.input), output.detach().requires_grad_()
            if call.sources and "" not in call.sources:
                self.close(call)
            return call.leaf.clone()  # what comes later may write into it
        if path == "":
            self.end()
        return None

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """The projections that `tensor` depends on, without those that it depends on through others only."""
        leaves = {id(c.leaf): c.path for c in self.calls if c.leaf is not None} | {id(self.leaf): ""}
        todo: list[Any] = [tensor.grad_fn]
        visited, sources = {None}, set()
        while todo:
            node = todo.pop()
            if node not in visited:
                visited.add(node)
                todo += [before for before, _ in node.next_functions]
                leaf = id(getattr(node, "variable", None))
                if leaf in leaves:
                    sources.add(leaves[leaf])
        return frozenset(sources)

    def close(self, last: Call) -> None:
        """Note the sublayer that the projection `last` ends."""
        first = list(
            {c.path: c for c in self.calls if c.path in last.sources and c.leaf is not None}.values()
        )
        features = last.input.flatten(0, -2)
        self.refuse(
            set() if torch.is_grad_enabled() else {last.path},
            "runs where gradients are turned off, so that it cannot be seen what feeds it",
        )
        self.refuse(
            {last.path} if len(features) < self.tokens else set(), "reads fewer tokens than the layer"
        )
        rows, columns = {c.path: cast(Tensor, c.leaf).shape[-1] for c in first}, features.shape[1]
        tokens = self.tokens_read(features, [cast(Tensor, c.leaf) for c in first])
        kind: Kind = "attention" if max(tokens) > 1 else "ffn"
        layouts: list[Layout]
        if kind == "attention":
            layouts = ["qkv"] if len(first) == 1 else ["kv" if n > 1 else "q" for n in tokens]
        else:
            layouts = ["2f" if len(first) == 1 and n == 2 * columns else "f" for n in rows.values()]
        others = [c for c, layout in zip(first, layouts, strict=True) if layout == "kv" and not c.sources]
        memory = 0
        if 0 < len(others) == layouts.count("kv"):
            kind, memory = "cross_attention", others[0].input.shape[-2]
        block = Block(kind, dict(zip(rows, layouts, strict=True)), last.path)
        self.sublayers.append(Observation(block, rows, columns, len(self.leaf), memory))

    def tokens_read(self, features: Tensor, leaves: list[Tensor]) -> list[int]:
        """On how many tokens of each leaf the features of one token depend: the first token of three to
        depend on several.

        Args:
            features: What a closing projection reads, (B * T, C).
            leaves: What the opening projections gave.
        """
        counts = [0]
        for token in (self.tokens - 1, self.tokens // 2, 0):
            total = features[token] @ torch.linspace(1, 2, features.shape[1]).to(features)
            slopes = torch.autograd.grad(total, leaves, retain_graph=True)
            counts = [int((slope.flatten(0, -2) != 0).any(1).sum()) for slope in slopes]
            if max(counts) > 1:
                break
        return counts

    def end(self) -> None:
        """Complete the sublayers, now that the layer has run, and drop the tensors."""
        ran = [c.path for c in self.calls]
        ends = [path for s in self.sublayers for path in (*s.rows, s.block.output)]
        names = {name for name, module in self.layer.named_modules() if isinstance(module, PROJECTIONS)}
        self.refuse(names - {*ran}, "do not run on these inputs")
        self.refuse({path for path in names if ran.count(path) > 1}, "run more than once")
        self.refuse(
            {path for path in names if ends.count(path) != 1}, "open or close no sublayer, or several"
        )
        calls = {c.path: c for c in self.calls}
        closing = {s.block.output for s in self.sublayers}
        sources = [calls[path].sources for s in self.sublayers for path in s.rows]
        self.parallel = len(closing) > 1 and not any(closing & paths for paths in sources)
        self.returns = template(calls[""].output, lambda t: "y" if t.shape == self.leaf.shape else None)
        self.sublayers = [self.complete(s, calls) for s in self.sublayers]
        attentions = tuple(f"{s.block.core}." for s in self.sublayers if s.block.core)
        weights = {name for name, parameter in self.layer.named_parameters() if parameter.dim() > 1}
        weights = {
            name
            for name in weights
            if name.rpartition(".")[0] not in names and not name.startswith(attentions)
        }
        self.refuse(
            {name for name in weights if not self.aside(name)},
            "are weights of neither nn.Linear nor an attention",
        )
        self.calls = []

    def aside(self, name: str) -> bool:
        """Whether a weight mixes no channels: that of an embedding, or of a depthwise convolution."""
        owner: Any = self.layer.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, nn.Embedding) or 1 < getattr(owner, "groups", 1) == getattr(
            owner, "in_channels", 0
        )

    def complete(self, observation: Observation, calls: Mapping[str, Call]) -> Observation:
        """Add the stream, and to an attention the smallest module that returns its output or its features."""
        last = calls[observation.block.output]
        block = replace(observation.block, stream=self.stream(last))
        if not UNITS[block.kind].has_heads:
            return replace(observation, block=block)
        parts = zip(*(path.split(".")[:-1] for path in observation.rows), strict=False)
        shared = [names[0] for names in parts if len(set(names)) == 1]
        for core in (".".join(shared[:depth]) for depth in range(len(shared), 0, -1)):
            y = last.leaf if last.path.startswith(f"{core}.") else last.input
            call = calls.get(core, Call(core, {}))
            returns = template(call.output, partial(sum_with, cast(Tensor, y), call.arguments))
            if "y" in str(returns):
                return self.with_core(
                    replace(observation, block=replace(block, core=core, returns=returns)), call
                )
        self.refuse(
            {last.path},
            "is in or after no module that takes the hidden states and returns what it gives or reads",
        )
        return observation

    def with_core(self, observation: Observation, call: Call) -> Observation:
        """Add what the attention module, which made this call, and the modules inside it hold."""
        core = observation.block.core
        module = self.layer.get_submodule(core)
        inner = [(n, m) for n, m in module.named_modules(prefix=core) if not isinstance(m, PROJECTIONS)]
        self.refuse({n for n, m in inner if hasattr(m, "kernel_size")}, "make something else of an attention")
        tensors = {n: v for n, v in call.arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(
            observation,
            numbers={f"{n}.{key}": v for n, m in inner for key, v in vars(m).items() if type(v) is int},
            weights={
                f"{n}.{key}": tuple(p.shape) for n, m in inner for key, p in m.named_parameters(recurse=False)
            },
            arguments={name: tuple(value.shape) for name, value in list(tensors.items())[1:]},
        )

    def stream(self, last: Call) -> str | None:
        """Path of the first module that reads the tensor which the output of `last` joins."""
        like, place = partial(alike, self.leaf), next(i for i, c in enumerate(self.calls) if c is last)
        closing = {s.block.output for s in self.sublayers} if self.parallel else {last.path}
        outputs = [like(c.leaf) for c in self.calls if c.path in closing]
        if any(output is None for output in outputs):
            return None
        joining = sum(outputs)
        later = [t for c in self.calls[place:] for t in (c.input, *floats(c.output))]
        later += floats(self.calls[0].output)
        sums = [t for t in map(like, later) if t is not None]
        for call in self.calls[: 1 if self.parallel else place]:
            read = like(call.input)
            if read is not None and any(
                (read + joining - t).abs().max() <= 1e-3 * joining.abs().max() for t in sums
            ):
                return call.path
        return None


def alike(tensor: Tensor, value: Any) -> Any:
    """`value` in the shape of `tensor`, where it is flat over samples; None if it does not fit."""
    same = (
        isinstance(value, Tensor) and value.numel() == tensor.numel() and value.shape[-1] == tensor.shape[-1]
    )
    return value.reshape_as(tensor) if same else None


def template(output: object, entry: Callable[[Tensor], str | None]) -> Any:
    """What a module returned, as in `Block.returns`.

    Args:
        output: The tensor or the tuple that it returned.
        entry: What stands for a tensor; None for most. Only the first that has something counts.
    """
    if isinstance(output, Tensor):
        return entry(output)
    if type(output) is not tuple:
        return None
    entries = [entry(value) if isinstance(value, Tensor) else None for value in output]
    first = next((i for i, name in enumerate(entries) if name), None)
    return tuple(name if i == first else None for i, name in enumerate(entries))


def sum_with(y: Tensor, arguments: Mapping[str, object], value: Tensor) -> str | None:
    """`"y"` if `value` is y, `"y+x"` if the argument x was added to it."""
    shaped = alike(value, y)
    if shaped is None or torch.equal(value, shaped):
        return None if shaped is None else "y"
    others = {name: alike(value, v) for name, v in arguments.items()}
    return next(
        (
            f"y+{n}"
            for n, v in others.items()
            if v is not None and torch.allclose(value, shaped + v, atol=1e-6)
        ),
        None,
    )
