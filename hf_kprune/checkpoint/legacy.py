"""Old checkpoints: heads pruned by `prune_heads` of transformers 2 to 4, and FFNs narrower than their config
says.

transformers 5 knows no `config.pruned_heads` and builds the dense model. Here, the sizes of the tensors are
what counts: they are written into the config as a plan, and from there on everything is as for a pruned
checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ArgumentError, CheckpointError, UnsupportedModelError
from ..modeling_kprune import HUB_OPTIONS, has, is_pruned, kind_of
from ..progress import unwarned
from ..structure.sublayers import Sublayer, find_sublayers
from ..structure.surgery import write_plan
from . import loading


WEIGHT_OPTIONS = ("use_safetensors", "variant")
"""Options that tell which file the weights are in."""


def from_legacy(
    path_or_name: str | os.PathLike[str], model_class: Any = None, **kwargs: object
) -> PreTrainedModel:
    """Open a checkpoint whose heads were pruned by transformers 2 to 4, or whose FFNs are narrower than its
    config says.

    Such are those of `prune_heads`, nn_pruning and TextPruner. The model that comes back is a pruned one:
    `save_pretrained` saves it in today's format, which `from_pretrained` loads.

    Args:
        path_or_name: A directory or a name on the Hub.
        model_class: A model class or an AutoModel class. Unset: what the config names, the base model if it
            names none.
        kwargs: Of `from_pretrained`.

    Raises:
        ArgumentError: If the checkpoint is in today's format already.
        CheckpointError: If its config and its weights contradict each other.
        UnsupportedModelError: If its layers are of a kind that transformers lacks, or that no family
            describes.

    Example:

        >>> from hf_kprune import from_legacy
        >>> type(from_legacy("examples/sst2-tiny")).__name__
        'BertForSequenceClassification'
    """
    name = os.fspath(path_or_name)
    hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
    reader: Any = (
        getattr(model_class, "config_class", None) or AutoConfig
    )  # early configs do not tell their model_type
    config, kwargs = reader.from_pretrained(name, return_unused_kwargs=True, **hub, **kwargs)
    if is_pruned(config):
        raise ArgumentError(f"{name} is pruned, in today's format: load it with from_pretrained")
    norm = getattr(config, "layer_norm_type", None)
    if norm not in (None, "layer_norm"):
        raise UnsupportedModelError(
            f"{name}: layer_norm_type is {norm!r} (nn_pruning): it was trained without layer norms, which "
            f"{config.model_type!r} of transformers cannot be"
        )
    model_class = model_class or loading.model_class(config)
    new_heads = bool(kwargs.get("ignore_mismatched_sizes"))
    where = {**hub, **{key: kwargs[key] for key in WEIGHT_OPTIONS if key in kwargs}}
    config = plan_from_weights(name, model_class, config, new_heads, where)
    return cast(PreTrainedModel, model_class.from_pretrained(name, config=config, **hub, **kwargs))


def plan_from_weights(
    name: str, model_class: Any, config: object, new_heads: bool, where: dict[str, object]
) -> PreTrainedConfig:
    """The config with a plan of the sizes that the tensors have, which transformers is asked for: it knows
    their names.

    Args:
        name: Of the checkpoint.
        model_class: As in `from_legacy`.
        config: Of the dense model.
        new_heads: Whether tensors outside the layers may be of another size, as `ignore_mismatched_sizes`
            says.
        where: Options for finding the weights.
    """
    with unwarned():  # of the sizes that are wanted here
        dense, info = model_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **where
        )
    sublayers = find_sublayers(dense)
    paths = {id(module): path for path, module in dense.named_modules()}
    inside = tuple({f"{paths[id(s.layers)]}." for s in sublayers})
    lost = [key for key in info["missing_keys"] if key.startswith(inside)]
    if lost:
        raise CheckpointError(
            f"{name}: {len(lost)} tensors of the layers are not in the weight files, such as {min(lost)}; "
            "layers that lost more than heads and neurons (biases, projections) or are named otherwise "
            "cannot be read"
        )
    expected = {key: list(value.shape) for key, value in dense.state_dict().items()}
    shapes = {key: list(shape) for key, shape in expected.items()}
    shapes |= {key: list(shape) for key, shape, _ in info["mismatched_keys"]}
    gone = heads_gone(name, sublayers)
    for s in sublayers:
        narrow(name, s, paths[id(s.layer)], gone[id(s.owner)].get(s.index, set()), shapes, expected)
    wrong = [
        key
        for key, shape in shapes.items()
        if shape != expected.get(key) and (key.startswith(inside) or not new_heads)
    ]
    if wrong:
        key = min(wrong)
        raise CheckpointError(
            f"{name}: {key} is {shapes[key]} in the weight files, {expected.get(key)} by config.json and the "
            "tensors beside it"
        )
    # a block that lost nothing stays out of the plan: T5's tables of positions stay shared
    write_plan([s for s in sublayers if any(units not in (None, s.plan["of"]) for units in s.plan["kept"])])
    for owner in {id(s.owner): s.owner for s in sublayers}.values():
        owner.config.__dict__.pop("pruned_heads", None)
    return cast(PreTrainedConfig, dense.config)


def heads_gone(name: str, sublayers: Sequence[Sublayer]) -> dict[int, dict[int, set[int]]]:
    """What `pruned_heads` says, by the identity of the model whose config it is in: layer to heads that are
    gone.
    """
    heads_by_owner = {}
    for owner in {id(s.owner): s.owner for s in sublayers}.values():
        entry = getattr(owner.config, "pruned_heads", None) or {}
        try:
            gone = {int(layer): {int(head) for head in heads} for layer, heads in entry.items() if heads}
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(
                f"{name}: pruned_heads is {entry!r}, expected a list of heads for each layer"
            ) from None
        attentions = [s for s in sublayers if s.owner is owner and s.unit.has_heads]
        if gone and len({(id(s.layers), s.kind) for s in attentions}) > 1:
            raise CheckpointError(
                f"{name}: pruned_heads does not say which of several stacks of layers it means"
            )
        of = {s.index: s.plan["of"] * s.plan["heads"] for s in attentions}
        strange = [(i, head) for i, heads in gone.items() for head in heads if not 0 <= head < of.get(i, 0)]
        if strange:
            raise CheckpointError(
                f"{name}: pruned_heads names head {min(strange)[1]} of layer {min(strange)[0]}; there are "
                f"{len(of)} layers of {max(of.values(), default=0)} heads"
            )
        heads_by_owner[id(owner)] = gone
    return heads_by_owner


def narrow(
    name: str,
    s: Sublayer,
    layer: str,
    gone: set[int],
    shapes: dict[str, list[int]],
    expected: dict[str, list[int]],
) -> None:
    """Write into the plan of `s` how many units its output projection has in `shapes`, and into `expected`
    what follows.

    Args:
        name: Of the checkpoint.
        s: A sublayer of the dense model.
        layer: Path of its layer.
        gone: Heads that its layer lost.
        shapes: Shapes of the tensors in the weight files.
        expected: Those of the dense model.
    """
    turned = kind_of(s.output) != "linear"  # the weight is (in, out)
    columns = shapes[f"{layer}.{s.block.output}.weight"][0 if turned else 1]
    units, rest = divmod(columns, s.unit_width)
    if rest or units > s.plan["of"]:
        raise CheckpointError(
            f"{name}: {layer}.{s.block.output} has {columns} columns in the weight files, expected a "
            f"multiple of {s.unit_width} and at most {s.plan['of'] * s.unit_width}"
        )
    if s.unit.has_heads:
        left = [head for head in range(s.plan["of"] * s.plan["heads"]) if head not in gone]
        if len(left) != units * s.plan["heads"]:
            raise CheckpointError(
                f"{name}: pruned_heads leaves {len(left)} heads in {layer} ({s.kind}), the weight files hold "
                f"{units * s.plan['heads']}"
            )
        for _, heads in s.plan["select"].values():
            heads[s.index] = left
    s.plan["kept"][s.index] = units
    expected[f"{layer}.{s.block.output}.weight"][0 if turned else 1] = columns
    for path, (width, fixed) in s.plan["rows"].items():
        for tensor in ("weight", "bias") if has(s.layer, path) else ():
            if (shape := expected.get(f"{layer}.{path}.{tensor}")) is not None:
                across = tensor == "weight" and kind_of(s.layer.get_submodule(path)) != "linear"
                shape[int(across)] = units * width + fixed
