"""Run by test_remote_code.py in a fresh process: load checkpoints that bring code of their own, write down what came out.

python tests/remote_code_elsewhere.py FOLDER without        reads FOLDER/tasks.pt, writes FOLDER/without.pt
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


folder, way = Path(sys.argv[1]), sys.argv[2]
if way == "without":
    sys.modules["hf_kprune"] = None  # type: ignore[assignment]  # wherever it is installed: importing it fails
else:
    import hf_kprune  # noqa: F401

import torch
import transformers


def outputs_of(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Type of the model that `load` gives, and its outputs; type and text of what it raises."""
    try:
        model = load(*args, **kwargs).eval()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        return type(model).__name__, model(**batch)[-1]


batch, results = torch.load(folder / "batch.pt"), {}
for name, auto in torch.load(folder / "tasks.pt").items():
    load = getattr(transformers, auto).from_pretrained
    results[name] = {"trusted": outputs_of(load, folder / name, trust_remote_code=True)}
    results[name]["untrusted"] = outputs_of(load, folder / name, trust_remote_code=False)
    if not isinstance(results[name]["trusted"], str):
        model = load(folder / name, trust_remote_code=True)
        model.save_pretrained(folder / f"{way}, {name}, again")
        results[name]["again"] = outputs_of(load, folder / f"{way}, {name}, again", trust_remote_code=True)
torch.save(results, folder / f"{way}.pt")
