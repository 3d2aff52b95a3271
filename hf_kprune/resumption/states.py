"""Where a run keeps its states, and how one of them is written and read."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from transformers.utils import logging

from ..errors import ArgumentError, CheckpointError
from ..files.contents import beside, reason
from ..files.destination import as_text
from ..files.disk import sync, sync_folder
from ..files.workplace import take
from ..processes import together


logger = logging.get_logger(__name__)

PATIENCE = 60.0
"""Seconds after which a run that nobody asked to be resumed keeps its first state."""

ENDING = ".safetensors"
OURS = re.compile(r"(measured-[0-9a-f]{8}|facts|decided|point|finished|sublayer-\d{3,})\.safetensors(\.new)?")
"""The files that are written here. No other is ever removed."""


class States:
    """The folder in which a run keeps what it takes to go on.

    Args:
        folder: Where; it is made when there is something to keep. None: nothing is kept.
        asked: Whether it was asked to go on. Then what is there is read, and all is kept at once. Otherwise
            nothing is read, and nothing is kept in the first minute.
        stays: Whether measurements stay when the run is over.
        accelerator: Its main process reads and writes.
    """

    def __init__(self, folder: Path | None, asked: bool, stays: bool, accelerator: Accelerator):
        self.folder, self.asked, self.stays, self.accelerator = folder, asked, stays, accelerator
        self.begin = time.monotonic()
        self.waiting: list[tuple[str, Mapping[str, Tensor], Callable[[], Any]]] = []
        self.lock: int | None = None
        self.keeps = True
        """Whether more is kept. Not after an error."""
        self.runs: set[str] = set()
        """The runs that are of this one."""

    def __enter__(self) -> States:
        with together(self.accelerator):
            if self.asked and self.is_here:
                try:
                    self.occupy()
                except OSError as error:
                    raise ArgumentError(
                        f"resume_from_checkpoint: states cannot be kept in {str(self.folder)!r}, "
                        f"{reason(error)}; pass another directory"
                    ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.waiting.clear()
        self.leave()

    @property
    def is_here(self) -> bool:
        """Whether this process is the one that keeps something."""
        return self.folder is not None and self.accelerator.is_main_process

    # ---- what is there ------------------------------------------------------------------------------------

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What is kept under a name, tensors and data, on every process; None if nothing is."""
        if not self.asked:
            return None
        content = None
        with together(self.accelerator):
            if self.folder is not None and self.has(name):
                content = load(self.folder / f"{name}{ENDING}")
        result: tuple[dict[str, Tensor], Any] | None
        (result,) = broadcast_object_list([content]) if self.accelerator.num_processes > 1 else (content,)
        return result

    def has(self, name: str) -> bool:
        """Whether something is kept under a name. On the main process."""
        if self.folder is None or not (self.asked and self.accelerator.is_main_process):
            return False
        return (self.folder / f"{name}{ENDING}").exists()

    # ---- what is kept -------------------------------------------------------------------------------------

    def keep(self, name: str, tensors: Mapping[str, Tensor], data: Callable[[], Any]) -> None:
        """Keep tensors and data (what JSON can say) under a name, as soon as the run has lasted long enough.

        An error, such as that of a full disk, ends the keeping and not the run.
        """
        if not (self.is_here and self.keeps):
            return
        self.waiting.append((name, tensors, data))
        if not (self.asked or time.monotonic() - self.begin > PATIENCE):
            return
        assert self.folder is not None
        try:
            if self.lock is None:
                self.occupy()
                self.remove("*/*", "measured-*")  # what a run that is not gone on with has left
                logger.info("states of this run are in %s: resume_from_checkpoint goes on", self.folder)
            for each, those, about in self.waiting:
                save(self.folder / f"{each}{ENDING}", those, about())
            self.waiting.clear()
        except (OSError, SafetensorError, CheckpointError) as error:
            logger.warning("no more states of this run are kept: %s", reason(error))
            self.waiting.clear()
            self.keeps = False

    def occupy(self) -> None:
        """Make the folder and lock it. Raises `CheckpointError` if another process has it."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = take(self.folder, self.folder)

    def leave(self) -> None:
        """Unlock the folder, which goes if it is empty."""
        if self.lock is not None and self.folder is not None:
            with suppress(OSError):
                (self.folder / "lock").unlink()
                self.folder.rmdir()
            os.close(self.lock)
            self.lock = None

    def drop(self, pattern: str) -> None:
        """Keep no longer what has such a name, such as `run/sublayer-*`, and no folder that is empty then."""
        self.waiting = [each for each in self.waiting if not fnmatchcase(each[0], pattern)]
        if self.is_here and self.lock is not None:
            self.remove(pattern)

    def remove(self, *patterns: str) -> None:
        """Remove files by name."""
        assert self.folder is not None
        for path in [path for each in patterns for path in self.folder.glob(f"{each}{ENDING}*")]:
            if OURS.fullmatch(path.name):
                path.unlink()
                with suppress(OSError):  # there is something else in it
                    path.parent.rmdir()

    def end(self) -> None:
        """Remove what is kept, as the run is over. In a directory that was named, measurements and other runs
        stay."""
        if not self.is_here or self.folder is None or not self.folder.is_dir():
            return
        with suppress(OSError, CheckpointError):  # another run has begun there
            if self.lock is None:
                self.occupy()
            self.remove(*(f"{run}/*" for run in self.runs) if self.stays else ("*/*", "measured-*"))
        self.leave()

    def say(self, origin: str) -> None:
        """Say where the run begins, if it was asked to go on."""
        if self.asked and self.is_here:
            logger.warning("states of this run are kept in %s, in which %s so far", self.folder, origin)


def states_of(accelerator: Accelerator, resume: bool | str | None, output_dir: str | None) -> States:
    """The states of a run.

    Args:
        accelerator: Its processes.
        resume: The option `resume_from_checkpoint`.
        output_dir: Where what is made is saved, if it is.

    Raises:
        ArgumentError: If there is no place for them, or if it is where the result is to be.
    """
    folder, named = None, isinstance(resume, str)
    with together(accelerator):
        if accelerator.is_main_process and resume is not False:
            folder = place_of(resume, output_dir)
    return States(folder, named or resume is True, named, accelerator)


def place_of(resume: bool | str | None, output_dir: str | None) -> Path | None:
    """The folder of the states of a run, see `states_of`, which has the arguments."""
    target = None if output_dir is None else Path(os.path.realpath(as_text(output_dir)))
    if isinstance(resume, str):
        folder = Path(os.path.realpath(as_text(resume, "resume_from_checkpoint")))
        if target is not None and target in (folder, *folder.parents):
            raise ArgumentError(
                f"resume_from_checkpoint is {resume!r}, which lies in output_dir, {output_dir!r}, where only "
                "the result may be; name another directory, or pass True"
            )
        return folder / "kprune_states"
    if resume and target is None:
        raise ArgumentError(
            "resume_from_checkpoint is True, but there is no output_dir that a state would belong to; pass "
            "the directory that states are kept in"
        )
    return None if target is None else beside(target, ".states")


def save(path: Path, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Write a file of tensors and of data beside its place, and put it there in one step."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # save_file would write to a name of its own first, which a kill would leave behind
    new.write_bytes(serialise(on_cpu, {"data": json.dumps(data)}))
    sync(new)
    os.replace(new, path)
    sync_folder(path.parent)


def load(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], Any]:
    """The tensors, if they are wanted, and the data of a file.

    Raises:
        CheckpointError: If it is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            # copies, as results depend on how memory is aligned, and as the file may be removed
            values = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors else {}  # noqa: SIM118
            return values, json.loads(file.metadata()["data"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not what this program wrote ({reason(error)}); delete it, or begin anew "
            "without resume_from_checkpoint"
        ) from error
