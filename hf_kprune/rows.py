"""Calibration rows: drawn from whatever dataset there is, tokenised if they are texts, and checked."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_labels, logging

from .arguments import KPruneArguments
from .errors import ArgumentError, CalibrationError


logger = logging.get_logger(__name__)


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model's position embeddings can tell apart; None if nothing limits them."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # models that number positions from padding_idx + 1 (RoBERTa's kin) lose the first ones
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def tokenize(texts: Sequence[Any], processing_class: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Tokenise texts, or pairs of texts, each into a row of its own."""
    rows = []
    for text in texts:
        pair = (text,) if isinstance(text, str) else tuple(text)
        if len(pair) not in (1, 2) or not all(isinstance(part, str) for part in pair):
            raise CalibrationError(f"a calibration text is {text!r}, expected a string or a pair of strings")
        rows.append(dict(processing_class(*pair, truncation=max_length is not None, max_length=max_length)))
    return rows


def flat(value: Any) -> Iterator[int]:
    """The numbers in a list, array or tensor, or in lists of them of any lengths (choices)."""
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        yield from flat(entry) if hasattr(entry, "__len__") else (entry,)


def row_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row that are not padding (of all its choices, for multiple choice)."""
    return sum(flat(row["attention_mask"])) if "attention_mask" in row else sum(1 for _ in flat(row["input_ids"]))


def has_choices(row: dict[str, Any]) -> bool:
    """Whether a row holds several sequences (multiple choice)."""
    ids = row["input_ids"]
    return ids.ndim > 1 if hasattr(ids, "ndim") else len(ids) > 0 and hasattr(ids[0], "__len__")


def row_length(row: dict[str, Any]) -> int:
    """Positions that a row takes, padding included."""
    return max(map(len, row["input_ids"]), default=0) if has_choices(row) else len(row["input_ids"])


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
    def sequences(self) -> int:
        """More than the rows where a row holds several choices."""
        return sum(len(row["input_ids"]) if has_choices(row) else 1 for row in self.rows)


def draw_rows(model: PreTrainedModel, dataset: Any, processing_class: Any, args: KPruneArguments, keep_labels: bool) -> Rows:
    """Draw rows without replacement until they hold `args.num_tokens` tokens, and check them.

    A dataset with a length is drawn from at random (`args.seed`), a stream is read from its beginning. Labels are
    dropped unless a data collator of the caller's may want to see them (`keep_labels`); nothing here uses them.
    """
    if isinstance(dataset, (str, Mapping)):  # both have a length and items, which are no rows
        raise CalibrationError(
            f"the calibration dataset is a {type(dataset).__name__}, expected a dataset of rows or a list of texts (of a "
            "DatasetDict, pass one split)"
        )
    limit = max_positions(model)
    labels = {"label", "labels", "label_ids", *find_labels(type(model))}
    accepted = set(inspect.signature(model.forward).parameters) - labels
    seen_columns: dict[str, None] = {}

    def prepare(row: Any) -> dict[str, Any]:
        if isinstance(row, (str, tuple, list)):
            if processing_class is None:
                raise ArgumentError("the calibration dataset holds texts: pass processing_class, the model's tokenizer")
            longest = [n for n in (args.max_seq_length, limit) if n is not None]
            row = tokenize([row], processing_class, min(longest, default=None))[0]
            row = {key: value for key, value in row.items() if key in accepted}
        columns = dict.fromkeys(row)
        kept = {key for key in columns if key in accepted or (keep_labels and key in labels)}
        surplus = [key for key in columns if key not in kept and key not in labels]
        if "input_ids" not in kept or (surplus and not args.remove_unused_columns):
            raise CalibrationError(
                f"the calibration dataset has the columns {sorted(columns)}, {type(model).__name__} takes "
                f"{sorted(accepted)}; tokenise the texts (dataset.map), or pass them as a plain list of strings with "
                "processing_class" + (", and drop the other columns or set remove_unused_columns=True" if surplus else "")
            )
        if surplus and not seen_columns:
            logger.info("not used for calibration: the columns %s", ", ".join(sorted(surplus)))
        seen_columns.update(columns)
        return {key: row[key] for key in columns if key in kept}

    order: Iterable[tuple[int, Any]]
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        draw = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
        order = ((index, dataset[index]) for index in draw)
    else:
        order = enumerate(dataset)

    rows: list[dict[str, Any]] = []
    tokens, measured, digest = 0, 0, hashlib.sha256()
    vocabulary = model.get_input_embeddings().num_embeddings
    for index, raw in order:
        row = prepare(raw)
        count, length = row_tokens(row), row_length(row)
        if limit is not None and length > limit:
            raise CalibrationError(
                f"calibration row {index} has {length} tokens, {type(model).__name__} takes at most {limit}; tokenise "
                f"with truncation=True, max_length={limit}, or pass texts and set max_seq_length"
            )
        ids = torch.tensor(list(flat(row["input_ids"])))
        if count == 0:
            continue
        if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
            raise CalibrationError(
                f"calibration row {index} has token ids {int(ids.min())} to {int(ids.max())}, the model's vocabulary "
                f"has {vocabulary}; was it made with another tokenizer?"
            )
        rows.append(row)
        digest.update(ids.to(torch.int64).numpy().tobytes())
        if tokens < (args.num_measure_tokens or args.num_tokens):
            measured = len(rows)
        tokens += count
        if tokens >= args.num_tokens:
            break
    if not rows:
        raise CalibrationError("the calibration dataset is empty; a few hundred texts like those the model will see will do")
    fingerprint = {
        "dataset": getattr(dataset, "_fingerprint", None) or type(dataset).__name__,
        "rows": len(rows),
        "rows_measured": measured,
        "tokens": tokens,
        "seed": args.seed,
        "sha256": digest.hexdigest(),
    }
    return Rows(rows, measured, tokens, fingerprint)
