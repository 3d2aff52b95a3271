"""What the commands do: `hf-kprune prune`, `plan`, `sweep`, `inspect` and `convert`. docs/cli.md has examples.

How they are read is in parser.py, how they end in terminal.py.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from accelerate import Accelerator
from transformers import AutoConfig, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file

from ..arguments import KPruneArguments
from ..budget import expected_bytes, model_size
from ..calibration.embeddings import SentenceFolder, folder_of, read_folder
from ..calibration.metrics import ALIASES, QA_COLUMNS, named_metric
from ..calibration.sources import text_columns
from ..calibration.tasks import needs_targets, task_of
from ..checkpoint.hub import check_push
from ..checkpoint.integrity import verify_weights
from ..checkpoint.legacy import from_legacy
from ..checkpoint.loading import check_place, check_stock, load_model, load_tokenizer, model_class, reading
from ..checkpoint.saving import save_atomically
from ..errors import ArgumentError, CheckpointError, KPruneError, UnsupportedArchitectureError
from ..modeling_kprune import HOW_TO_LOAD, has, is_pruned
from ..processes import together
from ..progress import quiet
from ..pruner import KPrunePruner
from ..report import JSON_NAME, MARKDOWN_NAME, PruningReport
from ..reports import Table, to_markdown
from ..state import one_run
from ..structure.detect import describe
from ..structure.facts import PROBLEMS, max_positions
from ..structure.families import FAMILIES, REFUSED
from ..structure.sublayers import Sublayer, find_sublayers
from ..sweep import check_plot
from ..text import printable
from .data_files import load_data
from .parser import DataArguments, SweepArguments
from .terminal import main, say


__all__ = ["DataArguments", "SweepArguments", "main", "run"]

NO_PIPELINE = {
    "multiple-choice": "AutoModelForMultipleChoice",
    "question-answering": "AutoModelForQuestionAnswering",
}
"""Tasks that transformers has models for, but not in every version a pipeline."""


@contextmanager
def trying(what: str) -> Iterator[None]:
    """Turn what libraries raise for a name, file or directory that they refuse into an `ArgumentError`."""
    try:
        yield
    except (KPruneError, CheckpointError):
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ArgumentError(f"cannot {what}: {error}") from error


def load_model_for(name: str, task: str | None) -> PreTrainedModel:
    """Load a model with the class of `task`, or with the one that its config names."""
    if task is None:
        return load_model(name)
    try:
        named = NO_PIPELINE.get(task)
        auto = getattr(transformers, named) if named else PIPELINE_REGISTRY.check_task(task)[1]["pt"][0]
    except KeyError:
        tasks = sorted({*NO_PIPELINE, *PIPELINE_REGISTRY.get_supported_tasks()})
        raise ArgumentError(f"task is {task!r}, expected one of {', '.join(tasks)}") from None
    check_place(name)
    with quiet(), reading(name):
        check_stock(AutoConfig.from_pretrained(name), name)
        model, info = auto.from_pretrained(name, output_loading_info=True)
    head = [key for key in info["missing_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
    if head and model.base_model is not model:
        raise ArgumentError(
            f"{name} was not trained for {task}: it has no weights for {', '.join(sorted(head))}"
        )
    return model


def encoder(
    columns: Sequence[str], tokenizer: Any, max_length: int, choices: bool
) -> Callable[[Any], dict[str, Any]]:
    """A function from rows to tokens: of texts, of pairs of texts, of lists of words, or of questions with choices."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in columns]
        wrong = [value for values in texts for value in values if not isinstance(value, (str, list))]
        if wrong:
            raise ArgumentError(
                f"{', '.join(columns)}: the data hold {wrong[0]!r}, expected texts or lists of words"
            )
        if not choices:
            words = isinstance(texts[0][0], list)
            return dict(tokenizer(*texts, is_split_into_words=words, truncation=True, max_length=max_length))
        each = [tokenizer(texts[0], answers, truncation=True, max_length=max_length) for answers in texts[1:]]
        return {key: [list(row) for row in zip(*(e[key] for e in each), strict=True)] for key in each[0]}

    return encode


def label_ids(labels: Sequence[Any], model: PreTrainedModel) -> list[Any]:
    """Labels as the loss of `model` takes them. Raises `ArgumentError` for those that it has no class for."""
    config = model.config
    if task_of(model).choices:
        return list(labels)
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1:
        return [torch.tensor(label, dtype=torch.float32).tolist() for label in labels]
    ids = [config.label2id.get(label) if isinstance(label, str) else label for label in labels]
    wrong = {str(label) for label, i in zip(labels, ids, strict=True) if i not in range(config.num_labels)}
    if wrong:
        known = ", ".join(map(str, config.label2id))
        raise ArgumentError(
            f"the evaluation data have the labels {sorted(wrong)[:5]}, the model {known}, or their numbers"
        )
    return ids


