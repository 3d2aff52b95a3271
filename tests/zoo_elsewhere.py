"""Run by test_zoo.py in a process that cannot import hf_kprune: load its checkpoints with the code that they bring.

python tests/zoo_elsewhere.py FOLDER        reads FOLDER/tasks.pt, writes FOLDER/results.pt: name to error, or ""
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


sys.modules["hf_kprune"] = None  # type: ignore[assignment]  # wherever it is installed: importing it fails
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()

import torch
import transformers
from zoo import outputs_of


def error_of(task: dict[str, Any]) -> str:
    """What is wrong with a model loaded from the task's checkpoint; empty if nothing is."""
    config = json.loads(Path(task["path"], "config.json").read_text())
    auto = next(
        (key for key, value in config["auto_map"].items() if value.endswith("." + task["class"])), None
    )
    if auto is None:
        return "no Auto class has it"
    model = getattr(transformers, auto).from_pretrained(task["path"], trust_remote_code=True)
    difference = float((outputs_of(model, task["kind"]) - task["expected"]).abs().max())
    return "" if difference < 1e-4 else f"outputs differ by {difference}"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, task in torch.load(folder / "tasks.pt").items():
        try:
            results[name] = error_of(task)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
