"""Calibration rows are drawn from whatever dataset there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError
from .nested import Row
from .reader import Reader
from .rows import Rows, TokensPerRow
from .sources import is_sized, read_rows, rows_of
from .texts import check_not_endless


def draw_rows(
    model: PreTrainedModel,
    dataset: object,
    processing_class: object,
    args: KPruneArguments,
    keep_labels: bool,
    tokens_per_row: TokensPerRow | None = None,
    most: int | None = None,
) -> Rows:
    """Draw rows without replacement until they hold `args.num_tokens` tokens, and check them.

    A dataset with a length is drawn from at random (`args.seed`), a stream is read from its beginning.

    Args:
        model: The model that the rows are for.
        dataset: Whatever `sources.rows_of` knows.
        processing_class: See `Reader`.
        args: Options.
        keep_labels: Whether labels stay in the rows, as a data collator of the caller's may want to see them.
            Else they are dropped, unless they are a decoder's targets, or mark by -100 tokens of a causal
            model that do not count.
        tokens_per_row: Counts the tokens of rows without `input_ids`. None: such rows are refused.
        most: Rows that are enough, whatever tokens they hold.
    """
    reader = Reader(model, processing_class, args, keep_labels)
    source = getattr(dataset, "_fingerprint", None) or type(dataset).__name__
    dataset = rows_of(dataset, reader.main, reader.dims)
    if args.packing:
        dataset = _packed(dataset, reader)
    rows: list[Row] = []
    tokens = measured = 0
    for row, count in _with_tokens(dataset, reader, tokens_per_row):
        rows.append(row)
        if tokens < (args.num_measure_tokens or args.num_tokens):
            measured = len(rows)
        tokens += count
        if tokens >= args.num_tokens or len(rows) == most:
            break
    if not rows:
        why = f": none of its {reader.count} rows has a token that is not padding" if reader.count else ""
        raise CalibrationError(
            f"the calibration dataset is empty{why}; a few hundred rows like those the model will see will "
            "do (an iterator can be read only once)"
        )
    if reader.causal and any("labels" in row for row in rows):  # all or none: they are batched
        rows = [type(row)({**row, "labels": row.get("labels", row["input_ids"])}) for row in rows]
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


def _packed(dataset: object, reader: Reader) -> Any:
    """The texts of a dataset, joined and cut into blocks; a stream stays one."""
    if reader.main != "input_ids":
        raise ArgumentError(f"packing is True, expected False: {reader.name} takes {reader.main}, no texts")
    sized = is_sized(dataset)
    blocks = reader.texts.pack((entry for _, entry in read_rows(dataset, sized, None)), sized)
    return list(blocks) if sized else blocks


def _with_tokens(
    dataset: object, reader: Reader, tokens_per_row: TokensPerRow | None
) -> Iterator[tuple[Row, int]]:
    """The rows of a dataset that have tokens, in the order of the draw, and how many these are."""
    sized, empty = is_sized(dataset), 0
    for index, entry in read_rows(dataset, sized, reader.args.seed):
        for part in reader.split(entry):
            row, tokens = reader.read(index, part, tokens_per_row)
            empty = 0 if tokens else empty + 1
            if tokens:
                yield row, tokens
            elif not sized:
                check_not_endless(empty)
