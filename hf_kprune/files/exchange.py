"""How a checkpoint gets to its place: nothing is lost, and nothing that is not ours is touched. Files only,
no model.

It is written into a folder of its own (`aside`), beside its destination or, where that cannot be renamed,
inside it, and then put in place (`put`):

    destination absent                          one rename
    an old checkpoint and nothing else          one exchange of the two folders (`renameat2` of Linux)
    other files too, a mount point, a file      file by file: the old config.json goes first, the new one
    system that cannot exchange, ...            comes last; whoever saves or loads next completes what a
                                                kill interrupted (`recover`)

The folder is locked by the process that writes it. Locks end with their process, so a folder that nobody
locks is a leftover.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, CheckpointError
from .contents import NOT_OURS, check_contents, contents, leaves, read_json, reason, shorten, workplaces
from .disk import is_same, move, sync, sync_folder
from .workplace import READY, leave, occupy, take


logger = logging.getLogger(__name__)

rename_exchange = (
    getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
)
"""`renameat2(-100, one, -100, other, 2)`: from the current directory, two names change places in one step."""


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into, near `target`. It is gone afterwards, and so is what killed saves
    left there.

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
    """Complete a move of a checkpoint, file by file, that a kill interrupted, and return whether there was
    one.

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
                f"{str(target)!r} was being replaced when its process died, and what is left to be moved "
                f"there from {str(folder / 'new')!r} cannot be: {reason(error)}; move it yourself, "
                "config.json last"
            ) from error
    return bool(folders)


def put(new: Path, target: Path, overwrite: bool) -> None:
    """Put the folder `new`, of `aside`, in the place of the checkpoint at `target`. Other files stay.

    Raises:
        ArgumentError: If something is there by now that must not be replaced; all is as it was then, as after
            any error.
    """
    sync(new)
    check_contents(str(target), target, overwrite)
    if (
        new.parent.parent == target.parent
        and not (target.is_dir() and contents(target)[1])
        and put_at_once(new, target)
    ):
        sync_folder(target.parent)
        for name in contents(new)[1] if new.exists() else ():  # it came at the last moment
            os.rename(new / name, target / name)
    else:
        put_one_by_one(new, target)


def put_at_once(new: Path, target: Path) -> bool:
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
    """Move the files of `new` to `target`, and the old checkpoint aside, so that `recover` can complete
    it.
    """
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
                f"{reason(error)}: parts of the checkpoint are in {str(target)!r}, others still in "
                f"{str(folder)!r}; the next save or load completes it"
            ) from error
        raise


def moves_of(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Names of the files of the old and of the new checkpoint. Raises `CheckpointError` if one leads to
    another directory.
    """
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
    old, new = moves_of(folder, target)
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
        old, new = moves_of(folder, target)
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
