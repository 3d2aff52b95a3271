"""Observe what a layer does: which projections open and close its sublayers, from one forward pass and no
names.

Autograd says so. Every projection's output is cut from the graph while the layer runs, and so is what comes
into the layer; what a projection reads then depends on just those that feed it. One that is fed by others,
and not by what came into the layer, closes a sublayer which those others open. If a token's features depend
on several tokens of an opening projection, that makes keys or values; if on one at most of each, the sublayer
is an FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modeling_kprune import parameter_names
from .facts import floats
from .families import Block, Kind, Layout
from .hooks import first, with_first
from .units import UNITS


PROJECTIONS = (nn.Linear, Conv1D)

MORE_TOKENS = (
    "what it does with several was not seen; if it gets several of larger images or longer texts, give those"
)


NO_PART = "no attention and no FFN was seen that it opens or closes"


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

    @property
    def projections(self) -> set[str]:
        """Paths of those that open it and of the one that closes it."""
        return {*self.rows, self.block.output}


class Watch:
    """Hooks on one layer. Once it has run, they know its sublayers, in their order, what else it has, and
    what it returns.

    Args:
        name: Path of the layer in the model.
        layer: The layer.
    """

    def __init__(self, name: str, layer: nn.Module):
        self.name, self.layer = name, layer
        self.trouble = f"{name} does not run on these inputs"
        """Why it cannot be described at all; `""` if it can."""
        self.rest: dict[str, str] = {}
        """The projections and other weights of it that are of no sublayer, path to reason."""
        self.entered = False
        self.runs, self.samples, self.tokens, self.parallel, self.packed = 0, 0, 0, False, False
        self.returns: Any = None
        self.sublayers: list[Observation] = []
        self.calls: list[Call] = []

    def hooks(self) -> Iterator[Any]:
        """Set the hooks on all modules of the layer, and yield their handles."""
        for path, module in self.layer.named_modules():
            yield module.register_forward_pre_hook(partial(self.on_entry, path), with_kwargs=True)
            yield module.register_forward_hook(partial(self.on_exit, path))

    def on_entry(
        self, path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        if path == "":
            self.entered = True
            hidden: Any = first(args, kwargs) if args or kwargs else None
            self.trouble = self.trouble_with(hidden)
            if self.trouble:
                return None
            self.runs, self.packed = 1, hidden.dim() == 2
            self.samples = 1 if self.packed else len(hidden)
            self.tokens = hidden.shape[:-1].numel() // self.samples
            self.leaf = hidden.detach().requires_grad_()
            args, kwargs = with_first(args, kwargs, self.leaf.clone())
        elif not self.entered:
            self.trouble = (
                f"{self.name}.{path} runs by itself, and not as a part of {self.name}, which is no layer then"
            )
        if self.trouble:
            return None
        self.calls.append(Call(path, {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}))
        return args, kwargs

    def trouble_with(self, hidden: Any) -> str:
        """Why the layer cannot be described that now runs on `hidden`; `""` if it can."""
        if self.runs:
            return f"{self.name} runs more than once in a pass of the model, where each layer is to run once"
        if not isinstance(hidden, Tensor) or hidden.dim() < 2:
            what = tuple(hidden.shape) if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            return (
                f"{self.name} takes {what}, no hidden states of (batch, several tokens, width) or of all "
                "samples as one sequence, (tokens, width)"
            )
        if hidden.shape[min(hidden.dim() - 2, 1) : -1].numel() < 2:
            return f"{self.name} takes {tuple(hidden.shape)}, one token of each sample; {MORE_TOKENS}"
        return ""

    def on_exit(self, path: str, module: nn.Module, _: tuple[object, ...], output: object) -> Any:
        if self.trouble:
            return None
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
        opening = {c.path: c for c in self.calls if c.path in last.sources and c.leaf is not None}
        features, which = last.input.flatten(0, -2), (*opening, last.path)
        if not torch.is_grad_enabled():
            why = f"{last.path} runs where gradients are turned off, so that it cannot be seen what feeds it"
            return self.leave(which, why)
        if not bool(features.isfinite().all()):
            return self.leave(which, f"{last.path} reads NaN or infinity on these inputs")
        if len(features) < 2 * self.samples:
            return self.leave(which, f"{last.path} reads one token of each sample; {MORE_TOKENS}")
        leaves = [cast(Tensor, c.leaf) for c in opening.values()]
        rows = {path: leaf.shape[-1] for path, leaf in zip(opening, leaves, strict=True)}
        columns = features.shape[1]
        tokens = self.tokens_read(features, leaves)
        kind: Kind = "attention" if max(tokens) > 1 else "ffn"
        layouts: list[Layout]
        if kind == "attention":
            layouts = ["qkv"] if len(opening) == 1 else ["kv" if n > 1 else "q" for n in tokens]
        else:
            layouts = ["2f" if len(opening) == 1 and n == 2 * columns else "f" for n in rows.values()]
        others = [
            c for c, layout in zip(opening.values(), layouts, strict=True) if layout == "kv" and not c.sources
        ]
        memory = 0
        if 0 < len(others) == layouts.count("kv"):
            kind, memory = "cross_attention", others[0].input.shape[-2]
        block = Block(kind, dict(zip(rows, layouts, strict=True)), last.path)
        self.sublayers.append(Observation(block, rows, columns, self.samples, memory))
        return None

    def leave(self, which: Iterable[str], why: str) -> None:
        """Leave the projections or other weights at these paths as they are, and every sublayer that one of
        them, or of what was left before, is of."""
        self.rest = {**dict.fromkeys(which, why), **self.rest}
        while lost := next((s for s in self.sublayers if self.rest.keys() & s.projections), None):
            self.sublayers.remove(lost)
            why = next(reason for path, reason in self.rest.items() if path in lost.projections)
            self.rest = {**self.rest, **dict.fromkeys(sorted(lost.projections - self.rest.keys()), why)}

    def tokens_read(self, features: Tensor, leaves: list[Tensor]) -> list[int]:
        """On how many tokens of each leaf the features of one token depend: the first token of three to
        depend on several.

        Args:
            features: What a closing projection reads, (B * T, C).
            leaves: What the opening projections gave.
        """
        counts = [0]
        tokens = min(self.tokens, len(features) // self.samples)
        for token in (tokens - 1, tokens // 2, 0):
            total = features[token] @ torch.linspace(1, 2, features.shape[1]).to(features)
            slopes = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            counts = [0 if s is None else int((s.flatten(0, -2) != 0).any(1).sum()) for s in slopes]
            if max(counts) > 1:
                break
        return counts

    def end(self) -> None:
        """Complete the sublayers, now that the layer has run, and drop the tensors."""
        ran = [c.path for c in self.calls]
        names = {name for name, module in self.layer.named_modules() if isinstance(module, PROJECTIONS)}
        self.leave(sorted(names - {*ran}), "it does not run on these inputs")
        self.leave(sorted(path for path in names if ran.count(path) > 1), "it runs more than once in a layer")
        calls = {c.path: c for c in self.calls}
        self.drop_followers()
        ends = [path for s in self.sublayers for path in (*s.rows, s.block.output)]
        shared = sorted(path for path in names if ends.count(path) > 1)
        self.leave(shared, "it is in several attentions or FFNs at once, of which none can be cut by itself")
        for s in [s for s in self.sublayers if UNITS[s.block.kind].has_heads]:
            self.complete(s, calls)
        closing = {s.block.output for s in self.sublayers}
        sources = [calls[path].sources for s in self.sublayers for path in s.rows]
        self.parallel = len(closing) > 1 and not any(closing & paths for paths in sources)
        self.sublayers = [
            replace(s, block=replace(s.block, stream=self.stream(calls[s.block.output])))
            for s in self.sublayers
        ]
        self.leave(sorted(names - {*ends, *self.rest}), NO_PART)
        output, like = calls[""].output, self.leaf
        alike = template(output, lambda t: "y" if t.shape == like.shape else None)
        narrower = template(
            output, lambda t: "y" if t.is_floating_point() and t.dim() == like.dim() else None
        )
        self.returns = alike if "y" in str(alike) else narrower  # layers may pool tokens
        attentions = tuple(f"{s.block.core}." for s in self.sublayers if s.block.core)
        weights = {name for name, parameter in self.layer.named_parameters() if parameter.dim() > 1}
        others = {name for name in weights if name.rpartition(".")[0] not in names and not self.aside(name)}
        others = {name for name in others if not name.startswith(attentions)}
        self.leave(sorted(others), "it is a weight of neither nn.Linear nor an attention")
        self.calls = []

    def drop_followers(self) -> None:
        """Leave an FFN that another one opens, as of three projections in turn: what the second one gives may
        be read elsewhere too, and only one of the two FFNs could be cut. Leave, too, what the end of
        an attention opens where nothing is carried past it: that is no sublayer, the next begins there."""
        closing: dict[str, str] = {}
        for s in list(self.sublayers):
            before = sorted(closing.keys() & s.rows.keys())
            if not before or (s.block.kind != "ffn" and closing[before[0]] == "ffn"):
                closing[s.block.output] = s.block.kind
                continue
            self.sublayers.remove(s)
            others = s.projections - {path for other in self.sublayers for path in other.projections}
            sublayer = "an FFN" if closing[before[0]] == "ffn" else "an attention"
            ends = f"{before[0]}, which ends {sublayer}"
            whys = {path: f"it {'follows' if path == s.block.output else 'joins'} {ends}" for path in others}
            self.rest = {**dict(sorted(whys.items())), **self.rest}

    def aside(self, name: str) -> bool:
        """Whether a weight mixes no channels: that of an embedding, or of a depthwise convolution."""
        owner: Any = self.layer.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, nn.Embedding) or 1 < getattr(owner, "groups", 1) == getattr(
            owner, "in_channels", 0
        )

    def complete(self, observation: Observation, calls: Mapping[str, Call]) -> None:
        """Add to an attention the smallest module that returns its output or its features, or leave it."""
        block, last = observation.block, calls[observation.block.output]
        parts = zip(*(path.split(".")[:-1] for path in observation.rows), strict=False)
        shared = [names[0] for names in parts if len(set(names)) == 1]
        why = (
            "it is of what mixes tokens here, and no module within the layer holds all of that and returns "
            "what it gives, so that nothing could stand there without heads"
        )
        for core in (".".join(shared[:depth]) for depth in range(len(shared), 0, -1)):
            y = last.leaf if last.path.startswith(f"{core}.") else last.input
            call = calls.get(core, Call(core, {}))
            returns = template(call.output, partial(sum_with, cast(Tensor, y), call.arguments))
            if "y" in str(returns):
                inner = self.layer.get_submodule(core).named_modules(prefix=core)
                others = [n for n, m in inner if not isinstance(m, PROJECTIONS) and hasattr(m, "kernel_size")]
                if not others:
                    whole = replace(observation, block=replace(block, core=core, returns=returns))
                    self.sublayers[self.sublayers.index(observation)] = self.with_core(whole, call)
                    return
                why = (
                    f"{', '.join(others)} lies between {' and '.join(observation.rows)} and {last.path}, and "
                    "would not be cut with them"
                )
                break
        self.leave((*observation.rows, last.path), why)

    def with_core(self, observation: Observation, call: Call) -> Observation:
        """Add what the attention module, which made this call, and the modules inside it hold."""
        core = observation.block.core
        module = self.layer.get_submodule(core)
        inner = [(n, m) for n, m in module.named_modules(prefix=core) if not isinstance(m, PROJECTIONS)]
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
