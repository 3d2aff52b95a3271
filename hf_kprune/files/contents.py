"""What is in a directory: the files of a checkpoint, which a save may replace, and what is foreign. It
changes nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ArgumentError


NAMES = (
    *(
        "config.json",
        "generation_config.json",
        "modeling_kprune.py",
        "kprune_report.*",
        "README.md",
    ),
    *("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-[0-9]*-of-[0-9]*.bin", "pytorch_model.bin.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *(
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "bpe.codes",
    ),
    *(
        "dict.txt",
        "entity_vocab.json",
        "emoji.json",
        "byte_maps.json",
        "normalizer.json",
        "spm*.model",
        "sentencepiece.model",
    ),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)
"""Files that `save_pretrained` of models, tokenizers and processors, sentence-transformers and we ourselves
write.
"""

NOT_OURS = (
    "which the checkpoint would replace and which no checkpoint wrote; move that elsewhere, or name another "
    "directory"
)
TEMPLATES = "additional_chat_templates"

WORDS = {errno.EROFS: "its file system is read-only", errno.ENAMETOOLONG: "its name is too long"}


def holds(target: Path) -> list[str]:
    """What is in a directory, apart from our own workplaces."""
    return sorted({*os.listdir(target)} - {folder.name for folder in workplaces(target)})


def is_empty(target: Path) -> bool:
    """Whether there is nothing in a directory but what a new file system comes with."""
    return holds(target) in ([], ["lost+found"])


def check_contents(text: str, target: Path, overwrite: bool) -> None:
    """Raise `ArgumentError` if something in `target`, called `text`, must not be replaced."""
    if os.path.lexists(target) and not target.is_dir():
        kind = "a file" if target.is_file() else "no directory"
        raise ArgumentError(f"output_dir {text!r} is {kind}, expected a directory")
    if not target.is_dir() or is_empty(target):
        return
    if not overwrite:
        raise ArgumentError(
            f"output_dir {text!r} is not empty; name another or set overwrite_output_dir=True"
        )
    doubtful = [name for name in contents(target)[1] if is_name(name)]
    if doubtful:
        raise ArgumentError(f"output_dir {text!r} holds {shorten(doubtful)}, {NOT_OURS}")


def contents(folder: Path) -> tuple[list[str], list[str]]:
    """What is in a directory, by relative path: the files of a checkpoint, and what is foreign (directories
    as a whole).

    A checkpoint has a config.json that names a model, or the modules.json of sentence-transformers; otherwise
    all is foreign.
    """
    config, modules = read_json(folder / "config.json"), read_json(folder / "modules.json")
    listed = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    described = isinstance(config, dict) and not config.keys().isdisjoint(
        {"model_type", "architectures", "kprune"}
    )
    if not described and not any("type" in module for module in listed):
        return [], holds(folder)
    inner = {TEMPLATES, *(str(module.get("path")) for module in listed)}
    code = set()
    for named in (config.get("auto_map") or {}).values() if isinstance(config, dict) else ():
        for name in named if isinstance(named, list) else [named]:
            code.add(f"{str(name).split('--')[-1].split('.')[0]}.py")
    ours, foreign = list[str](), list[str]()
    for name in holds(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink() and name in inner:
            for file in leaves(path):
                file = os.path.normpath(os.path.join(name, file))
                (ours if is_name(file) or os.path.isdir(folder / file) else foreign).append(file)
        elif path.is_file() and (name in code or is_name(name)) and (name != "README.md" or is_card(path)):
            ours.append(name)
        else:
            foreign.append(name)
    return ours, foreign


def leaves(folder: Path) -> list[str]:
    """Files and empty directories in a directory and those below it, by relative path."""
    paths = ["."] if not os.listdir(folder) else []
    for root, folders, names in os.walk(folder):
        empty = [name for name in folders if not os.listdir(Path(root, name))]
        paths += [str(Path(root, name).relative_to(folder)) for name in [*names, *empty]]
    return paths


def is_name(relative: str) -> bool:
    """Whether a checkpoint writes a file by that name."""
    folder, name = os.path.split(relative)
    inner = ("*.jinja", "*_config.json") if folder else ()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*NAMES, *inner))


def is_card(path: Path) -> bool:
    """Whether a README begins as model cards do."""
    with open(path, "rb") as file:
        return file.read(3) == b"---"


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no file, or no JSON in it."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None


def shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def reason(error: BaseException) -> str:
    """What an exception means, without what it is about."""
    code = getattr(error, "errno", None)
    return WORDS.get(code) or getattr(error, "strerror", None) or str(error) if code else str(error)


def not_written(target: Path, error: BaseException, size: float) -> str:
    """What to say when writing a checkpoint of `size` bytes to `target` failed."""
    nearest = next(place for place in (target, *target.parents) if place.is_dir())
    return (
        f"cannot write to {str(target)!r}: {reason(error)} (the weights take {size:,.0f} bytes, "
        f"{shutil.disk_usage(nearest).free:,} are free); what was there is as it was"
    )


def workplaces(target: Path) -> tuple[Path, Path]:
    """The folder to write into, beside `target` or inside it. One name for each target."""
    folder = beside(target, ".tmp")
    return folder, target / folder.name


def beside(target: Path, ending: str) -> Path:
    """A hidden folder of ours beside `target`, with a name of a length that always fits."""
    name = f".{target.name[:32]}.{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}"
    return target.parent / (name + ending)
