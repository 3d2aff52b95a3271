"""Calibration data as people have it: every container gives the same rows, and what cannot be read is said in their words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from data import CHAT, PLAIN, TELLING, draw, word_tokenizer
from models import shallow, tiny_of_class
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset
from transformers import BatchEncoding, DataCollatorWithPadding

from hf_kprune import ArgumentError, CalibrationError, KPruneArguments, KPruneError, KPrunePruner
from hf_kprune.calibration.sources import MOST_SHUFFLED, TARGET_COLUMNS, TEXT_COLUMNS
from hf_kprune.calibration.texts import CHARACTERS


GPT = "GPT2LMHeadModel"
IDS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20], [21, 22, 23, 24]]
TEXTS = [" ".join(f"w{i}" for i in row) for row in IDS]
TENSOR = torch.tensor(IDS)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])


def read(dataset: Any, *, stream: bool = False, **options: Any) -> list[list[int]]:
    """The real tokens of the rows that are drawn, sorted."""
    rows = draw(GPT, dataset, word_tokenizer(), **options).rows
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    masks = [
        torch.as_tensor(row.get("attention_mask", torch.ones_like(i))).bool()
        for i, row in zip(ids, rows, strict=True)
    ]
    return sorted(i[mask].tolist() for i, mask in zip(ids, masks, strict=True))


def encoded(**options: Any) -> BatchEncoding:
    return word_tokenizer()(TEXTS, **options)


class Numbered:
    """A map-style dataset and nothing more."""

    def __init__(self, rows: list[Any], length: int | None = None):
        self.rows, self.length = rows, len(rows) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Streamed(IterableDataset[Any]):
    """A stream that tells a length, as torch's may."""

    def __iter__(self) -> Iterator[Any]:
        return iter(TEXTS)

    def __len__(self) -> int:
        return len(TEXTS)


class Unsized(Numbered):
    def __len__(self) -> int:
        raise TypeError("no length")


def collated(rows: list[Any]) -> dict[str, Tensor]:
    return dict(DataCollatorWithPadding(word_tokenizer())([word_tokenizer()(text) for text in rows]))


def loader(rows: Any, **options: Any) -> DataLoader[Any]:
    """A DataLoader of rows of whatever kind, as they are."""
    return DataLoader(rows, **options)


