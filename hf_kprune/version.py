"""The version, in one place, and those of what it runs on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version


__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of Python, this package and those that its results depend on."""
    return {"python": platform.python_version(), "hf_kprune": __version__, **_of_libraries()}


@cache
def _of_libraries() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")}
