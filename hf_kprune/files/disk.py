"""Files on the disk: moved, compared, and held by it."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import sys
from pathlib import Path

from .contents import leaves


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


def move(source: Path, place: Path) -> None:
    """Move a file or an empty directory, into a directory that is made if need be."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        place.mkdir(exist_ok=True)
        source.rmdir()
    else:
        shutil.move(source, place)


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
