"""Where a checkpoint may be written: what can be known before the work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import ArgumentError, KPruneError
from .contents import NAMES, check_contents, is_empty, reason, workplaces
from .exchange import recover


def check_destination(
    path: object, overwrite: bool = False, read_from: Iterable[object] = (), size: float = 0
) -> str:
    """Refuse a directory that a checkpoint cannot or must not be written to, and return it as text.

    Args:
        path: Text or a path.
        overwrite: Whether a checkpoint that is there may be replaced. Other files stay in any case.
        read_from: Files and directories that model and data were read from. What is no path of this machine
            is passed over.
        size: Bytes that the checkpoint will take; 0 if that is not known.

    Raises:
        ArgumentError: If the path is no path, or blank; if it is the home directory, the root of the file
            system, a parent of one of these or of the current directory, or the current directory itself
            while something is in it; if it holds what was read, or, without `overwrite`, anything; with it,
            files that only look like a checkpoint's; if it cannot be written or has no room.
        CheckpointError: If another process writes there, or what a killed one left cannot be completed.
    """
    text = as_text(path)
    try:
        target = resolve(text)
        refuse_roots(text, target)
        recover(target)
        check_contents(text, target, overwrite)
        check_not_read(text, target, read_from)
        free = probe(target)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, KPruneError):
            raise
        raise ArgumentError(f"cannot write to {text!r}: {reason(error)}; name another directory") from error
    if free is not None and size > free:
        raise ArgumentError(
            f"cannot write to {text!r}: the checkpoint takes about {size:,.0f} bytes, {free:,} are free "
            "there; make room, or name another directory"
        )
    return text


def as_text(path: object, name: str = "output_dir") -> str:
    """The path as text; `ArgumentError`, with the name of the option, if it is none, or one that nobody
    means.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ArgumentError(f"{name} is {path!r}, expected a path as text")
    if not text.strip():
        raise ArgumentError(
            f"{name} is {text!r}, expected the name of a directory: was a variable of the shell unset?"
        )
    if os.path.expanduser(text) != text:
        raise ArgumentError(
            f"{name} is {text!r}, in which only a shell expands ~; write {os.path.expanduser(text)!r}"
        )
    return text


def resolve(text: str) -> Path:
    """The directory itself, absolute, where symbolic links lead to. Raises `ArgumentError` if one leads
    nowhere.
    """
    target = Path(text).resolve()
    for place in (Path(text), *Path(text).parents):
        if place.is_symlink() and not place.exists():
            raise ArgumentError(
                f"output_dir {text!r}: {str(place)!r} is a symbolic link to {os.readlink(place)!r}, which "
                "does not exist; make that directory, or name another"
            )
    return target


def refuse_roots(text: str, target: Path) -> None:
    """Raise `ArgumentError` for directories in which other things live."""
    home, current = None, None
    with suppress(RuntimeError):  # there is none
        home = Path.home().resolve()
    with suppress(FileNotFoundError):  # it was removed
        current = Path.cwd().resolve()
    if target == Path(target.anchor):
        what = "the root of the file system"
    elif target == home:
        what = "the home directory"
    elif home is not None and target in home.parents:
        what = "a parent of the home directory"
    elif current is not None and target in current.parents:
        what = "a parent of the current directory"
    elif target == current and not is_empty(target):
        what = "the current directory, and there is something in it"
    else:
        return
    raise ArgumentError(
        f"output_dir {text!r} is {what}, expected a directory of its own, such as "
        f"{str(Path(text, 'pruned'))!r}"
    )


def check_not_read(text: str, target: Path, read_from: Iterable[object]) -> None:
    """Raise `ArgumentError` if `target` is, or holds, something that model or data come from."""
    for source in read_from:
        if isinstance(source, (str, os.PathLike)) and os.path.exists(source):
            place = Path(source).resolve()
            if target in (place, *place.parents) and target.is_dir() and not is_empty(target):
                raise ArgumentError(
                    f"output_dir {text!r} holds {str(source)!r}, which is read in this run; name another"
                )


def origins(*things: object) -> list[str]:
    """The files and directories that models, tokenizers, folders and datasets say they come from."""
    names = []
    for thing in things:
        names.append(getattr(getattr(thing, "config", thing), "name_or_path", None))
        names.append(str(thing.path) if hasattr(thing, "path") else None)
        names += [
            file["filename"] for file in getattr(thing, "cache_files", None) or () if "filename" in file
        ]
    return [name for name in names if isinstance(name, str) and name]


def probe(target: Path) -> int | None:
    """Write next to nothing where `target` is to be, as permissions do not tell, and return the bytes that
    are free there.

    None if the file system does not tell. Raises `OSError` if it cannot be written.
    """
    for folder in workplaces(target):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(folder / "new" / max(NAMES, key=len))  # too long a path
    nearest = next(place for place in (target, *target.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{str(nearest)!r} is no directory")
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(b"1")
    usage = shutil.disk_usage(nearest)
    return usage.free if usage.total else None
