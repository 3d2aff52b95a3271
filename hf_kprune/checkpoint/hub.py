"""Uploads, by `huggingface_hub`, and where a model card may be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..arguments import KPruneArguments
from ..errors import ArgumentError
from ..files.contents import is_card
from ..files.destination import as_text


def check_card_place(directory: object, overwrite: bool) -> Path:
    """Where a model card is written. Raises `ArgumentError` if something else is there that `overwrite` does
    not give up.
    """
    path = Path(as_text(directory), "README.md")
    if not path.parent.is_dir():
        raise ArgumentError(
            f"output_dir {str(directory)!r} is no directory; save the model there first, or name another"
        )
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    foreign = path.exists() and "hf_kprune" not in text.split("\n---")[0]
    if path.is_dir() or (foreign and not (overwrite and is_card(path))):
        raise ArgumentError(
            f"{str(path)!r} is not a model card of hf_kprune; move it elsewhere, or name another output_dir"
        )
    return path


def check_push(args: KPruneArguments, path: str | None, token: str | None = None) -> None:
    """Raise `ArgumentError` for an upload of the folder `path` (None: not known yet) that cannot succeed."""
    if constants.HF_HUB_OFFLINE:
        raise ArgumentError(
            "push_to_hub is asked for, but HF_HUB_OFFLINE is set: unset it, or save without pushing"
        )
    if not (token or args.hub_token or get_token()):
        raise ArgumentError(
            "push_to_hub is asked for, but there is no token: run hf auth login, set HF_TOKEN, or pass "
            "hub_token"
        )
    if args.hub_model_id is not None or path is not None:
        name = repository_name(args, path)
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            source = "the name of output_dir" if args.hub_model_id is None else "hub_model_id"
            raise ArgumentError(
                f"{source} is {name!r}, expected a name for a repository on the Hub: {error}"
            ) from error


def repository_name(args: KPruneArguments, path: str | None) -> str:
    """`hub_model_id`, by default the name of the folder."""
    return args.hub_model_id if args.hub_model_id is not None else Path(str(path)).resolve().name


def push_folder(
    path: str,
    args: KPruneArguments,
    commit_message: str,
    token: str | None,
    revision: str | None,
    **kwargs: Any,
) -> Any:
    """Upload a saved checkpoint to `args.hub_model_id` (default: the name of the folder), made if it does not
    exist.
    """
    revision = revision or args.hub_revision
    api = HfApi(token=token or args.hub_token)
    repository = api.create_repo(
        repository_name(args, path), private=args.hub_private_repo, exist_ok=True
    ).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repository,
        folder_path=path,
        commit_message=commit_message,
        revision=revision,
        **kwargs,
    )
