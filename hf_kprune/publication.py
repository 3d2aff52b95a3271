"""The model of a pruner is saved with all that belongs to it, and pushed to the Hub."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from .checkpoint.card import model_card, write_picture
from .checkpoint.exporters import UnsavableError, check_generation
from .checkpoint.hub import check_card_place, check_push, push_folder
from .checkpoint.remote_code import check_code_travels
from .checkpoint.saving import save_atomically
from .checkpoint.sentence_folder import card_of, carry
from .errors import ArgumentError, KPruneError
from .options import from_json
from .processes import together
from .sizes import model_size
from .state import Pruner, begin_phase, noting, one_run, origins_of, tell
from .validation import show


def save(pruner: Pruner, output_dir: str | None) -> str:
    """Save the model of a pruner as `write` does; an error says that a pruned model is unharmed."""
    try:
        with one_run(pruner):
            return write(pruner, output_dir)
    except KPruneError as error:
        if pruner.report is None:
            raise
        advice = "; the pruned model is unharmed in memory"
        if not isinstance(error, UnsavableError):
            advice += ", and save_model('elsewhere') is all that is needed"
        raise type(error)(f"{error}{advice}") from error


def write(pruner: Pruner, output_dir: str | None) -> str:
    """Save the model of a pruner with all that belongs to it, as it is now, and return where.

    Args:
        pruner: It holds the model.
        output_dir: Directory to write to. None: the one of its options.
    """
    args, path = pruner.args, output_dir
    with together(pruner.accelerator):
        if pruner.accelerator.is_main_process:
            size = model_size(pruner.model).bytes
            path = args.check_output_dir(output_dir, origins_of(pruner), size)
            check_savable(pruner.model)
            begin_phase(pruner, "save")
            options = (
                args.max_shard_size,
                lambda folder: write_beside(pruner, folder),
                args.overwrite_output_dir,
            )
            save_atomically(pruner.model, path, *options)
    path = str(path or args.output_dir)
    pruner.checkpoint = os.path.abspath(path)
    return path


def check_savable(model: PreTrainedModel) -> None:
    """Raise `UnsavableError` for what was found before the work if there was an `output_dir`."""
    try:
        check_code_travels(model)
        check_generation(model)
    except ArgumentError as error:
        raise UnsavableError(str(error)) from error


def write_beside(pruner: Pruner, directory: str) -> None:
    """Write what belongs to a model beside it: tokenizer, report, model card, modules of
    sentence-transformers.

    Raises:
        UnsavableError: If the tokenizer cannot be saved.
    """
    processor = pruner.processing_class
    if processor is not None:
        try:
            processor.save_pretrained(directory)
        except OSError:  # of the place, where another one will do
            raise
        except Exception as error:  # its own code, of whatever kind
            raise UnsavableError(
                f"processing_class, {show(processor)}, cannot be saved: its save_pretrained failed with a "
                f"{type(error).__name__}; set pruner.processing_class to one that can be saved, or to None"
            ) from error
    if pruner.report is not None:
        pruner.report.save(directory, endings(pruner))
    pruner.create_model_card(output_dir=directory)
    if pruner.sentence_folder is not None:
        carry(pruner.sentence_folder, directory)


def endings(pruner: Pruner) -> tuple[str, ...]:
    """Those of the formats that a report is to be written in."""
    return (".md", ".html") if pruner.args.html_report else (".md",)


def tell_of_the_save(pruner: Pruner, path: str) -> None:
    """Tell listeners of a checkpoint in `path`. It is whole, whatever they do, and their errors say so."""
    note = f"The checkpoint in {pruner.checkpoint} is whole; on_save came after it was written."
    with together(pruner.accelerator), noting(note):
        tell(pruner, "on_save", path)


def write_card(pruner: Pruner, output_dir: str | None, *about: Any) -> None:
    """Write the card of the model of a pruner, see `KPrunePruner.create_model_card`.

    Args:
        pruner: It holds the model.
        output_dir: Directory to write to. None: the one of its options.
        about: What `model_card` takes beside the model and its report.

    Raises:
        ArgumentError: If there is no directory, or if something else is there.
    """
    directory = pruner.args.output_dir if output_dir is None else output_dir
    if directory is None:
        raise ArgumentError("no output_dir: pass it to create_model_card() or to KPruneArguments")
    if pruner.accelerator.is_main_process:
        place = check_card_place(directory, pruner.args.overwrite_output_dir)
        metadata = from_json("card_metadata", pruner.args.card_metadata)
        prepared = pruner.processing_class is not None
        card = model_card(pruner.model, pruner.report, metadata, prepared, *about)
        card = card if pruner.sentence_folder is None else card_of(pruner.sentence_folder, card)
        place.write_text(card, encoding="utf-8")
        write_picture(place.parent, pruner.report)


def push(
    pruner: Pruner,
    commit_message: str = "Model pruned with hf_kprune",
    token: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Push the saved checkpoint of a pruner, after saving it if need be.

    `KPrunePruner.push_to_hub` has the arguments.
    """
    with together(pruner.accelerator):
        if pruner.accelerator.is_main_process:
            check_push(pruner.args, pruner.checkpoint or pruner.args.output_dir, token)
    if pruner.checkpoint is None:
        too, pruner.args.push_to_hub = pruner.args.push_to_hub, False
        try:
            pruner.save_model()
        finally:
            pruner.args.push_to_hub = too
    with together(pruner.accelerator):
        if not pruner.accelerator.is_main_process:
            return None
        return push_folder(str(pruner.checkpoint), pruner.args, commit_message, token, revision, **kwargs)
