"""The options of a run in a YAML file: `--config FILE` reads them, `--save_config` prints them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError


SECRET = "hub_token"
"""The option that is never printed."""


def add_config(command: Any) -> None:
    """Add both options to the parser of a command."""
    help = "Read options from this YAML file. Those on the command line have the last word."
    command.add_argument("--config", metavar="FILE", help=help)
    help = "Print the options as such a file, and do nothing else."
    command.add_argument("--save_config", action="store_true", help=help)


def with_config(argv: Sequence[str], commands: Collection[str]) -> list[str]:
    """A command line in which `--config FILE` is replaced by what the file says, before all else, so that
    options on the command line have the last word.

    Args:
        argv: Words of a command line.
        commands: Names of the commands that take a file.

    Raises:
        ArgumentError: If the file cannot be read, or names no command where the command line names none.
    """
    words = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in words:
        return list(argv)
    place = words.index("--config")
    if place + 1 == len(words):
        raise ArgumentError("--config is without a value, expected a file, such as run.yaml")
    options = read(words[place + 1])
    rest = words[:place] + words[place + 2 :]
    named = options.pop("command", None)
    command = rest.pop(0) if rest and not rest[0].startswith("-") else named
    if command not in commands:
        raise ArgumentError(
            f"the command of {words[place + 1]} is {command!r}, expected one of {', '.join(commands)}: write "
            "it there as 'command: prune', or on the command line"
        )
    return [str(command), *words_of(options), *rest]


def read(file: str) -> dict[str, Any]:
    """The options in a file. Raises `ArgumentError` if it holds none."""
    import yaml

    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"cannot read the options in {file!r}: {error}") from error
    if not isinstance(options, dict):
        raise ArgumentError(f"{file!r} holds {options!r:.80}, expected options, such as 'sparsity: 0.5'")
    return {str(name): value for name, value in options.items()}


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as the words of a command line. What is None is left out."""
    words = list[str]()
    for name, value in options.items():
        if value is None:
            continue
        if value is False:
            words.append(f"--no_{name}")
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        elif isinstance(value, dict):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words


def as_yaml(command: str, values: Mapping[str, Any]) -> str:
    """A command and its options as `--config` reads them."""
    import yaml

    shown = {name: value for name, value in values.items() if name != SECRET}
    return str(yaml.safe_dump({"command": command, **shown}, sort_keys=False, allow_unicode=True))
