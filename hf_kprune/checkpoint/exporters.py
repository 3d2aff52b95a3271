"""The formats that a model is saved in: what writes each, and what reads it back and compares."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .. import modeling_kprune
from ..errors import ArgumentError, CheckpointError
from ..modeling_kprune import is_pruned
from ..structure.offload import is_dispatched, read_state
from .remote_code import is_stock, split, write_auto_map


class UnsavableError(CheckpointError):
    """A model that no place can hold as it is, so that another directory is no way out."""


def check_generation(model: PreTrainedModel) -> None:
    """Raise `ArgumentError` if Transformers does not save the generation config of a model as it is now.

    What was loaded and not changed since it does save, whatever that says.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate() or saves(config):
        return
    flags = flags_in_the_way(config)
    words = ", ".join(f"{name}={value!r}" for name, value in flags.items())
    raise ArgumentError(
        f"model.generation_config has {words}, which cannot be, or means nothing beside its other flags, and "
        "Transformers saves no such config; set each of these to None, as in "
        f"model.generation_config.{next(iter(flags))} = None, or the flags that it takes, such as "
        "do_sample=True for a temperature and num_beams for an early_stopping"
    )


def saves(config: GenerationConfig) -> bool:
    """Whether Transformers saves a generation config, which it does not say but by doing so."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (TypeError, ValueError):
            return False
    return True


def flags_in_the_way(config: GenerationConfig) -> dict[str, object]:
    """The flags of a generation config, with their values, without which all others could be saved."""
    rest = copy.deepcopy(config)
    flags = {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
    for name in flags:
        setattr(rest, name, None)
    before = None
    while before != len(flags):  # a flag may be one that a later one makes room for
        before = len(flags)
        for name, value in list(flags.items()):
            setattr(rest, name, value)
            if saves(rest):
                del flags[name]
            else:
                setattr(rest, name, None)
    return flags


def write(model: PreTrainedModel, directory: str, max_shard_size: str) -> None:
    """Write a model with its config. patches.py adds to it what a model with a plan needs."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)


def verify_tensors(model: PreTrainedModel, directory: str) -> None:
    """Reload `directory` with the class of `model` and raise `UnsavableError` unless all tensors are as
    `loads_back` says.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = {"device_map": model.hf_device_map, "offload_folder": folder} if is_dispatched(model) else {}
        again = type(model).from_pretrained(directory, dtype=model.dtype, **place)
        differing = model.state_dict().keys() ^ again.state_dict().keys()
        for (name, expected), (other, tensor) in zip(read_state(model), read_state(again), strict=False):
            if name != other or not loads_back(expected, tensor, model.dtype):
                differing |= {name}
    if differing:
        raise UnsavableError(
            f"{len(differing)} tensors do not load back as they were saved, such as {min(differing)}: what "
            f"{type(model).__name__}.from_pretrained makes of it is another model, and nothing is written; "
            "save_pretrained of the model writes it without this comparison"
        )


def verify_native(model: PreTrainedModel, directory: str) -> None:
    """Verify the tensors, and the ways to load them where the class of the model is not the only one."""
    verify_tensors(model, directory)
    if is_stock(model) or type(model).is_remote_code():
        verify_ways_in(model, directory)


def verify_ways_in(model: PreTrainedModel, directory: str) -> None:
    """Load `directory` in the other ways that docs/loading.md promises, and raise unless they give the class
    of `model`.

    By the auto classes that have it, and by the file that travels. Weights stay on disk: names and sizes are
    compared.
    """
    wanted, config = (
        type(model).__name__,
        json.loads(Path(directory, "config.json").read_text(encoding="utf-8")),
    )
    try:
        if Path(directory, "modeling_kprune.py").read_bytes() != Path(modeling_kprune.__file__).read_bytes():
            raise CheckpointError("modeling_kprune.py is not the one of hf_kprune")
        expected = write_auto_map(
            AutoConfig.from_pretrained(directory, trust_remote_code=True), Path(directory)
        )
        if config.get("auto_map") != expected:
            raise CheckpointError(f"its auto_map is {config.get('auto_map')}, expected {expected}")
        for auto, entry in expected.items():
            if not auto.startswith("AutoModel") or split(entry)[2] != wanted:
                continue
            of_file = (
                getattr(modeling_kprune, wanted)
                if is_stock(model)
                else get_class_from_dynamic_module(entry, directory)
            )
            for load in (getattr(transformers, auto).from_pretrained, of_file.from_pretrained):
                loaded = load(directory, device_map="meta", trust_remote_code=True)
                if type(loaded).__name__ != wanted:
                    raise CheckpointError(f"{auto} gives a {type(loaded).__name__}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        kind = CheckpointError if isinstance(error, OSError) else UnsavableError  # that may be of the place
        raise kind(
            f"the checkpoint does not load as {wanted}, as docs/loading.md promises: {reason}"
        ) from error


def loads_back(saved: torch.Tensor, loaded: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor holds the values that were saved.

    `from_pretrained` rounds floating tensors to the dtype of the model, except those that its class keeps in
    another one, such as float32 for parts of a model of 16 bits. In that no value may have changed at all.

    Args:
        saved: The tensor of the model in memory.
        loaded: The one that came back.
        dtype: That of the model.
    """
    saved, loaded = saved.cpu(), loaded.cpu()
    if not (saved.is_floating_point() and loaded.is_floating_point()):
        return saved.dtype == loaded.dtype and torch.equal(saved, loaded)
    common = dtype if loaded.dtype == dtype else torch.promote_types(saved.dtype, loaded.dtype)
    return torch.equal(saved.to(common), loaded.to(common))


class Exporter(NamedTuple):
    """How a model is saved in a format.

    Args:
        write: Called with the model, the folder to write into, and the largest size of a file, as in
            `save_pretrained`.
        verify: Called with the model and the folder. It raises `CheckpointError` unless that holds the same
            model.
    """

    write: Callable[[PreTrainedModel, str, str], None]
    verify: Callable[[PreTrainedModel, str], None]


EXPORTERS = {"native": Exporter(write, verify_native), "stock": Exporter(write, verify_tensors)}
"""The formats: the checkpoint of a model with a plan, and the plain one of a dense or a uniform model."""


def form_of(model: PreTrainedModel) -> str:
    """The format that a model is saved in."""
    return "native" if is_pruned(model.config) else "stock"