CONTAINERS: dict[str, Any] = {
    "a tuple of strings": lambda: tuple(TEXTS),
    "a generator of strings": lambda: (text for text in TEXTS),
    "an array of strings": lambda: np.array(TEXTS),
    "a pandas Series": lambda: pd.Series(TEXTS, index=range(5, 10)),
    "a pandas DataFrame": lambda: pd.DataFrame(
        {"sentence": TEXTS, "label": [0, 1, 0, 1, 0]}, index=list("abcde")
    ),
    "a pandas DataFrame of ids": lambda: pd.DataFrame({"input_ids": IDS}),
    "a column of a dataset": lambda: datasets.Dataset.from_dict({"a": TEXTS})["a"],
    "strings with labels": lambda: [(text, 1) for text in TEXTS],
    "strings with labels in tensors": lambda: [(text, torch.tensor(1)) for text in TEXTS],
    "a BatchEncoding": lambda: encoded(),
    "a BatchEncoding of tensors": lambda: encoded(return_tensors="pt"),
    "BatchEncodings of single rows": lambda: [word_tokenizer()(text) for text in TEXTS],
    "BatchEncodings of (1, L)": lambda: [word_tokenizer()(text, return_tensors="pt") for text in TEXTS],
    "BatchEncodings of batches": lambda: [
        word_tokenizer()(TEXTS[:3], return_tensors="pt"),
        word_tokenizer()(TEXTS[3:]),
    ],
    "a dict of lists": lambda: {"input_ids": IDS, "label": [0, 1, 0, 1, 0]},
    "a dict of tensors": lambda: {"input_ids": TENSOR},
    "a dict of texts": lambda: {"text": TEXTS, "idx": range(5)},
    "a dict of pandas columns": lambda: dict(pd.DataFrame({"text": TEXTS, "label": 0}).items()),
    "a list of (1, L) tensors": lambda: list(TENSOR.split(1)),
    "a list of (L,) tensors": lambda: list(TENSOR),
    "a list of lists of ids": lambda: IDS,
    "a list of lists of (1, L)": lambda: [[row] for row in IDS],
    "a list of lists of single numbers": lambda: [list(row) for row in TENSOR],
    "a list of lists of numbers of numpy": lambda: [list(row) for row in np.array(IDS)],
    "a tensor": lambda: TENSOR,
    "an array": lambda: np.array(IDS),
    "a list of (input, target)": lambda: [(row, torch.full_like(row, -100)) for row in TENSOR.split(1)],
    "a TensorDataset": lambda: TensorDataset(TENSOR),
    "a map-style dataset": lambda: Numbered(TEXTS),
    "a map-style dataset without a length": lambda: Unsized(TEXTS),
    "a stream of torch": lambda: Streamed(),
    "a stream of datasets": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    "a DataLoader of strings": lambda: loader(TEXTS, batch_size=2),
    "a DataLoader of pairs with labels": lambda: loader([(text, 1) for text in TEXTS], batch_size=2),
    "a DataLoader of dicts of strings": lambda: loader(
        [{"text": text, "label": 1} for text in TEXTS], batch_size=2
    ),
    "a DataLoader of dicts of tensors": lambda: loader([{"input_ids": row} for row in TENSOR], batch_size=2),
    "a DataLoader with a collator": lambda: loader(TEXTS, batch_size=2, collate_fn=collated),
    "a DataLoader with a sampler": lambda: loader(TEXTS, batch_size=3, sampler=SequentialSampler(TEXTS)),
    "a DataLoader that shuffles": lambda: loader(TensorDataset(TENSOR), batch_size=3, shuffle=True),
    "a DataLoader of a TensorDataset": lambda: loader(TensorDataset(TENSOR, torch.zeros(5)), batch_size=4),
    "a DataLoader of lists of rows": lambda: loader(TENSOR, batch_size=4, collate_fn=list),
    "a DataLoader of lists of ids": lambda: loader(IDS, batch_size=4),
    "a DataLoader of (1, L) tensors": lambda: loader(TENSOR.split(1), batch_size=2),
    "a DataLoader of tuples of columns": lambda: loader(
        TEXTS,
        batch_size=2,
        collate_fn=lambda rows: tuple(collated(rows)[key] for key in ("input_ids", "attention_mask")),
    ),
    "a DataLoader that makes no batches": lambda: loader(TEXTS, batch_size=None),
    "a list of the batches of a DataLoader": lambda: list(loader(TEXTS, batch_size=2, collate_fn=collated)),
    "a column of contents": lambda: [{"content": text, "id": 1} for text in TEXTS],
    "a column of documents": lambda: datasets.Dataset.from_dict({"document": TEXTS}),
    "a column of words": lambda: datasets.Dataset.from_dict({"tokens": [text.split() for text in TEXTS]}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_rows(kind: str) -> None:
    assert read(CONTAINERS[kind]()) == IDS


@pytest.mark.parametrize(
    "dataset", [TensorDataset(TENSOR, MASK), TensorDataset(TENSOR, MASK, torch.zeros(5)), None]
)
def test_a_mask_that_comes_next_to_the_ids_is_one(dataset: Any) -> None:
    expected = [row[mask.bool()].tolist() for row, mask in zip(TENSOR, MASK, strict=True)]
    columns = {"input_ids": TENSOR, "attention_mask": MASK}
    for data in (
        (dataset, loader(dataset, batch_size=2)) if dataset else (columns, loader([columns], batch_size=None))
    ):
        assert read(data) == expected


def test_a_pruner_takes_a_data_loader() -> None:
    generator = torch.Generator().manual_seed(0)
    data = loader(TensorDataset(torch.randint(2, 60, (24, 12), generator=generator)), batch_size=5)
    args = KPruneArguments(method="magnitude", use_cpu=True, disable_tqdm=True)
    report = KPrunePruner(shallow(), args, data).prune()
    assert report.calibration["tokens"] == 24 * 12
    assert report.sparsity >= 0.5


PAIRS = [names for names in TEXT_COLUMNS if len(names) == 2]


@pytest.mark.parametrize("names", PAIRS)
def test_columns_of_pairs_are_known(names: tuple[str, str]) -> None:
    row = {names[1]: "w7 w8", names[0]: "w5 w6", "idx": 3, "label": 1}
    assert read([row]) == [[5, 6, 4, 7, 8]]
    chosen = {"x": "w7 w8", "text": "w5 w6"}
    assert read([chosen], text_columns=["text", "x"]) == [[5, 6, 4, 7, 8]]
    assert read([chosen], text_columns=["x"]) == [[7, 8]]
    assert read([{**chosen, "input_ids": [9]}], text_columns=["x"]) == [[7, 8]]


@pytest.mark.parametrize("names", TARGET_COLUMNS)
def test_columns_of_sources_and_targets_are_known(names: tuple[str, str]) -> None:
    row = {names[0]: "w5 w6", names[1]: "w7"}
    (source,) = draw("T5ForConditionalGeneration", [row], word_tokenizer()).rows
    assert (source["input_ids"], source["labels"]) == ([5, 6], [7])
    question = {"question": "w5 w6", "answer": "w7"}
    (chosen,) = draw(
        "T5ForConditionalGeneration", [question], word_tokenizer(), text_columns=["question", "answer"]
    ).rows
    assert chosen == source


def test_a_question_and_its_choices() -> None:
    question = {"question": "w5", "a": "w6", "b": "w7 w8"}
    (row,) = draw(
        shallow(head="MULTIPLE_CHOICE"), [question], word_tokenizer(), text_columns=["question", "a", "b"]
    ).rows
    assert row["input_ids"] == [[5, 4, 6], [5, 4, 7, 8]]


SHARED = [
    {"from": "human", "value": "w5 w6"},
    {"from": "gpt", "value": "w7 w8 w9"},
    {"from": "human", "value": "w10"},
]
PARTS = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]


@pytest.mark.parametrize("chat", [CHAT, SHARED, PARTS])
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", None])
def test_chats_in_every_way_of_writing_them(chat: Any, column: str | None) -> None:
    words = word_tokenizer()
    words.chat_template = PLAIN
    row = chat if column is None else {column: chat, "id": "a"}
    assert draw(GPT, [row], words).rows[0]["input_ids"] == [5, 6, 7, 8, 9, 10]
    assert draw(GPT, {column or "messages": [chat, chat]}, words).tokens == 12


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            [{"text": "w5", "content": "w6"}],
            {},
            r"in the columns \['text'\] or \['content'\]; choose with text_columns",
        ),
        (
            [{"text": "w5"}],
            {"text_columns": ["sentence"]},
            "no column sentence in the data, which has: text; text_columns",
        ),
        (
            [{"a": "w5", "b": "w6", "c": "w7"}],
            {"text_columns": ["a", "b", "c"]},
            "names 3 columns, GPT2LMHeadModel takes one",
        ),
        (
            [{"headline": "w5"}],
            {},
            r"has the columns \['headline'\], .* in text_columns, the names of the columns",
        ),
        ([{"sentence": 5}], {}, "a calibration text is 5, expected a string"),
        ([{"sentence": float("nan")}], {}, "a calibration text is nan, expected a string"),
        (
            pd.Series(["w5", None, float("nan")]),
            {},
            "a calibration row is (None|nan), expected a mapping of columns",
        ),
        ([{"sentence": None}], {}, "a calibration text is None, expected a string"),
        ([("w5", float("nan"))], {}, r"a calibration text is \['w5', nan\], expected a string"),
        ([{"tokens": ["w5", 6]}], {}, "expected a string or a list of words"),
        ([("w5", "w6", "w7")], {}, "expected a string or a pair of strings"),
        (
            {"input_ids": IDS, "label": [1]},
            {},
            r"differ in length: input_ids \(5\), label \(1\); expected as many",
        ),
        ({"train": datasets.Dataset.from_dict({"text": TEXTS})}, {}, r"pass one split: train\)"),
        (
            "w5 w6",
            {},
            r"is a str, expected a dataset of rows or a list of texts; of a single text pass \[text\]",
        ),
        (b"w5", {}, "is a bytes, expected a dataset of rows"),
        (torch.tensor(5), {}, "is a Tensor, expected a dataset of rows"),
        (
            TENSOR[0],
            {},
            r"a calibration row is tensor\(\d+\), expected a mapping of columns, input_ids among them",
        ),
        ([5, 6, 7], {}, r"a calibration row is \d, expected a mapping of columns, input_ids among them"),
        ([None], {}, "a calibration row is None, expected a mapping of columns"),
        (
            [{"messages": ["hello"]}],
            {},
            "a message of a calibration chat is 'hello', expected a role and a content",
        ),
        ([[{"role": "user"}]], {}, "expected a role and a content of text"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], {}, "expected a role and a content of text"),
    ],
)
def test_what_holds_no_texts_or_ids_is_refused(dataset: Any, options: dict[str, Any], message: str) -> None:
    words = word_tokenizer()
    words.chat_template = PLAIN
    with pytest.raises(KPruneError, match=message):
        draw(GPT, dataset, words, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": ["w5", "w6"]}, "row 0 has 'w5' in its input_ids, expected whole numbers"),
        ({"input_ids": "w5"}, "row 0 has 'w5' in its input_ids, expected whole numbers"),
        ({"input_ids": 5}, "row 0 has 5 in its input_ids, expected whole numbers"),
        ({"input_ids": [5.0, 6.0]}, "row 0 has 5.0 in its input_ids, expected whole numbers"),
        ({"input_ids": torch.tensor([5.0])}, "row 0 has 5.0 in its input_ids, expected whole numbers"),
        ({"input_ids": np.array([5.5])}, "row 0 has 5.5 in its input_ids, expected whole numbers"),
        ({"input_ids": [5, None]}, "row 0 has None in its input_ids, expected whole numbers"),
        ({"input_ids": [True, False]}, "row 0 has True in its input_ids, expected whole numbers"),
        ({"input_ids": torch.tensor([True])}, "row 0 has True in its input_ids, expected whole numbers"),
        ({"input_ids": [5, [6, 7]]}, r"row 0 has \[6, 7\] in its input_ids, expected whole numbers"),
        ({"input_ids": [[5, 6], 7]}, r"row 0 has 7 in its input_ids, expected whole numbers"),
        ({"input_ids": [[[5]]]}, r"row 0 has \[5\] in its input_ids, expected whole numbers"),
        ({"input_ids": [5, -1]}, "row 0 has token ids -1 to 5, the model's vocabulary has 60"),
        ({"input_ids": [5, 10**30]}, "row 0 has token ids 5 to 10{30}, the model's vocabulary has 60"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"row 0 has attention_mask of \(1,\) for input_ids of \(2,\)",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [[1, 1]]},
            r"row 0 has attention_mask of \(2,\) for|of \(1, 2\)|other numbers",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [1, 2]},
            "row 0 has an attention_mask of other numbers than 0",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [0, -10000.0]},
            "row 0 has an attention_mask of other numbers than 0",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": ["1", "1"]},
            "row 0 has an attention_mask of other numbers than 0",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [1, None]},
            "row 0 has an attention_mask of other numbers than 0",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": 1},
            r"row 0 has attention_mask of \(\) for input_ids of \(2,\)",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [0, 0]},
            "is empty: none of its 1 rows has a token that is not padding",
        ),
        ({"input_ids": None}, "row 0 has None in its input_ids, expected whole numbers"),
        (
            {"input_ids": [5, 6], "token_type_ids": [0]},
            r"row 0 has token_type_ids of \(1,\) for input_ids of \(2,\)",
        ),
        (
            {"input_ids": [5, 6], "token_type_ids": [0, 2]},
            "row 0 has token_type_ids 0 to 2, .* has 2 types of tokens",
        ),
        (
            {"input_ids": [5, 6], "position_ids": [0.5, 1]},
            "row 0 has 0.5 in its position_ids, expected whole numbers",
        ),
    ],
)
def test_ids_and_masks_that_are_none_are_refused(row: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        draw(shallow(), [row], word_tokenizer())


def test_a_missing_value_is_like_no_column() -> None:
    row = {"input_ids": [5, 6], "attention_mask": None, "token_type_ids": None, "label": None}
    assert draw(shallow(), [row]).rows == [{"input_ids": [5, 6]}]
    with pytest.raises(
        CalibrationError, match="some calibration rows have the columns .*; give all rows the same columns"
    ):
        draw(shallow(), [row, {"input_ids": [7], "attention_mask": [1]}])


def test_a_single_text_is_no_choice() -> None:
    for row in ({"input_ids": [5, 6]}, "w5 w6", ("w5", "w6")):
        with pytest.raises(
            CalibrationError, match="compares choices|expected a question and each of its choices"
        ):
            draw(shallow(head="MULTIPLE_CHOICE"), [row], word_tokenizer())


def test_names_that_are_no_inputs_are_not_listed_and_a_default_is_no_advice() -> None:
    with pytest.raises(CalibrationError) as error:
        draw(GPT, [{"kwargs": 1, "args": 2}])
    assert "'kwargs'" not in str(error.value).split(" takes ")[1]
    assert "remove_unused_columns" not in str(error.value)
    assert draw(GPT, [{"input_ids": [5], "kwargs": 1}]).rows == [{"input_ids": [5]}]


@pytest.mark.parametrize("value", [[], [5], [""], {"a": 1}])
def test_text_columns_are_names(value: Any) -> None:
    with pytest.raises(ArgumentError, match="text_columns is .*, expected a list of"):
        KPruneArguments(text_columns=value)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that fail, and streams without an end
# ---------------------------------------------------------------------------------------------------------------------


class Failing(Exception):  # noqa: N818
    pass


def failing_stream() -> Iterator[str]:
    yield from TEXTS
    raise Failing("gone")


class FailingRows(Numbered):
    def __getitem__(self, index: int) -> Any:
        raise KeyError(index)


class Stopping(Numbered):
    def __getitem__(self, index: int) -> Any:
        raise StopIteration


class NoLength(Numbered):
    def __len__(self) -> int:
        raise Failing("no")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            failing_stream,
            "row 5 of the calibration dataset could not be read: the dataset raised the Failing shown above",
        ),
        (
            lambda: FailingRows(TEXTS),
            r"row \d of the .* could not be read, though its length is 5: .* the KeyError",
        ),
        (
            lambda: Stopping(TEXTS),
            r"row \d of the .* could not be read, though its length is 5: .* the StopIteration",
        ),
        (
            lambda: Numbered(TEXTS, 9),
            r"row \d of the .* could not be read, though its length is 9: .* the IndexError",
        ),
        (lambda: NoLength(TEXTS), "has a length that cannot be told"),
        (
            lambda: loader(FailingRows(TEXTS), batch_size=2),
            "row 0 of the .* could not be read: .* the KeyError",
        ),
    ],
)
def test_a_dataset_that_fails_is_named_with_the_row(dataset: Any, message: str, packing: bool) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        draw(GPT, dataset(), word_tokenizer(), packing=packing, max_seq_length=4)
    assert error.value.__cause__ is not None


