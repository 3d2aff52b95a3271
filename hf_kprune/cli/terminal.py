"""`hf-kprune` as a process: what is printed and where, warnings and errors in a line, exit codes. Standard
library only.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArgumentError, KPruneError
from .output import complain
from .parser import COMMANDS, as_options, options_of, parse


INPUT, INTERRUPT, NO_READER = 2, 130, 141
"""Exit codes: something in the input, Ctrl-C, and nobody who reads what is printed."""


def is_there() -> bool:
    """Whether the current directory exists still."""
    try:
        return os.path.isdir(os.getcwd())
    except OSError:
        return False


def open_streams() -> None:
    """Make standard streams that the caller closed lead nowhere, and all able to print every character."""
    for descriptor in (0, 1, 2):  # or the next file that is opened would take the place of a closed one
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, as it stays open
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def show_warning(names: Sequence[str], verbose: bool) -> Callable[..., None]:
    """A replacement of `warnings.showwarning`: our own warnings in a line; those of libraries only if
    `verbose`.
    """
    package = str(Path(__file__).parents[1])

    def show(message: object, category: object, filename: str, *_: object, **__: object) -> None:
        ours = filename.startswith(package) or category.__module__.startswith("hf_kprune")
        if ours or verbose:
            complain(f"warning: {as_options(str(message), names)}")

    return show


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process where it is, in place of raising: compiled code of a library that is being
    imported may answer an exception by aborting.
    """

    def end(*_: object) -> None:
        os.write(2, b"hf-kprune: interrupted\n")
        os._exit(INTERRUPT)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a process in the background may have been asked to ignore it
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str] | None = None, load: Callable[[], None] | None = None) -> int:
    """Run a command line (default: `sys.argv`) and return its exit code.

    Args:
        argv: Words after the name of the program.
        load: Called before a command runs, but not for help.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    names = list(options_of(words[0])) if words and words[0] in COMMANDS else []
    open_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning(names, "--verbose" in words)
            command, options = parse(words)
            if not is_there():
                raise ArgumentError("the current directory is gone; change to one that exists")
            if load is not None:
                with ending_at_once():
                    load()
            from . import commands

            commands.run(command, options)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        code, message = INTERRUPT, "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at its end
        return NO_READER
    except KPruneError as error:
        code, message = INPUT, f"error: {as_options(str(error), names)}"
    complain(message)
    return code
