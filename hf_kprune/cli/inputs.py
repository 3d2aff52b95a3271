"""What the options of a command name: model, tokenizer, rows and metric, made into a pruner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from transformers import AutoConfig, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from ..arguments import KPruneArguments
from ..calibration.embeddings import folder_of
from ..calibration.metrics import ALIASES, QA_COLUMNS, named_metric
from ..calibration.sources import text_columns
from ..calibration.tasks import needs_targets, task_of
from ..checkpoint.loading import Offload, check_place, check_stock, load_model, load_tokenizer, reading
from ..errors import ArgumentError, KPruneError
from ..processes import together
from ..progress import quiet
from ..pruner import KPrunePruner
from ..structure.facts import PROBLEMS, input_names, main_input, max_positions
from .data_files import load_data
from .images import Images, check_images, image_columns, load_processor, with_images
from .labels import label_ids
from .options import DataArguments
from .output import say


NO_PIPELINE = {
    "multiple-choice": "AutoModelForMultipleChoice",
    "question-answering": "AutoModelForQuestionAnswering",
}
"""Tasks that transformers has models for, but not in every version a pipeline."""


def make_pruner(data: DataArguments, args: KPruneArguments, calibrates: bool = True) -> KPrunePruner:
    """The pruner that the options describe.

    Args:
        data: They name model and data.
        args: Options of the pruner.
        calibrates: Otherwise it evaluates alone, and its calibration rows are those that it evaluates.
    """
    with together(Accelerator(cpu=args.use_cpu)):
        model = load(data, Offload(data.offload, Accelerator(cpu=args.use_cpu).device))
        rows = rows_for(model, data, args)
        evaluation = rows.evaluation() if data.eval_dataset_name or data.eval_file else None
        metric = metric_function(data.metric, model) if data.metric and not rows.figures else None
        collator = rows.collate_choices if isinstance(rows, Texts) and rows.task.choices else None
    if rows.remark and calibrates:
        say(rows.remark)
    return KPrunePruner(model, args, rows.calibration(), collator, evaluation, rows.processor, metric)


def load(data: DataArguments, offload: Offload) -> PreTrainedModel:
    """The model.

    Raises:
        ArgumentError: If it cannot be loaded, or if it takes neither texts nor images.
    """
    name = data.model_name_or_path
    with trying(f"load the model {name!r}"):
        model = load_model_for(name, data.task, offload)
    if not {"input_ids", "pixel_values"} & {main_input(model)}:
        raise ArgumentError(
            f"{type(model).__name__} takes {main_input(model)}, but the command line takes texts and images "
            "only; prune it from Python: KPrunePruner(model, args, rows, processing_class=...)"
        )
    return model


def rows_for(model: PreTrainedModel, data: DataArguments, args: KPruneArguments) -> Texts | Images:
    """The rows that a model is pruned on: images, if it takes them and the data have some, or texts.

    Raises:
        ArgumentError: If the data cannot be read, or if there is nothing with the model to read them by.
    """
    name, sees = data.model_name_or_path, "pixel_values" in input_names(model)
    if sees:
        source = data.dataset_name, data.dataset_config_name, data.dataset_split, data.dataset_file
        rows = with_images(load_data(*source, []))
        if main_input(model) == "pixel_values" or image_columns(rows):
            check_images(model, rows)
            with trying(f"load the image processor of {name!r}"):
                processor = load_processor(name)
            return Images(model, processor, rows, data, args)
    with trying(f"load the tokenizer of {name!r}"):
        tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise ArgumentError(
            f"there is no tokenizer with the model {name!r}; save the one it was trained with there"
        )
    return Texts(model, tokenizer, data, args)


class Texts:
    """The rows of texts that a model is pruned and evaluated on.

    Args:
        model: It says what a row is made of.
        tokenizer: The model's.
        data: They name the data.
        args: They name the columns and the longest row.

    Raises:
        ArgumentError: If the data cannot be read, or lack the columns of texts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, data: DataArguments, args: KPruneArguments):
        self.model, self.processor, self.data, self.args = model, tokenizer, data, args
        self.kind, self.task = type(model).__name__, task_of(model)
        self.remark = ""
        """What is to be said of the evaluation rows."""
        evaluated = data.eval_dataset_name or data.eval_file
        self.figures = {"exact_match", "perplexity"} & set(self.task.figures) if evaluated else set()
        """Those of the model's that `KPrunePruner.evaluate` takes from the texts themselves."""
        names = args.text_columns and [
            name.strip() for names in args.text_columns for name in names.split(",")
        ]
        if names and not self.task.choices and len(names) > 2:
            raise ArgumentError(f"text_columns names {len(names)} columns, {self.kind} takes one or two")
        if names and args.packing and len(names) > 1:
            raise ArgumentError(f"packing joins the texts of one column, text_columns names {len(names)}")
        source = data.dataset_name, data.dataset_config_name, data.dataset_split, data.dataset_file
        self.rows = load_data(*source, [])
        self.columns = text_columns(self.rows.column_names, names, needs_targets(model))
        if not self.columns:
            raise ArgumentError(
                f"--text_columns is needed: the data have the columns {', '.join(self.rows.column_names)}"
            )
        limits = args.max_seq_length, max_positions(model), tokenizer.model_max_length
        longest = min(limit for limit in limits if limit is not None)
        folder, reader = folder_of(model), tokenizer
        if folder is not None:
            longest = min(longest, folder.longest(args.max_seq_length, tokenizer) or longest)
            reader = folder.reader(tokenizer)
        self.encode = encoder(self.columns, reader, longest, self.task.choices)

    def calibration(self) -> Any:
        """The calibration rows, tokenised when they are read; their texts, if they are to be joined, or if
        the second becomes what the decoder is to give."""
        if self.args.packing:
            return self.rows[self.columns[0]]
        if needs_targets(self.model):
            return self.rows.select_columns(list(self.columns))
        return self.rows.with_transform(self.encode)

    def evaluation(self) -> datasets.Dataset:
        """The evaluation rows. If some are calibration rows too, there is a remark.

        Raises:
            ArgumentError: If the model cannot be evaluated on them, by this metric, or from the command line
                at all.
        """
        data, task = self.data, self.task
        if not task.choices and task.variant not in PROBLEMS and not self.figures:
            raise ArgumentError(
                f"{self.kind} cannot be evaluated here: leave that out and use KPrunePruner.evaluate()"
            )
        if data.metric and self.figures and ALIASES.get(data.metric) not in task.figures:
            raise ArgumentError(
                f"metric is {data.metric!r}, expected one of {', '.join(task.figures)} for {self.kind}"
            )
        columns = list(self.columns) if self.figures else [*self.columns, data.label_column]
        if "exact_match" in self.figures:
            columns = list(QA_COLUMNS)
        source = data.eval_dataset_config_name, data.eval_dataset_split, data.eval_file
        rows = load_data(data.eval_dataset_name, *source, columns)
        common = overlap(rows, self.rows, self.columns) if set(self.columns) <= set(rows.column_names) else 0
        if common:
            self.remark = (
                f"{common:,} of {len(rows):,} evaluation rows are calibration rows too: "
                "they say little of other texts."
            )
        if self.figures:
            return rows
        encoded = rows.map(self.encode, batched=True, remove_columns=rows.column_names)
        return encoded.add_column("label", label_ids(rows[data.label_column], self.model))

    def collate_choices(self, rows: list[dict[str, object]]) -> dict[str, Any]:
        """A batch of questions with choices. The collator wants a label, also where nothing looks at it."""
        collator = transformers.DataCollatorForMultipleChoice(self.processor)
        return dict(collator([{"label": 0, **row} for row in rows]))


