"""The kinds of unit: where the rows and columns of a head or a neuron lie, its cost and its name.

A unit is what is kept or pruned as one. Its features are columns of the output projection of its sublayer,
and it owns rows of the input projections. What depends on the kind of unit is in the class of that kind. A
further kind whose units are columns of one output projection is a further subclass of `Unit` with its
entries in `UNITS` and `KINDS`; CONTRIBUTING.md has the recipe. One whose weights lie otherwise (an expert, a
neuron of one, a channel of the hidden dimension) also takes a place in `sublayers.py` and `surgery.py`, and
in the plan that travels with checkpoints (`modeling_kprune.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import BORROWED
from .configs import ask, read
from .families import KEYS, Block, Stack


@dataclass(frozen=True)
class Unit(ABC):
    """One unit of a sublayer, and what is true of its kind.

    Args:
        head_dim: Columns of one head in the output projection.
        heads: Query heads in a unit; 1 for what has none.
        kv_heads: Key-value heads in a unit; 1 for what has none.
    """

    plural: ClassVar[str]
    """What several of them are called."""
    holder: ClassVar[str]
    """What a sublayer of them is called."""
    prunes: ClassVar[str]
    """Name of the option that says whether they are pruned at all."""
    minimum: ClassVar[str]
    """Name of the option that says how many of them each sublayer must keep."""
    multiple: ClassVar[str] = ""
    """Name of the option of which each sublayer keeps a multiple; `""` if it may keep any number."""
    uniform: ClassVar[str]
    """Key of `Stack.uniform` for the config attribute that can say how many of them all layers have."""
    uniform_change: ClassVar[str]
    """What a config says that has such an attribute."""
    any_number: ClassVar[bool] = True
    """Whether such a config accepts any number of them."""
    has_heads: ClassVar[bool] = False
    """Whether a unit is made of attention heads."""
    in_experts: ClassVar[bool] = False
    """Whether the units are shared out among experts, each of which keeps as many of its own."""
    saves_flops: ClassVar[bool] = True
    """Whether a token costs less where one of them has gone."""
    strided: ClassVar[bool] = False
    """Whether the columns of a unit lie apart, those of others between them."""

    head_dim: int = 1
    heads: int = 1
    kv_heads: int = 1

    @classmethod
    @abstractmethod
    def of(cls, config: object, stack: Stack, block: Block, head_unit: str) -> Unit:
        """What a unit of a block is, from the dense model's config, which stays as it is after pruning.

        Args:
            config: The config of the model that owns the stack.
            stack: Its `heads`, `kv_heads` and `head_dim` name the attributes.
            block: One of `stack.blocks`.
            head_unit: With grouped queries, `"group"` for a key-value head with its query heads, or `"query"`
                for one query head of every group; `BORROWED` where keys and values are another layer's.
        """

    @property
    def width(self) -> int:
        """Columns of a unit in the output projection."""
        return self.heads * self.head_dim

    @property
    def sizes(self) -> dict[str, int]:
        """What a unit adds to each of the sizes that `Block.sizes` names; 0 where it changes nothing."""
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "groups": 0}
        return {**heads, "width": self.width, "kv_width": self.kv_heads * self.head_dim, "experts": 0}

    @abstractmethod
    def parts(self, layout: str) -> list[int]:
        """Rows of a unit in each of the parts that a projection of this layout fuses, see `Block.inputs`."""

    def columns(self, count: int, width: int | None = None) -> Tensor:
        """Columns of the output projection that belong to each of `count` units, (count, width).

        Args:
            count: Units of the sublayer.
            width: Entries of a unit in something else that is laid out like these columns. Default:
                `self.width`.
        """
        width = self.width if width is None else width
        return torch.arange(count).unsqueeze(1) * width + torch.arange(width)

    def rows(self, layout: str, count: int) -> Tensor:
        """Rows of an input projection that belong to each of `count` units, (count, rows of a unit)."""
        parts = self.parts(layout)
        starts = [count * sum(parts[:place]) for place in range(len(parts))]
        return torch.cat([s + self.columns(count, width) for s, width in zip(starts, parts, strict=True)], 1)

    def token_flops(self, tokens: float, keys: float) -> float:
        """FLOPs of a unit where no weight takes part, a multiply-add counted as 2.

        Those of a head are 2 s s' d of the products of queries with keys, and as many of attention weights
        with values.

        Args:
            tokens: Tokens of a sequence, s.
            keys: Tokens that each of them reads, s'.
        """
        return 4 * tokens * keys * self.width if self.has_heads else 0

    def cached(self, count: int) -> int:
        """Numbers, of keys and of values, that `count` units cache for each token."""
        return 2 * count * self.kv_heads * self.head_dim if self.has_heads else 0

    def least(self, options: object) -> int:
        """How many of them a sublayer keeps at least, or each of the parts that share them out."""
        return int(getattr(options, self.minimum))

    def in_stock(self, stack: Stack) -> bool:
        """Whether the config of a stock model can say how many of them each layer has."""
        return self.uniform in stack.uniform

    @abstractmethod
    def stock_sizes(self, stack: Stack, count: int) -> dict[str, int]:
        """The config attributes by which each layer of a stock model has `count` units, with their values.

        Args:
            stack: Its `uniform` names the attributes.
            count: Units of each layer.
        """


class Neuron(Unit):
    """A neuron of an FFN: one feature, with its row in the first projection and in that of the gate."""

    plural, holder = "neurons", "FFN"
    prunes, minimum, multiple = "prune_ffn", "min_neurons", "round_to"
    uniform, uniform_change = "ffn", "another FFN width"

    @classmethod
    def of(cls, *_: Any, **__: Any) -> Neuron:
        return cls()

    def parts(self, layout: str) -> list[int]:
        return {"f": [1], "2f": [1, 1]}[layout]

    def stock_sizes(self, stack: Stack, count: int) -> dict[str, int]:
        return {stack.uniform["ffn"]: count}


@dataclass(frozen=True)
class ExpertNeuron(Neuron):
    """A neuron of one expert. A token passes `routes` of the experts, so it is that share of a neuron that
    every token passes."""

    holder = "mixture of experts"
    prunes = "prune_experts"
    uniform, uniform_change = "experts", "another width of experts"
    any_number = False  # programs that compute all experts at once want multiples
    in_experts = True

    routes: int = 1

    @classmethod
    def of(cls, config: object, stack: Stack, *_: Any, **__: Any) -> ExpertNeuron:
        return cls(routes=routes_of(config, stack))

    def stock_sizes(self, stack: Stack, count: int) -> dict[str, int]:
        return {stack.uniform["experts"]: count}


@dataclass(frozen=True)
class Expert(Unit):
    """A whole expert, with the row by which the router chooses it. Tokens that were sent to it go to the next
    best one.

    Args:
        inner: Columns of an expert in the output projection, its bias among them.
        routes: Experts that a token is sent to.
        groups: Groups of the router, of which it chooses some before it chooses experts in them. All keep
            equally many; 1 where there are none.
        open_groups: Groups that it chooses.
        counts: Config attributes that say how many experts there are.
    """

    plural, holder = "experts", "mixture of experts"
    prunes, minimum = "prune_experts", ""
    uniform, uniform_change = "", "another number of experts"
    any_number = False
    saves_flops = False

    inner: int = 0
    routes: int = 1
    groups: int = 1
    open_groups: int = 1
    counts: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: object, stack: Stack, *_: Any, **__: Any) -> Expert:
        groups, chosen = (read(config, name) or 1 for name in stack.groups)
        counts = tuple(name for name in stack.experts if isinstance(read(config, name), int))
        routes = routes_of(config, stack)
        return cls(routes=routes, groups=groups, open_groups=min(chosen, groups), counts=counts)

    @property
    def width(self) -> int:
        return self.inner

    @property
    def sizes(self) -> dict[str, int]:
        return {**dict.fromkeys(super().sizes, 0), "experts": 1}

    def parts(self, _: str) -> list[int]:
        raise AssertionError("what reads for experts lies in slices, not in rows of projections")

    def least(self, _: object) -> int:
        """As many as a token is sent to. Two in any case: a router that chooses among groups compares the two
        best of each."""
        return max(-(-self.routes // self.open_groups), 2)

    def in_stock(self, _: Stack) -> bool:
        return bool(self.counts)

    def stock_sizes(self, _: Stack, count: int) -> dict[str, int]:
        return dict.fromkeys(self.counts, count)


def routes_of(config: object, stack: Stack) -> int:
    """How many experts a token is sent to."""
    routes = read(config, stack.routes)
    if routes is None:
        raise UnsupportedArchitectureError(
            f"{type(config).__name__} has no {stack.routes!r}, the number of experts that a token is "
            "sent to, by which they cost; name the attribute that says it in Stack(routes=...)"
        )
    return max(int(routes), 1)


class Head(Unit):
    """An attention head, a key-value head with the query heads that share it, or all heads of an attention.

    It has the `head_dim` rows of each of its query heads and of each of its key and value heads.
    """

    plural, holder = "heads", "attention"
    prunes, minimum = "prune_heads", "min_heads"
    uniform, uniform_change = "heads", "fewer heads of the same size, which it derives from their number"
    any_number = False  # many want a divisor of the hidden size
    has_heads = True

    @classmethod
    def of(cls, config: object, stack: Stack, block: Block, head_unit: str) -> Head:
        heads = read(config, stack.heads)
        d = ask(config, stack.head_dim) or (read(config, "hidden_size") or 0) // (heads or 1)
        if not heads or not d:
            raise UnsupportedArchitectureError(
                f"{type(config).__name__} has {stack.heads} of {heads} and a head size ({stack.head_dim}) of "
                f"{d}, by which its family tells heads; expected both over 0. Describe this variant: "
                "docs/add_a_family.md"
            )
        kv_heads = int(ask(config, stack.kv_heads) or heads)  # True is one for all
        if LATENT in block.inputs.values():
            return LatentHead.in_latent_attention(config, d)
        if block.obstacle and getattr(config, block.obstacle, True):
            return Head(d, heads, kv_heads)
        if head_unit == BORROWED:
            return BorrowingHead(d, kv_heads, 0)
        if kv_heads < heads and (head_unit == "query" or kv_heads == 1):
            return QueryHead(d, kv_heads, 0)
        return Head(d, heads // kv_heads)

    def parts(self, layout: str) -> list[int]:
        q, kv = self.width, self.kv_heads * self.head_dim
        fused = {"2kv": [kv, kv], "qkv": [q, kv, kv], "qkv:perhead": [q + 2 * kv]}
        return {"q": [q], "2q": [2 * q], "h": [self.heads], "kv": [kv], **fused}[layout]

    def stock_sizes(self, stack: Stack, count: int) -> dict[str, int]:
        names = stack.uniform
        sizes = {stack.head_dim: self.head_dim, names["heads"]: count * self.heads}
        if "kv_heads" in names and self.kv_heads:
            sizes[names["kv_heads"]] = count * self.kv_heads
        return sizes


class QueryHead(Head):
    """One query head of each of `heads` groups; `kv_heads` is 0, as keys and values stay whole.

    A projection has the query heads of a group side by side, so those of a unit lie apart. With a single
    key-value head for all, a unit is one query head.
    """

    strided = True

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"groups": 1}

    def columns(self, count: int, width: int | None = None, extra: int = 0) -> Tensor:
        """As `Unit.columns`, where `extra` entries that belong to no unit come after those of each group."""
        d = (self.width if width is None else width) // self.heads
        groups = torch.arange(self.heads).view(1, -1, 1) * (count * d + extra)
        return (groups + torch.arange(count).view(-1, 1, 1) * d + torch.arange(d)).flatten(1)

    def rows(self, layout: str, count: int) -> Tensor:
        if layout in KEYS:
            return torch.zeros(count, 0, dtype=torch.long)
        width = {"2q": 2 * self.width, "h": self.heads}.get(layout)
        return self.columns(count, width, extra=2 * self.head_dim if layout == "qkv:perhead" else 0)

    def cached(self, count: int) -> int:
        return 2 * min(count, 1) * self.width


class BorrowingHead(QueryHead):
    """One query head of each group where keys and values are those of an earlier layer, which caches them."""

    def cached(self, _: int) -> int:
        return 0


LATENT = "kv:latent"
"""Layout of a projection from a latent vector to keys and values, in multi-head latent attention."""


@dataclass(frozen=True)
class LatentHead(Head):
    """A head of multi-head latent attention (DeepSeek-V2): queries and keys are of another size than
    values, whose size `head_dim` is.

    Keys and values come from a latent vector that all heads share. It is what the cache holds, so that the
    cache grows as before as long as there is a head.

    Args:
        positional: The part of a query that carries positions; the keys' is in the latent vector.
        plain: The other part.
        latent: Numbers of the latent vector, the part of keys that carries positions included.
    """

    positional: int = 0
    plain: int = 0
    latent: int = 0

    @classmethod
    def in_latent_attention(cls, config: object, head_dim: int) -> LatentHead:
        """The head that a config describes, by the names that all such configs have."""
        names = ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank")
        positional, plain, rank = (int(read(config, name)) for name in names)
        return cls(head_dim, positional=positional, plain=plain, latent=rank + positional)

    def parts(self, layout: str) -> list[int]:
        return {"q": [self.plain + self.positional], LATENT: [self.plain + self.head_dim]}[layout]

    def token_flops(self, tokens: float, keys: float) -> float:
        return 2 * tokens * keys * (self.plain + self.positional + self.head_dim)

    def cached(self, count: int) -> int:
        return self.latent if count else 0


WHOLE_EXPERTS = "whole experts"
"""The kind of a mixture of experts in a report if whole ones are its units."""

UNITS: dict[str, type[Unit]] = {
    "attention": Head,
    "cross_attention": Head,
    "ffn": Neuron,
    "experts": ExpertNeuron,
}
"""What the units of a block are, by `Block.kind`."""

KINDS = {
    "attention": ("heads", "attentions"),
    "cross_attention": ("heads of cross-attention", "cross-attentions"),
    "ffn": ("neurons", "FFNs"),
    "experts": ("neurons of experts", "mixtures of experts"),
    WHOLE_EXPERTS: ("experts", "mixtures of experts"),
}
"""What a report calls the units of a block, and such blocks, by `Block.kind`, or by `WHOLE_EXPERTS`."""