def overlap(rows: datasets.Dataset, others: datasets.Dataset, columns: Sequence[str]) -> int:
    """How many of the rows have the texts of one of the others. Rows without text do not count."""

    def texts(dataset: datasets.Dataset) -> Iterator[str]:
        parts = zip(*(dataset[column] for column in columns), strict=True)
        return (str(part) for part in parts if any(part))

    wanted = Counter(texts(rows))
    return sum(wanted.pop(text, 0) for text in texts(others))


def metric_function(name: str, model: PreTrainedModel) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` for a metric by its name: one of our own, or of the `evaluate` library."""
    known = named_metric(name, model)
    if known is not None:
        return known
    import evaluate  # which takes its metrics from the Hub, or a script

    with trying(f"load the metric {name!r}"):
        metric = evaluate.load(name)

    def compute(prediction: Any) -> dict[str, float]:
        scores = prediction.predictions
        answers = (
            scores.squeeze(-1) if scores.shape[-1] == 1 else scores.argmax(-1)
        )  # one number, or classes or choices
        if model.config.problem_type == "multi_label_classification":
            answers = (scores > 0).astype(int)
        return dict(metric.compute(predictions=answers, references=prediction.label_ids))

    return compute


def make_pruner(data: DataArguments, args: KPruneArguments) -> KPrunePruner:
    """The pruner that the options describe."""
    accelerator, name = Accelerator(cpu=args.use_cpu), data.model_name_or_path
    with together(accelerator):
        with trying(f"load the model {name!r}"):
            model, tokenizer = load_model_for(name, data.task), load_tokenizer(name)
        if "input_ids" not in model.main_input_name:
            raise ArgumentError(
                f"{type(model).__name__} takes {model.main_input_name}, but the command line takes texts only; prune it from "
                "Python: KPrunePruner(model, args, rows, processing_class=...)"
            )
        if tokenizer is None:
            raise ArgumentError(
                f"there is no tokenizer with the model {name!r}; save the one it was trained with there"
            )
        kind, task = type(model).__name__, task_of(model)
        named = args.text_columns and [
            name.strip() for names in args.text_columns for name in names.split(",")
        ]
        if named and not task.choices and len(named) > 2:
            raise ArgumentError(f"text_columns names {len(named)} columns, {kind} takes one or two")
        if named and args.packing and len(named) > 1:
            raise ArgumentError(f"packing joins the texts of one column, text_columns names {len(named)}")
        source = data.dataset_name, data.dataset_config_name, data.dataset_split, data.dataset_file
        dataset = load_data(*source, [])
        columns = text_columns(dataset.column_names, named, needs_targets(model))
        if not columns:
            raise ArgumentError(
                f"--text_columns is needed: the data have the columns {', '.join(dataset.column_names)}"
            )
        limits = [
            n
            for n in (args.max_seq_length, max_positions(model), tokenizer.model_max_length)
            if n is not None
        ]
        folder = folder_of(model)
        if folder is not None:
            limits.append(folder.longest(args.max_seq_length, tokenizer) or min(limits))
        encode = encoder(
            columns, tokenizer if folder is None else folder.reader(tokenizer), min(limits), task.choices
        )
        eval_dataset = None
        if data.eval_dataset_name or data.eval_file:
            from_texts = {"exact_match", "perplexity"} & set(task.figures)
            if not task.choices and task.variant not in PROBLEMS and not from_texts:
                raise ArgumentError(
                    f"{kind} cannot be evaluated here: leave that out and use KPrunePruner.evaluate()"
                )
            source = (
                data.eval_dataset_name,
                data.eval_dataset_config_name,
                data.eval_dataset_split,
                data.eval_file,
            )
            if data.metric and from_texts and ALIASES.get(data.metric) not in task.figures:
                raise ArgumentError(
                    f"metric is {data.metric!r}, expected one of {', '.join(task.figures)} for {kind}"
                )
            needed = (
                QA_COLUMNS
                if "exact_match" in from_texts
                else columns
                if from_texts
                else [*columns, data.label_column]
            )
            eval_dataset = rows = load_data(*source, needed)
            if not from_texts:
                eval_dataset = rows.map(encode, batched=True, remove_columns=rows.column_names)
                eval_dataset = eval_dataset.add_column("label", label_ids(rows[data.label_column], model))
        compute_metrics = (
            metric_function(data.metric, model) if data.metric and not (eval_dataset and from_texts) else None
        )

    def collate_choices(
        rows: list[dict[str, Any]],
    ) -> dict[str, Any]:  # it wants a label, also where nothing looks at it
        return dict(
            transformers.DataCollatorForMultipleChoice(tokenizer)([{"label": 0, **row} for row in rows])
        )

    comparable = eval_dataset is not None and set(columns) <= set(rows.column_names)
    common = overlap(rows, dataset, columns) if comparable else 0
    if common:
        say(
            f"{common:,} of {len(rows):,} evaluation rows are calibration rows too: they say little of other texts."
        )
    collator = collate_choices if task.choices else None
    calibration = dataset[columns[0]] if args.packing else dataset.with_transform(encode)
    return KPrunePruner(model, args, calibration, collator, eval_dataset, tokenizer, compute_metrics)


def prune(data: DataArguments, args: KPruneArguments) -> None:
    path = args.check_output_dir(read_from=data.origins)
    if args.push_to_hub:
        check_push(args, path)
    pruner = make_pruner(data, args)
    args.check_output_dir(read_from=data.origins, size=expected_bytes(pruner.model, args))
    dense = evaluate_quietly(pruner) if pruner.eval_dataset is not None else {}
    push = args.push_to_hub
    try:
        report = pruner.prune()
    finally:  # a callback may fail after the model is pruned
        if pruner.report is not None:
            args.push_to_hub = False
            save(pruner, path)
    say(
        report
        if args.verbose
        else f"{report.summary()}  every sublayer: {JSON_NAME} and {MARKDOWN_NAME} there\n"
    )
    if dense:
        pruned = evaluate_quietly(pruner)
        rows = [
            (name, f"{value:.4f}", f"{pruned[name]:.4f}")
            for name, value in dense.items()
            if isinstance(value, float) and not name.endswith(("_per_second", "time"))
        ]
        say(to_markdown([Table(("evaluation", "dense", "pruned"), rows, "lrr")]))
    else:
        names = ", ".join(task_of(pruner.model).figures) or "the loss"
        say(f"No evaluation data: --eval_file FILE shows {names} of the dense and the pruned model.\n")
    say(how_to_load(path, pruner.model, pruner.sentence_folder))
    if push:
        with trying("push to the Hub"):
            pruner.push_to_hub()


def evaluate_quietly(pruner: KPrunePruner) -> dict[str, float]:
    """Evaluate as a run of its own, with the bar of all runs in place of the one of `Trainer`."""
    with one_run(pruner):
        return pruner.evaluate()


def sweep(data: DataArguments, args: KPruneArguments, options: SweepArguments) -> None:
    path = args.check_output_dir(read_from=data.origins)
    if options.plot is not None:
        check_plot(options.plot)
    pruner = make_pruner(data, args)
    made = pruner.sweep(
        options.budgets,
        metric=options.compare_by,
        greater_is_better=not options.lower_is_better,
        max_drop=options.max_drop,
        refine=options.refine,
        output_dir=None if options.max_drop is not None else path,
    )
    say(f"\n{made}")
    if made.best:
        save(pruner, path)
        say(how_to_load(path, pruner.model, pruner.sentence_folder))
    if options.plot is not None and pruner.accelerator.is_main_process:
        with trying(f"write the plot {options.plot!r}"):
            made.plot(options.plot)
    if options.max_drop is not None and not made.best:
        raise ArgumentError(
            f"no model tried is within max_drop={options.max_drop} of the dense one; try smaller budgets"
        )


def save(pruner: KPrunePruner, path: str) -> None:
    """Save the pruned model to `path`; where that fails after all, beside it or in the temporary directory.

    Raises `ArgumentError` in either case, which says where it is.
    """
    try:
        return pruner.save_model(path)
    except (KPruneError, CheckpointError) as error:
        first = error.__cause__ or error  # without the advice for those who write Python
    name = f"{Path(path).resolve().name[:32]}-{os.getpid()}"
    for place in (str(Path(path).resolve().with_name(name)), str(Path(tempfile.gettempdir(), name))):
        try:
            pruner.save_model(place)
        except (KPruneError, CheckpointError):
            continue  # what is told is why the first place failed
        raise ArgumentError(f"{first}; the pruned model was saved to {place!r} instead") from first
    raise first


def how_to_load(path: str, model: PreTrainedModel, folder: SentenceFolder | None = None) -> str:
    name = type(model).__name__
    library, load = ("transformers", f"{name}.from_pretrained")
    if folder is not None:
        library, load, name = "sentence_transformers", folder.library_class, folder.library_class
    imports = f"    import hf_kprune\n    from {library} import {name}\n"
    return f"The pruned model is in {path}. To load it:\n\n{imports}\n    model = {load}({path!r})\n"


def plan(data: DataArguments, args: KPruneArguments) -> None:
    pruner = make_pruner(data, args)
    say(f"\nA plan only: nothing was changed or written.\n\n{pruner.plan()}")


def inspect(name: str, verify: bool = False) -> None:
    check_place(name)
    with trying(f"load the model {name!r}"), reading(name):
        folder = read_folder(name)
        name = name if folder is None else folder.transformer
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # shapes, no memory
            model = ((folder and folder.transformer_class(config)) or model_class(config))(config)
        model.to(config.dtype or torch.float32)
        report = cached_file(name, JSON_NAME, _raise_exceptions_for_missing_entries=False)
    pruned, size, dtype = is_pruned(config), model_size(model), str(model.dtype).removeprefix("torch.")
    kind = printable(config.model_type)
    say(f"{printable(name)}: {type(model).__name__} ({kind}), {'K-pruned' if pruned else 'dense'}")
    say(f"parameters: {size.parameters:,} ({size.bytes / 1e6:,.1f} MB in {dtype})")
    say(
        f"without embeddings: {size.parameters_without_embeddings:,} ({size.bytes_without_embeddings / 1e6:,.1f} MB)"
    )
    try:
        sublayers, source = structure(model)
        say(f"family: {kind}, can be pruned; its structure is {source}\n")
        say(to_markdown([layers_of(sublayers)]))
        say("\n\n".join(projections_of(sublayers)))
    except UnsupportedArchitectureError as error:
        say(f"cannot be pruned{' again' if pruned else ''}: {error}")
    if pruned:
        say(f"\n{HOW_TO_LOAD}")
    if report is not None:
        say(
            "\n"
            + PruningReport.from_json(Path(report).read_text(encoding="utf-8")).to_markdown().splitlines()[0]
        )
    if verify:
        with trying(f"read the weights of {name!r}"):
            say("\n" + "\n".join(verify_weights(name)))


def structure(model: PreTrainedModel) -> tuple[list[Sublayer], str]:
    """The sublayers of a model without weights, and how they are known.

    Raises `UnsupportedArchitectureError` if they are not.
    """
    config = model.config
    try:
        return find_sublayers(model), "listed, and proved by the tests"
    except UnsupportedArchitectureError:
        if config.model_type in {*FAMILIES, *REFUSED} or is_pruned(config):
            raise
    needed, free = 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    if needed > free:
        raise UnsupportedArchitectureError(
            f"no family describes model_type {config.model_type!r}; to find out what its layers do it has to run, which takes "
            f"{needed / 1e9:,.1f} GB of memory, of which {free / 1e9:,.1f} are free. Describe one of them in ten lines with "
            "hf_kprune.register_family: docs/add_a_family.md"
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = type(model)(config).float()
        for parameter in (
            dense.parameters()
        ):  # so that no bias is zero, no norm one, and nothing scaled to next to nothing
            parameter.data += (0.1 if parameter.dim() == 1 else 0.02) * torch.randn_like(parameter)
    describe(dense)
    return find_sublayers(dense), "detected, and proved: cutting equals masking, sublayer by sublayer"


def layers_of(sublayers: Sequence[Sublayer]) -> Table:
    """What is left of each layer, and of how much."""
    names = {"attention": "heads", "cross_attention": "cross-attention heads", "ffn": "neurons"}
    kinds = list(dict.fromkeys(s.kind for s in sublayers))
    counts: dict[str, dict[str, tuple[str, str]]] = {}
    for s in sublayers:
        counts.setdefault(f"{s.stack_name}.{s.index}", {})[s.kind] = f"{s.num_units}", f"{s.plan['of']}"
    rows = [
        (layer, *(cell for kind in kinds for cell in units.get(kind, ("-", "-"))))
        for layer, units in counts.items()
    ]
    columns = "layer", *(title for kind in kinds for title in (names[kind], "of"))
    return Table(columns, rows, "l" + "rr" * len(kinds))


def projections_of(sublayers: Sequence[Sublayer]) -> list[str]:
    """The projections that the units of each stack are in."""
    lines = []
    for s in {(s.stack_name, s.block.output): s for s in sublayers}.values():
        inputs = ", ".join(path for path in s.block.inputs if has(s.layer, path))
        lines.append(f"{s.stack_name}, {s.kind}: {inputs} -> {s.block.output}")
    return lines


def convert(old: str, new: str) -> None:
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


def run(command: str, options: Sequence[Any]) -> None:
    """Run a command on what `parser.parse` gave for it."""
    commands: dict[str, Callable[..., None]] = {
        "prune": prune,
        "plan": plan,
        "sweep": sweep,
        "inspect": inspect,
        "convert": convert,
    }
    verbose = any(getattr(option, "verbose", False) for option in options)
    with nullcontext() if verbose else quiet():
        commands[command](*options)
