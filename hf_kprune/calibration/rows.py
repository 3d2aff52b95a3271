"""Calibration rows: drawn from whatever dataset there is, made into what the model takes if they are not yet, and checked."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError
from ..structure.configs import text_config
from ..structure.facts import input_names, is_causal, label_names, max_positions, vocabulary
from .sources import CHAT_COLUMNS, depth, is_sized, read_rows, rows_of, split_rows, text_columns
from .tasks import needs_targets, task_of
from .texts import Texts, check_not_endless


logger = logging.get_logger(__name__)

TokensPerRow = Callable[[dict[str, Any]], int]
"""Tokens that the model makes of a row without `input_ids`: patches of an image, frames of sound."""


def flat(value: Any) -> Iterator[Any]:
    """The numbers in a list, array or tensor, or in lists of them of any lengths (choices)."""
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        yield from flat(entry) if depth(entry) else (entry,)


def plain(value: Any) -> Any:
    """A list of single numbers in tensors or arrays as one of plain numbers; anything else as it is."""
    if isinstance(value, (list, tuple)) and any(
        hasattr(entry, "ndim") and not depth(entry) for entry in value
    ):
        return [entry.item() if hasattr(entry, "item") else entry for entry in value]
    return value


def strays(value: Any, dims: int) -> Iterator[tuple[Any]]:
    """What in lists or tensors of so many dimensions is no whole number, each in a tuple of its own."""
    if dims == 0 or not depth(value):
        if dims or isinstance(value, bool) or not isinstance(value, Integral):
            yield (value,)
        return
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        yield from strays(entry, dims - 1) if dims > 1 or depth(entry) else strays(entry, 0)


def shape_of(value: Any) -> tuple[int, ...]:
    """The length of a list, and those of the lists in it."""
    return (len(value), *(map(len, value) if depth(value) > 1 else ())) if depth(value) else ()


def floats(value: Any) -> Tensor | None:
    """An input of floats as a float32 tensor, many times smaller than the lists that datasets give; None for others."""
    if not hasattr(value, "dtype"):
        if not hasattr(value, "__len__") or not isinstance(next(flat(value), None), float):
            return None
        value = np.asarray(value, dtype=np.float32)
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.float() if tensor.is_floating_point() else None


def row_tokens(row: dict[str, Any], tokens_per_row: TokensPerRow | None = None) -> int:
    """Tokens of a row that are not padding (of all its choices, for multiple choice)."""
    if "input_ids" not in row:
        return row_length(row, tokens_per_row)
    return (
        sum(flat(row["attention_mask"]))
        if "attention_mask" in row
        else sum(1 for _ in flat(row["input_ids"]))
    )


def row_length(row: dict[str, Any], tokens_per_row: TokensPerRow | None = None) -> int:
    """Positions that a row takes, padding included."""
    if "input_ids" in row:
        return max(map(len, row["input_ids"]), default=0) if has_choices(row) else len(row["input_ids"])
    if tokens_per_row is None:
        raise ArgumentError(
            f"a row of {sorted(row)} does not tell how many tokens it makes; pass tokens_per_row"
        )
    return tokens_per_row(row)


def has_choices(row: dict[str, Any]) -> bool:
    """Whether a row holds several sequences (multiple choice)."""
    return depth(row.get("input_ids", ())) > 1


@dataclass
class Rows:
    """The rows that were drawn, in the order of the draw.

    `measured` of them, the first, serve for measuring too; `tokens` counts the tokens of all.
    """

    rows: list[dict[str, Any]]
    measured: int
    tokens: int
    fingerprint: dict[str, Any]

    @property
    def held_out(self) -> int:
        """The last so many of the measured ones, held out of trials to compare what they make; trials have the first half."""
        return self.measured // 4

    def first(self, tokens: int, tokens_per_row: TokensPerRow | None = None) -> int:
        """How many of the measured rows, from the first on, hold no more than so many tokens; at least one."""
        sums = itertools.accumulate(row_tokens(row, tokens_per_row) for row in self.rows[: self.measured])
        return max(1, sum(total <= tokens for total in sums))

    @property
    def sequences(self) -> int:
        """More than the rows where a row holds several choices."""
        return sum(len(row["input_ids"]) if has_choices(row) else 1 for row in self.rows)


class Reader:
    """Makes what a dataset holds into rows that a model takes, and checks them. `digest` is of what the model reads."""

    def __init__(
        self, model: PreTrainedModel, processing_class: Any, args: KPruneArguments, keep_labels: bool
    ):
        self.name, self.processing_class = type(model).__name__, processing_class
        self.args, self.keep_labels = args, keep_labels
        names = model.main_input_name
        self.main: str = names if isinstance(names, str) else names[0]
        self.labels = label_names(model)
        self.accepted = input_names(model)
        self.dims = {"pixel_values": 3, "input_features": 2}.get(
            self.main, 2 if task_of(model).choices else 1
        )
        sound = self.accepted & {"input_values", "input_features"}
        self.sense = "image" if "pixel_values" in self.accepted else "audio" if sound else None
        self.causal = is_causal(model)
        self.limit, self.vocabulary = max_positions(model), vocabulary(model, model)
        self.needs_targets = needs_targets(model)
        decoder = model.get_decoder() if self.needs_targets else model
        self.target_limit = max_positions(decoder) if isinstance(decoder, PreTrainedModel) else self.limit
        self.target_vocabulary = vocabulary(model, decoder)
        self.texts = Texts(processing_class, args, self.limit, self.needs_targets)
        self.types = getattr(text_config(model.config), "type_vocab_size", None)
        self.digest, self.told, self.warned = hashlib.sha256(), False, set[str]()

    def read(self, index: int, raw: Any, tokens_per_row: TokensPerRow | None) -> tuple[dict[str, Any], int]:
        """A row of those columns that are used, with floats in tensors, and its tokens; 0 if there is nothing in it."""
        columns = {key: plain(value) for key, value in self.columns(raw).items()}
        used = self.accepted & columns.keys()
        if "labels" in columns and self.needs_targets and "decoder_input_ids" not in columns:
            used.add("labels")
        elif self.causal and depth(columns.get("labels")) and -100 in flat(columns["labels"]):
            used.add("labels")
            if (labels := len(columns["labels"])) != (length := len(columns.get("input_ids", ()))):
                raise CalibrationError(
                    f"calibration row {index} has {labels} labels for {length} tokens; expected one each, -100 where the "
                    "knowledge is not to be compared"
                )
        surplus = sorted(columns.keys() - used - self.labels)
        if self.main not in columns or (surplus and not self.args.remove_unused_columns):
            text = (
                "tokenise the texts (dataset.map), or pass processing_class and either a plain list of strings or, in "
                "text_columns, the names of the columns that hold the texts"
            )
            other = f"make {self.main} of them (dataset.map), or pass a column {self.sense!r} and processing_class"
            raise CalibrationError(
                f"the calibration dataset has the columns {sorted(columns)}, {self.name} takes {sorted(self.accepted)}; "
                + (text if self.main == "input_ids" else other)
                + (
                    ""
                    if self.args.remove_unused_columns
                    else ", and drop the other columns or set remove_unused_columns=True"
                )
            )
        if surplus and not self.told:
            logger.info("not used for calibration: the columns %s", ", ".join(surplus))
        self.told = True
        if "input_ids" in used:
            self.check_whole(f"calibration row {index} has", {key: columns[key] for key in used})
        row = {
            key: value
            for key, value in columns.items()
            if key in used or (self.keep_labels and key in self.labels)
        }
        row |= {key: tensor for key in used if "mask" not in key and (tensor := floats(row[key])) is not None}

        if "input_ids" in row:
            has = f"calibration row {index} has"
            self.check_ids(has, list(flat(row["input_ids"])), row_length(row), self.limit, self.vocabulary)
            self.check_beside(has, row)
        count = row_tokens(row, tokens_per_row)
        if self.needs_targets:
            targets = [row[key] for key in ("decoder_input_ids", "labels") if key in row]
            if not targets:
                raise CalibrationError(
                    f"calibration row {index} has only {', '.join(row)}, which leaves the decoder of {self.name} nothing to "
                    "read; pass (source, target) pairs, or rows with labels or decoder_input_ids"
                )
            target = [token for token in flat(targets[0]) if token != -100]
            has = f"the target of calibration row {index} has"
            self.check_ids(has, target, len(target), self.target_limit, self.target_vocabulary)
            count = count if target else 0
        for key in sorted(used) if count else ():
            value = row[key]
            if key in ("input_ids", "labels", "decoder_input_ids"):
                value = torch.tensor(list(flat(value)), dtype=torch.int64)  # choices may differ in length
            elif (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not bool(torch.isfinite(value).all())
            ):
                raise CalibrationError(
                    f"calibration row {index} has {key} that are not finite; leave such rows out"
                )
            elif key != self.main and not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            self.digest.update(np.ascontiguousarray(value).tobytes())
        return row, count

    def check_whole(self, has: str, columns: dict[str, Any]) -> None:
        """Raise `CalibrationError` unless ids are whole numbers, in as many dimensions as the model reads."""
        if depth(columns["input_ids"]) != self.dims and self.dims > 1:
            raise CalibrationError(
                f"{has} a single text, but {self.name} compares choices; name the question and its choices in "
                "text_columns, or pass input_ids of (choices, tokens)"
            )
        for key in ("input_ids", "decoder_input_ids", "labels", "token_type_ids", "position_ids"):
            value = columns.get(key, ())
            dims = self.dims if key == "input_ids" else max(1, depth(value))
            for (stray,) in strays(value, dims):
                raise CalibrationError(
                    f"{has} {stray!r:.80} in its {key}, expected whole numbers{', in lists of them' if dims > 1 else ''}"
                )

    def check_beside(self, has: str, columns: dict[str, Any]) -> None:
        """Raise `CalibrationError` unless what comes with ids is one number for each of them, and one that can be."""
        shape = shape_of(columns["input_ids"])
        for key in ("attention_mask", "token_type_ids"):
            if key in columns and shape_of(columns[key]) != shape:
                raise CalibrationError(
                    f"{has} {key} of {shape_of(columns[key])} for input_ids of {shape}; expected one number for each token"
                )
        if not {*flat(columns.get("attention_mask", ()))} <= {0, 1}:
            raise CalibrationError(
                f"{has} an attention_mask of other numbers than 0, for padding, and 1; expected these"
            )
        types = {*flat(columns.get("token_type_ids", ()))}
        if types and self.types and not 0 <= min(types) <= max(types) < self.types:
            raise CalibrationError(
                f"{has} token_type_ids {min(types)} to {max(types)}, {self.name} has {self.types} types of tokens; was it "
                "made with another tokenizer?"
            )

    def check_ids(
        self, has: str, ids: list[int], length: int, limit: int | None, vocabulary: int | None
    ) -> None:
        if limit is not None and length > limit:
            raise CalibrationError(
                f"{has} {length} tokens, {self.name} takes at most {limit}; tokenise with truncation=True, "
                f"max_length={limit}, or pass texts and set max_seq_length"
            )
        if ids and vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise CalibrationError(
                f"{has} token ids {min(ids)} to {max(ids)}, the model's vocabulary has {vocabulary}; was it made with "
                "another tokenizer?"
            )

    def split(self, raw: Any) -> Iterable[Any]:
        """The rows in an entry of the dataset: itself, or those of a batch of token ids, (1, L) or more."""
        if self.main == "input_ids" and depth(ids := self.named(raw).get("input_ids", ())) > self.dims:
            return split_rows(self.named(raw), len(ids))
        return [raw]

    def named(self, raw: Any) -> dict[str, Any]:
        """An entry of the dataset as columns by name."""
        if isinstance(raw, Mapping):
            inputs = self.accepted - {self.main}
            return {
                key: value
                for key, value in raw.items()
                if value is not None or key not in inputs | self.labels
            }
        if self.main == "input_ids":
            if isinstance(raw, (tuple, list)) and raw and all(isinstance(part, Mapping) for part in raw):
                return {"messages": raw}
            if isinstance(raw, (tuple, list)) and any(isinstance(part, str) for part in raw):
                texts = [
                    part for part in raw if not isinstance(part, (Number, Tensor)) or part != part
                ]  # but for labels
                return {"text": texts[0] if len(texts) == 1 else texts}
            if (
                isinstance(raw, (tuple, list))
                and depth(raw) > 1
                and (isinstance(raw, tuple) or hasattr(raw[0], "ndim"))
            ):
                return self.tuple_of_ids(*raw)
            if depth(raw):
                return {"input_ids": raw}
            return {"text": raw} if isinstance(raw, str) else {}
        if isinstance(raw, str):
            return {}
        if isinstance(raw, tuple) and raw and not isinstance(raw[0], (int, float)):
            raw = raw[0]  # an image or sound, and a label
        ready = self.sense is None or (self.processing_class is None and floats(raw) is not None)
        return {self.main if ready else str(self.sense): raw}

    def tuple_of_ids(self, ids: Any, *others: Any) -> dict[str, Any]:
        """Token ids, with the mask if that comes next. What else a tuple has, as targets, is not read, which is said."""
        columns, used = {"input_ids": ids}, 0
        if others and depth(others[0]) and {*flat(others[0])} <= {0, 1} and not {*flat(ids)} <= {0, 1}:
            columns["attention_mask"], used = others[0], 1
        if others[used:]:
            self.warn(
                "the calibration rows are tuples: their token ids are read, and a mask that comes next, nothing else"
            )
        return columns

    def warn(self, message: str) -> None:
        """Once for all rows."""
        if message not in self.warned:
            logger.warning(message)
        self.warned.add(message)

    def columns(self, raw: Any) -> dict[str, Any]:
        """A row of the dataset with what is in it, a text, a chat, an image or sound, made into inputs of the model."""
        columns = self.named(raw)
        if not columns and not isinstance(raw, Mapping):
            raise CalibrationError(
                f"a calibration row is {raw!r:.80}, expected a mapping of columns, {self.main} among them"
            )
        chosen = self.args.text_columns if isinstance(raw, Mapping) else None
        if self.main in columns and not (chosen and columns.keys() >= {*chosen}):
            return columns
        chat = next((name for name in CHAT_COLUMNS if name in columns), None) if chosen is None else None
        if self.sense in columns:
            made = self.features(columns)
        elif self.main != "input_ids":
            return columns
        elif chat is not None:
            made = self.texts.chat(columns.pop(chat))
        elif not isinstance(raw, Mapping) and "text" in columns:
            made = self.texts.tokens(columns.pop("text"))
        elif (
            names := text_columns(columns.keys(), chosen, self.needs_targets)
        ) and self.processing_class is not None:
            made = self.of_texts(names, columns)
        else:
            return columns
        return columns | {
            key: value for key, value in made.items() if key in self.accepted or key == "labels"
        }

    def of_texts(self, names: tuple[str, ...], columns: dict[str, Any]) -> dict[str, Any]:
        """Token ids of the texts in columns of these names, which are taken out of `columns`."""
        texts = [columns.pop(name) for name in dict.fromkeys(names)]
        texts = [dict(zip(dict.fromkeys(names), texts, strict=True))[name] for name in names]
        others = sorted(
            key for key, value in columns.items() if isinstance(value, str) and key not in self.labels
        )
        if others and len(names) == 1 and self.args.text_columns is None:
            self.warn(
                f"the calibration texts are read from the column {names[0]}, not from {', '.join(others)}; choose with "
                "text_columns"
            )
        if self.dims > 1:
            return self.texts.choices(texts)
        if len(texts) > 2:
            raise ArgumentError(f"text_columns names {len(texts)} columns, {self.name} takes one or two")
        if len(texts) == 1 and isinstance(texts[0], list) and (names != ("text",) or len(texts[0]) > 2):
            return self.texts.words(texts[0])
        return self.texts.tokens(texts[0] if len(texts) == 1 else tuple(texts))

    def features(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Of an image or of sound, and of the text beside it if the processor is for both. Takes them out of `columns`."""
        processor, sense = self.processing_class, str(self.sense)
        name, value = type(processor).__name__, columns.pop(sense)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if processor is None or isinstance(processor, PreTrainedTokenizerBase):
            wanted = "image processor" if sense == "image" else "feature extractor"
            raise ArgumentError(
                f"the calibration dataset holds rows of {sense}, processing_class is {name}; pass the model's {wanted}"
            )
        if sense == "audio":
            rate = expected = getattr(
                getattr(processor, "feature_extractor", processor), "sampling_rate", None
            )
            if not isinstance(
                value, (np.ndarray, Tensor, list, tuple)
            ):  # bare samples do not tell their rate
                value, rate = value["array"], value["sampling_rate"]
            if rate != expected:
                raise CalibrationError(
                    f"the calibration dataset has audio at {rate} Hz, {name} takes {expected} Hz; resample it: "
                    f"dataset.cast_column('audio', datasets.Audio(sampling_rate={expected}))"
                )
            value, options["sampling_rate"] = np.asarray(value, dtype=np.float32), rate
        if hasattr(processor, "tokenizer"):
            options |= {"images" if sense == "image" else sense: value}
            made = processor(**options, **({"text": columns.pop("text")} if "text" in columns else {}))
        else:
            made = processor(value, **options)
        if any(len(part) != 1 for part in made.values()):
            shapes = {key: tuple(part.shape) for key, part in made.items()}
            raise CalibrationError(
                f"{name} made {shapes} of one {sense}, expected one row; pass rows with {self.main}"
            )
        return {key: part[0] for key, part in made.items()}


