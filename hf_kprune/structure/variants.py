"""The descriptions that an observed sublayer may have: what shapes and numbers leave open, plain ones first.

watch.py observes the sublayers and detect.py tries the variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypedDict

from ..errors import UnsupportedArchitectureError
from .configs import read
from .families import Block, Dimension, Layout, Place, Size
from .units import UNITS
from .watch import Observation


HIDDEN = ("d_model", "dim", "embed_dim", "hidden_size", "n_embd")
"""Attributes of modules that are as likely to be the width of the hidden states as that of the heads."""


class HeadNames(TypedDict, total=False):
    """The fields of `Stack` that name config attributes for the heads; none where there is no attention."""

    heads: str
    kv_heads: str
    head_dim: str


def head_names(
    where: str, path: str, config: Any, observations: Sequence[Observation]
) -> Iterator[HeadNames]:
    """The config attributes that may say how many heads there are, and of which size: those that fit the
    shapes.

    Args:
        where: Name of the layers, for errors.
        path: Their path in the model whose config it is.
        config: The config of that model.
        observations: The sublayers of the layers.

    Raises:
        UnsupportedArchitectureError: If none fit.
    """
    attentions = [o for o in observations if UNITS[o.block.kind].has_heads]
    if not attentions:
        yield {}
        return
    values = {**config.to_dict(), **{name: read(config, name) for name in config.attribute_map}}
    values = {name: value for name, value in values.items() if isinstance(value, int)}

    def saying(value: float, usual: str, default: int, *words: str) -> list[str]:
        """The first attribute of this value: the usual one, none if that is the default, or another one."""
        others = [name for name in values if any(word in name for word in words)]
        return [name for name in (usual, "", *others) if (read(config, name) or default) == value][:1]

    fits = False
    for heads, name in _head_counts(values, path).items():
        sizes = {o.columns / heads for o in attentions if heads}
        groups = {key_value_heads(o, heads) for o in attentions}
        if len(sizes) == len(groups) == 1:
            kv_names = saying(groups.pop(), "num_key_value_heads", heads, "kv", "key_value", "query", "group")
            size = (read(config, "hidden_size") or 0) // heads
            for kv_name, dim in product(kv_names, saying(sizes.pop(), "head_dim", size, "head", "kv")):
                fits = True
                yield {"heads": name, "kv_heads": kv_name, "head_dim": dim}
    if not fits:
        shapes = ", ".join(f"{path} gives {rows}" for o in attentions for path, rows in o.rows.items())
        raise UnsupportedArchitectureError(
            f"no attributes of {type(config).__name__} tell a number of heads that have one size in {where}, "
            f"where {shapes} features"
        )


def _head_counts(values: Mapping[str, int], path: str) -> dict[int, str]:
    """How many heads there may be, each number with its likeliest config attribute, the likeliest first."""
    side = next((side for side in ("encoder", "decoder") if side in path), "")
    counts: dict[int, str] = {}
    for name in sorted(values, key=lambda n: (side not in n, n != "num_attention_heads", n)):
        other = any(word in name for word in ("dim", "size", "kv", "key", "hidden"))
        if "head" in name and type(values[name]) is int and not other:
            counts.setdefault(values[name], name)
    return counts


def key_value_heads(observation: Observation, heads: int) -> float:
    """Key-value heads of an attention with so many heads; not a number if its shapes do not fit."""
    d = observation.columns / heads if heads else float("nan")
    rows, inputs = observation.rows, observation.block.inputs
    if len(rows) == 1:
        return (next(iter(rows.values())) / d - heads) / 2
    kv = {rows[path] for path, layout in inputs.items() if layout == "kv"}
    q = {rows[path] for path, layout in inputs.items() if layout == "q"}
    return kv.pop() / d if len(kv) == 1 and q == {observation.columns} else float("nan")


def variants(observation: Observation, config: object, names: HeadNames) -> Iterator[Block]:
    """The ways in which a sublayer may have to be described.

    Args:
        observation: What the sublayer was observed to do.
        config: The config of the model that owns its layers.
        names: Of its attributes, those for the heads.
    """
    if not UNITS[observation.block.kind].has_heads:
        yield observation.block
        return
    heads = read(config, names["heads"])
    kv_heads = int(key_value_heads(observation, heads))
    weights = _slices(observation, heads, kv_heads)
    inside = {p: dim for p, dim in weights.items() if p.rpartition(".")[0] == observation.block.core}
    layouts: list[dict[str, Layout]] = [dict(observation.block.inputs)]
    layouts += [{path: "qkv:perhead"} for path in observation.rows if len(observation.rows) == 1]
    blocks: list[Block] = []
    for layout, sizes, select, slices in product(
        layouts,
        _sizes(observation, heads, kv_heads, config, names),
        (_select(observation, heads), {}),
        ({}, inside, weights),
    ):
        block = replace(observation.block, inputs=layout, sizes=sizes, select=select, slices=slices)
        if block not in blocks:
            blocks.append(block)
            yield block


def _sizes(
    observation: Observation, heads: int, kv_heads: int, config: object, names: HeadNames
) -> list[dict[str, Size]]:
    """What `Block.sizes` may be: surely sizes, doubtful ones too, those in the config too, or all."""
    counts: dict[Size, int] = {"heads": heads, "kv_heads": kv_heads, "groups": heads // kv_heads}
    sure: dict[str, Size] = {}
    doubtful: dict[str, Size] = {}
    for path, value in observation.numbers.items():
        name = path.rpartition(".")[2]
        size: Size = (
            "groups" if "group" in name else "kv_heads" if "kv" in name or "key_value" in name else "heads"
        )
        counting = ("head" in name or size == "groups") and not ("dim" in name or "size" in name)
        if value == counts[size] and counting:
            sure[path] = size
        elif value == observation.columns:
            (doubtful if name in HIDDEN else sure)[path] = "width"
    pairs: list[tuple[str, Size]] = [(names["heads"], "heads"), (names["kv_heads"], "kv_heads")]
    core = observation.block.core
    views: dict[str, Size] = {f"{core}.config.{name}": size for name, size in pairs if hasattr(config, name)}
    return [sure, {**sure, **doubtful}, {**sure, **views}, {**sure, **doubtful, **views}]


def _select(observation: Observation, heads: int) -> dict[str, Place]:
    """What `Block.select` may be: arguments that are as large as the heads are many."""
    select: dict[str, Place] = {}
    for argument, shape in observation.arguments.items():
        if len(shape) > 2:
            if len(shape) == 4 and shape[1] == heads:
                select[argument] = 1
            elif shape[0] == heads != observation.batch:
                select[argument] = 0
            elif shape[0] == heads * observation.batch:
                select[argument] = "0:batch"
    return select


def _slices(observation: Observation, heads: int, kv_heads: int) -> dict[str, Dimension]:
    """What `Block.slices` may be: parameters with a dimension, the first such one, as large as heads make."""
    width = observation.columns
    sizes = {heads, kv_heads, width, kv_heads * width // heads} - {1}
    slices: dict[str, Dimension] = {}
    for path, shape in observation.weights.items():
        if shape and shape[0] in sizes:
            slices[path] = 0
        elif len(shape) > 1 and shape[1] in sizes:
            slices[path] = 1
    return slices
