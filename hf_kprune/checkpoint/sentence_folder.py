"""What lies beside the transformer in a sentence-transformers folder is carried into the folder of the pruned
one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..calibration.embeddings import MODULES, SentenceFolder
from ..calibration.sentence_modules import read_json


WEIGHTS = re.compile(r"\.(safetensors|bin|h5|msgpack|ot|onnx|gguf|pt|pth|ckpt)(\.index\.json)?$")
EXPORTS = re.compile(r"onnx|openvino|checkpoint-\d+|runs")


def files_beside(folder: SentenceFolder) -> Iterator[tuple[Path, Path]]:
    """Each file beside the transformer, and its place in a folder that has the transformer at the top.

    Weights of the dense transformer, their exports, hidden files and checkpoints of training are left out.
    """
    for top in dict.fromkeys((folder.path / folder.place, folder.path)):
        for entry in sorted(top.iterdir()):
            another = entry == folder.path / folder.place or (entry / MODULES).exists()
            if another or entry.name.startswith(".") or entry.name == "config.json":
                continue
            if entry.is_dir() and not EXPORTS.fullmatch(entry.name):
                files = (file for file in sorted(entry.rglob("*")) if file.is_file())
                yield from ((file, file.relative_to(top)) for file in files)
            elif entry.is_file() and not WEIGHTS.search(entry.name):
                yield entry, Path(entry.name)


def carry(folder: SentenceFolder, directory: str) -> None:
    """Copy what lies beside the transformer into `directory`. What is there already stays."""
    for source, place in files_beside(folder):
        target = directory / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(source, target)
    if folder.place:
        modules = read_json(folder.path / MODULES)
        modules[0]["path"] = ""
        Path(directory, MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")


def card_of(folder: SentenceFolder, text: str) -> str:
    """The model card `text` with the metadata of the folder's card, whose text follows."""
    ours, source = ModelCard(text), folder.path / "README.md"
    theirs = ModelCard(
        source.read_text(encoding="utf-8") if source.exists() else "", ignore_metadata_errors=True
    )
    new: dict[str, Any] = ours.data.to_dict()
    old: dict[str, Any] = theirs.data.to_dict()
    old.pop("model-index", None)  # results of the dense model
    tags = ["sentence-transformers", *(old.get("tags") or []), *(new.get("tags") or [])]
    first = {"base_model": new["base_model"]} if new.get("base_model") else {}
    library = {"library_name": "sentence-transformers"}
    data = {**new, **library, **old, **first, "tags": list(dict.fromkeys(tags))}
    metadata = ModelCardData(**data).to_yaml()
    loading = f"import hf_kprune\nfrom sentence_transformers import {folder.library_class}\n\n"
    loading += f"model = {folder.library_class}(path)"
    body = f"{ours.text.rstrip()}\n\nWith sentence-transformers:\n\n```python\n{loading}\n```\n"
    body += f"\n## The card of the dense model\n\n{theirs.text.strip()}\n" if theirs.text.strip() else ""
    return f"---\n{metadata}\n---\n{body}"
