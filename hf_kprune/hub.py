"""Model cards and uploads, by `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .modeling_kprune import HOW_TO_LOAD
from .report import PruningReport


def model_card(
    model: PreTrainedModel,
    report: PruningReport | None,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> str:
    """Text of a model card: how to load the model, and the report of how it was pruned."""
    base = finetuned_from or model.config.name_or_path
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        tags=["hf_kprune", "pruned", *as_list(tags)],
        base_model=None if not base or Path(base).exists() else base,
        pipeline_tag=next(iter(as_list(tasks)), None),
        datasets=as_list(dataset_tags) or as_list(dataset) or None,
    )
    title = model_name or f"{type(model).__name__}, K-pruned"
    architecture = type(model).__name__
    loading = ""
    if getattr(model.config, "kprune", None) is not None:
        loading = (
            f"{HOW_TO_LOAD[0].upper()}{HOW_TO_LOAD[1:]}.\n\n"
            f"```python\nimport hf_kprune\nfrom transformers import {architecture}\n\n"
            f"model = {architecture}.from_pretrained(path)\n```\n\n"
        )
    trained = ", ".join(as_list(dataset) + as_list(dataset_args))
    loading += f"The dense model was trained on {trained}.\n\n" if trained else ""
    body = "" if report is None else f"## How it was pruned\n\n{report.to_markdown()}"
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{loading}{body}"


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def push_folder(
    path: str, args: KPruneArguments, commit_message: str, token: str | None, revision: str | None, **kwargs: Any
) -> Any:
    """Upload a saved checkpoint to `args.hub_model_id` (default: the name of the folder), made if it does not exist."""
    revision = revision or args.hub_revision
    api = HfApi(token=token or args.hub_token)
    name = args.hub_model_id or Path(path).resolve().name
    repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repository,
        folder_path=path,
        commit_message=commit_message,
        revision=revision,
        **kwargs,
    )
