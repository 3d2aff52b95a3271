"""The state of a pruner, for those who are handed one: who listens, which model is in its place, where it is
saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .calibration.embeddings import SentenceFolder
from .calibration.knowledge import KnowledgeLoss
from .callbacks import CallbackHandler
from .checkpoint.exporters import check_generation
from .checkpoint.hub import check_push
from .checkpoint.remote_code import check_code_travels
from .errors import ArgumentError
from .files.destination import origins
from .processes import together
from .report import PruningReport
from .sizes import expected_bytes
from .structure.offload import duplicate, is_dispatched, rebind


class Pruner(Protocol):
    """What a pruner has for those who are handed one: `KPrunePruner`, which documents it, is the only one."""

    model: PreTrainedModel
    dense_model: PreTrainedModel | None
    source: str | None
    """What the model was loaded from, if the pruner has loaded it."""
    args: KPruneArguments
    calibration_dataset: Any
    data_collator: Callable[[list[Any]], dict[str, Any]] | None
    eval_dataset: Any
    processing_class: Any
    compute_metrics: Callable[[Any], dict[str, float]] | None
    compute_loss: KnowledgeLoss | None
    sentence_folder: SentenceFolder | None
    report: PruningReport | None
    metrics: dict[str, float]
    """Figures of the model before it was pruned, if they were measured."""
    callback_handler: CallbackHandler
    checkpoint: str | None
    """Where the model was saved as it is now."""

    @property
    def accelerator(self) -> Accelerator: ...
    def evaluate(self) -> dict[str, float]: ...
    def save_model(self, output_dir: str | None = None) -> None: ...
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


def adopt(pruner: Pruner, student: PreTrainedModel, report: PruningReport, inplace: bool = True) -> None:
    """Let the model of a pruner become the student, if anything was cut, and tell listeners that it is
    pruned.

    Args:
        pruner: It holds the model.
        student: It shares tensors with the model.
        report: How it was made.
        inplace: Otherwise the model stays what it is, and the student takes its place in the pruner.
    """
    if not inplace:
        student = duplicate(student if report.cut_something else pruner.model)  # to share no tensors
        pruner.dense_model = pruner.dense_model or pruner.model
        pruner.model = student
    elif report.cut_something:
        pruner.model.__dict__.update(student.__dict__)  # one step: nothing can come between
        rebind(pruner.model)
    pruner.report, pruner.checkpoint = report, None
    note = "The model is pruned all the same: on_prune_end came after. save_model() works."
    with together(pruner.accelerator), noting(note):
        tell(pruner, "on_prune_end")


def check_place(pruner: Pruner, dataset: object) -> None:
    """Refuse options that cannot be, an `output_dir` that cannot be saved to, and a model that could not be
    saved there, before anything runs.
    """
    with together(pruner.accelerator):
        pruner.args.check()
        if pruner.accelerator.is_main_process:
            if pruner.args.output_dir is not None:
                size = expected_bytes(pruner.model, pruner.args)
                pruner.args.check_output_dir(None, origins_of(pruner, dataset), size)
                check_code_travels(pruner.model)
                check_generation(pruner.model)
            if pruner.args.push_to_hub:
                check_push(pruner.args, pruner.args.output_dir)


def check_inplace(model: PreTrainedModel, inplace: bool) -> None:
    """Raise `ArgumentError` if a model is to stay as it is that cannot be copied."""
    if not inplace and is_dispatched(model):
        raise ArgumentError(
            f"inplace is False, but layers of {type(model).__name__} wait elsewhere, and are not copied; "
            "leave inplace at True, or load the model without offload or device_map"
        )


def origins_of(pruner: Pruner, dataset: object = None) -> list[str]:
    """Files and directories that model and data come from, which must not be replaced."""
    data = dataset, pruner.calibration_dataset, pruner.eval_dataset
    return origins(pruner.model, pruner.processing_class, pruner.sentence_folder, *data)
