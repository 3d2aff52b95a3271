"""The state of a pruner, for those who are handed one: who listens, which model is in its place, where it is
saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .calibration.embeddings import SentenceFolder
from .calibration.knowledge import KnowledgeLoss
from .callbacks import CallbackHandler
from .checkpoint.hub import check_push
from .checkpoint.remote_code import check_code_travels
from .checkpoint.saving import save_atomically
from .checkpoint.sentence_folder import carry
from .errors import CheckpointError
from .files.destination import origins
from .processes import together
from .report import PruningReport
from .sizes import expected_bytes, model_size
from .structure.offload import rebind
from .validation import show


class Pruner(Protocol):
    """What a pruner has for those who are handed one: `KPrunePruner`, which documents it, is the only one."""

    model: PreTrainedModel
    args: KPruneArguments
    calibration_dataset: Any
    data_collator: Callable[[list[Any]], dict[str, Any]] | None
    eval_dataset: Any
    processing_class: Any
    compute_loss: KnowledgeLoss | None
    sentence_folder: SentenceFolder | None
    report: PruningReport | None
    callback_handler: CallbackHandler
    checkpoint: str | None
    """Where the model was saved as it is now."""

    @property
    def accelerator(self) -> Accelerator: ...
    def evaluate(self) -> dict[str, float]: ...
    def create_model_card(self, *, output_dir: str | None = None) -> None: ...


def tell(pruner: Pruner, event: str, *args: object, **kwargs: object) -> None:
    """Tell the listeners of a pruner of an event, on the main process only. `kwargs` may name another
    `model`.
    """
    if pruner.accelerator.is_main_process:
        call(pruner, event, *args, **kwargs)


def call(pruner: Pruner, event: str, *args: object, **kwargs: object) -> None:
    """Tell the listeners of a pruner of an event on this process."""
    about = {"model": pruner.model, **kwargs}
    pruner.callback_handler.call(event, pruner.args, pruner.report, *args, **about)


def begin_phase(pruner: Pruner, name: str) -> None:
    """Tell the listeners of a pruner that a phase begins, if it is another one than the last."""
    if pruner.callback_handler.phase != name:
        pruner.callback_handler.phase = name
        tell(pruner, "on_phase_begin", name)


@contextmanager
def one_run(pruner: Pruner) -> Iterator[None]:
    """Within this context all events belong to one run; a run within a run is a part of it."""
    handler = pruner.callback_handler
    handler.runs += 1
    try:
        yield
    finally:
        handler.runs -= 1
        if not handler.runs:
            handler.phase = ""
            tell(pruner, "on_run_end")


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Add to an error, whatever it is, what it did not undo."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


@contextmanager
def in_place(pruner: Pruner, model: PreTrainedModel, report: PruningReport) -> Iterator[None]:
    """Within this context a pruner evaluates, saves and reports another model as if it were its own."""
    before = pruner.model, pruner.report, pruner.checkpoint
    pruner.model, pruner.report = model, report
    try:
        yield
    finally:
        pruner.model, pruner.report, pruner.checkpoint = before


def adopt(pruner: Pruner, student: PreTrainedModel, report: PruningReport) -> None:
    """Let the model of a pruner become the student, if anything was cut, and tell listeners that it is
    pruned.
    """
    if report.cut_something:
        pruner.model.__dict__.update(student.__dict__)  # one step: nothing can come between
        rebind(pruner.model)
    pruner.report, pruner.checkpoint = report, None
    note = "The model is pruned all the same: on_prune_end came after. save_model() works."
    with together(pruner.accelerator), noting(note):
        tell(pruner, "on_prune_end")


def check_place(pruner: Pruner, dataset: object) -> None:
    """Refuse options that cannot be and an `output_dir` that cannot be saved to, before anything runs."""
    with together(pruner.accelerator):
        pruner.args.check()
        if pruner.accelerator.is_main_process:
            if pruner.args.output_dir is not None:
                size = expected_bytes(pruner.model, pruner.args)
                pruner.args.check_output_dir(None, origins_of(pruner, dataset), size)
                check_code_travels(pruner.model)
            if pruner.args.push_to_hub:
                check_push(pruner.args, pruner.args.output_dir)


def origins_of(pruner: Pruner, dataset: object = None) -> list[str]:
    """Files and directories that model and data come from, which must not be replaced."""
    data = dataset, pruner.calibration_dataset, pruner.eval_dataset
    return origins(pruner.model, pruner.processing_class, pruner.sentence_folder, *data)


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
            check_code_travels(pruner.model)
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


def write_beside(pruner: Pruner, directory: str) -> None:
    """Write what belongs to a model beside it: tokenizer, report, model card, modules of
    sentence-transformers.

    Raises:
        CheckpointError: If the tokenizer cannot be saved.
    """
    processor = pruner.processing_class
    if processor is not None:
        try:
            processor.save_pretrained(directory)
        except Exception as error:  # its own code, of whatever kind
            raise CheckpointError(
                f"processing_class, {show(processor)}, cannot be saved: its save_pretrained failed with a "
                f"{type(error).__name__}; set pruner.processing_class to one that can be saved, or to None"
            ) from error
    if pruner.report is not None:
        pruner.report.save(directory)
    pruner.create_model_card(output_dir=directory)
    if pruner.sentence_folder is not None:
        carry(pruner.sentence_folder, directory)


def tell_of_the_save(pruner: Pruner, path: str) -> None:
    """Tell listeners of a checkpoint in `path`. It is whole, whatever they do, and their errors say so."""
    note = f"The checkpoint in {pruner.checkpoint} is whole; on_save came after it was written."
    with together(pruner.accelerator), noting(note):
        tell(pruner, "on_save", path)
