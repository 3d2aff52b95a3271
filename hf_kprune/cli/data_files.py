"""Calibration and evaluation data by the name of a file, of a directory, or of a dataset on the Hub."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from huggingface_hub.errors import HFValidationError

from ..errors import ArgumentError


class Format(NamedTuple):
    """How a kind of file is read: the builder of `datasets`, its options, and in words what the file must
    hold.
    """

    builder: str
    options: dict[str, Any]
    content: str


_TABLE = {"keep_default_na": False}  # else a text such as "None" or "NA" would be a missing value
_CSV = Format("csv", _TABLE, "a line of column names, then a line with as many values for each row")
_TSV = Format(
    "csv", {**_TABLE, "sep": "\t", "quoting": csv.QUOTE_NONE}, _CSV.content + ", with tabs between them"
)
_JSON = Format("json", {}, "a list of objects, or an object a line, each a row")

FORMATS = {
    ".parquet": Format("parquet", {}, "a Parquet table"),
    ".csv": _CSV,
    ".tsv": _TSV,
    ".json": _JSON,
    ".jsonl": _JSON,
    ".txt": Format("text", {}, "a text a line"),
}
"""Kinds of files by their ending, which `.gz` may follow. In a `.tsv` quotes are characters like others."""


def load_data(
    name: str | None, config: str | None, split: str, file: str | None, columns: Sequence[str]
) -> datasets.Dataset:
    """Load one split of a dataset, or a local file, that must have certain columns.

    Args:
        name: A directory, also one that `save_to_disk` wrote, or a dataset on the Hub. Read if `file` is
            None.
        config: Configuration of that dataset.
        split: Split of that dataset, such as "train" or "train[:1000]".
        file: A local file of one of the kinds in `FORMATS`.
        columns: Names of columns that must be there.

    Raises:
        ArgumentError: If there is no such thing, if it cannot be read, or if a column is missing.
    """
    dataset = load_file(file) if file is not None else load_split(str(name), config, split)
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ArgumentError(
            f"no column {', '.join(missing)} in the data, which has: {', '.join(dataset.column_names)}"
        )
    return dataset


def load_file(file: str) -> datasets.Dataset:
    """The rows of a local file. Raises `ArgumentError` if it is missing, of another kind, or not well
    formed.
    """
    path = Path(file)
    ending = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if ending not in FORMATS:
        raise ArgumentError(
            f"{file!r} ends with {path.suffix!r}, expected one of {', '.join(FORMATS)}, or these with .gz"
        )
    if path.is_dir():
        raise ArgumentError(
            f"{file!r} is a directory, expected a file; a directory is passed as the name of a dataset"
        )
    if not path.is_file():
        raise ArgumentError(f"there is no file {file!r}")
    builder, options, content = FORMATS[ending]
    try:
        source = datasets.DownloadManager().extract(file) if builder == "parquet" else file
        return datasets.load_dataset(builder, data_files=source, split="train", **options)
    except PermissionError as error:
        raise ArgumentError(
            f"cannot load the file {file!r}: it may not be read; change its permissions"
        ) from error
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            content += ", in UTF-8"
        raise ArgumentError(
            f"cannot load the file {file!r}: it has no rows or is damaged; expected {content}"
            + (", compressed by gzip" if path.suffix.lower() == ".gz" else "")
        ) from error


def load_split(name: str, config: str | None, split: str) -> datasets.Dataset:
    """One split of a directory or of a dataset on the Hub. Raises `ArgumentError` if there is no such
    thing.
    """
    what = f"cannot load the dataset {name!r} (configuration {config!r}, split {split!r})"
    if {"state.json", "dataset_dict.json"} & set(os.listdir(name) if os.path.isdir(name) else ()):
        return _load_from_disk(name, split, what)
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ArgumentError(f"{what}: {_reason(error, name, config, split)}") from error


def _load_from_disk(name: str, split: str, what: str) -> datasets.Dataset:
    try:
        dataset = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            f"{what}: the directory was written by save_to_disk and is damaged; write it again"
        ) from error
    if isinstance(dataset, datasets.Dataset):
        return dataset
    if split not in dataset:
        raise ArgumentError(f"{what}: it has the splits {', '.join(dataset)}; name one of them")
    return dataset[split]


def _reason(error: Exception, name: str, config: str | None, split: str) -> str:
    """Why a dataset could not be loaded, and what to do."""
    if isinstance(error, ConnectionError):
        return (
            "there is no such directory here, and the Hub cannot be reached; pass a directory or a local file"
        )
    if isinstance(error, FileNotFoundError | HFValidationError):
        if os.path.isdir(name):
            return f"the directory holds no files of data; expected {', '.join(FORMATS)}"
        return (
            "there is no such directory here, and no dataset of this name that can be read on the Hub; check "
            "the name, or log in (hf auth login) if it is private"
        )
    try:
        configs = datasets.get_dataset_config_names(name)
        if len(configs) > 1 and config not in configs:
            return f"it has the configurations {', '.join(configs)}; name one of them"
        splits = datasets.get_dataset_split_names(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return "its files are damaged or of a kind that cannot be read here; pass one of them as a local file"
    if split.partition("[")[0] not in splits:
        return f"it has the splits {', '.join(splits)}; name one of them"
    return "its files are damaged, or the part of the split is not written as in train[:1000]"
