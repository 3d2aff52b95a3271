"""What people pass as calibration data, one row after the other; and which of its columns hold the texts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..errors import ArgumentError, CalibrationError, KPruneError
from ..validation import show
from .nested import Row, depth


TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("content",),
    ("document",),
    ("article",),
    ("dialogue",),
    ("tokens",),
    ("words",),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "context"),
    ("question", "passage"),
    ("question", "sentence"),
    ("question1", "question2"),
)
"""Names under which datasets hold texts or pairs of texts: of GLUE, SuperGLUE, SQuAD, and usual ones."""

TARGET_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
)
"""Names under which datasets hold sources with their targets, for models whose decoder is given a target."""

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Names under which datasets hold chats."""

MOST_SHUFFLED = 2**27
"""Rows whose numbers are shuffled in memory; of a longer dataset numbers are drawn one by one."""


def text_columns(columns: Collection[str], names: Sequence[str] | None, targets: bool) -> tuple[str, ...]:
    """Names of the columns that hold the texts, in the order in which they are read; none if it is not known.

    Args:
        columns: All that there are.
        names: Those that the caller chose (`KPruneArguments.text_columns`), or None.
        targets: Whether a pair is a source and a target.

    Raises:
        ArgumentError: If a chosen column is missing, or if several choices fit.
    """
    if names is not None:
        missing = [name for name in names if name not in columns]
        if missing:
            raise ArgumentError(
                f"no column {', '.join(missing)} in the data, which has: {', '.join(columns)}; text_columns "
                "names those that hold the texts"
            )
        return tuple(names)
    single = [entry for entry in TEXT_COLUMNS if len(entry) == 1]
    known = [entry for entry in (*TARGET_COLUMNS, *single) if targets] or TEXT_COLUMNS
    fitting = [entry for entry in known if set(entry) <= set(columns)]
    largest = [entry for entry in fitting if not any(set(entry) < set(other) for other in fitting)]
    if len(largest) > 1:
        choices = " or ".join(str(list(entry)) for entry in largest)
        raise ArgumentError(f"the data may hold the texts in the columns {choices}; choose with text_columns")
    return largest[0] if largest else ()


def split_rows(columns: Mapping[str, Any], number: int) -> list[Row]:
    """Columns of `number` entries as rows. What has another number of entries is the same in each."""

    def entry(value: Any, index: int) -> Any:
        return value[index] if depth(value) and len(value) == number else value

    return [{name: entry(value, index) for name, value in columns.items()} for index in range(number)]


def rows_of_columns(columns: Mapping[str, Any], main: str, dims: int) -> list[Row]:
    """The rows of a dict of columns, such as a tokenizer makes of texts; that of a single text is one row.

    Args:
        columns: Tensors, arrays or lists by name.
        main: Name of the model's main input.
        dims: Dimensions of that input in one row.

    Raises:
        CalibrationError: If these are splits of a dataset, or columns that differ in length.
    """
    if any(hasattr(value, "column_names") for value in columns.values()):
        raise CalibrationError(
            f"the calibration dataset is a {type(columns).__name__}, expected a dataset of rows or a list of "
            f"texts (of a DatasetDict, pass one split: {', '.join(map(str, columns))})"
        )
    columns = {key: listed(value) for key, value in columns.items() if value is not None}
    single = main in columns and depth(columns[main]) <= dims
    chats = [value for name, value in columns.items() if name in CHAT_COLUMNS and depth(value) and len(value)]
    text = any(isinstance(value, str) for value in columns.values()) or any(
        isinstance(chat[0], Mapping) for chat in chats
    )
    if single or text:
        return [dict(columns)]
    lengths = {name: len(value) if depth(value) else None for name, value in columns.items()}
    if len({*lengths.values()}) > 1 or None in lengths.values():
        sizes = ", ".join(f"{name} ({'no list' if n is None else n})" for name, n in lengths.items())
        raise CalibrationError(
            f"the calibration dataset is a {type(columns).__name__} of columns that differ in length: "
            f"{sizes}; expected as many entries in each"
        )
    return split_rows(columns, next(iter(lengths.values()), 0) or 0)


def listed(value: Any) -> Any:
    """A table or a column of pandas as a list; anything else as it is."""
    if not hasattr(value, "iloc"):
        return value
    return value.to_dict("records") if hasattr(value, "columns") else value.tolist()


def rows_of_batch(batch: Any, by_column: bool, main: str, dims: int) -> Iterable[Any]:
    """The rows in a batch of a DataLoader, in which a list holds columns if `by_column`, else rows."""
    if isinstance(batch, Mapping):
        return rows_of_columns(batch, main, dims)
    if isinstance(batch, (list, tuple)):
        columns = by_column and all(depth(part) and not isinstance(part, Mapping) for part in batch)
        return zip(*batch, strict=True) if columns and len({len(part) for part in batch}) == 1 else batch
    return batch if depth(batch) else [batch]