def test_refusals_of_a_dataset_come_through_as_they_are() -> None:
    class Refusing(Numbered):
        def __getitem__(self, index: int) -> Any:
            raise ArgumentError("as I said")

    with pytest.raises(ArgumentError, match="^as I said$"):
        draw(GPT, Refusing(TEXTS), word_tokenizer())


def test_a_length_beyond_all_memory_is_drawn_from() -> None:
    class Endless:
        def __len__(self) -> int:
            return MOST_SHUFFLED * 10**6

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": [5 + index % 50]}

    assert draw(GPT, Endless(), num_tokens=20).tokens == 20


@pytest.mark.parametrize(
    "row", ["", " \n", {"text": ""}, {"input_ids": []}, {"input_ids": [5], "attention_mask": [0]}]
)
@pytest.mark.parametrize("packing", [False, True])
def test_an_endless_stream_without_tokens_ends(
    row: Any, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_kprune.calibration.texts.EMPTY_ROWS", 200)
    if packing and isinstance(row, dict) and "text" not in row:
        pytest.skip("packing takes texts")
    with pytest.raises(
        CalibrationError, match="200 rows of the calibration stream, one after the other, hold no"
    ):
        draw(
            GPT,
            itertools.chain(TEXTS[:2] if packing else [], itertools.repeat(row)),
            word_tokenizer(),
            packing=packing,
        )


def test_an_endless_stream_of_texts_is_read_as_far_as_it_is_needed() -> None:
    assert draw(GPT, itertools.cycle(["", *TEXTS]), word_tokenizer(), num_tokens=40).tokens == 40
    packed = draw(
        GPT, itertools.cycle(["", *TEXTS]), word_tokenizer(), num_tokens=40, packing=True, max_seq_length=8
    )
    assert packed.tokens == 40


def test_an_iterator_is_read_once() -> None:
    rows = iter(TEXTS)
    draw(GPT, rows, word_tokenizer())
    with pytest.raises(CalibrationError, match="is empty.* .an iterator can be read only once"):
        draw(GPT, rows, word_tokenizer())


# ---------------------------------------------------------------------------------------------------------------------
# Long texts
# ---------------------------------------------------------------------------------------------------------------------


class Counting:
    """The tokenizer, and how many characters it was given."""

    def __init__(self, side: str = "right"):
        self.inner, self.characters = word_tokenizer(), 0
        self.inner.truncation_side = side

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.characters += sum(len(text) for text in (*texts, options.get("text_target") or "") if text)
        return self.inner(*texts, **options)


LONG = " ".join(f"w{4 + i * i % 56}" for i in range(4_000))
SPACES = " " * 5_000 + LONG + " " * 5_000
WORD = "w" * 5_000 + " " + LONG
BLANK = " " * 10_000


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kind", ["long", "spaces", "word", "blank", "long and short", "short and long", "both long"]
)
def test_a_long_text_gives_what_all_of_it_gives(kind: str, side: str) -> None:
    pairs = {
        "long and short": (LONG, "w5 w6"),
        "short and long": ("w5", LONG),
        "both long": (LONG[:1500], LONG[300:1800]),
    }
    text: Any = {"long": LONG, "spaces": SPACES, "word": WORD, "blank": BLANK, **pairs}[kind]
    pair = text if isinstance(text, tuple) else (text,)
    expected = Counting(side).inner(*pair, truncation=True, max_length=9)["input_ids"]
    counting = Counting(side)
    if not expected:
        with pytest.raises(CalibrationError, match="is empty"):
            draw(GPT, [text], counting, max_seq_length=9)
        return
    assert draw(GPT, [text], counting, max_seq_length=9).rows[0]["input_ids"] == expected
    if LONG in pair:  # and not where spaces or a long word come first
        assert counting.characters <= 3 * len(pair) * CHARACTERS * 9


