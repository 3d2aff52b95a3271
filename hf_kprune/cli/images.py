"""Rows with images, of a folder of images or a table, that a model is pruned and evaluated on."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import KPruneArguments
from ..calibration.processed import PICTURES
from ..calibration.tasks import task_of
from ..errors import ArgumentError
from ..progress import quiet
from ..structure.facts import PROBLEMS
from .data_files import load_data
from .labels import label_ids
from .options import DataArguments


def load_processor(name: str) -> Any:
    """The processor saved with a model that reads images.

    Raises:
        ArgumentError: If there is none.
    """
    with quiet():
        processor = AutoProcessor.from_pretrained(name)
    if isinstance(processor, PreTrainedTokenizerBase):
        raise ArgumentError(
            f"there is no image processor with the model {name!r}; save the one it was trained with there"
        )
    return processor


def with_images(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose columns of images are such, also where a table holds the bytes of image files; their one
    column of images has the name by which it is read."""
    for name, feature in rows.features.items():
        if isinstance(feature, dict) and {"bytes", "path"} == feature.keys():
            rows = rows.cast_column(name, datasets.Image())
    names = image_columns(rows)
    if len(names) == 1 and names[0] not in PICTURES:
        rows = rows.rename_column(names[0], PICTURES[0])
    return rows


def image_columns(rows: datasets.Dataset) -> list[str]:
    """Names of the columns that hold an image, or a list of them."""
    features = {name: getattr(feature, "feature", feature) for name, feature in rows.features.items()}
    return [name for name, feature in features.items() if isinstance(feature, datasets.Image)]


def check_images(model: PreTrainedModel, rows: datasets.Dataset) -> None:
    """Raise `ArgumentError` unless rows have one column of images."""
    if not {*image_columns(rows)} & {*PICTURES}:
        raise ArgumentError(
            f"{type(model).__name__} takes images, expected one column of them in the data, which have: "
            f"{', '.join(rows.column_names)}; pass a folder of images as --dataset_name, or a table with "
            "their files"
        )


class Images:
    """The rows of images that a model is pruned and evaluated on.

    Args:
        model: It says what a row is made of.
        processor: The model's.
        rows: The calibration rows, see `with_images`.
        data: They name the evaluation data.
        args: They name the column of texts.

    Raises:
        ArgumentError: If there is no such column of texts.
    """

    remark = ""
    figures: frozenset[str] = frozenset()

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        rows: datasets.Dataset,
        data: DataArguments,
        args: KPruneArguments,
    ):
        self.model, self.processor, self.data, self.task = model, processor, data, task_of(model)
        self.rows = rows
        names = args.text_columns or []
        if len(names) > 1 or not {*names} <= {*rows.column_names}:
            raise ArgumentError(
                f"text_columns names {', '.join(names)}, expected the one column with the texts beside the "
                f"images; the data have {', '.join(rows.column_names)}"
            )
        if names and names[0] != "text":
            self.rows = self.rows.rename_column(names[0], "text")

    def calibration(self) -> datasets.Dataset:
        """The calibration rows, of which inputs are made when they are read."""
        return self.rows

    def evaluation(self) -> datasets.Dataset:
        """The evaluation rows, with labels.

        Raises:
            ArgumentError: If the model cannot be evaluated from the command line.
        """
        if self.task.variant not in PROBLEMS:
            raise ArgumentError(
                f"{type(self.model).__name__} cannot be evaluated here: leave that out and use "
                "KPrunePruner.evaluate()"
            )
        data = self.data
        source = data.eval_dataset_config_name, data.eval_dataset_split, data.eval_file
        rows = with_images(load_data(data.eval_dataset_name, *source, [data.label_column]))
        check_images(self.model, rows)
        labels, feature = rows[data.label_column], rows.features[data.label_column]
        if isinstance(feature, datasets.ClassLabel) and {*feature.names} <= {*self.model.config.label2id}:
            labels = [feature.int2str(label) for label in labels]

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            image = row[PICTURES[0]].convert("RGB")
            return {"pixel_values": self.processor(images=image, return_tensors="np")["pixel_values"][0]}

        encoded = rows.map(encode, remove_columns=rows.column_names)
        return encoded.add_column("label", label_ids(labels, self.model)).with_format("torch")
