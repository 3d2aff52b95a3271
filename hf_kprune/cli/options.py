"""The options that the command line has beside those of `KPruneArguments`: which data, which budgets.
Standard library only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..arguments import KPruneArguments
from ..errors import ArgumentError
from ..options import option
from ..validation import check_fields, known_keywords


@known_keywords
@dataclass
class SweepArguments:
    """Which budgets are tried, and what is good enough.

    > How small

    `budgets`, `max_drop` and `refine` say which models are made.

    > How models are compared

    `DataArguments.metric` names the figure that they are compared by, of which `lower_is_better` may be said.
    `compare_by` is the old name of it. `plot` draws the models.
    """

    budgets: list[float] = field(
        default_factory=lambda: [0.4, 0.5, 0.6, 0.7, 0.8],
        metadata={"help": "Make one model for each of these fractions of the prunable FLOPs to remove."},
    )
    compare_by: str | None = option(
        None, "Compare models by this metric. This is the old name of --metric in a sweep."
    )
    lower_is_better: bool = option(False, "Take a lower value of the metric for a better one, as of a loss.")
    max_drop: float | None = option(
        None,
        "Save the smallest model to output_dir whose metric is at most this much worse than the dense one's.",
    )
    refine: int = option(
        2, "Try this many times between the sparsest model good enough and the next, with max_drop."
    )
    plot: str | None = option(
        None,
        "Draw the sweep into this file, such as sweep.svg. This takes matplotlib: pip install matplotlib.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.compare_by is not None:
            warnings.warn(
                f"compare_by is the old name of metric: pass --metric {self.compare_by}", FutureWarning
            )


@known_keywords
@dataclass
class ResumeArguments:
    """Whether a run goes on where an earlier one was interrupted."""

    resume_from_checkpoint: bool | str | None = option(
        None,
        "Keep a state of the run as it goes, and go on where an interrupted run with the same options was. "
        "The state lies beside output_dir until the model is saved, or in this directory, where "
        "measurements stay for other budgets. By default a state is kept after a minute.",
        const=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)


@known_keywords
@dataclass
class RecoverArguments:
    """Whether the pruned model learns from the dense one."""

    recover_minutes: float | None = option(
        None,
        "Let the pruned model learn from the dense one for this many minutes, without labels, on the "
        "calibration data. By default it does not.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.recover_minutes is not None and not self.recover_minutes > 0:
            raise ArgumentError(f"recover_minutes is {self.recover_minutes}, expected a number over 0")


@known_keywords
@dataclass
class DataArguments:
    """What is pruned, and with what data. Calibration takes texts or images; labels are for evaluation."""

    model_name_or_path: str = field(
        metadata={"help": "Prune this model, a directory or a name on the Hub. It is required."}
    )
    task: str | None = option(
        None,
        "Load the model for this task, such as text-classification or fill-mask. By default its config "
        "names the class.",
    )
    offload: str | None = option(
        None,
        "Keep the layers of the model on disk, where its checkpoint is, or, with a GPU, in the memory of the "
        "machine (cpu), and bring one at a time to the device. By default the model lies there as a whole.",
        choices=("cpu", "disk"),
    )
    dataset_name: str | None = option(
        None,
        "Calibrate on this dataset on the Hub, or on this directory, as load_dataset() reads it: for a model "
        "that takes images also a folder of them.",
    )
    dataset_config_name: str | None = option(
        None, "Take this configuration of the calibration dataset, such as sst2 of glue."
    )
    dataset_split: str = option("train", "Take this split of the calibration dataset.")
    dataset_file: str | None = option(
        None, "Calibrate on this local file, a .parquet, .csv, .tsv, .json, .jsonl or .txt, or a .gz of one."
    )
    eval_file: str | None = option(
        None, "Compare the dense and the pruned model on this local file with labels."
    )
    eval_dataset_name: str | None = option(
        None, "Compare them on this dataset on the Hub, or on this directory."
    )
    eval_dataset_config_name: str | None = option(None, "Take this configuration of the evaluation dataset.")
    eval_dataset_split: str = option("validation", "Take this split of the evaluation dataset.")
    label_column: str = option(
        "label",
        "Read the labels from this column of the evaluation data. They are numbers, or names in the config.",
    )
    metric: str | None = option(
        None,
        "Evaluate this figure alone, such as accuracy, or by this script for evaluate.load(). A sweep "
        "compares models by it. By default all figures of the task are printed, and a sweep compares by the "
        "distance.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.dataset_name is None) == (self.dataset_file is None):
            raise ArgumentError("pass the calibration data as either --dataset_name or --dataset_file")
        if self.eval_dataset_name is not None and self.eval_file is not None:
            raise ArgumentError("pass the evaluation data as either --eval_dataset_name or --eval_file")
        if self.metric is not None and not (self.eval_dataset_name or self.eval_file):
            raise ArgumentError("--metric needs evaluation data: --eval_dataset_name or --eval_file")

    @property
    def origins(self) -> list[str | None]:
        """What is read in this run, if it is on this machine: nothing is written over it."""
        files = [self.dataset_file, self.eval_file, self.metric]
        return [self.model_name_or_path, self.dataset_name, self.eval_dataset_name, *files]


@known_keywords
@dataclass
class EvaluateArguments:
    """Which model is evaluated, and on what."""

    model: str = field(metadata={"help": "A directory or a name on the Hub.", "positional": True})
    task: str | None = option(
        None, "Load the model for this task. By default its config names the class of the model."
    )
    eval_file: str | None = option(None, "Evaluate on this local file with labels.")
    eval_dataset_name: str | None = option(None, "Evaluate on this dataset on the Hub, or on this directory.")
    eval_dataset_config_name: str | None = option(None, "Take this configuration of the dataset.")
    eval_dataset_split: str = option("validation", "Take this split of the dataset.")
    text_columns: list[str] | None = option(None, "Read the texts from these columns, one or two.")
    label_column: str = option("label", "Read the labels from this column.")
    metric: str | None = option(None, "Show this figure alone. By default all figures of the task are shown.")
    max_seq_length: int | None = option(None, "Truncate texts to this many tokens.")
    per_device_eval_batch_size: int = option(32, "Evaluate this many sequences at a time.")
    use_cpu: bool = option(False, "Evaluate on the CPU even if there is an accelerator.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.eval_dataset_name is not None and self.eval_file is not None:
            raise ArgumentError("pass the evaluation data as either --eval_dataset_name or --eval_file")
        if self.needs_data and not (self.eval_dataset_name or self.eval_file):
            raise ArgumentError("pass the evaluation data as --eval_dataset_name or --eval_file")

    needs_data = True

    def data(self) -> DataArguments:
        """The same for what prunes and evaluates: the texts are those of the evaluation data."""
        return DataArguments(
            model_name_or_path=self.model,
            task=self.task,
            dataset_name=self.eval_dataset_name,
            dataset_config_name=self.eval_dataset_config_name,
            dataset_split=self.eval_dataset_split,
            dataset_file=self.eval_file,
            eval_file=self.eval_file,
            eval_dataset_name=self.eval_dataset_name,
            eval_dataset_config_name=self.eval_dataset_config_name,
            eval_dataset_split=self.eval_dataset_split,
            label_column=self.label_column,
            metric=self.metric,
        )

    def args(self) -> KPruneArguments:
        """The same for `KPrunePruner`."""
        return KPruneArguments(
            text_columns=self.text_columns,
            max_seq_length=self.max_seq_length,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            use_cpu=self.use_cpu,
            disable_tqdm=True,
        )


@known_keywords
@dataclass
class CompareArguments(EvaluateArguments):
    """Which models are compared, on what, and which batches are timed."""

    pruned: str = field(default="", metadata={"help": "Another one.", "positional": True})
    batch_sizes: list[int] = option([1, 32], "Time batches of these numbers of sequences.")
    lengths: list[int] = option([16, 128], "Time sequences of these numbers of tokens.")
    rounds: int = option(20, "Time so many passes of each model, in turns.")

    needs_data = False
