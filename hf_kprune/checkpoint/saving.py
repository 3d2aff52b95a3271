"""Checkpoints: loading through plain `from_pretrained`, and saving that leaves either nothing or a whole checkpoint.

`import hf_kprune` wraps seven functions of transformers; each does nothing for a model whose config has no plan in `kprune`:

    PreTrainedModel.post_init                 shrinks the model, built on the meta device, before its weights are loaded
    PreTrainedModel.from_pretrained           refuses weights that do not fit the plan, or are not those that were saved
    PreTrainedModel.save_pretrained           records what the weight files are
    PreTrainedModel._upload_modified_files    the same, before an upload
    PreTrainedConfig.get_config_dict          completes a save that was killed while it moved files
    PreTrainedConfig.from_dict                takes off the notice that stops plain transformers
    PreTrainedConfig.to_json_file             adds modeling_kprune.py, its auto_map and the notice, before uploads too
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .. import modeling_kprune
from ..files.exchange import aside, not_written, put, recover
from ..modeling_kprune import (
    CheckpointError,
    edit_config,
    is_pruned,
    load_checked,
    record_weights,
    seal,
    shrink,
    spare_empty,
    unseal,
)
from ..progress import quiet
from .remote_code import check_code_is_used, dense_auto_map, is_stock, split, write_auto_map


def install() -> None:
    """Wrap the seven functions. Calling it again changes nothing."""
    if getattr(PreTrainedModel.post_init, "is_kprune", False):
        return
    post_init = PreTrainedModel.post_init
    load = PreTrainedModel.__dict__["from_pretrained"].__func__
    find = PreTrainedConfig.__dict__["get_config_dict"].__func__
    read = PreTrainedConfig.__dict__["from_dict"].__func__
    write = PreTrainedConfig.to_json_file
    save, upload = PreTrainedModel.save_pretrained, PreTrainedModel._upload_modified_files

    @functools.wraps(post_init)
    def shrink_then_post_init(self: PreTrainedModel) -> None:
        shrink(self)
        post_init(self)
        spare_empty(self)

    @functools.wraps(load)
    def load_and_check(cls: type[PreTrainedModel], name: Any, *args: Any, **kwargs: Any) -> Any:
        def load_with_its_code(*args: Any, **kwargs: Any) -> Any:
            model, info = load(cls, *args, **kwargs)
            check_code_is_used(model, name)
            return model, info

        return load_checked(load_with_its_code, name, *args, **kwargs)

    @functools.wraps(save)
    def save_and_record(
        self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            record_weights(save_directory)

    @functools.wraps(upload)
    def record_and_upload(self: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        record_weights(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    @functools.wraps(find)
    def recover_and_find(
        cls: type[PreTrainedConfig], pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        if recover(name) and Path(name, "modules.json").exists():
            raise CheckpointError(
                f"{name} was not yet whole and was completed just now: load it again"
            )  # who asks has looked
        return find(cls, name, **kwargs)

    @functools.wraps(read)
    def read_and_unseal(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = read(cls, config_dict, **kwargs)
        config = unseal(result[0] if isinstance(result, tuple) else result)
        if is_pruned(config) and (entries := dense_auto_map(config)) != getattr(config, "auto_map", {}):
            config.auto_map = entries
            if not entries:
                del config.auto_map
        return result

    @functools.wraps(write)
    def write_and_seal(self: PreTrainedConfig, json_file_path: Any, use_diff: bool = True) -> None:
        directory = Path(json_file_path).parent
        if not is_pruned(self) and "modeling_kprune." in str(getattr(self, "auto_map", "")):
            del self.auto_map
        write(self, json_file_path, use_diff)
        if is_pruned(self):
            shutil.copyfile(modeling_kprune.__file__, directory / "modeling_kprune.py")
            edit_config(directory, auto_map=write_auto_map(self, directory))
            seal(directory)

    shrink_then_post_init.is_kprune = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = shrink_then_post_init
    PreTrainedModel.from_pretrained = classmethod(load_and_check)
    PreTrainedModel.save_pretrained, PreTrainedModel._upload_modified_files = (
        save_and_record,
        record_and_upload,
    )
    PreTrainedConfig.get_config_dict = classmethod(recover_and_find)  # type: ignore[arg-type]
    PreTrainedConfig.from_dict = classmethod(read_and_unseal)  # type: ignore[arg-type]
    PreTrainedConfig.to_json_file = write_and_seal


def save_atomically(
    model: PreTrainedModel,
    output_dir: str,
    max_shard_size: str,
    add: Callable[[str], None],
    overwrite: bool = True,
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
        with quiet(), aside(target) as new:
            model.save_pretrained(new, max_shard_size=max_shard_size)
            add(str(new))
            verify(model, str(new))
            put(new, target, overwrite)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            not_written(target, error, sum(p.nbytes for p in model.parameters()))
        ) from error


def verify(model: PreTrainedModel, directory: str) -> None:
    """Reload `directory` with the class of `model` and raise `CheckpointError` unless all tensors are the same bits."""
    again = type(model).from_pretrained(directory, dtype=model.dtype).state_dict()
    # from_pretrained gives every floating tensor one dtype, whatever is in the file
    expected = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    differing = [
        name for name in expected.keys() | again.keys() if not same(expected.get(name), again.get(name))
    ]
    if differing:
        raise CheckpointError(
            f"{len(differing)} tensors do not load back as they were saved, such as {min(differing)}"
        )
    if is_pruned(model.config) and (
        is_stock(model) or type(model).is_remote_code()
    ):  # else its class is the only way
        verify_ways_in(model, directory)


def verify_ways_in(model: PreTrainedModel, directory: str) -> None:
    """Load `directory` in the other ways that docs/loading.md promises, and raise unless they give the class of `model`.

    By the auto classes that have it, and by the file that travels. Weights stay on disk: names and sizes are compared.
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
        message = f"the checkpoint does not load as {wanted}, as docs/loading.md promises: {type(error).__name__}: {error}"
        raise CheckpointError(message) from error


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are there, of one dtype, and equal."""
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
