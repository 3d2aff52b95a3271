"""Calibration rows: drawn from whatever dataset there is, made into what the model takes if they are not yet, and checked."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_labels, logging

from .arguments import KPruneArguments
from .errors import ArgumentError, CalibrationError
from .sublayers import family_of


logger = logging.get_logger(__name__)

TokensPerRow = Callable[[dict[str, Any]], int]
"""Tokens that the model makes of a row without `input_ids`: patches of an image, frames of sound."""


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model's position embeddings can tell apart; None if nothing limits them."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # models that number positions from padding_idx + 1 (RoBERTa's kin) lose the first ones
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    return None if limit is None else int(limit)


def vocabulary(model: PreTrainedModel, part: Any) -> int | None:
    """Token ids that a part of the model (itself, its decoder) can embed; None if it does not say."""
    try:
        return int(part.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):  # two towers, or a plain module
        return getattr(model.config.get_text_config(), "vocab_size", None)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model is a causal language model, whose labels are those of its own inputs."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return any(cls.__name__ in causal for cls in type(model).__mro__)


def needs_targets(model: PreTrainedModel) -> bool:
    """Whether the model has a decoder that must be told what to read: `labels` or `decoder_input_ids`."""
    name, takes = type(model).__name__, inspect.signature(model.forward).parameters
    alone = "Classification" in name or "QuestionAnswering" in name  # their decoders read the encoder's tokens again
    alone = alone or (name.endswith("Model") and any(stack.shifts for stack in family_of(model) or ()))
    return getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes and not alone


def flat(value: Any) -> Iterator[Any]:
    """The numbers in a list, array or tensor, or in lists of them of any lengths (choices)."""
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        yield from flat(entry) if hasattr(entry, "__len__") else (entry,)


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
    return sum(flat(row["attention_mask"])) if "attention_mask" in row else sum(1 for _ in flat(row["input_ids"]))


def row_length(row: dict[str, Any], tokens_per_row: TokensPerRow | None = None) -> int:
    """Positions that a row takes, padding included."""
    if "input_ids" in row:
        return max(map(len, row["input_ids"]), default=0) if has_choices(row) else len(row["input_ids"])
    if tokens_per_row is None:
        raise ArgumentError(f"a row of {sorted(row)} does not tell how many tokens it makes; pass tokens_per_row")
    return tokens_per_row(row)


def has_choices(row: dict[str, Any]) -> bool:
    """Whether a row holds several sequences (multiple choice)."""
    ids = row.get("input_ids", ())
    return ids.ndim > 1 if hasattr(ids, "ndim") else len(ids) > 0 and hasattr(ids[0], "__len__")


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

    @property
    def sequences(self) -> int:
        """More than the rows where a row holds several choices."""
        return sum(len(row["input_ids"]) if has_choices(row) else 1 for row in self.rows)


class Reader:
    """Makes what a dataset holds into rows that a model takes, and checks them. `digest` is of what the model reads."""

    def __init__(self, model: PreTrainedModel, processing_class: Any, args: KPruneArguments, keep_labels: bool):
        self.name, self.processing_class = type(model).__name__, processing_class
        self.args, self.keep_labels = args, keep_labels
        names = model.main_input_name
        self.main: str = names if isinstance(names, str) else names[0]
        self.labels = {"label", "labels", "label_ids", *find_labels(type(model))}
        self.accepted = set(inspect.signature(model.forward).parameters) - self.labels
        sound = self.accepted & {"input_values", "input_features"}
        self.sense = "image" if "pixel_values" in self.accepted else "audio" if sound else None
        self.causal = is_causal(model)
        self.limit, self.vocabulary = max_positions(model), vocabulary(model, model)
        self.needs_targets = needs_targets(model)
        decoder = model.get_decoder() if self.needs_targets else model
        self.target_limit = max_positions(decoder) if isinstance(decoder, PreTrainedModel) else self.limit
        self.target_vocabulary = vocabulary(model, decoder)
        self.digest, self.told = hashlib.sha256(), False

    def read(self, index: int, raw: Any, tokens_per_row: TokensPerRow | None) -> tuple[dict[str, Any], int]:
        """A row of those columns that are used, with floats in tensors, and its tokens; 0 if there is nothing in it."""
        columns = self.columns(raw)
        used = self.accepted & columns.keys()
        if "labels" in columns and self.needs_targets and "decoder_input_ids" not in columns:
            used.add("labels")
        elif "labels" in columns and self.causal and -100 in np.ravel(columns["labels"]):
            used.add("labels")
            if (labels := len(columns["labels"])) != (length := len(columns.get("input_ids", ()))):
                raise CalibrationError(
                    f"calibration row {index} has {labels} labels for {length} tokens; expected one each, -100 where the "
                    "knowledge is not to be compared"
                )
        surplus = sorted(columns.keys() - used - self.labels)
        if self.main not in columns or (surplus and not self.args.remove_unused_columns):
            text = "tokenise the texts (dataset.map), or pass them as a plain list of strings with processing_class"
            other = f"make {self.main} of them (dataset.map), or pass a column {self.sense!r} and processing_class"
            raise CalibrationError(
                f"the calibration dataset has the columns {sorted(columns)}, {self.name} takes {sorted(self.accepted)}; "
                + (text if self.main == "input_ids" else other)
                + (", and drop the other columns or set remove_unused_columns=True" if surplus else "")
            )
        if surplus and not self.told:
            logger.info("not used for calibration: the columns %s", ", ".join(surplus))
        self.told = True
        row = {key: value for key, value in columns.items() if key in used or (self.keep_labels and key in self.labels)}
        row |= {key: tensor for key in used if "mask" not in key and (tensor := floats(row[key])) is not None}

        count = row_tokens(row, tokens_per_row)
        if "input_ids" in row:
            has = f"calibration row {index} has"
            self.check_ids(has, list(flat(row["input_ids"])), row_length(row), self.limit, self.vocabulary)
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
            elif isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CalibrationError(f"calibration row {index} has {key} that are not finite; leave such rows out")
            elif key != self.main and not (isinstance(value, Tensor) and value.is_floating_point()):
                continue
            self.digest.update(np.ascontiguousarray(value).tobytes())
        return row, count

    def check_ids(self, has: str, ids: list[int], length: int, limit: int | None, vocabulary: int | None) -> None:
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

    def columns(self, raw: Any) -> dict[str, Any]:
        """A row of the dataset with what is in it, a text, a chat, an image or sound, made into inputs of the model."""
        if named := isinstance(raw, Mapping):
            columns = dict(raw)
        elif self.main == "input_ids" and isinstance(raw, (str, tuple, list)):
            columns = {"messages" if raw and all(isinstance(part, Mapping) for part in raw) else "text": raw}
        elif self.sense is not None and not isinstance(raw, str):
            columns = {self.sense: raw}
        else:
            raise CalibrationError(f"a calibration row is {raw!r:.80}, expected a mapping of columns, {self.main} among them")
        if self.main in columns:
            return columns
        texts = self.main == "input_ids"
        if self.sense in columns:
            made = self.features(columns)
        elif texts and "messages" in columns:
            made = self.chat(columns.pop("messages"))
        elif texts and columns.keys() - self.labels == {"text"} and not (named and self.processing_class is None):
            made = self.tokens(columns.pop("text"))
        else:
            return columns
        return columns | {key: value for key, value in made.items() if key in self.accepted or key == "labels"}

    def tokenizer(self, what: str) -> Any:
        if self.processing_class is None:
            raise ArgumentError(f"the calibration dataset holds {what}: pass processing_class, the model's tokenizer")
        return getattr(self.processing_class, "tokenizer", self.processing_class)  # of a processor for texts and more

    def truncation(self) -> dict[str, Any]:
        longest = min((n for n in (self.args.max_seq_length, self.limit) if n is not None), default=None)
        return {"truncation": longest is not None, "max_length": longest}

    def tokens(self, text: Any) -> dict[str, Any]:
        """Of a text or a pair of texts; of a source and a target, which become `labels`, where the decoder needs one."""
        tokenizer = self.tokenizer("texts")
        pair = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        if len(pair) not in (1, 2) or not all(isinstance(part, str) for part in pair):
            raise CalibrationError(f"a calibration text is {text!r}, expected a string or a pair of strings")
        if self.needs_targets and len(pair) == 2:
            return dict(tokenizer(pair[0], text_target=pair[1], **self.truncation()))
        return dict(tokenizer(*pair, **self.truncation()))

    def chat(self, messages: Any) -> dict[str, Any]:
        """Of a chat; `labels` are -100 where the assistant does not speak, if the template tells."""
        tokenizer = self.tokenizer("chats")
        if getattr(tokenizer, "chat_template", None) is None:
            name = type(tokenizer).__name__
            raise ArgumentError(f"the calibration dataset holds chats, {name} has no chat_template: set it, or pass texts")
        tells = tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None
        options = {"return_dict": True, "return_assistant_tokens_mask": tells, **self.truncation()}
        made = dict(tokenizer.apply_chat_template(messages, **options))
        if tells:
            spoken = zip(made["input_ids"], made.pop("assistant_masks"), strict=True)
            made["labels"] = [token if ours else -100 for token, ours in spoken]
        return made

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
            rate = expected = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
            if not isinstance(value, (np.ndarray, Tensor, list, tuple)):  # bare samples do not tell their rate
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
            raise CalibrationError(f"{name} made {shapes} of one {sense}, expected one row; pass rows with {self.main}")
        return {key: part[0] for key, part in made.items()}

    def pack(self, dataset: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Blocks of one length, cut from all texts in their order, one after the other. What is left over is dropped."""
        if self.main != "input_ids":
            raise ArgumentError(f"packing is True, expected False: {self.name} takes {self.main}, no texts")
        tokenizer = self.tokenizer("texts")
        block = min(n for n in (self.args.max_seq_length or 1024, self.limit) if n is not None)
        stream: list[int] = []
        last, made = None, False
        for raw in dataset:
            text = raw.get("text") if isinstance(raw, Mapping) else raw
            if not isinstance(text, str):
                held = f"the columns {sorted(raw)}" if isinstance(raw, Mapping) else repr(raw)
                raise CalibrationError(f"packing takes strings or a column 'text', the calibration dataset has {held}")
            if not text.strip():
                continue
            if last is not None and tokenizer.eos_token_id not in (None, last):
                stream.append(tokenizer.eos_token_id)
            stream += tokenizer(text, verbose=False)["input_ids"]  # or it would warn of long documents
            last = stream[-1]
            for start in range(0, len(stream) - block + 1, block):
                yield {"input_ids": stream[start : start + block]}
                made = True
            stream = stream[len(stream) // block * block :]
        if stream and not made:
            raise CalibrationError(
                f"packed, the calibration texts hold {len(stream)} tokens, fewer than a block of {block}; give more texts or "
                "lower max_seq_length"
            )


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
    if isinstance(dataset, (str, Mapping)):  # both have a length and items, which are no rows
        raise CalibrationError(
            f"the calibration dataset is a {type(dataset).__name__}, expected a dataset of rows or a list of texts (of a "
            "DatasetDict, pass one split)"
        )
    reader = Reader(model, processing_class, args, keep_labels)
    source = getattr(dataset, "_fingerprint", None) or type(dataset).__name__
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if args.packing:
        blocks = reader.pack((dataset[i] for i in range(len(dataset))) if sized else dataset)
        dataset = list(blocks) if sized else blocks
    drawn: Iterable[tuple[int, Any]] = enumerate(dataset)
    if sized:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
        drawn = ((index, dataset[index]) for index in order)

    rows: list[dict[str, Any]] = []
    tokens = measured = 0
    for index, raw in drawn:
        row, count = reader.read(index, raw, tokens_per_row)
        if count == 0:
            continue
        rows.append(row)
        if tokens < (args.num_measure_tokens or args.num_tokens):
            measured = len(rows)
        tokens += count
        if tokens >= args.num_tokens:
            break
    if not rows:
        raise CalibrationError("the calibration dataset is empty; a few hundred rows like those the model will see will do")
    if reader.causal and any("labels" in row for row in rows):
        rows = [{**row, "labels": row.get("labels", row["input_ids"])} for row in rows]  # all or none: they are batched
    fingerprint = {
        "dataset": source,
        "rows": len(rows),
        "rows_measured": measured,
        "tokens": tokens,
        "seed": args.seed,
        "sha256": reader.digest.hexdigest(),
    }
    return Rows(rows, measured, tokens, fingerprint)