def draw_rows(
    model: PreTrainedModel,
    dataset: Any,
    processing_class: Any,
    args: KPruneArguments,
    keep_labels: bool,
    tokens_per_row: TokensPerRow | None = None,
) -> Rows:
    """Draw rows without replacement until they hold `args.num_tokens` tokens, and check them.

    A dataset with a length is drawn from at random (`args.seed`), a stream is read from its beginning. Labels are dropped
    unless a data collator of the caller's may want to see them (`keep_labels`), or they are a decoder's targets, or -100
    in them marks tokens of a causal language model that do not count. `tokens_per_row` counts the tokens of rows without
    `input_ids`, which are refused if it is None.
    """
    reader = Reader(model, processing_class, args, keep_labels)
    source = getattr(dataset, "_fingerprint", None) or type(dataset).__name__
    dataset = rows_of(dataset, reader.main, reader.dims)
    sized = is_sized(dataset)
    if args.packing:
        if reader.main != "input_ids":
            raise ArgumentError(
                f"packing is True, expected False: {reader.name} takes {reader.main}, no texts"
            )
        blocks = reader.texts.pack((raw for _, raw in read_rows(dataset, sized, None)), sized)
        dataset = list(blocks) if sized else blocks

    rows: list[dict[str, Any]] = []
    tokens = measured = empty = passed = 0
    for index, raw in read_rows(dataset, sized, args.seed):
        for single in reader.split(raw):
            row, count = reader.read(index, single, tokens_per_row)
            empty, passed = (0, passed) if count else (empty + 1, passed + 1)
            if count == 0:
                if not sized:
                    check_not_endless(empty)
                continue
            rows.append(row)
            if tokens < (args.num_measure_tokens or args.num_tokens):
                measured = len(rows)
            tokens += count
            if tokens >= args.num_tokens:
                break
        if tokens >= args.num_tokens:
            break
    if not rows:
        why = f": none of its {passed} rows has a token that is not padding" if passed else ""
        raise CalibrationError(
            f"the calibration dataset is empty{why}; a few hundred rows like those the model will see will do (an iterator "
            "can be read only once)"
        )
    if reader.causal and any("labels" in row for row in rows):
        rows = [
            {**row, "labels": row.get("labels", row["input_ids"])} for row in rows
        ]  # all or none: they are batched
    names = {frozenset(row.keys() - reader.labels) for row in rows}
    if len(names) > 1:
        kinds = " and others ".join(", ".join(sorted(name)) for name in names)
        raise CalibrationError(
            f"some calibration rows have the columns {kinds}; give all rows the same columns"
        )
    fingerprint = {
        "dataset": source,
        "rows": len(rows),
        "rows_measured": measured,
        "tokens": tokens,
        "seed": args.seed,
        "sha256": reader.digest.hexdigest(),
    }
    return Rows(rows, measured, tokens, fingerprint)
