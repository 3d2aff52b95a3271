"""Where states of batches wait: in memory up to a limit, and in files beyond it."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .hooks import State
from .offload import Folder


MEMORY = 2**26
"""Bytes of states that a shelf keeps in the machine's memory; further ones wait in temporary files."""

SHARE = 16
"""Of a GPU, a shelf keeps so many times less than its memory there."""


def room_on(device: torch.device) -> int:
    """Bytes of states that a shelf keeps on a device."""
    if device.type != "cuda":
        return MEMORY
    return torch.cuda.get_device_properties(device).total_memory // SHARE


class InFile:
    """A state in a file, which is removed when nobody needs it any more."""

    def __init__(self, state: State):
        self.folder = Folder()
        self.path = self.folder.place() / "state.pt"
        torch.save((dict(state.inputs), dict(state.outputs)), self.path)

    def load(self) -> State:
        """The state, on the device that it came from."""
        return State(*torch.load(self.path, weights_only=True))


class Shelf:
    """States by key. What is put there is not changed any more, so shelves may share states."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, State | InFile] = {}
        self.used = 0

    def __getitem__(self, key: Hashable) -> State:
        entry = self.entries[key]
        return entry if isinstance(entry, State) else entry.load()

    def __setitem__(self, key: Hashable, state: State) -> None:
        self.drop(key)
        size = state.nbytes
        if self.used + size <= room_on(state.device):
            self.entries[key] = state
            self.used += size
        else:
            self.entries[key] = InFile(state)

    def drop(self, key: Hashable) -> None:
        """Let go of a state, if there is one."""
        entry = self.entries.pop(key, None)
        if isinstance(entry, State):
            self.used -= entry.nbytes

    def copy(self) -> Shelf:
        """A shelf of the same states."""
        other = Shelf()
        other.entries, other.used = dict(self.entries), self.used
        return other
