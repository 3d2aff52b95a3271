"""See what a layer does: which of its projections open and close sublayers, from one forward pass and no names.

Autograd tells. Every projection's output is cut from the graph while the layer runs, and so is what comes into the layer;
what a projection reads then depends on just those that feed it. One that is fed by others, and not by what came into the
layer, closes a sublayer which those others open. If a token's features depend on several tokens of an opening projection,
that makes keys or values; if on one at most of each, the sublayer is an FFN.
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
from .families import Block
from .proof import floats
from .units import UNITS


PROJECTIONS = (nn.Linear, Conv1D)


@dataclass
class Call:
    """One call of a module in the layer; of a projection, also what feeds it (`""`: what came into the layer)."""

    path: str
    arguments: dict[str, Any]
    output: Any = None
    fed_by: frozenset[str] = frozenset()
    leaf: Tensor | None = None

    @property
    def input(self) -> Any:
        return next(iter(self.arguments.values()), None)


@dataclass(frozen=True)
class Seen:
    """A sublayer that a layer was seen to have, and what tells how else it may have to be described.

    Args:
        block: With `"qkv"` for what is fused in an attention, whichever its layout.
        rows: What each opening projection gives.
        columns: What the closing one reads.
        batch: Samples that it ran on.
        memory: Tokens that the keys and values come from, if from elsewhere.
        numbers: Whole numbers that the attention's modules hold.
        weights: Shapes of its parameters that are not of those projections.
        given: Shapes of the tensors that it takes beside the hidden states.
    """

    block: Block
    rows: Mapping[str, int]
    columns: int
    batch: int
    memory: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Watch:
    """Hooks on one layer. Once it has run they know its sublayers, in their order, and what it returns.

    Raises `UnsupportedArchitectureError` from the forward pass if the layer does not consist of such sublayers alone.
    """

    def __init__(self, name: str, layer: nn.Module):
        self.name, self.layer = name, layer
        self.runs, self.tokens, self.parallel = 0, 0, False
        self.returns: Any = None
        self.sublayers: list[Seen] = []
        self.calls: list[Call] = []

    def hooks(self) -> Iterator[Any]:
        """Set them; what can be removed again."""
        for path, module in self.layer.named_modules():
            yield module.register_forward_pre_hook(partial(self.on_entry, path), with_kwargs=True)
            yield module.register_forward_hook(partial(self.on_exit, path))

    def refuse(self, which: set[str], why: str) -> None:
        if which:
            raise UnsupportedArchitectureError(f"in {self.name}, {', '.join(sorted(which))} {why}")

    def on_entry(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if path == "":
            if self.runs:
                raise UnsupportedArchitectureError(
                    f"{self.name} runs more than once: its weights are those of several layers"
                )
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] < 2:
                raise UnsupportedArchitectureError(
                    f"{self.name} takes no hidden states of (batch, several tokens, width)"
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

    def on_exit(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = next(c for c in reversed(self.calls) if c.path == path and c.output is None)
        call.output = output
        if isinstance(module, PROJECTIONS) and isinstance(output, Tensor):
            call.fed_by, call.leaf = self.feeding(call.input), output.detach().requires_grad_()
            if call.fed_by and "" not in call.fed_by:
                self.close(call)
            return call.leaf.clone()  # what comes later may write into it
        if path == "":
            self.end()
        return None

    def feeding(self, tensor: Tensor) -> frozenset[str]:
        """The projections that `tensor` depends on, but for those that it does through others only."""
        leaves = {id(c.leaf): c.path for c in self.calls if c.leaf is not None} | {id(self.leaf): ""}
        todo: list[Any] = [tensor.grad_fn]
        passed, found = {None}, set()
        while todo:
            node = todo.pop()
            if node not in passed:
                passed.add(node)
                todo += [before for before, _ in node.next_functions]
                leaf = getattr(node, "variable", None)
                found |= {leaves[id(leaf)]} if id(leaf) in leaves else set()
        return frozenset(found)

    def close(self, last: Call) -> None:
        """Take up the sublayer that the projection `last` ends."""
        first = list({c.path: c for c in self.calls if c.path in last.fed_by and c.leaf is not None}.values())
        features, reach = last.input.flatten(0, -2), [0]
        self.refuse(
            {last.path} if len(features) < self.tokens else set(), "reads fewer tokens than the layer"
        )
        for token in (self.tokens - 1, self.tokens // 2, 0):
            total = features[token] @ torch.linspace(1, 2, features.shape[1]).to(features)
            slopes = torch.autograd.grad(total, [cast(Tensor, c.leaf) for c in first], retain_graph=True)
            reach = [int((slope.flatten(0, -2) != 0).any(1).sum()) for slope in slopes]
            if max(reach) > 1:
                break
        rows, columns = {c.path: cast(Tensor, c.leaf).shape[-1] for c in first}, features.shape[1]
        if max(reach) > 1:
            layouts = ["qkv"] if len(first) == 1 else ["kv" if n > 1 else "q" for n in reach]
        else:
            layouts = ["2f" if len(first) == 1 and n == 2 * columns else "f" for n in rows.values()]
        others = [c for c, layout in zip(first, layouts, strict=True) if layout == "kv" and not c.fed_by]
        crosses = 0 < len(others) == layouts.count("kv")
        kind = "cross_attention" if crosses else "attention" if max(reach) > 1 else "ffn"
        block = Block(kind, dict(zip(rows, layouts, strict=True)), last.path)
        memory = others[0].input.shape[-2] if crosses else 0
        self.sublayers.append(Seen(block, rows, columns, len(self.leaf), memory))

    def end(self) -> None:
        """Complete the sublayers, now that the layer has run, and drop the tensors."""
        ran = [c.path for c in self.calls]
        told = [path for s in self.sublayers for path in (*s.rows, s.block.output)]
        names = {name for name, module in self.layer.named_modules() if isinstance(module, PROJECTIONS)}
        self.refuse(names - {*ran}, "do not run on these inputs")
        self.refuse({path for path in names if ran.count(path) > 1}, "run more than once")
        self.refuse(
            {path for path in names if told.count(path) != 1}, "open or close no sublayer, or several"
        )
        calls = {c.path: c for c in self.calls}
        closing = {s.block.output for s in self.sublayers}
        feeding = [calls[path].fed_by for s in self.sublayers for path in s.rows]
        self.parallel = len(closing) > 1 and not any(closing & paths for paths in feeding)
        self.returns = template(calls[""].output, lambda t: "y" if t.shape == self.leaf.shape else None)
        self.sublayers = [self.completed(s, calls) for s in self.sublayers]
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

    def completed(self, seen: Seen, calls: Mapping[str, Call]) -> Seen:
        """With its stream, and for an attention the smallest module around it that returns its output or features."""
        last = calls[seen.block.output]
        block = replace(seen.block, stream=self.stream(last))
        if not UNITS[block.kind].has_heads:
            return replace(seen, block=block)
        parts = zip(*(path.split(".")[:-1] for path in seen.rows), strict=False)
        shared = [names[0] for names in parts if len(set(names)) == 1]
        for core in (".".join(shared[:depth]) for depth in range(len(shared), 0, -1)):
            y = last.leaf if last.path.startswith(f"{core}.") else last.input
            call = calls.get(core, Call(core, {}))
            returns = template(call.output, partial(made_of, cast(Tensor, y), call.arguments))
            if "y" not in str(returns):
                continue
            module = self.layer.get_submodule(core)
            inner = [(n, m) for n, m in module.named_modules(prefix=core) if not isinstance(m, PROJECTIONS)]
            convolutions = {n for n, m in inner if hasattr(m, "kernel_size")}
            self.refuse(convolutions, "make something else of an attention")
            taken = {
                n: v for n, v in call.arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
            }
            return replace(
                seen,
                block=replace(block, core=core, returns=returns),
                numbers={
                    f"{n}.{key}": value
                    for n, m in inner
                    for key, value in vars(m).items()
                    if type(value) is int
                },
                weights={
                    f"{n}.{key}": tuple(p.shape)
                    for n, m in inner
                    for key, p in m.named_parameters(recurse=False)
                },
                given={n: tuple(v.shape) for n, v in list(taken.items())[1:]},
            )
        self.refuse(
            {last.path},
            "is in or after no module that takes the hidden states and returns what it gives or reads",
        )
        return seen

    def stream(self, last: Call) -> str | None:
        """Path of the first module that reads the tensor which the output of `last` joins."""
        like, place = partial(alike, self.leaf), next(i for i, c in enumerate(self.calls) if c is last)
        closing = {s.block.output for s in self.sublayers} if self.parallel else {last.path}
        outputs = [like(c.leaf) for c in self.calls if c.path in closing]
        if any(output is None for output in outputs):
            return None
        joining = sum(outputs)
        later = [t for c in self.calls[place:] for t in (c.input, *floats(c.output))] + floats(
            self.calls[0].output
        )
        sums = [t for t in map(like, later) if t is not None]
        for call in self.calls[: 1 if self.parallel else place]:
            read = like(call.input)
            if read is not None and any(
                (read + joining - t).abs().max() <= 1e-3 * joining.abs().max() for t in sums
            ):
                return call.path
        return None


def alike(tensor: Tensor, value: Any) -> Any:
    """`value` in the shape of `tensor`; some modules see the tokens of all samples in one row. None if it has others."""
    same = (
        isinstance(value, Tensor) and value.numel() == tensor.numel() and value.shape[-1] == tensor.shape[-1]
    )
    return value.reshape_as(tensor) if same else None


def template(output: Any, entry: Callable[[Tensor], str | None]) -> Any:
    """What a module returned, as in `Block.returns`: `entry` says what stands for a tensor, and the first to be any counts."""
    if isinstance(output, Tensor):
        return entry(output)
    if type(output) is not tuple:
        return None
    entries = [entry(value) if isinstance(value, Tensor) else None for value in output]
    first = next((i for i, made in enumerate(entries) if made), None)
    return tuple(made if i == first else None for i, made in enumerate(entries))


def made_of(y: Tensor, arguments: Mapping[str, Any], value: Tensor) -> str | None:
    """`"y"` if `value` is y, `"y+x"` if the argument x was added to it."""
    made = alike(value, y)
    if made is None or torch.equal(value, made):
        return None if made is None else "y"
    others = {name: alike(value, v) for name, v in arguments.items()}
    return next(
        (f"y+{n}" for n, v in others.items() if v is not None and torch.allclose(value, made + v, atol=1e-6)),
        None,
    )
