"""How a checkpoint gets to its place: nothing is lost, and nothing that is not ours is touched. Files only, no model.

It is written into a folder of its own (`aside`), beside its destination or, where that cannot be renamed, inside it, and then
put in place (`put`):

    destination absent                          one rename
    an old checkpoint and nothing else          one exchange of the two folders (`renameat2` of Linux)
    other files too, a mount point, a file      file by file: the old config.json goes first, the new one comes last; whoever
    system that cannot exchange, ...            saves or loads next completes what a kill interrupted (`recover`)

The folder is locked by the process that writes it. Locks end with their process, so a folder that nobody locks is a leftover.
"""

from __future__ import annotations

import ctypes
import errno
import filecmp
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..errors import ArgumentError, CheckpointError


logger = logging.getLogger(__name__)

NAMES = (
    *(
        "config.json",
        "generation_config.json",
        "modeling_kprune.py",
        "kprune_report.json",
        "kprune_report.md",
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
"""Files that `save_pretrained` of models, tokenizers and processors, sentence-transformers and we ourselves write."""

NOT_OURS = "which the checkpoint would replace and which no checkpoint wrote; move that elsewhere, or name another directory"
TEMPLATES = "additional_chat_templates"
READY = "ready.json"
"""In a folder aside: what is about to be moved. While it is there, the next save or load goes on with it."""

rename_exchange = (
    getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
)
"""`renameat2(-100, one, -100, other, 2)`: from the current directory, two names change places in one step."""

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
    """What is in a directory, by relative path: the files of a checkpoint, and what is foreign (directories as a whole).

    A checkpoint has a config.json that names a model, or the modules.json of sentence-transformers; otherwise all is foreign.
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
    found = ["."] if not os.listdir(folder) else []
    for root, folders, names in os.walk(folder):
        empty = [name for name in folders if not os.listdir(Path(root, name))]
        found += [str(Path(root, name).relative_to(folder)) for name in [*names, *empty]]
    return found


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


def shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Writing aside and putting in place
# ---------------------------------------------------------------------------------------------------------------------


def workplaces(target: Path) -> tuple[Path, Path]:
    """The folder to write into, beside `target` or inside it. One name for each target, of a length that always fits."""
    name = f".{target.name[:32]}.{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}.tmp"
    return target.parent / name, target / name


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into, near `target`. It is gone afterwards, and so is what killed saves left there.

    Raises `CheckpointError` if another process is writing to the same place.
    """
    parents = [place for place in target.parents if not place.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in workplaces(target):
            if folder.exists():
                tidy(folder, target)
        folder, lock = occupy(target)
        try:
            yield folder / "new"
        finally:
            leave(folder, lock)
    except BaseException:
        for place in parents:
            with suppress(OSError):  # something is in it by now
                place.rmdir()
        raise


def occupy(target: Path) -> tuple[Path, int]:
    """Lock a workplace that holds an empty folder `new`, with the mode and the owner of `target` if that can be exchanged."""
    beside, inside = workplaces(target)
    if target.is_dir() and not stays(target):
        with suppress(OSError):  # the parent cannot be written, or the owner not be set: inside is as good
            return furnish(beside, target, like=target)
    return furnish(inside if target.is_dir() else beside, target)


def furnish(folder: Path, target: Path, like: Path | None = None) -> tuple[Path, int]:
    """Lock `folder` and make `new` in it."""
    lock = take(folder, target)
    try:
        (folder / "new").mkdir()
        if like is not None:
            resemble(folder / "new", like)
    except BaseException:
        leave(folder, lock)
        raise
    return folder, lock


def stays(target: Path) -> bool:
    """Whether a directory cannot be exchanged for another: a mount point, or the current directory."""
    mounts = {partition.mountpoint for partition in psutil.disk_partitions(all=True)}
    return os.path.ismount(target) or str(target) in mounts or os.path.samefile(target, os.curdir)


def resemble(new: Path, target: Path) -> None:
    """Give `new` owner, mode and attributes of `target`. Raises `PermissionError` where that is not allowed."""
    expected = target.stat()
    if (new.stat().st_uid, new.stat().st_gid) != (expected.st_uid, expected.st_gid):
        os.chown(new, expected.st_uid, expected.st_gid)
    shutil.copystat(target, new)
    if new.stat().st_mode != expected.st_mode:
        raise PermissionError(errno.EPERM, f"mode {expected.st_mode:o} is not allowed", str(new))


def take(folder: Path, target: Path) -> int:
    """Lock a workplace, made if need be, for this process. Raises `CheckpointError` if another one has it."""
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # who had it removes it just now
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
            try:
                flock(lock)
                if os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
                    return lock
            except BlockingIOError as error:
                os.close(lock)
                raise CheckpointError(
                    f"{str(target)!r} is being written by another process; wait until it has finished, or name another"
                ) from error
            except FileNotFoundError:
                pass
            os.close(lock)


def flock(lock: int) -> None:
    """Lock an open file until it is closed, by the end of the process if need be. `BlockingIOError` if another one has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror) from error
        logger.warning(
            "this file system has no locks (%s): let no other process save to the same place", error.strerror
        )


def leave(folder: Path, lock: int) -> None:
    """Remove a workplace and its lock, unless there is something in it that is still to be moved."""
    try:
        if (folder / READY).exists():
            return
        for name in ("new", "old"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        (folder / "ready").unlink(missing_ok=True)
        (folder / "lock").unlink()
        folder.rmdir()
    except (
        OSError
    ) as error:  # such as files that are still open, over NFS: the checkpoint is where it belongs
        logger.warning(
            "%s is left behind (%s); the next save to the same place removes it", folder, error.strerror
        )
    finally:
        os.close(lock)


def tidy(folder: Path, target: Path) -> None:
    """Complete or remove what a process that is no more left in a workplace."""
    lock = take(folder, target)
    try:
        if (folder / READY).exists():
            finish(folder, target)
    except BaseException:
        os.close(lock)
        raise
    leave(folder, lock)


def recover(name: Any) -> bool:
    """Complete a move of a checkpoint, file by file, that a kill interrupted, and return whether there was one.

    Does nothing for what is no path.

    Raises:
        CheckpointError: If another process is writing there right now, or if the files cannot be moved.
    """
    try:
        target = Path(name).resolve()
        folders = [folder for folder in workplaces(target) if (folder / READY).exists()]
    except (TypeError, ValueError, OSError, RuntimeError):
        return False  # the name of a repository, for all we know
    for folder in folders:
        try:
            tidy(folder, target)
        except OSError as error:
            raise CheckpointError(
                f"{str(target)!r} was being replaced when its process died, and what is left to be moved there from "
                f"{str(folder / 'new')!r} cannot be: {reason(error)}; move it yourself, config.json last"
            ) from error
    return bool(folders)


def put(new: Path, target: Path, overwrite: bool) -> None:
    """Put the folder `new`, of `aside`, in the place of the checkpoint at `target`. Other files stay.

    Raises:
        ArgumentError: If something is there by now that must not be replaced; all is as it was then, as after any error.
    """
    sync(new)
    check_contents(str(target), target, overwrite)
    if (
        new.parent.parent == target.parent
        and not (target.is_dir() and contents(target)[1])
        and exchanged(new, target)
    ):
        sync_folder(target.parent)
        for name in contents(new)[1] if new.exists() else ():  # it came at the last moment
            os.rename(new / name, target / name)
    else:
        put_one_by_one(new, target)


def exchanged(new: Path, target: Path) -> bool:
    """Put a folder in its place in one step. False, with a warning, where that cannot be."""
    try:
        if not target.is_dir():
            os.rename(new, target)
        elif rename_exchange is None:
            raise OSError(errno.ENOSYS, "this system cannot exchange folders")
        elif rename_exchange(-100, os.fsencode(new), -100, os.fsencode(target), 2):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return True
    except OSError as error:
        logger.warning(
            "%s cannot be put in place in one step (%s): its files are moved one by one",
            target,
            error.strerror,
        )
        return False


def put_one_by_one(new: Path, target: Path) -> None:
    """Move the files of `new` to `target`, and the old checkpoint aside, so that `recover` can complete it."""
    target.mkdir(exist_ok=True)
    old, names = contents(target)[0], leaves(new)
    there = [name for name in names if os.path.lexists(target / name) and name not in old]
    same = [
        name for name in there if is_same(new / name, target / name)
    ]  # such as code that came with both models
    if blocking := [name for name in there if name not in same]:
        raise ArgumentError(f"output_dir {str(target)!r} holds {shorten(blocking)}, {NOT_OURS}")
    folder = new.parent
    try:
        (folder / "ready").write_text(json.dumps({"old": old + same, "new": names}), encoding="utf-8")
        sync(folder / "ready")
        os.rename(folder / "ready", folder / READY)
        sync_folder(folder)
        finish(folder, target)
    except BaseException:
        try:
            undo(folder, target)
        except OSError as error:
            raise CheckpointError(
                f"{reason(error)}: parts of the checkpoint are in {str(target)!r}, others still in {str(folder)!r}; the next "
                "save or load completes it"
            ) from error
        raise


def is_same(one: Path, other: Path) -> bool:
    """Whether both are files with the same content, or both directories."""
    if one.is_symlink() or other.is_symlink():
        return False
    return (
        one.is_dir()
        and other.is_dir()
        or one.is_file()
        and other.is_file()
        and filecmp.cmp(one, other, shallow=False)
    )


def planned(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Names of the files of the old and of the new checkpoint. Raises `CheckpointError` if one leads to another directory."""
    names = read_json(folder / READY)
    try:
        old, new = list[str](names["old"]), list[str](names["new"])
        places = [place / name for name in old + new for place in (target, folder / "new", folder / "old")]
        if all(
            any(place.parent.resolve().is_relative_to(base) for base in (target, folder)) for place in places
        ):
            return old, new
    except (KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{str(folder / READY)!r} is not what this program wrote; look at {str(folder)!r} and remove it"
    )


def finish(folder: Path, target: Path) -> None:
    """Move the old checkpoint out of `target` and the new one in; begun again after a kill, it goes on."""
    target.mkdir(exist_ok=True)
    old, new = planned(folder, target)
    for name in sorted(old, key=entrance, reverse=True):
        is_old = name not in new or os.path.lexists(folder / "new" / name)
        if is_old and os.path.lexists(target / name):
            move(target / name, folder / "old" / name)
    sync_folder(target)
    for place in {(target / name).parent for name in old} - {target}:
        with suppress(OSError):  # something foreign is in it, or it is gone
            place.rmdir()
    for name in sorted(new, key=entrance):
        if os.path.lexists(folder / "new" / name):
            if entrance(name):
                sync_folder(target)
            move(folder / "new" / name, target / name)
    for place in {(target / name).parent for name in new}:
        sync_folder(place)
    (folder / READY).unlink()


def undo(folder: Path, target: Path) -> None:
    """Move the new checkpoint out of `target` and the old one back in."""
    if (folder / READY).exists():
        old, new = planned(folder, target)
        for name in sorted(new, key=entrance, reverse=True):
            if os.path.lexists(target / name) and not os.path.lexists(folder / "new" / name):
                move(target / name, folder / "new" / name)
        for name in sorted(old, key=entrance):
            if os.path.lexists(folder / "old" / name):
                move(folder / "old" / name, target / name)
        (folder / READY).unlink()


def entrance(name: str) -> int:
    """How surely a loader begins with a file: the surer, the later it comes, and the earlier it goes."""
    folder, name = os.path.split(name)
    return 0 if name not in ("config.json", "modules.json") else 1 if folder else 2


def move(source: Path, place: Path) -> None:
    """Move a file or an empty directory, into a directory that is made if need be."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        place.mkdir(exist_ok=True)
        source.rmdir()
    else:
        shutil.move(source, place)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a directory with all below it."""
    if path.is_dir():
        for name in leaves(path):
            if not (path / name).is_dir():
                sync(path / name)
        for root, _, _ in os.walk(path):
            sync_folder(Path(root))
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the disk hold the names in a directory."""
    if sys.platform == "win32":
        return  # it has no such thing
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have it neither
            raise
    finally:
        os.close(folder)
