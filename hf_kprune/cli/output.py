"""What the command line prints: on the main process alone, and without characters that steer a terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from ..errors import ArgumentError
from ..text import printable


def is_main_process() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: object) -> None:
    """Print on the main process, without control characters.

    Raises:
        BrokenPipeError: If nobody reads the output any more.
        ArgumentError: If it cannot be written.
    """
    if not is_main_process():
        return
    try:
        print(printable(str(text), keep="\n\t"), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArgumentError(
            f"cannot write to the standard output: {error.strerror}; send it elsewhere"
        ) from error


def complain(message: str) -> None:
    """A line on the standard error of the main process; lost if that is closed, as there is nowhere else to
    say so.
    """
    if is_main_process():
        with suppress(OSError):
            print(f"hf-kprune: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