def rows_of_loader(loader: DataLoader[object], main: str, dims: int) -> Iterator[Any]:
    """The rows of a DataLoader, in its own order."""
    for batch in loader:
        if loader.batch_sampler is None:  # it does not make batches
            yield batch
        else:
            by_column = isinstance(batch, tuple) or loader.collate_fn is default_collate
            yield from rows_of_batch(batch, by_column, main, dims)


def rows_of(dataset: object, main: str, dims: int) -> Any:
    """Calibration data of any kind, as something with a length and items, or as something to iterate over.

    Args:
        dataset: A map-style or iterable dataset, a list, a generator, a DataLoader, a dict of columns, a
            table of pandas.
        main: Name of the model's main input.
        dims: Dimensions of that input in one row.

    Raises:
        CalibrationError: If it is something else.
    """
    if isinstance(dataset, DataLoader):
        return rows_of_loader(dataset, main, dims)
    if isinstance(dataset, Mapping):
        return rows_of_columns(dataset, main, dims)
    dataset = listed(dataset)
    iterable = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if (
        isinstance(dataset, (str, bytes, type))
        or not iterable
        or (hasattr(dataset, "ndim") and not depth(dataset))
    ):
        raise CalibrationError(
            f"the calibration dataset is a {type(dataset).__name__}, expected a dataset of rows or a list of "
            "texts; of a single text pass [text], of a file what datasets.load_dataset reads from it"
        )
    return dataset


def is_sized(dataset: object) -> bool:
    """Whether rows can be drawn from a dataset by number; if not, it is a stream."""
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        return False
    try:
        return len(dataset) >= 0
    except (TypeError, NotImplementedError):  # torch's way to say that there is no length
        return False
    except Exception as error:
        raise CalibrationError(
            "the calibration dataset has a length that cannot be told: its len() fails as above"
        ) from error


def read_rows(dataset: Any, sized: bool, seed: int | None) -> Iterator[tuple[int, Any]]:
    """The rows of a dataset with their numbers: in their order, or if there is a `seed` at random, each once.

    Raises `CalibrationError` if the dataset fails at one of them.
    """

    def failure(index: int, error: Exception) -> Exception:
        if isinstance(error, KPruneError):
            return error
        length = f", though its length is {len(dataset)}" if sized else ""
        return CalibrationError(
            f"row {index} of the calibration dataset could not be read{length}: the dataset raised the "
            f"{type(error).__name__} shown above; mend it, or leave the row out"
        )

    if sized:
        for index in numbers(len(dataset), seed):
            try:
                row = dataset[index]
            except Exception as error:
                raise failure(index, error) from error
            yield index, row
        return
    stream = iter(dataset)
    for index in count():
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise failure(index, error) from error
        yield index, row


def numbers(length: int, seed: int | None) -> Iterator[int]:
    """The numbers from 0 to `length`, each once: in a random order if there is a `seed`."""
    if seed is None:
        yield from range(length)
        return
    generator = torch.Generator().manual_seed(seed)
    if length <= MOST_SHUFFLED:
        yield from torch.randperm(length, generator=generator).tolist()
        return
    past: set[int] = set()
    while len(past) < length:
        number = int(torch.randint(length, (), generator=generator))
        if number not in past:
            past.add(number)
            yield number


def check_processing_class(processing_class: object) -> None:
    """Raise `ArgumentError` for what cannot turn data into inputs: a name, a class, a model, a config."""
    if processing_class is None:
        return
    able = callable(processing_class) or hasattr(processing_class, "pad")
    if not able or isinstance(processing_class, (str, type, torch.nn.Module)):
        name = repr(str(processing_class)) if isinstance(processing_class, (str, os.PathLike)) else "..."
        raise ArgumentError(
            f"processing_class is {show(processing_class)}, expected a tokenizer or processor: "
            f"AutoTokenizer.from_pretrained({name})"
        )


def check_rows(name: str, dataset: object) -> None:
    """Raise `ArgumentError` for what is no dataset of rows."""
    able = hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    if not able or isinstance(dataset, (str, bytes, os.PathLike)):
        raise ArgumentError(
            f"{name} is {show(dataset)}, expected a dataset of tokenised rows: pass one as {name}"
        )


def first_label(dataset: object) -> Any:
    """The label of the first row of a dataset that can be looked into; None if it has none."""
    if (
        not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
        or isinstance(dataset, Mapping)
        or not len(dataset)
    ):
        return None
    row = dataset[0]
    return row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
