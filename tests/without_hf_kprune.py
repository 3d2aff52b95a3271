"""Run by test_checkpoint.py in a process without hf_kprune: load checkpoints there, write down what came out.

The process is a fork of the one that runs the tests, and forgets that hf_kprune was imported. The slow tests of
test_zoo.py and test_remote_code.py begin with a fresh interpreter.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers
from huggingface_hub import HfApi
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    dynamic_module_utils,
    pipeline,
)


def forget_hf_kprune() -> None:
    """Take its wrappers off transformers, and let importing it fail, wherever it is installed."""
    for owner in (PreTrainedModel, PreTrainedConfig):
        for name, value in list(vars(owner).items()):
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType) and function.__globals__["__name__"].startswith(
                "hf_kprune"
            ):
                plain = function.__wrapped__  # type: ignore[attr-defined]
                setattr(owner, name, classmethod(plain) if isinstance(value, classmethod) else plain)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_kprune"]:
        del sys.modules[name]
    sys.modules["hf_kprune"] = None  # type: ignore[assignment]


def error_of(load: Any, *args: Any, **kwargs: Any) -> str:
    """Type and text of what `load` raises; empty if it loads."""
    try:
        load(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_each_way(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    auto, directory, batch = getattr(transformers, task["auto"]), task["directory"], task["batch"]
    stock = getattr(transformers, task["class"])
    facts: dict[str, Any] = {
        "refused": [
            error_of(load, directory, ignore_mismatched_sizes=ignore)
            for load in (auto.from_pretrained, stock.from_pretrained)
            for ignore in (False, True)
        ]
    }
    outputs = facts["outputs"] = {}

    @torch.no_grad()
    def run(name: str, model: Any) -> Any:
        outputs[name] = model.eval()(**batch)[0]
        return model

    model = run("loaded", auto.from_pretrained(directory, trust_remote_code=True))
    facts["state"] = model.state_dict()
    facts["class"], facts["is stock"] = type(model).__name__, isinstance(model, stock)
    run("copied", copy.deepcopy(model))
    run("pickled", pickle.loads(pickle.dumps(model)))
    for implementation in task["implementations"]:
        model.set_attn_implementation(implementation)
        run(implementation, model)
    full = model(**batch, output_hidden_states=True, output_attentions=True)
    facts["hidden states"] = len(full.hidden_states)
    facts["heads"] = [attentions.shape[1] for attentions in full.attentions]
    run("by its own class", type(model).from_pretrained(directory))
    again = folder / task["name"]
    model.save_pretrained(again)
    run("saved again", auto.from_pretrained(again, trust_remote_code=True))
    facts["saved"] = str(again)
    facts["refused"].append(error_of(auto.from_pretrained, again))
    run("a base model", AutoModel.from_pretrained(directory, trust_remote_code=True))
    run("a new head", AutoModelForTokenClassification.from_pretrained(directory, trust_remote_code=True))
    run("a new model", auto.from_config(model.config, trust_remote_code=True))
    if task["pipeline"]:
        facts["pipeline"] = pipeline(task["pipeline"], model=directory, trust_remote_code=True)(task["text"])
    return facts


def main(folder: Path) -> None:
    """Read tasks.pt in a folder, and write results.pt beside it."""
    forget_hf_kprune()
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    tasks = torch.load(folder / "tasks.pt", weights_only=False)
    results: dict[str, Any] = {"import": error_of(__import__, "hf_kprune")}
    for task in tasks["load"]:
        results[task["name"]] = load_each_way(task, folder)
    for name, directory in tasks["broken"].items():
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        results[name] = [
            error_of(load, directory, trust_remote_code=True, ignore_mismatched_sizes=ignore)
            for ignore in (False, True)
        ]
    hub = transformers.AutoModelForSequenceClassification.from_pretrained(
        "someone/pruned", revision="v2", cache_dir=tasks["cache"], trust_remote_code=True
    )
    hub.save_pretrained(folder / "from the hub")
    results["hub"] = hub.state_dict()
    results["hub refused"] = error_of(
        transformers.AutoModelForSequenceClassification.from_pretrained,
        "someone/pruned",
        cache_dir=tasks["cache"],
    )
    pushed = results["pushed"] = {}

    def commit(api: HfApi, operations: Any, **kwargs: Any) -> None:
        for operation in operations:
            pushed[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    create = lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)  # noqa: E731
    with patch.multiple(HfApi, create_repo=create, create_commit=commit):
        hub.save_pretrained(folder / "pushed", push_to_hub=True, repo_id="me/small")
    torch.save(results, folder / "results.pt")