def test_a_long_source_and_a_long_target_are_cut_first() -> None:
    counting = Counting()
    (row,) = draw("T5ForConditionalGeneration", [(LONG, LONG)], counting, max_seq_length=9).rows
    expected = word_tokenizer()(LONG, truncation=True, max_length=9)["input_ids"]
    assert (row["input_ids"], row["labels"]) == (expected, expected)
    assert counting.characters <= 6 * CHARACTERS * 9


def test_long_words_chats_and_packed_streams_are_cut_first() -> None:
    expected = word_tokenizer()(LONG, truncation=True, max_length=9)["input_ids"]
    assert read([{"words": LONG.split()}], max_seq_length=9) == [expected]
    counting = Counting()
    blocks = draw(GPT, iter([LONG]), counting, packing=True, max_seq_length=8, num_tokens=40)
    everything = word_tokenizer()(LONG)["input_ids"]
    assert [row["input_ids"] for row in blocks.rows] == [everything[i : i + 8] for i in range(0, 40, 8)]
    assert counting.characters <= 3 * CHARACTERS * 48


@pytest.mark.parametrize("tells", [False, True])
def test_a_long_chat_gives_what_all_of_it_gives(tells: bool) -> None:
    words = word_tokenizer()
    words.chat_template = TELLING if tells else PLAIN
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": LONG}]
    expected = words.apply_chat_template(chat, return_dict=True, truncation=True, max_length=9)["input_ids"]
    (row,) = draw(GPT, [chat], words, max_seq_length=9).rows
    assert row["input_ids"] == expected
    if tells:
        assert row["labels"] == [-100, -100, *expected[2:]]


