"""Models whose code is not that of transformers: it travels with the checkpoint, and each class gets a
narrowed one beside it.

A repository names its own classes in `config.auto_map`, as {"AutoModel": "modeling_own.OwnModel"}. In a
pruned checkpoint the entry is "kprune_modeling_own.OwnModel": that file makes, of the class in
modeling_own.py, one that is shrunk to the plan. Stock classes have theirs in modeling_kprune.py itself. With
`import hf_kprune` neither of them is read: the entry is "modeling_own.OwnModel" again, or none.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from ..errors import ArgumentError, CheckpointError
from ..modeling_kprune import is_pruned
from ..structure.facts import auto_class, auto_tables


STOCK, PREFIX = "modeling_kprune", "kprune_"
WRAPPER = '''"""Written by hf_kprune: the classes of {module}.py, shrunk to the plan in config.json."""

from .modeling_kprune import narrowed
'''


def stock_entries(config: Any) -> dict[str, str]:
    """`AutoModel...` class name to class in modeling_kprune.py, for every auto class that has this model
    type.

    A class that no table has is under the auto class of its task: `MllamaForCausalLM` under
    `AutoModelForCausalLM`.
    """
    tables = {
        name: table[config.model_type] for name, table in auto_tables().items() if config.model_type in table
    }
    entries = {
        name: f"{STOCK}.{target if isinstance(target, str) else target[0]}" for name, target in tables.items()
    }
    for name in config.architectures or ():
        if f"{STOCK}.{name}" not in entries.values() and hasattr(transformers, name):
            entries.setdefault(auto_class(name), f"{STOCK}.{name}")
    return entries


def split(reference: str) -> tuple[str, str, str]:
    """Repository with `--` (or nothing), module and class in an entry of `auto_map`."""
    repository, dashes, target = reference.rpartition("--")
    module, _, name = target.rpartition(".")
    return repository + dashes, module, name


def dense_auto_map(config: Any) -> dict[str, Any]:
    """`config.auto_map` as it was before pruning: without what hf_kprune writes there."""
    entries: dict[str, Any] = {}
    written = getattr(config, "auto_map", None)
    for auto, reference in written.items() if isinstance(written, dict) else ():
        if isinstance(reference, str):
            repository, module, name = split(reference)
            if module == STOCK and config.model_type in auto_tables().get(auto, ()):
                continue
            reference = f"{repository}{module.removeprefix(PREFIX)}.{name}"
        entries[auto] = reference
    return entries


def brings_code(config: object) -> bool:
    """Whether a config names model classes of its own."""
    entries = dense_auto_map(config).items()
    return any(auto.startswith("AutoModel") and split(entry)[1] != STOCK for auto, entry in entries)


def write_auto_map(config: object, directory: Path) -> dict[str, Any]:
    """The `auto_map` of a pruned checkpoint in `directory`, where its code is; writes the file of each
    narrowed class.
    """
    entries = dense_auto_map(config)
    if not brings_code(config):
        return {**entries, **stock_entries(config)}
    classes: dict[str, set[str]] = {}
    for auto, entry in entries.items():
        repository, module, name = split(entry) if auto.startswith("AutoModel") else ("", STOCK, "")
        if module != STOCK and (directory / f"{module}.py").exists():
            classes.setdefault(module, set()).add(name)
            entries[auto] = f"{PREFIX}{module}.{name}"
    for module, names in classes.items():
        imports = [f"from .{module} import {name} as Dense{name}\n" for name in sorted(names)]
        lines = [f"{name} = narrowed(Dense{name}, __name__)\n" for name in sorted(names)]
        text = "".join([WRAPPER.format(module=module), *imports, "\n\n", *lines])
        (directory / f"{PREFIX}{module}.py").write_text(text, encoding="utf-8")
    return entries


def is_stock(model: PreTrainedModel) -> bool:
    """Whether the class of a model is one of transformers, or one that modeling_kprune.py made of it."""
    kind = type(model).dense_class() if hasattr(type(model), "dense_class") else type(model)
    return bool(kind.__module__.startswith("transformers."))


def check_code_is_used(model: PreTrainedModel, name: object) -> None:
    """Refuse a stock class for a pruned checkpoint `name` that brings code of its own."""
    if is_pruned(model.config) and brings_code(model.config) and is_stock(model):
        autos = ", ".join(auto for auto in dense_auto_map(model.config) if auto.startswith("AutoModel"))
        raise CheckpointError(
            f"{name} brings code of its own, without which {type(model).__name__} would compute something "
            f"else: load it with trust_remote_code=True, and one of {autos}"
        )


def check_code_travels(model: PreTrainedModel) -> None:
    """Warn of a model whose class is in no checkpoint: whoever loads it needs that class, as for the dense
    model.

    Raises `ArgumentError` if its code is meant to travel (`register_for_auto_class`) and is in no file.
    """
    kind, module = type(model), sys.modules.get(type(model).__module__)
    name = kind.__name__
    advice = (
        f"define it in a file of its own and call {name}.register_for_auto_class({auto_name(kind)!r}) first"
    )
    if is_stock(model):
        return
    if not kind.is_remote_code():
        warnings.warn(
            f"{name} is a class of {kind.__module__}, not of transformers: the checkpoint loads by "
            f"{name}.from_pretrained where that class is at hand; to let its code travel with it, {advice}",
            stacklevel=2,
        )
    elif kind.__module__ == "__main__" or not getattr(module, "__file__", None):
        raise ArgumentError(
            f"{name} is registered for an auto class, and its code is in no file that can be saved; {advice}"
        )


def auto_name(kind: Any) -> str:
    """Name of the auto class that a model class belongs to, by the names of it and of what it is made of."""
    names = (auto_class(base.__name__) for base in kind.__mro__)
    return next((name for name in names if name != "AutoModel"), "AutoModel")
