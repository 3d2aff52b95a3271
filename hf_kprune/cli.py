"""The command line: `hf-kprune prune`, `hf-kprune plan`, `hf-kprune inspect`. docs/cli.md has examples.

What the user got wrong ends in one line on stderr and exit code 2, Ctrl-C in 130; anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import datasets
import evaluate
import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file, logging

from .arguments import KPruneArguments
from .calibration import max_positions, together
from .errors import ArgumentError, CheckpointError, KPruneError, UnsupportedArchitectureError
from .modeling_kprune import HOW_TO_LOAD
from .pruner import KPrunePruner, load_model, model_class, model_size
from .report import JSON_NAME, PruningReport
from .sublayers import find_sublayers
from .version import __version__


BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
"""File endings and the loaders of `datasets` that read them."""

HEADS_WITHOUT_PIPELINE = {
    "multiple-choice": AutoModelForMultipleChoice,
    "question-answering": AutoModelForQuestionAnswering,
}
"""Tasks that transformers has models for, but no pipeline in every version."""

TIMINGS = ("_runtime", "_per_second", "_time")
"""Endings of what Trainer.evaluate() reports about itself, not about the model."""


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class DataArguments:
    """What is pruned, and with what data. Calibration needs texts only; labels are for evaluation."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "Model: a directory or a name on the Hub. Required."})
    task: str | None = _option(
        None,
        "Task whose model class is loaded: text-classification, token-classification, fill-mask, feature-extraction, "
        "question-answering, multiple-choice, ... Unset: the class that the model's config names.",
    )
    dataset_name: str | None = _option(None, "Calibration data: a dataset on the Hub or a directory, for load_dataset().")
    dataset_config_name: str | None = _option(None, "Configuration of that dataset, such as sst2 of glue.")
    dataset_split: str = _option("train", "Split of that dataset.")
    dataset_file: str | None = _option(None, "Calibration data: a local file, .parquet, .csv, .json, .jsonl or .txt.")
    text_columns: str = _option(
        "text",
        "Column of the texts, or two columns of pairs, as in premise,hypothesis. For multiple-choice: the question, then "
        "a column for each choice.",
    )
    eval_file: str | None = _option(None, "Labelled data, a local file, on which dense and pruned model are compared.")
    eval_dataset_name: str | None = _option(None, "The same, a dataset on the Hub or a directory.")
    eval_dataset_config_name: str | None = _option(None, "Configuration of the evaluation dataset.")
    eval_dataset_split: str = _option("validation", "Split of the evaluation dataset.")
    label_column: str = _option("label", "Column of the labels in the evaluation data: numbers, or names in the config.")
    metric: str | None = _option(
        None, "Metric for evaluate.load(), such as accuracy, or the path of a metric script. Unset: the loss alone."
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.dataset_file is None):
            raise ArgumentError("pass the calibration data as either --dataset_name or --dataset_file")
        if self.eval_dataset_name is not None and self.eval_file is not None:
            raise ArgumentError("pass the evaluation data as either --eval_dataset_name or --eval_file")
        if self.metric is not None and self.eval_dataset_name is None and self.eval_file is None:
            raise ArgumentError("--metric needs evaluation data: --eval_dataset_name or --eval_file")

    @property
    def columns(self) -> list[str]:
        return [column.strip() for column in self.text_columns.split(",")]


class CommandParser(HfArgumentParser):
    """Options of one command. What argparse finds wrong with them is an error like any other."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}; see {self.prog} --help")


# ---------------------------------------------------------------------------------------------------------------------
# Model and data
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what the loaders of the libraries raise for a name or file they refuse into an `ArgumentError`."""
    try:
        yield
    except (KPruneError, CheckpointError):
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ArgumentError(f"cannot load {what}: {error}") from error


