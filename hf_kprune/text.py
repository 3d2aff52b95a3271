"""Text of any origin, made fit for a terminal, for Markdown, and for strangers. Standard library only."""

from __future__ import annotations

import os
import re
import unicodedata


def printable(text: str, keep: str = "") -> str:
    """A text without characters that steer a terminal or reorder what it shows: those are written as escapes.

    Args:
        text: Of any origin.
        keep: Characters that stay as they are, such as line ends.
    """

    def shown(character: str) -> str:
        steers = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        return (
            character.encode("unicode_escape").decode("ascii")
            if steers and character not in keep
            else character
        )

    return "".join(map(shown, text))


def in_markdown(value: object) -> str:
    """A value as plain text in Markdown, also in a table: it ends no cell and no line, and makes no link, tag
    or emphasis.
    """
    return re.sub(r"([|`*<>\[\]])", r"\\\1", printable(str(value)))


def public_name(name: str) -> str:
    """A name without where it lies: of a local path the last part, of a cached download the name on the Hub.

    A home directory, whose last part is the name of a person, becomes "model".
    """
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if re.fullmatch(r"\w[\w. -]*(/\w[\w.-]*)?", name) and not os.path.exists(name):
        return name
    path = os.path.realpath(os.path.expanduser(name.replace("\\", "/")))
    return "model" if path == os.path.realpath(os.path.expanduser("~")) else os.path.basename(path) or "model"
