"""Temporary folders of this process, which do not outlive it: those of a process that was killed are removed
by the next one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

from .workplace import flock


PREFIX = "hf_kprune-"
"""Of the names of scratches."""

LOCK = "lock"
"""The file in a scratch that its process keeps locked."""

FRESH = 60.0
"""Seconds for which a scratch is left alone whose process may not have locked it yet."""


class Scratch:
    """A locked folder in the temporary folder, in which folders are made. It is gone when nobody needs it any
    more.

    Args:
        parent: The temporary folder.
    """

    def __init__(self, parent: Path):
        remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT)
        flock(lock)
        weakref.finalize(self, remove, self.path, os.getpid(), lock)

    def folder(self) -> Path:
        """A new folder."""
        return Path(tempfile.mkdtemp(dir=self.path))


_scratches = weakref.WeakValueDictionary[tuple[int, str], Scratch]()


def scratch() -> Scratch:
    """The scratch of this process, which lasts as long as somebody has it."""
    key = os.getpid(), tempfile.gettempdir()
    return _scratches.get(key) or _scratches.setdefault(key, Scratch(Path(key[1])))


def remove(path: Path, process: int, lock: int | None = None) -> None:
    """Remove a folder of `process`, unless this one is a fork of it."""
    if os.getpid() == process:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the scratches whose processes are no longer there: nothing else has such names and locks."""
    for path in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # another user's, or another process removes it just now
            if time.time() - path.stat().st_mtime < FRESH:
                continue
            lock = os.open(path, os.O_RDWR)
            try:
                if flock(lock):
                    shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(lock)