@contextmanager
def trying(what: str) -> Iterator[None]:
    """Turn what libraries raise for a name, file or directory that they refuse into an `ArgumentError`."""
    try:
        yield
    except KPruneError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ArgumentError(f"cannot {what}: {error}") from error


def load_model_for(name: str, task: str | None, offload: Offload) -> PreTrainedModel:
    """Load a model with the class of `task`, or with the one that its config names."""
    if task is None:
        return load_model(name, offload)
    try:
        named = NO_PIPELINE.get(task)
        auto = getattr(transformers, named) if named else PIPELINE_REGISTRY.check_task(task)[1]["pt"][0]
    except KeyError:
        tasks = sorted({*NO_PIPELINE, *PIPELINE_REGISTRY.get_supported_tasks()})
        raise ArgumentError(f"task is {task!r}, expected one of {', '.join(tasks)}") from None
    check_place(name)
    with quiet(), reading(name):
        config = AutoConfig.from_pretrained(name)
        check_stock(config, name)
        model, info = offload.read(auto, config, name)
    head = [key for key in info["missing_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
    if head and model.base_model is not model:
        raise ArgumentError(
            f"{name} was not trained for {task}: it has no weights for {', '.join(sorted(head))}"
        )
    return model


def encoder(
    columns: Sequence[str], tokenizer: Any, max_length: int, choices: bool
) -> Callable[[Any], dict[str, Any]]:
    """A function from rows to tokens: of texts, of pairs of texts, of lists of words, or of questions with
    choices.
    """

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
