"""Model cards: metadata that the Hub reads, and what a reader wants to know, by `huggingface_hub`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.utils import cached_file

from ..charts import units_kept
from ..history import in_words
from ..modeling_kprune import HOW_TO_LOAD, is_pruned
from ..report import NAME, PruningReport
from ..reports import can_draw, draw
from ..text import in_markdown, printable, public_name
from .lineage import earlier_cuts
from .remote_code import stock_entries


PICTURE = f"{NAME}.png"
"""The picture beside a card: what is left of each layer."""
CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag", "datasets", "base_model")
"""Metadata of the dense model's card that hold for the pruned one, too. Tags are joined."""
REPOSITORY = r"[\w.-]+(/[\w.-]+)?"
SILENCE = 'processor([0.0] * 16_000, sampling_rate=16_000, return_tensors="pt")'
INPUTS = {
    "input_ids": ("AutoTokenizer", 'processor("What a warm and funny film.", return_tensors="pt")'),
    "pixel_values": ("AutoImageProcessor", 'processor(Image.new("RGB", (64, 64)), return_tensors="pt")'),
    "input_values": ("AutoFeatureExtractor", SILENCE),
    "input_features": ("AutoFeatureExtractor", SILENCE),
}
"""Of what a model reads first: the class that prepares it, and an example of it."""
LIMITS = (
    "It does what the dense model does, less well the more was removed, above all on inputs unlike the "
    "calibration data. What the dense model gets wrong, and its biases, are still there. Measure it on data "
    "of your own before you rely on it."
)
CITATIONS = {
    "hf_kprune": "@software{hf_kprune, title = {hf_kprune}, author = {{The hf_kprune authors}}}",
    "kprune": (
        "@inproceedings{park2024accurate,\n  title = {Accurate Retraining-free Pruning for Pretrained "
        "Encoder-based Language Models},\n  author = {Park, Seungcheol and Choi, Hojun and Kang, U},\n"
        "  booktitle = {The Twelfth International Conference on Learning Representations},\n"
        "  year = {2024},\n  url = {https://openreview.net/forum?id=s2NjWfaYdZ}\n}"
    ),
}


def model_card(  # noqa: PLR0913, as Trainer.create_model_card
    model: PreTrainedModel,
    report: PruningReport | None,
    metadata: Mapping[str, Any] | None = None,
    processor: bool = True,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    measured: str = "",
) -> str:
    """Text of a model card: how to load the model, and the report of how it was pruned.

    `metadata` are fields for its head; they give way to the other arguments, which are those of
    `Trainer.create_model_card`, and what the dense model's card says gives way to both. `processor` says
    whether there is a tokenizer, or what else prepares inputs, beside the model. `measured` are tables, in
    Markdown, of how the dense and the pruned model compare.
    """
    pruned = is_pruned(model.config) or (report is not None and report.cut_something)
    title = printable(model_name or type(model).__name__ + (", pruned" if pruned else ""))
    base = repository(finetuned_from or model.config.name_or_path or "")
    fields: dict[str, Any] = {
        "language": language,
        "license": license,
        "base_model": base,
        "pipeline_tag": next(iter(as_list(tasks)), None),
        "datasets": as_list(dataset_tags) or as_list(dataset) or None,
    }
    old = metadata_of(model)
    guess = {"pipeline_tag": task_of(model), "library_name": "transformers"}
    fields = guess | old | dict(metadata or {}) | {key: value for key, value in fields.items() if value}
    ours = ["hf_kprune", *(["pruned"] if pruned else [])]
    every = [*ours, *as_list(old.get("tags")), *as_list((metadata or {}).get("tags")), *as_list(tags)]
    fields["tags"] = list(dict.fromkeys(every))
    if pruned and fields.get("base_model"):
        fields.setdefault("base_model_relation", "finetune")
    results = evaluation(report, fields)
    if results:
        fields |= {"model_name": title, "eval_results": results}
    data = ModelCardData(**{key: value for key, value in fields.items() if value is not None})
    trained = ", ".join(map(in_markdown, as_list(dataset) + as_list(dataset_args)))
    parts = [summary(report)] if pruned and report is not None else []
    parts.append(loading(model, processor))
    parts += [f"The dense model was trained on {trained}."] if trained else []
    parts += [f"## Beside the dense model\n\n{measured}"] if measured else []
    parts += history(model, report) if pruned else []
    body = "\n\n".join(part.strip() for part in parts if part)
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n"


