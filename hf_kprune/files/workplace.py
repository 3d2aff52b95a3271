"""The folder that a checkpoint is written in before it is put in its place, locked by the process that writes
it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from ..errors import CheckpointError
from .contents import workplaces


logger = logging.getLogger(__name__)

READY = "ready.json"
"""In a folder aside: what is about to be moved. While it is there, the next save or load goes on with it."""


def occupy(target: Path) -> tuple[Path, int]:
    """Lock a workplace that holds an empty folder `new`, with the mode and the owner of `target` if that can
    be exchanged.
    """
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
    """Give `new` owner, mode and attributes of `target`. Raises `PermissionError` where that is not
    allowed.
    """
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
                    f"{str(target)!r} is being written by another process; wait until it has finished, or "
                    "name another"
                ) from error
            except FileNotFoundError:
                pass
            os.close(lock)


def flock(lock: int) -> bool:
    """Lock an open file until it is closed, by the end of the process if need be. `BlockingIOError` if
    another one has it. False, with a warning, where the file system has no locks.
    """
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
        return False
    return True


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
