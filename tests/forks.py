"""Functions in processes that are forked from the one that runs the tests: it has imported all, which takes most of the time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState


def fork(action: Callable[..., object], *arguments: object, out: Path, name: str = "") -> ForkProcess:
    """Start a process that calls `action`, and prints to the files stdout and stderr in `out`, or stdout.`name`."""
    streams = [out / f"{stream}{name and '.'}{name}" for stream in ("stdout", "stderr")]
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(streams, action, arguments))
    process.start()
    return process


def _begin(streams: list[Path], action: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Be as a process that was just begun: with streams of its own, usual warnings, and one of no others."""
    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    warnings.resetwarnings()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    action(*arguments)


def join(processes: list[ForkProcess], timeout: float) -> list[int]:
    """The exit codes of processes, once all have ended."""
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert None not in codes, f"processes still run after {timeout} s: exit codes {codes}"
    return [int(code or 0) for code in codes]


def printed_by(action: Callable[..., object], *arguments: object, out: Path, timeout: float) -> str:
    """What a function prints that ends without an error in a process of its own."""
    codes = join([fork(action, *arguments, out=out)], timeout)
    assert codes == [0], (out / "stderr").read_text()[-4000:]
    return (out / "stdout").read_text()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