def load_model_for(name: str, task: str | None) -> PreTrainedModel:
    """Load a model with the class of `task`, or with the one that its config names."""
    if task is None:
        return load_model(name)
    try:
        auto = HEADS_WITHOUT_PIPELINE.get(task) or PIPELINE_REGISTRY.check_task(task)[1]["pt"][0]
    except KeyError:
        tasks = sorted({*HEADS_WITHOUT_PIPELINE, *PIPELINE_REGISTRY.get_supported_tasks()})
        raise ArgumentError(f"task is {task!r}, expected one of {', '.join(tasks)}") from None
    model, info = auto.from_pretrained(name, output_loading_info=True)
    head = [key for key in info["missing_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
    if head and model.base_model is not model:
        raise ArgumentError(f"{name} was not trained for {task}: it has no weights for {', '.join(sorted(head))}")
    return model


def load_data(name: str | None, config: str | None, split: str, file: str | None) -> datasets.Dataset:
    """Load one split of a dataset, or a local file."""
    if file is None:
        with loading(f"the dataset {name!r} (configuration {config!r}, split {split!r})"):
            return datasets.load_dataset(name, config, split=split)
    builder = BUILDERS.get(Path(file).suffix)
    if builder is None:
        raise ArgumentError(f"{file!r} ends with {Path(file).suffix!r}, expected one of {', '.join(BUILDERS)}")
    if not os.path.isfile(file):
        raise ArgumentError(f"there is no file {file!r}")
    with loading(f"the file {file!r}"):
        return datasets.load_dataset(builder, data_files=file, split="train")


def check_columns(dataset: datasets.Dataset, columns: Sequence[str]) -> None:
    """Raise `ArgumentError` if a column is missing."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ArgumentError(f"no column {', '.join(missing)} in the data, which has: {', '.join(dataset.column_names)}")


def encoder(columns: Sequence[str], tokenizer: Any, max_length: int | None, choices: bool) -> Callable[[Any], Any]:
    """A function from a batch of rows to their tokens: of texts, of pairs, of lists of words, or of questions with choices."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in columns]
        options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length}
        if not choices:
            return dict(tokenizer(*texts, is_split_into_words=isinstance(texts[0][0], list), **options))
        each = [tokenizer(texts[0], answers, **options) for answers in texts[1:]]
        return {key: [list(row) for row in zip(*(e[key] for e in each), strict=True)] for key in each[0]}

    return encode


def label_ids(dataset: datasets.Dataset, column: str, model: PreTrainedModel) -> list[Any]:
    """Labels as the model's loss takes them. Raises `ArgumentError` for those that it has no class for."""
    labels = dataset[column]
    config = model.config
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1:
        return [torch.tensor(label, dtype=torch.float32).tolist() for label in labels]
    names = {str(name): index for name, index in config.label2id.items()}
    ids = [names.get(label) if isinstance(label, str) else label for label in labels]
    wrong = {label for label, i in zip(labels, ids, strict=True) if type(i) is not int or not 0 <= i < config.num_labels}
    if wrong:
        raise ArgumentError(
            f"the column {column!r} has the labels {sorted(map(str, wrong))[:5]}, the model knows {config.num_labels}: "
            f"0 to {config.num_labels - 1}, or {', '.join(names)}"
        )
    return ids


def metric_function(name: str | None, model: PreTrainedModel) -> Callable[[Any], dict[str, float]] | None:
    """`compute_metrics` for a metric of the `evaluate` library."""
    if name is None:
        return None
    with loading(f"the metric {name!r}"):
        metric = evaluate.load(name)
    config = model.config

    def compute(prediction: Any) -> dict[str, float]:
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if config.problem_type == "multi_label_classification":
            answers = (scores > 0).astype(int)
        else:
            regression = config.problem_type == "regression" or config.num_labels == 1
            answers = scores.squeeze(-1) if regression else scores.argmax(-1)
        return dict(metric.compute(predictions=answers, references=prediction.label_ids))

    return compute


def make_pruner(data: DataArguments, args: KPruneArguments) -> KPrunePruner:
    """The pruner that the options describe."""
    accelerator = Accelerator(cpu=args.use_cpu)
    if args.disable_tqdm or not accelerator.is_main_process:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    with together(accelerator):
        with loading(f"the model {data.model_name_or_path!r}"):
            model = load_model_for(data.model_name_or_path, data.task)
        with loading(f"the tokenizer of {data.model_name_or_path!r}"):
            tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path)
        choices = "ForMultipleChoice" in type(model).__name__
        if not choices and len(data.columns) > 2:
            raise ArgumentError(f"text_columns names {len(data.columns)} columns, {type(model).__name__} takes one or two")
        limits = (args.max_seq_length, max_positions(model), tokenizer.model_max_length)
        encode = encoder(data.columns, tokenizer, min(limit for limit in limits if limit is not None), choices)

        dataset = load_data(data.dataset_name, data.dataset_config_name, data.dataset_split, data.dataset_file)
        check_columns(dataset, data.columns)
        eval_dataset = None
        if data.eval_dataset_name is not None or data.eval_file is not None:
            if not choices and "ForSequenceClassification" not in type(model).__name__:
                raise ArgumentError(
                    f"evaluation here is for sequence classification, regression and multiple choice, the model is a "
                    f"{type(model).__name__}; prune without evaluation data, and compare with KPrunePruner.evaluate()"
                )
            raw = load_data(
                data.eval_dataset_name, data.eval_dataset_config_name, data.eval_dataset_split, data.eval_file
            )
            check_columns(raw, [*data.columns, data.label_column])
            eval_dataset = raw.map(encode, batched=True, remove_columns=raw.column_names)
            eval_dataset = eval_dataset.add_column("label", label_ids(raw, data.label_column, model))
        compute_metrics = metric_function(data.metric, model)

    collator = None
    if choices:  # the collator wants a label in every row, the calibration does not look at it
        pad = DataCollatorForMultipleChoice(tokenizer)
        collator = lambda rows: pad([{"label": 0, **row} for row in rows])  # noqa: E731
    return KPrunePruner(
        model,
        args,
        dataset.with_transform(encode),
        data_collator=collator,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def prune(data: DataArguments, args: KPruneArguments) -> None:
    path = args.check_output_dir()
    pruner = make_pruner(data, args)
    say = pruner.accelerator.print
    evaluated = pruner.eval_dataset is not None
    dense = pruner.evaluate() if evaluated else {}
    report = pruner.prune()
    pruned = pruner.evaluate() if evaluated else {}
    with loading(f"what was saved to {path!r}"):  # no space, no permission, ...
        pruner.save_model()
    say(f"\n{report}")
    if evaluated:
        say("| evaluation | dense | pruned |\n| --- | ---: | ---: |")
        figures = [key for key in dense if isinstance(dense[key], float) and not key.endswith(TIMINGS)]
        say("\n".join(f"| {key} | {dense[key]:.4f} | {pruned[key]:.4f} |" for key in figures) + "\n")
    name = type(pruner.model).__name__
    say(f"The pruned model is in {path}. To load it:\n")
    say(f"    import hf_kprune\n    from transformers import {name}\n\n    model = {name}.from_pretrained({path!r})\n")


def plan(data: DataArguments, args: KPruneArguments) -> None:
    pruner = make_pruner(data, args)
    report = pruner.plan()
    pruner.accelerator.print(f"\nA plan only, nothing was changed or written.\n\n{report}")


def inspect(name: str) -> None:
    with loading(f"the model {name!r}"):
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # shapes, no memory
            model = model_class(config)(config)
        model.to(config.dtype or torch.float32)
        report = cached_file(name, JSON_NAME, _raise_exceptions_for_missing_entries=False)
    size = model_size(model, 0)
    plan = getattr(config, "kprune", None)
    print(f"{name}: {type(model).__name__} ({config.model_type}), {'K-pruned' if plan else 'dense'}")
    for what, parameters, total in (
        ("parameters", size.parameters, size.bytes),
        ("without embeddings", size.parameters_without_embeddings, size.bytes_without_embeddings),
    ):
        print(f"{what}: {parameters:,} ({total / 1e6:,.1f} MB in {str(model.dtype).removeprefix('torch.')})")
    try:
        sublayers = find_sublayers(model)
    except UnsupportedArchitectureError as error:
        print(f"cannot be pruned: {error}")
        return
    print(f"family: {config.model_type}, known\n\n| layer | heads | of | neurons | of |\n| --- | ---: | ---: | ---: | ---: |")
    rows: dict[str, dict[str, str]] = {}
    for s in sublayers:
        rows.setdefault(f"{s.stack.layers}.{s.index}", {})[s.kind] = f"{s.num_units} | {s.plan['of']}"
    for layer, kinds in rows.items():
        print(f"| {layer} | {kinds.get('attention', '- | -')} | {kinds.get('ffn', '- | -')} |")
    if plan:
        print(f"\n{HOW_TO_LOAD}")
    if report is not None:
        print("\n" + PruningReport.from_json(Path(report).read_text(encoding="utf-8")).to_markdown().splitlines()[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: `sys.argv`) and return its exit code."""
    parser = argparse.ArgumentParser(prog="hf-kprune", description="Prune Transformers models without retraining (K-prune).")
    parser.add_argument("--version", action="version", version=f"hf-kprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prune,plan,inspect}", parser_class=CommandParser)
    types = (DataArguments, KPruneArguments)
    usage = "%(prog)s --model_name_or_path MODEL (--dataset_name NAME | --dataset_file FILE) [options]"
    for name, text in (
        ("prune", "Prune a model, save it to --output_dir and print what was done."),
        ("plan", "Dry run: print what prune, with the same options, would cut. Nothing is changed or written."),
    ):
        commands.add_parser(name, dataclass_types=types, usage=usage, help=text, description=text)
    text = "Print the sizes of a dense or pruned model, layer by layer, without loading its weights."
    commands.add_parser("inspect", help=text, description=text).add_argument(
        "model_name_or_path", help="A directory or a name on the Hub."
    )
    try:
        options, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ArgumentError(f"no such options: {' '.join(unknown)}; see hf-kprune {options.command} --help")
        if options.command == "inspect":
            inspect(options.model_name_or_path)
            return 0
        data, args = (t(**{f.name: getattr(options, f.name) for f in dataclasses.fields(t)}) for t in types)
        (prune if options.command == "prune" else plan)(data, args)
        return 0
    except (KPruneError, CheckpointError) as error:
        return fail(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        return fail(130, "interrupted")


def fail(code: int, message: str) -> int:
    """Say why on stderr, in one process of several, and return the exit code."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"hf-kprune: {message}", file=sys.stderr)
    return code
