"""Loading and saving K-pruned checkpoints through plain `from_pretrained` and `save_pretrained`.

`import hf_kprune` wraps eight functions of transformers; each does nothing for a model whose config has no
plan in `kprune`:

    PreTrainedModel.post_init                     shrinks the model, on device meta, before its weights come
    PreTrainedModel.from_pretrained               refuses weights that do not fit, or are not those saved
    PreTrainedModel.save_pretrained               records what the weight files are
    PreTrainedModel._upload_modified_files        the same, before an upload
    GenerationMixin._get_static_cache_init_shape  lets a static cache take the heads of each layer as it comes
    PreTrainedConfig.get_config_dict              completes a save that was killed while it moved files
    PreTrainedConfig.from_dict                    takes off the notice that stops plain transformers
    PreTrainedConfig.to_json_file                 adds modeling_kprune.py, its auto_map and the notice

Each wrapper here is made of the function that it wraps.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from .. import modeling_kprune
from ..errors import CheckpointError
from ..files.exchange import recover
from ..modeling_kprune import (
    edit_config,
    is_pruned,
    load_checked,
    record_weights,
    seal,
    shrink,
    spare_empty,
    unseal,
)
from .remote_code import check_code_is_used, dense_auto_map, write_auto_map


Function = Callable[..., Any]


def install() -> None:
    """Wrap the eight functions. Calling it again changes nothing."""
    model, config = PreTrainedModel, PreTrainedConfig
    if getattr(model.post_init, "is_kprune", False):
        return
    for owner, name, wrap in (
        (model, "post_init", shrink_first),
        (model, "from_pretrained", check_weights),
        (model, "save_pretrained", record_when_saved),
        (model, "_upload_modified_files", record_when_uploaded),
        (GenerationMixin, "_get_static_cache_init_shape", leave_open),
        (config, "get_config_dict", recover_first),
        (config, "from_dict", take_notice_off),
        (config, "to_json_file", add_notice),
    ):
        function = inspect.getattr_static(owner, name, None)
        if isinstance(function, classmethod):
            setattr(owner, name, classmethod(wrap(function.__func__)))
        elif function is not None:  # which not all versions have
            setattr(owner, name, wrap(function))
    model.post_init.is_kprune = True


def shrink_first(post_init: Function) -> Function:
    @functools.wraps(post_init)
    def shrink_and_post_init(self: PreTrainedModel) -> None:
        shrink(self)
        post_init(self)
        spare_empty(self)

    return shrink_and_post_init


def check_weights(load: Function) -> Function:
    @functools.wraps(load)
    def load_and_check(cls: type[PreTrainedModel], name: object, *args: object, **kwargs: Any) -> Any:
        def load_with_its_code(*args: object, **kwargs: object) -> Any:
            model, info = load(cls, *args, **kwargs)
            check_code_is_used(model, name)
            return model, info

        return load_checked(load_with_its_code, name, *args, **kwargs)

    return load_and_check


def record_when_saved(save: Function) -> Function:
    @functools.wraps(save)
    def save_and_record(
        self: PreTrainedModel,
        save_directory: Any,
        is_main_process: bool = True,
        *args: object,
        **kwargs: object,
    ) -> None:
        save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            record_weights(save_directory)

    return save_and_record


def record_when_uploaded(upload: Function) -> Function:
    @functools.wraps(upload)
    def record_and_upload(self: PreTrainedModel, working_dir: Any, *args: object, **kwargs: object) -> Any:
        record_weights(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    return record_and_upload


def leave_open(shape: Function) -> Function:
    @functools.wraps(shape)
    def shape_unless_pruned(self: Any) -> Any:
        return None if is_pruned(self.config) else shape(self)

    return shape_unless_pruned


def recover_first(find: Function) -> Function:
    @functools.wraps(find)
    def recover_and_find(
        cls: type[PreTrainedConfig], pretrained_model_name_or_path: Any, **kwargs: object
    ) -> Any:
        name = pretrained_model_name_or_path
        if recover(name) and Path(name, "modules.json").exists():  # who asks has looked at it before
            raise CheckpointError(f"{name} was not yet whole and was completed just now: load it again")
        return find(cls, name, **kwargs)

    return recover_and_find


def take_notice_off(read: Function) -> Function:
    @functools.wraps(read)
    def read_and_unseal(cls: type[PreTrainedConfig], config_dict: dict[str, object], **kwargs: object) -> Any:
        result = read(cls, config_dict, **kwargs)
        config = unseal(result[0] if isinstance(result, tuple) else result)
        if is_pruned(config) and (entries := dense_auto_map(config)) != getattr(config, "auto_map", {}):
            config.auto_map = entries
            if not entries:
                del config.auto_map
        return result

    return read_and_unseal


def add_notice(write: Function) -> Function:
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

    return write_and_seal