def repository(name: str) -> str | None:
    """The name of a model on the Hub; None for a directory of this machine that is no download of one."""
    public = public_name(name) if not os.path.isdir(name) or "models--" in name else ""
    fits = re.fullmatch(REPOSITORY, public) and (public == name or "/" in public)
    return public if fits else None


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the card beside the dense model, in its folder or in the Hub's cache, says of the pruned one,
    too.
    """
    name = model.config.name_or_path or ""
    options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    options["_raise_exceptions_for_connection_errors"] = False
    there = os.path.isdir(name) or repository(name) is not None  # else it is a directory that is gone
    path = cached_file(name, "README.md", **options) if there else None
    if path is None:
        return {}
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    kept = {key: data[key] for key in (*CARRIED, "tags") if data.get(key)}
    for key in ("datasets", "base_model"):  # a path of this machine is nobody's data set or model
        names = [str(each) for each in as_list(kept.pop(key, None))]
        names = [each for each in names if re.fullmatch(REPOSITORY, each) and not os.path.exists(each)]
        kept |= {key: names if key == "datasets" else names[0]} if names else {}
    return kept


def task_of(model: PreTrainedModel) -> str | None:
    """The task of the Hub that the class of a model is for; None if its head is for none of them."""
    name = type(model).__name__
    for task, classes in TASK_MAPPING.items():
        if any(name in ([each] if isinstance(each, str) else each) for each in classes.values()):
            return str(task)
    plain = name.endswith("Model") and model.main_input_name == "input_ids"
    return "feature-extraction" if plain else None


def evaluation(report: PruningReport | None, fields: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of a report, those of a model that came before this one under names that say so. On which
    data they were measured only the user knows.
    """
    earlier = {"before": " before pruning", "after": " before recovery"}
    results, task, source = list[EvalResult](), fields.get("pipeline_tag") or "other", "evaluation data"
    for when, figures in (report.metrics if report is not None else {}).items():
        for name, value in figures.items():
            label = name if report is None or when == report.stage else name + earlier[when]
            results.append(EvalResult(task, source, source, name, value, metric_name=label))
    return results


def summary(report: PruningReport) -> str:
    """What the model is, in two sentences."""
    before, after = report.before.parameters, report.after.parameters
    work = f"{report.sparsity:.0%} of the work of its heads and neurons is removed"
    removed = report.weights_removed() + work
    return (
        f"This is {in_markdown(report.model)}, of which {removed}, by the method "
        f"{in_markdown(report.method)} of hf_kprune and without retraining. Of {before:,} parameters "
        f"{after:,} are left."
    )


def loading(model: PreTrainedModel, processor: bool) -> str:
    """How to load the model, in each way that there is, with an input of the kind that it reads, if there is
    a processor that prepares it.
    """
    architecture, needs_us = type(model).__name__, is_pruned(model.config)
    entries = stock_entries(model.config)
    auto = next((name for name, entry in entries.items() if entry.endswith(f".{architecture}")), None)
    kind, example = INPUTS.get(model.main_input_name, (None, "")) if processor else (None, "")
    image = "from PIL import Image\n" if kind == "AutoImageProcessor" else ""

    def code(name: str, more: str = "", before: str = "") -> str:
        names = ", ".join(sorted(each for each in (kind, name) if each))
        lines = f"model = {name}.from_pretrained(path{more})\n"
        if kind:
            lines += f"processor = {kind}.from_pretrained(path)\noutputs = model(**{example})\n"
        return f"```python\n{before}{image}from transformers import {names}\n\n{lines}```\n\n"

    if not needs_us:
        return f"## How to load it\n\n{code(architecture)}"
    text = f"## How to load it\n\n{HOW_TO_LOAD[0].upper()}{HOW_TO_LOAD[1:]}.\n\n"
    text += code(architecture, before="import hf_kprune\n")
    if auto:
        text += "Without hf_kprune:\n\n" + code(auto, ", trust_remote_code=True")
    task = task_of(model)
    if task and kind == "AutoTokenizer":
        text += "In a pipeline:\n\n```python\nimport hf_kprune\nfrom transformers import pipeline\n\n"
        text += f'pipe = pipeline("{task}", model=path)\n```\n'
    return text


def history(model: PreTrainedModel, report: PruningReport | None) -> list[str]:
    """How a model was pruned, what that does not promise, and whom to cite."""
    cuts = earlier_cuts(model)
    parts = []
    if report is not None:
        shown = f"![What is left of each layer]({PICTURE})\n\n" if can_show(report) else ""
        parts.append(f"## How it was pruned\n\n{shown}{report.to_markdown()}")
    elif cuts:
        parts.append(f"## How it was pruned\n\n{in_markdown(in_words(cuts))}")
    if not parts:
        return []
    methods = {str(cut.get("method")) for cut in cuts} | ({report.method} if report is not None else set())
    names = ["hf_kprune", *(["kprune"] if "kprune" in methods else [])]
    citations = "\n\n".join(CITATIONS[name] for name in names)
    return [*parts, f"## Limits\n\n{LIMITS}", f"## Citation\n\n```bibtex\n{citations}\n```"]


def can_show(report: PruningReport) -> bool:
    """Whether there is something to draw, and what draws it."""
    return bool(report.sublayers) and can_draw()


def write_picture(directory: Path, report: PruningReport | None) -> None:
    """Draw what is left of each layer beside a card, if that shows it."""
    if report is not None and can_show(report):
        (directory / PICTURE).write_bytes(draw(units_kept(report.sublayers)))


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
