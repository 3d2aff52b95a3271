"""What the commands do: `hf-kprune prune`, `plan`, `sweep`, `inspect`, `report`, `export` and `convert`.
docs/cli.md has examples.

How they are read is in parser.py, how they end in terminal.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..calibration.embeddings import SentenceFolder
from ..calibration.metrics import ALIASES
from ..calibration.tasks import task_of
from ..checkpoint.exporters import UnsavableError
from ..checkpoint.hub import check_push
from ..checkpoint.legacy import from_legacy
from ..checkpoint.loading import load_tokenizer
from ..checkpoint.saving import save_atomically
from ..comparison import compare as models_side_by_side
from ..errors import ArgumentError, KPruneError
from ..evaluation import plain_figures
from ..modeling_kprune import is_pruned
from ..progress import quiet
from ..pruner import KPrunePruner
from ..recovery import check as check_recovery
from ..report import JSON_NAME, MARKDOWN_NAME
from ..reports import Table, to_markdown
from ..runtimes import export
from ..sizes import expected_bytes, model_size
from ..state import one_run
from ..sweep import check_plot
from .inputs import make_pruner, trying
from .inspection import inspect, write_page
from .options import (
    CompareArguments,
    DataArguments,
    EvaluateArguments,
    RecoverArguments,
    ResumeArguments,
    SweepArguments,
)
from .output import say


__all__ = ["DataArguments", "RecoverArguments", "ResumeArguments", "SweepArguments", "run"]


def prune(
    data: DataArguments, args: KPruneArguments, resume: ResumeArguments, recovery: RecoverArguments
) -> None:
    """Prune a model, let it recover if that was asked for, save it, and print what was done and how good the
    dense model is, and what has become of it.
    """
    path = args.check_output_dir(read_from=data.origins)
    if args.push_to_hub:
        check_push(args, path)
    pruner = make_pruner(data, args)
    args.check_output_dir(read_from=data.origins, size=expected_bytes(pruner.model, args))
    figures: dict[str, dict[str, float]] = {}
    evaluates, minutes = pruner.eval_dataset is not None, recovery.recover_minutes
    if minutes is not None:
        check_recovery(pruner, minutes, {})
    if evaluates:
        figures["dense"] = evaluate_quietly(pruner)
    push = args.push_to_hub
    try:
        report = pruner.prune(resume_from_checkpoint=resume.resume_from_checkpoint, inplace=minutes is None)
        if evaluates:
            figures["pruned"] = evaluate_quietly(pruner)
        if minutes is not None:
            pruner.recover(minutes)
            if evaluates:
                figures["recovered"] = evaluate_quietly(pruner)
    finally:  # a callback may fail after the model is pruned
        if pruner.report is not None:
            args.push_to_hub = False
            save(pruner, path)
    say(
        report
        if args.verbose
        else f"{report.summary()}  every sublayer: {JSON_NAME} and {MARKDOWN_NAME} there\n"
    )
    if figures:
        say(to_markdown([evaluations(figures)]))
    else:
        names = ", ".join(task_of(pruner.model).figures) or "the loss"
        say(f"No evaluation data: --eval_file FILE shows {names} of the dense and the pruned model.\n")
    say(how_to_load(path, pruner.model, pruner.sentence_folder))
    if push:
        with trying("push to the Hub"):
            pruner.push_to_hub()


def evaluations(figures: dict[str, dict[str, float]]) -> Table:
    """What `evaluate()` gave for some models, side by side, without the times that it took."""
    names = plain_figures(next(iter(figures.values())), "")
    rows = [(name, *(f"{each[name]:.4f}" for each in figures.values())) for name in names]
    return Table(("evaluation", *figures), rows, "l" + "r" * len(figures))


def evaluate_quietly(pruner: KPrunePruner) -> dict[str, float]:
    """Evaluate as a run of its own, with the bar of all runs in place of the one of `Trainer`."""
    with one_run(pruner):
        return pruner.evaluate()


def sweep(
    data: DataArguments, args: KPruneArguments, options: SweepArguments, resume: ResumeArguments
) -> None:
    """Prune for many budgets, print a table, and save all models, or the smallest good enough."""
    path = args.check_output_dir(read_from=data.origins)
    if options.plot is not None:
        check_plot(options.plot)
    pruner = make_pruner(data, args)
    table = pruner.sweep(
        options.budgets,
        metric=options.compare_by or figure_of(data, pruner),
        greater_is_better=not options.lower_is_better,
        max_drop=options.max_drop,
        refine=options.refine,
        output_dir=None if options.max_drop is not None else path,
        resume_from_checkpoint=resume.resume_from_checkpoint,
    )
    say(f"\n{table}")
    if table.best:
        save(pruner, path)
        say(how_to_load(path, pruner.model, pruner.sentence_folder))
    if options.plot is not None and pruner.accelerator.is_main_process:
        with trying(f"write the plot {options.plot!r}"):
            table.plot(options.plot)
    if options.max_drop is not None and not table.best:
        raise ArgumentError(
            f"no model tried is within max_drop={options.max_drop} of the dense one; try smaller budgets"
        )


def figure_of(data: DataArguments, pruner: KPrunePruner) -> str | None:
    """What `evaluate()` calls the metric of the options; a script gives the figure that it is called
    after.
    """
    if data.metric is None:
        return None
    return ALIASES[data.metric] if pruner.compute_metrics is None else Path(data.metric).stem


def save(pruner: KPrunePruner, path: str) -> None:
    """Save the pruned model to `path`; if that place fails after all, beside it or in the temporary one.

    Raises:
        ArgumentError: In either case. It says where the model is.
        UnsavableError: If no place can hold the model as it is.
    """
    try:
        return pruner.save_model(path)
    except KPruneError as error:
        first = error.__cause__ or error  # without the advice for those who write Python
        if isinstance(error, UnsavableError):
            raise first from None
    name = f"{Path(path).resolve().name[:32]}-{os.getpid()}"
    for place in (str(Path(path).resolve().with_name(name)), str(Path(tempfile.gettempdir(), name))):
        try:
            pruner.save_model(place)
        except KPruneError:
            continue  # the error says why the first place failed
        raise ArgumentError(f"{first}; the pruned model was saved to {place!r} instead") from first
    raise first


def how_to_load(path: str, model: PreTrainedModel, folder: SentenceFolder | None = None) -> str:
    """A sentence and the lines of Python that load the model in `path`."""
    name = type(model).__name__
    library, load = "transformers", f"{name}.from_pretrained"
    if folder is not None:
        library, load, name = "sentence_transformers", folder.library_class, folder.library_class
    imports = f"    import hf_kprune\n    from {library} import {name}\n"
    return f"The pruned model is in {path}. To load it:\n\n{imports}\n    model = {load}({path!r})\n"


def plan(data: DataArguments, args: KPruneArguments) -> None:
    """Print what `prune` would cut, and change nothing."""
    pruner = make_pruner(data, args)
    say(f"\nA plan only: nothing was changed or written.\n\n{pruner.plan()}")


def evaluate(data: EvaluateArguments) -> None:
    """Print how good a model is."""
    pruner = make_pruner(data.data(), data.args(), calibrates=False)
    say(to_markdown([evaluations({data.model: evaluate_quietly(pruner)})]))


def compare(options: CompareArguments) -> None:
    """Print how large, how fast and how good two models are, side by side."""
    evaluates = options.eval_file is not None or options.eval_dataset_name is not None
    dense, pruned, more = options.model, options.pruned, dict[str, Any]()
    if evaluates:
        pruner = make_pruner(options.data(), options.args(), calibrates=False)
        more = {
            "eval_dataset": pruner.eval_dataset,
            "processing_class": pruner.processing_class,
            "data_collator": pruner.data_collator,
            "compute_metrics": pruner.compute_metrics,
        }
    sizes = options.batch_sizes, options.lengths, options.rounds
    say(models_side_by_side(dense, pruned, batch_sizes=sizes[0], lengths=sizes[1], rounds=sizes[2], **more))


def convert(old: str, new: str) -> None:
    """Save a checkpoint whose heads an early version of transformers pruned so that today's can load it.

    Args:
        old: Directory or name on the Hub to read.
        new: Directory to write to.
    """
    args = KPruneArguments(output_dir=new)
    path = args.check_output_dir(read_from=[old])
    with trying(f"load the model {old!r}"):
        model, tokenizer = from_legacy(old), load_tokenizer(old)
    if not is_pruned(model.config):
        raise ArgumentError(
            f"{old!r} has all heads and neurons that its config says: there is nothing in it to convert"
        )
    args.check_output_dir(size=model_size(model).bytes)
    save_atomically(
        model,
        path,
        args.max_shard_size,
        lambda folder: tokenizer and tokenizer.save_pretrained(folder),
        overwrite=False,
    )
    say(how_to_load(path, model))


def export_model(name: str, output_dir: str, format: str) -> None:
    """Write a model for another runtime, see `runtimes.export`."""
    path = export(name, output_dir, format)
    say(f"The {format} model is in {path}: {', '.join(sorted(os.listdir(path)))}")


def run(command: str, options: Sequence[object]) -> None:
    """Run a command on what `parser.parse` gave for it."""
    commands: dict[str, Callable[..., None]] = {
        "prune": prune,
        "evaluate": evaluate,
        "compare": compare,
        "plan": plan,
        "sweep": sweep,
        "inspect": inspect,
        "report": write_page,
        "export": export_model,
        "convert": convert,
    }
    verbose = any(getattr(option, "verbose", False) for option in options)
    with nullcontext() if verbose else quiet():
        commands[command](*options)
