"""The entries of a dataset become rows that a model takes, if they are not such rows yet, and are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError
from ..structure.configs import text_config
from ..structure.facts import (
    input_names,
    is_causal,
    label_names,
    main_input,
    max_positions,
    vocabulary,
)
from .nested import Row, depth, flat, floats, plain, shape_of, strays
from .processed import (
    Processed,
    has_pictures,
    pictures_of,
    process,
    question_about,
    with_patches_joined,
)
from .rows import TokensPerRow, row_length, row_tokens
from .sources import CHAT_COLUMNS, split_rows, text_columns
from .tasks import needs_targets, task_of
from .texts import Texts


logger = logging.get_logger(__name__)

DIMENSIONS = {"pixel_values": 3, "input_features": 2, "hidden_states": 2, "inputs_embeds": 2}
"""Of the inputs of one row that are no texts."""


class Reader:
    """Makes the entries of a dataset into rows that a model takes, and checks them.

    Args:
        model: The model that the rows are for.
        processing_class: Its tokenizer, image processor or feature extractor; None if entries are rows.
        args: Options: `text_columns`, `remove_unused_columns`, and those of `Texts`.
        keep_labels: Whether labels that the model does not read stay in the rows.
    """

    def __init__(
        self, model: PreTrainedModel, processing_class: Any, args: KPruneArguments, keep_labels: bool
    ):
        self.name, self.processing_class = type(model).__name__, processing_class
        self.args, self.keep_labels = args, keep_labels
        self.main = main_input(model)
        self.labels, self.accepted = label_names(model), input_names(model)
        self.text_dims = 2 if task_of(model).choices else 1
        self.dims = DIMENSIONS.get(self.main, self.text_dims)
        sound = self.accepted & {"input_values", "input_features"}
        self.sense = "image" if "pixel_values" in self.accepted else "audio" if sound else None
        self.causal, self.needs_targets = is_causal(model), needs_targets(model)
        self.limit, self.vocabulary = max_positions(model), vocabulary(model, model)
        decoder = model.get_decoder() if self.needs_targets else model
        self.target_limit = max_positions(decoder) if isinstance(decoder, PreTrainedModel) else self.limit
        self.target_vocabulary = vocabulary(model, decoder)
        self.texts = Texts(processing_class, args, self.limit, self.needs_targets)
        self.types = getattr(text_config(model.config), "type_vocab_size", None)
        self.digest = hashlib.sha256()  # of what the model reads
        self.count, self.messages = 0, set[str]()

    # --------------------------------------------------------------------------------------------------------
    # A row, checked
    # --------------------------------------------------------------------------------------------------------

    def read(self, index: int, entry: object, tokens_per_row: TokensPerRow | None) -> tuple[Row, int]:
        """A row of those columns that are used, with floats in tensors, and how many tokens it has."""
        encoded = self.columns(entry)
        columns = {key: plain(value) for key, value in encoded.items()}
        inputs = self.inputs(index, columns)
        self.check_columns(columns, inputs)
        self.count += 1
        has = f"calibration row {index} has"
        if "input_ids" in inputs:
            self.check_integers(has, {key: columns[key] for key in inputs})
        names = inputs | self.labels if self.keep_labels else inputs
        row = {key: value for key, value in columns.items() if key in names}
        for key in inputs:
            tensor = None if "mask" in key else floats(row[key])
            row |= {} if tensor is None else {key: tensor}
        if "input_ids" in row:
            self.check_ids(has, list(flat(row["input_ids"])), row_length(row), self.limit, self.vocabulary)
            self.check_beside(has, row)
        elif "inputs_embeds" in row and (
            not isinstance(row["inputs_embeds"], Tensor) or row["inputs_embeds"].dim() != 2
        ):
            raise CalibrationError(
                f"{has} inputs_embeds of {shape_of(row['inputs_embeds'])}, expected floats, (tokens, width)"
            )
        if isinstance(encoded, Processed):
            row = Processed(row)
        elif not self.keep_labels:  # a collator of the caller's knows the rows as they are
            row = with_patches_joined(row)
        tokens = row_tokens(row, tokens_per_row)
        if self.needs_targets and not self.check_target(index, row):
            tokens = 0
        if tokens:
            self.note(index, {key: row[key] for key in sorted(inputs)})
        return row, tokens

    def inputs(self, index: int, columns: Mapping[str, Any]) -> set[str]:
        """Names of the columns that are inputs. Labels are if they are targets, or say which tokens count."""
        names = self.accepted & columns.keys()
        if "labels" in columns and self.needs_targets and "decoder_input_ids" not in columns:
            names.add("labels")
        elif self.causal and depth(columns.get("labels")) and -100 in flat(columns["labels"]):
            names.add("labels")
            if (labels := len(columns["labels"])) != (length := len(columns.get("input_ids", ()))):
                raise CalibrationError(
                    f"calibration row {index} has {labels} labels for {length} tokens; expected one each, "
                    "-100 where the knowledge is not to be compared"
                )
        return names

    def note(self, index: int, inputs: Mapping[str, Any]) -> None:
        """Add what the model reads of a row to the digest.

        Raises:
            CalibrationError: If there are floats that are not finite.
        """
        for key, value in inputs.items():
            real = isinstance(value, Tensor) and value.is_floating_point()
            if key in ("input_ids", "labels", "decoder_input_ids"):
                value = torch.tensor(list(flat(value)), dtype=torch.int64)  # choices may differ in length
            elif real and not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"calibration row {index} has {key} that are not finite; leave such rows out"
                )
            elif key != self.main and not real:
                continue
            self.digest.update(np.ascontiguousarray(value).tobytes())

    def check_columns(self, columns: Mapping[str, object], inputs: set[str]) -> None:
        """Raise `CalibrationError` if the main input is missing, or if columns are left where none may be."""
        surplus = sorted(columns.keys() - inputs - self.labels)
        lacks = not inputs & {self.main, "inputs_embeds"}
        if lacks or (surplus and not self.args.remove_unused_columns):
            text = (
                "tokenise the texts (dataset.map), or pass processing_class and either a plain list of "
                "strings or, in text_columns, the names of the columns that hold the texts"
            )
            other = f"make {self.main} of them (dataset.map)" + (
                f", or pass a column {self.sense!r} and processing_class" if self.sense else ""
            )
            drop = ", and drop the other columns or set remove_unused_columns=True"
            raise CalibrationError(
                f"the calibration dataset has the columns {sorted(columns)}, {self.name} takes "
                f"{sorted(self.accepted)}"
                + (f", and no row is read without {self.main}" if lacks else "")
                + "; "
                + (text if self.main == "input_ids" else other)
                + ("" if self.args.remove_unused_columns else drop)
            )
        if surplus and not self.count:
            logger.info("not used for calibration: the columns %s", ", ".join(surplus))

    def check_integers(self, has: str, columns: Mapping[str, object]) -> None:
        """Raise `CalibrationError` unless ids are whole numbers, in as many dimensions as the model reads."""
        if depth(columns["input_ids"]) != self.text_dims and self.text_dims > 1:
            raise CalibrationError(
                f"{has} a single text, but {self.name} compares choices; name the question and its choices "
                "in text_columns, or pass input_ids of (choices, tokens)"
            )
        for key in ("input_ids", "decoder_input_ids", "labels", "token_type_ids", "position_ids"):
            value = columns.get(key, ())
            dims = self.text_dims if key == "input_ids" else max(1, depth(value))
            for (stray,) in strays(value, dims):
                raise CalibrationError(
                    f"{has} {stray!r:.80} in its {key}, expected whole "
                    f"numbers{', in lists of them' if dims > 1 else ''}"
                )

    def check_beside(self, has: str, columns: Mapping[str, object]) -> None:
        """Raise `CalibrationError` unless a mask and types are one possible number for each of the ids."""
        shape = shape_of(columns["input_ids"])
        for key in ("attention_mask", "token_type_ids"):
            if key in columns and shape_of(columns[key]) != shape:
                batch = ", in two dimensions where input_ids have two"
                raise CalibrationError(
                    f"{has} {key} of {shape_of(columns[key])} for input_ids of {shape}; expected one number "
                    f"for each token{'' if depth(columns[key]) else batch}"
                )
        if not {*flat(columns.get("attention_mask", ()))} <= {0, 1}:
            raise CalibrationError(
                f"{has} an attention_mask of other numbers than 0, for padding, and 1; expected these"
            )
        types = {*flat(columns.get("token_type_ids", ()))}
        if types and self.types and not 0 <= min(types) <= max(types) < self.types:
            raise CalibrationError(
                f"{has} token_type_ids {min(types)} to {max(types)}, {self.name} has {self.types} types of "
                "tokens; was it made with another tokenizer?"
            )

    def check_target(self, index: int, row: Mapping[str, object]) -> bool:
        """Whether there is a token in the target of a row.

        Raises:
            CalibrationError: If the row has no target, or one that the decoder cannot read.
        """
        targets = [row[key] for key in ("decoder_input_ids", "labels") if key in row]
        if not targets:
            raise CalibrationError(
                f"calibration row {index} has only {', '.join(row)}, which gives the decoder of {self.name} "
                "nothing to read; pass (source, target) pairs, or rows with labels or decoder_input_ids"
            )
        target = [token for token in flat(targets[0]) if token != -100]
        has = f"the target of calibration row {index} has"
        self.check_ids(has, target, len(target), self.target_limit, self.target_vocabulary)
        return bool(target)

    def check_ids(
        self, has: str, ids: list[int], length: int, limit: int | None, vocabulary: int | None
    ) -> None:
        """Raise `CalibrationError` unless ids fit a vocabulary and their number a limit, where not None."""
        if limit is not None and length > limit:
            raise CalibrationError(
                f"{has} {length} tokens, {self.name} takes at most {limit}; tokenise with truncation=True, "
                f"max_length={limit}, or pass texts and set max_seq_length"
            )
        if ids and vocabulary is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise CalibrationError(
                f"{has} token ids {min(ids)} to {max(ids)}, the model's vocabulary has {vocabulary}; was it "
                "made with another tokenizer?"
            )

    # --------------------------------------------------------------------------------------------------------
    # An entry of the dataset, as columns
    # --------------------------------------------------------------------------------------------------------

    def split(self, entry: object) -> Iterable[Any]:
        """The rows in an entry of the dataset: itself, or those of a batch of token ids, (1, L) or more."""
        if self.main == "input_ids" and depth(ids := self.named(entry).get("input_ids", ())) > self.dims:
            if len(ids) > 1:
                self.warn(
                    "calibration rows with input_ids of several dimensions are read as batches of rows, the "
                    f"first of them as {len(ids)} rows"
                )
            return split_rows(self.named(entry), len(ids))
        return [entry]

    def named(self, entry: object) -> Row:
        """An entry of the dataset as columns by name."""
        if isinstance(entry, Mapping):
            optional = (self.accepted - {self.main}) | self.labels
            return {key: value for key, value in entry.items() if value is not None or key not in optional}
        if self.main == "input_ids":
            return self.text_or_ids(entry)
        if isinstance(entry, str):
            return {}
        if isinstance(entry, tuple) and entry and not isinstance(entry[0], (int, float)):
            entry = entry[0]  # an image or sound, and a label
        ready = self.sense is None or (self.processing_class is None and floats(entry) is not None)
        return {self.main if ready else str(self.sense): entry}

    def text_or_ids(self, entry: object) -> Row:
        """A chat, texts or token ids, under the name of the column that holds such; nothing for others."""
        if isinstance(entry, (tuple, list)):
            if entry and all(isinstance(part, Mapping) for part in entry):
                return {"messages": entry}
            if any(isinstance(part, str) for part in entry):
                # numbers are labels, but for NaN, which stands where a table lacks a text
                texts = [part for part in entry if not isinstance(part, (Number, Tensor)) or part != part]
                return {"text": texts[0] if len(texts) == 1 else texts}
            if depth(entry) > 1 and (isinstance(entry, tuple) or hasattr(entry[0], "ndim")):
                return self.tuple_of_ids(*entry)
        if depth(entry):
            return {"input_ids": entry}
        return {"text": entry} if isinstance(entry, str) else {}

    def tuple_of_ids(self, ids: object, *others: object) -> Row:
        """Token ids, with the mask if that comes next. Of a tuple nothing else is read, as a warning says."""
        columns, rest = {"input_ids": ids}, list(others)
        if rest and depth(rest[0]) and {*flat(rest[0])} <= {0, 1} and not {*flat(ids)} <= {0, 1}:
            columns["attention_mask"] = rest.pop(0)
        if rest:
            self.warn(
                "the calibration rows are tuples: their token ids are read, and a mask that comes next, "
                "nothing else"
            )
        return columns

    def warn(self, message: str) -> None:
        """Warn once for all rows."""
        if message not in self.messages:
            logger.warning(message)
        self.messages.add(message)

    def columns(self, entry: object) -> Row:
        """An entry of the dataset with its text, chat, image or sound made into inputs of the model."""
        columns = self.named(entry)
        if not columns and not isinstance(entry, Mapping):
            raise CalibrationError(
                f"a calibration row is {entry!r:.80}, expected a mapping of columns, {self.main} among them"
            )
        chosen = self.args.text_columns if isinstance(entry, Mapping) else None
        if self.main in columns and not (chosen and columns.keys() >= {*chosen}):
            return columns
        chats = [name for name in CHAT_COLUMNS if columns.get(name) is not None]  # it is in a row of text
        chat = chats[0] if chats and chosen is None else None
        if self.has_images(columns, columns.get(chat) if chat else None):
            return self.process(columns, chat)
        if self.sense in columns:
            inputs = self.features(columns)
        elif self.main != "input_ids":
            return columns
        elif chat is not None:
            inputs = self.texts.chat(columns.pop(chat))
        elif not isinstance(entry, Mapping) and "text" in columns:
            inputs = self.texts.tokens(columns.pop("text"))
        else:
            names = text_columns(columns.keys(), chosen, self.needs_targets)
            if not names or self.processing_class is None:
                return columns
            inputs = self.of_texts(names, columns)
        names_here = self.accepted | {"labels"}
        return columns | {key: value for key, value in inputs.items() if key in names_here}

    def of_texts(self, names: tuple[str, ...], columns: dict[str, object]) -> Row:
        """Token ids of the texts in columns of these names, which are taken out of `columns`."""
        values = {name: columns.pop(name) for name in dict.fromkeys(names)}
        texts = [values[name] for name in names]
        others = sorted(
            key for key, value in columns.items() if isinstance(value, str) and key not in self.labels
        )
        if others and len(names) == 1 and self.args.text_columns is None:
            self.warn(
                f"the calibration texts are read from the column {names[0]}, not from {', '.join(others)}; "
                "choose with text_columns"
            )
        if self.dims > 1:
            return self.texts.choices(texts)
        if len(texts) > 2:
            raise ArgumentError(f"text_columns names {len(texts)} columns, {self.name} takes one or two")
        if len(texts) == 1 and isinstance(texts[0], list) and (names != ("text",) or len(texts[0]) > 2):
            return self.texts.words(texts[0])
        return self.texts.tokens(texts[0] if len(texts) == 1 else tuple(texts))

    def has_images(self, columns: Row, chat: object) -> bool:
        """Whether a row of a language model has images, of which a processor makes tokens."""
        there = bool(pictures_of(columns)) or has_pictures(chat)
        return (
            there
            and self.sense == "image"
            and self.main == "input_ids"
            and hasattr(self.processing_class, "tokenizer")
            and (chat is not None or getattr(self.processing_class, "chat_template", None) is not None)
        )

    def process(self, columns: Row, chat: str | None) -> Processed:
        """The row that the processor makes of images and the chat or the text beside them."""
        processor = self.processing_class
        if getattr(processor, "chat_template", None) is None:
            raise ArgumentError(
                f"the calibration dataset holds chats with images, {type(processor).__name__} has no "
                "chat_template: set it, or pass rows as the processor makes them"
            )
        images, text = pictures_of(columns), columns.get("text")
        encoded = process(processor, columns[chat] if chat else question_about(text, images), images)
        if self.limit is not None and len(encoded["input_ids"]) > self.limit:
            raise CalibrationError(
                f"a calibration row has {len(encoded['input_ids'])} tokens with its images, {self.name} "
                f"takes at most {self.limit}; shorten its texts, or make its images smaller"
            )
        return Processed({key: value for key, value in encoded.items() if key in self.accepted})

    def features(self, columns: Row) -> Row:
        """Inputs made of an image or of sound, and of the text beside it if the processor is for both.

        What they are made of is taken out of `columns`.
        """
        processor, sense = self.processing_class, str(self.sense)
        name, value = type(processor).__name__, columns.pop(sense)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if processor is None or isinstance(processor, PreTrainedTokenizerBase):
            wanted = "image processor" if sense == "image" else "feature extractor"
            raise ArgumentError(
                f"the calibration dataset holds rows of {sense}, processing_class is {name}; pass the "
                f"model's {wanted}"
            )
        if sense == "audio":
            extractor = getattr(processor, "feature_extractor", processor)
            rate = expected = getattr(extractor, "sampling_rate", None)
            if not isinstance(
                value, (np.ndarray, Tensor, list, tuple)
            ):  # bare samples do not tell their rate
                value, rate = value["array"], value["sampling_rate"]
            if rate != expected:
                raise CalibrationError(
                    f"the calibration dataset has audio at {rate} Hz, {name} takes {expected} Hz; resample "
                    f"it: dataset.cast_column('audio', datasets.Audio(sampling_rate={expected}))"
                )
            value, options["sampling_rate"] = np.asarray(value, dtype=np.float32), rate
        if hasattr(processor, "tokenizer"):
            options |= {"images" if sense == "image" else sense: value}
            inputs = processor(**options, **({"text": columns.pop("text")} if "text" in columns else {}))
        else:
            inputs = processor(value, **options)
        if any(len(part) != 1 for part in inputs.values()):
            shapes = {key: tuple(part.shape) for key, part in inputs.items()}
            raise CalibrationError(
                f"{name} made {shapes} of one {sense}, expected one row; pass rows with {self.main}"
            )
        return {key: part[0] for key, part in inputs.items()}
