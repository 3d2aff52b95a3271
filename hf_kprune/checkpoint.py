"""Checkpoints: loading through plain `from_pretrained`, and saving that leaves either nothing or a whole checkpoint.

`import hf_kprune` wraps five functions of transformers; each does nothing for a model whose config has no `kprune`:

    PreTrainedModel.post_init             shrinks the model, built on the meta device, before its weights are loaded
    PreTrainedModel.from_pretrained       refuses weights that do not fit the plan
    PreTrainedConfig.get_config_dict      completes a save that was killed while it moved files
    PreTrainedConfig.from_dict            takes off the notice that stops plain transformers
    PreTrainedConfig.to_json_file         adds modeling_kprune.py, its auto_map and the notice, before uploads too
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from . import modeling_kprune
from .modeling_kprune import CheckpointError, is_pruned, load_checked, seal, shrink, unseal
from .saving import aside, not_written, put, recover


def auto_map(model_type: str) -> dict[str, str]:
    """`AutoModel...` class name to class in modeling_kprune.py, for every auto class that has this model type."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and model_type in mapping._model_mapping:
            target = mapping._model_mapping[model_type]
            found[name] = f"modeling_kprune.{target if isinstance(target, str) else target[0]}"
    return found


def install() -> None:
    """Wrap the five functions. Calling it again changes nothing."""
    if getattr(PreTrainedModel.post_init, "is_kprune", False):
        return
    post_init = PreTrainedModel.post_init
    load = PreTrainedModel.__dict__["from_pretrained"].__func__
    find = PreTrainedConfig.__dict__["get_config_dict"].__func__
    read = PreTrainedConfig.__dict__["from_dict"].__func__
    write = PreTrainedConfig.to_json_file

    @functools.wraps(post_init)
    def shrink_then_post_init(self: PreTrainedModel) -> None:
        shrink(self)
        post_init(self)

    @functools.wraps(load)
    def load_and_check(cls: type[PreTrainedModel], name: Any, *args: Any, **kwargs: Any) -> Any:
        return load_checked(functools.partial(load, cls), name, *args, **kwargs)

    @functools.wraps(find)
    def recover_and_find(cls: type[PreTrainedConfig], pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        if recover(name) and Path(name, "modules.json").exists():
            raise CheckpointError(f"{name} was not yet whole and was completed just now: load it again")  # who asks has looked
        return find(cls, name, **kwargs)

    @functools.wraps(read)
    def read_and_unseal(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = read(cls, config_dict, **kwargs)
        unseal(result[0] if isinstance(result, tuple) else result)
        return result

    @functools.wraps(write)
    def write_and_seal(self: PreTrainedConfig, json_file_path: Any, use_diff: bool = True) -> None:
        pruned = is_pruned(self)
        if pruned:
            self.auto_map = auto_map(self.model_type)
        elif "modeling_kprune." in str(getattr(self, "auto_map", "")):
            del self.auto_map
        write(self, json_file_path, use_diff)
        if pruned:
            shutil.copyfile(modeling_kprune.__file__, Path(json_file_path).with_name("modeling_kprune.py"))
            seal(Path(json_file_path).parent)

    shrink_then_post_init.is_kprune = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = shrink_then_post_init
    PreTrainedModel.from_pretrained = classmethod(load_and_check)
    PreTrainedConfig.get_config_dict = classmethod(recover_and_find)  # type: ignore[arg-type]
    PreTrainedConfig.from_dict = classmethod(read_and_unseal)  # type: ignore[arg-type]
    PreTrainedConfig.to_json_file = write_and_seal


def save_atomically(
    model: PreTrainedModel, output_dir: str, max_shard_size: str, add: Callable[[str], None], overwrite: bool = True
) -> None:
    """Write `model` near `output_dir`, reload it, compare every tensor, and only then put it in place.

    A kill at any moment leaves `output_dir` absent (or as it was), or whole, or such that the next save or load completes it;
    what is left behind then is one folder whose name begins with `.` and ends with `.tmp`, which the next save to the same
    place removes. saving.py has the whole of it.

    Args:
        model: A pruned or plain model.
        output_dir: Made if need be. Files in it that are no checkpoint's stay.
        max_shard_size: As in `save_pretrained`.
        add: Called with the folder to write everything else into it (tokenizer, report, model card).
        overwrite: Whether a checkpoint that is there is replaced.

    Raises:
        ArgumentError: If something is there that must not be replaced.
        CheckpointError: If it cannot be written, or does not load back to the same tensors; nothing is left behind then.
    """
    target = Path(output_dir).resolve()
    try:
        with aside(target) as new:
            model.save_pretrained(new, max_shard_size=max_shard_size)
            add(str(new))
            verify(model, str(new))
            put(new, target, overwrite)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(not_written(target, error, sum(p.nbytes for p in model.parameters()))) from error


def verify(model: PreTrainedModel, directory: str) -> None:
    """Reload `directory` with the class of `model` and raise `CheckpointError` unless all tensors are the same bits."""
    again = type(model).from_pretrained(directory, dtype=model.dtype).state_dict()
    # from_pretrained gives every floating tensor one dtype, whatever is in the file
    expected = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    differing = [name for name in expected.keys() | again.keys() if not same(expected.get(name), again.get(name))]
    if differing:
        raise CheckpointError(f"{len(differing)} tensors do not load back as they were saved, such as {min(differing)}")


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are there, of one dtype, and equal."""
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