# ---------------------------------------------------------------------------------------------------------------------
# Collators
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "the data collator returned None, expected a dict of tensors"),
        ([1, 2], r"the data collator returned \[1, 2\], expected a dict of tensors"),
        ({"input_ids": [[5, 6]]}, r"the data collator made \['input_ids'\], expected tensors that"),
        (
            {"input_ids": torch.ones(3, 4)},
            "made input_ids of .* in torch.float32 for .* rows; expected whole numbers",
        ),
        (
            {"input_ids": torch.ones(4, dtype=torch.long)},
            r"made input_ids of \(4,\) .* expected whole numbers, \(rows, tokens\)",
        ),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long)},
            r"made input_ids of \(1, 4\) in torch.int64 for \d+ rows",
        ),
        ({"kwargs": torch.ones(1)}, r"the data collator made \['kwargs'\], expected tensors"),
    ],
)
def test_what_a_collator_makes_is_checked(result: Any, message: str) -> None:
    arguments = KPruneArguments(use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row} for row in IDS * 4]
    with pytest.raises(CalibrationError, match=message):
        KPrunePruner(shallow(), arguments, rows, data_collator=lambda _: result).prune()


def test_a_model_made_from_ids_of_every_container_is_the_same() -> None:
    first = draw(GPT, [{"input_ids": row} for row in IDS])
    for dataset in (IDS, np.array(IDS), list(TENSOR.split(1)), {"input_ids": TENSOR}):
        assert draw(tiny_of_class(GPT), dataset).fingerprint["sha256"] == first.fingerprint["sha256"]


def test_rows_that_the_model_does_not_run_on_are_refused_with_the_cause() -> None:
    rows = [{"input_ids": row, "position_ids": [99] * 4} for row in IDS * 4]
    arguments = KPruneArguments(use_cpu=True, disable_tqdm=True)
    with pytest.raises(
        CalibrationError, match="does not run on the first calibration rows, .* the .*Error shown above"
    ):
        KPrunePruner(shallow(), arguments, rows, processing_class=word_tokenizer()).prune()
