"""Rows of all kinds of models: images, sound, sources with targets, chats and packed texts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from data import CHAT, PLAIN, TELLING, draw, word_tokenizer
from models import CONFIGS_BY_CLASS, TEXT_SIZES, shallow, tiny_of_class
from transformers import (
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from zoo import IMAGE, make

from hf_kprune import ArgumentError, CalibrationError, PruningReport
from hf_kprune.calibration.rows import has_choices, row_length, row_tokens
from hf_kprune.calibration.tasks import needs_targets
from hf_kprune.cli.terminal import main
from hf_kprune.structure.facts import main_input, max_positions


def one(*args: Any, **kwargs: Any) -> dict[str, Any]:
    (row,) = draw(*args, **kwargs).rows
    return {key: value if isinstance(value, torch.Tensor) else list(value) for key, value in row.items()}


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# Images and sound
# ---------------------------------------------------------------------------------------------------------------------


def images(count: int = 6, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, 3, 8, 8), dtype=np.float32))


def patches(row: dict[str, Any]) -> int:
    side: int = row["pixel_values"].shape[-1]
    return side**2 // 16 + 1


class ImageProcessor:
    """Stands in for one of transformers', which need an imaging library: scales by 2, a row at a time."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.tensor(np.array(images.pixels))[None] * 2, "extra": torch.zeros(1)}


class Processor:
    """An image processor and a tokenizer in one."""

    tokenizer = word_tokenizer()

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        features = ImageProcessor()(images, return_tensors)
        return features | dict(self.tokenizer([text], return_tensors=return_tensors))


class Image:
    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels


def test_rows_of_pixels_in_every_kind_of_dataset_are_the_same() -> None:
    data = images()
    expected = draw(
        "ViTModel", [{"pixel_values": image} for image in data], tokens_per_row=patches, num_tokens=12
    )
    assert (expected.tokens, len(expected.rows), expected.sequences) == (15, 3, 3)
    assert {row["pixel_values"].dtype for row in expected.rows} == {torch.float32}
    lists = datasets.Dataset.from_list([{"pixel_values": image.tolist()} for image in data])
    half = [{"pixel_values": Image(image / 2), "label": 1} for image in data]
    kinds = {
        "lists": lists,
        "arrays": lists.with_format("numpy"),
        "tensors": lists.with_format("torch"),
        "doubles": [{"pixel_values": image.astype(np.float64), "label": 1} for image in data],
        "images": [row["pixel_values"] for row in half],
        "a column of images": [{"image": row["pixel_values"], "label": 1} for row in half],
    }
    for kind, dataset in kinds.items():
        rows = draw("ViTModel", dataset, ImageProcessor(), patches, num_tokens=12)
        for row, wanted in zip(rows.rows, expected.rows, strict=True):
            assert row.keys() == {"pixel_values"}, kind
            torch.testing.assert_close(row["pixel_values"], wanted["pixel_values"], rtol=0, atol=0)
        assert rows.fingerprint["sha256"] == expected.fingerprint["sha256"], kind
        assert rows.tokens == expected.tokens, kind
    other = draw(
        "ViTModel",
        images(seed=1),
        lambda x, return_tensors: {"pixel_values": x[None]},
        patches,
        num_tokens=12,
    )
    assert other.fingerprint["sha256"] != expected.fingerprint["sha256"]


def test_what_a_processor_makes_beyond_the_models_inputs_is_no_surplus_column() -> None:
    row = {"image": Image(images(1)[0])}
    assert one("ViTModel", [row], ImageProcessor(), patches, remove_unused_columns=False).keys() == {
        "pixel_values"
    }
    with pytest.raises(CalibrationError, match="drop the other columns or set remove_unused_columns=True"):
        draw("ViTModel", [{**row, "file": "a"}], ImageProcessor(), patches, remove_unused_columns=False)


def test_tokens_and_lengths_of_rows_without_ids_are_the_callers() -> None:
    row = {"pixel_values": images(1)[0]}
    assert (row_tokens(row, patches), row_length(row, patches), has_choices(row)) == (5, 5, False)
    for count in (row_tokens, row_length):
        with pytest.raises(
            ArgumentError, match=r"row of \['pixel_values'\] does not tell .* pass tokens_per_row"
        ):
            count(row)
    with pytest.raises(ArgumentError, match="pass tokens_per_row"):
        draw("ViTModel", [row])


def test_an_image_and_its_text_are_one_row() -> None:
    image = images(1)[0]
    prepared = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "pixel_values": image}
    expected = draw("CLIPModel", [prepared])
    rows = draw("CLIPModel", [{"image": Image(image / 2), "text": "w5 w6 w7", "url": "a"}], Processor())
    for row in (*expected.rows, *rows.rows):
        assert row.keys() == prepared.keys()
        assert torch.as_tensor(row["input_ids"]).tolist() == [5, 6, 7]
        assert torch.equal(row["pixel_values"], torch.tensor(image))
    assert expected.tokens == rows.tokens == 3
    assert one("CLIPModel", ["w5"], Processor())["input_ids"] == [5]  # by the processor's tokenizer
    assert rows.fingerprint["sha256"] == expected.fingerprint["sha256"]
    dimmer = draw("CLIPModel", [{**prepared, "pixel_values": image / 2}])
    assert dimmer.fingerprint["sha256"] != expected.fingerprint["sha256"]
    assert max_positions(tiny_of_class("CLIPModel")) == 20
    with pytest.raises(CalibrationError, match="has 21 tokens, CLIPModel takes at most 20"):
        draw("CLIPModel", [{**prepared, "input_ids": [5] * 21}])
    with pytest.raises(CalibrationError, match="token ids 5 to 60, the model's vocabulary has 60"):
        draw("CLIPModel", [{**prepared, "input_ids": [5, 60, 6]}])


def sound(length: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


def test_sound_goes_through_the_feature_extractor() -> None:
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    wave = sound()
    expected = extractor(wave, sampling_rate=8000)["input_values"][0]
    audio = {"array": wave, "sampling_rate": 8000}
    for raw in (
        wave,
        wave.tolist(),
        torch.tensor(wave),
        {"audio": audio},
        {"audio": {**audio, "array": wave.tolist()}},
    ):
        row = one("Wav2Vec2ForCTC", [raw], extractor, lambda row: len(row["input_values"]) // 2)
        assert row.keys() == {"input_values", "attention_mask"}
        torch.testing.assert_close(row["input_values"], torch.tensor(expected))
        assert int(row["attention_mask"].sum()) == 40
    rows = draw(
        "Wav2Vec2ForCTC",
        [sound(n, n) for n in (40, 30)],
        extractor,
        lambda row: len(row["input_values"]) // 2,
    )
    assert rows.tokens == 35
    batch = extractor.pad(rows.rows, return_tensors="pt")  # what a collator does with them
    assert batch["input_values"].shape == (2, 40)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_values"]) for row in rows.rows]
    with pytest.raises(
        CalibrationError, match=r"audio at 16000 Hz, Wav2Vec2FeatureExtractor takes 8000 Hz; resample"
    ):
        draw("Wav2Vec2ForCTC", [{"audio": {**audio, "sampling_rate": 16000}}], extractor, len)
    with pytest.raises(
        CalibrationError, match=r"made \{'input_values': \(2, 40\)\D.* of one audio, expected one row"
    ):
        draw("Wav2Vec2ForCTC", [np.stack([wave, wave])], extractor, len)


def test_speech_and_its_transcript_are_one_row() -> None:
    extractor = WhisperFeatureExtractor(
        feature_size=4, sampling_rate=8000, chunk_length=1, hop_length=500, n_fft=64
    )
    processor = transformers.WhisperProcessor(extractor, word_tokenizer())
    audio = {"array": sound(4000), "sampling_rate": 8000}
    name, frames = "WhisperForConditionalGeneration", lambda row: 8
    row = one(name, [{"audio": audio, "text": "w5 w6"}], processor, frames)
    assert row.keys() == {"input_features", "labels"}
    assert (row["input_features"].shape, row["labels"].tolist()) == ((4, 16), [5, 6])
    same = draw(name, [{"input_features": row["input_features"].tolist(), "labels": [5, 6]}], None, frames)
    assert same.fingerprint["sha256"] == draw(name, [row], None, frames).fingerprint["sha256"]
    assert one(name, [{**row, "decoder_input_ids": [2, 5]}], None, frames).keys() == {
        "input_features",
        "decoder_input_ids",
    }
    for alone, given in (
        ([{"audio": audio}], extractor),
        ([{"input_features": row["input_features"]}], None),
    ):
        with pytest.raises(
            CalibrationError,
            match="the decoder of Whisper.* nothing to read; pass .* labels or decoder_input_ids",
        ):
            draw(name, alone, given, frames)
    with pytest.raises(
        CalibrationError, match="target of calibration row 0 has 13 tokens, .* takes at most 12"
    ):
        draw(name, [{**row, "labels": [5] * 13}], None, frames)
    assert one("WhisperForAudioClassification", [{"audio": audio}], extractor, frames).keys() == {
        "input_features"
    }


class Twice:
    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(2, 3, 8, 8)}


@pytest.mark.parametrize(
    ("row", "processing_class", "error", "message"),
    [
        (
            {"image": 1},
            None,
            ArgumentError,
            "rows of image, processing_class is NoneType; pass the model's image processor",
        ),
        (
            {"image": 1},
            word_tokenizer(),
            ArgumentError,
            "processing_class is .*Token.*; pass the model's image processor",
        ),
        (
            {"image": 1},
            Twice(),
            CalibrationError,
            r"Twice made \{'pixel_values': \(2, 3, 8, 8\)\} of one image, expected one row",
        ),
        (
            {"pixels": 1},
            None,
            CalibrationError,
            r"the columns \['pixels'\], ViTModel takes .* make pixel_values of them",
        ),
        (
            {"text": "w5"},
            word_tokenizer(),
            CalibrationError,
            r"the columns \['text'\], ViTModel takes",
        ),
        (
            "w5",
            word_tokenizer(),
            CalibrationError,
            "a calibration row is 'w5', expected .* pixel_values among them",
        ),
        (
            {"pixel_values": [[[1.0, float("nan")]]]},
            None,
            CalibrationError,
            "row 0 has pixel_values that are not finite",
        ),
        (
            {"pixel_values": np.full((3, 8, 8), np.inf)},
            None,
            CalibrationError,
            "row 0 has pixel_values that are not finite",
        ),
    ],
)
def test_images_that_cannot_be_used_are_refused(
    row: Any, processing_class: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw("ViTModel", [row], processing_class, patches)


# ---------------------------------------------------------------------------------------------------------------------
# Sources and targets
# ---------------------------------------------------------------------------------------------------------------------

TARGETS = {
    "T5Model": True,
    "T5ForConditionalGeneration": True,
    "T5ForSequenceClassification": False,
    "T5ForQuestionAnswering": False,
    "T5ForTokenClassification": False,
    "T5EncoderModel": False,
    "BartModel": False,
    "BartForConditionalGeneration": True,
    "BartForSequenceClassification": False,
    "BartForQuestionAnswering": False,
    "BartForCausalLM": False,
    "PegasusModel": True,
    "PegasusForConditionalGeneration": True,
    "WhisperForConditionalGeneration": True,
    "WhisperForAudioClassification": False,
    "GPT2LMHeadModel": False,
    "CLIPModel": False,
}


@pytest.mark.parametrize("name", TARGETS)
def test_models_whose_decoder_must_be_told_what_to_read(name: str) -> None:
    """Where no target is asked for, the model runs without; where one is, it does not, BART alone repeats the source."""
    model = tiny_of_class(name)
    assert needs_targets(model) == TARGETS[name]
    if model.main_input_name == "input_ids" and name != "CLIPModel":
        inputs = {"input_ids": torch.tensor([[5, 6, tiny_of_class(name).config.eos_token_id or 3]])}
        if not TARGETS[name] or name.startswith("Bart"):
            model(**inputs)
        else:
            with pytest.raises(ValueError, match="specify exactly one of|decoder_"):
                model(**inputs)


def test_a_pair_is_a_source_and_a_target() -> None:
    name, data = "T5ForConditionalGeneration", [("w5 w6 w7", "w8 w9"), ["w10", "w11 w12 w13"]]
    rows = draw(name, data, word_tokenizer())
    by_source = {row["input_ids"][0]: row for row in rows.rows}
    assert by_source[5] == {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9]}
    assert by_source[10] == {"input_ids": [10], "attention_mask": [1], "labels": [11, 12, 13]}
    assert rows.tokens == 4  # of the sources
    frozen = datasets.Dataset.from_list([{**by_source[i], "id": i} for i in (5, 10)])
    assert draw(name, frozen).rows == rows.rows
    swapped = [(source, "w9 w8") for source, _ in data]
    assert draw(name, swapped, word_tokenizer()).fingerprint["sha256"] != rows.fingerprint["sha256"]
    cut = one(name, data[:1], word_tokenizer(), max_seq_length=2)
    assert (cut["input_ids"], cut["labels"]) == ([5, 6], [8, 9])
    assert one("BartForSequenceClassification", data[:1], word_tokenizer())["input_ids"] == [
        5,
        6,
        7,
        4,
        8,
        9,
    ]  # not a target
    masked = {"input_ids": [5, 6], "attention_mask": [1.0, 1.0]}
    assert draw("T5EncoderModel", [masked]).rows == [masked]  # lists that a tokenizer can pad
    assert one("T5EncoderModel", ["w5 w6"], word_tokenizer()).keys() == {"input_ids", "attention_mask"}


def test_decoder_inputs_may_be_given_and_then_labels_are_not_kept() -> None:
    row = {"input_ids": [5, 6], "decoder_input_ids": [2, 7, 8], "labels": [7, 8, 3]}
    assert one("T5Model", [row]) == {"input_ids": [5, 6], "decoder_input_ids": [2, 7, 8]}
    assert one("T5Model", [row], keep_labels=True) == row
    other = {**row, "decoder_input_ids": [2, 8, 7]}
    assert draw("T5Model", [row]).fingerprint["sha256"] != draw("T5Model", [other]).fingerprint["sha256"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "T5Model",
            "w5",
            "only input_ids, attention_mask, .* the decoder of T5Model nothing to read; pass .source, target. pairs",
        ),
        ("T5Model", ("w5",), "pairs, or rows with labels or decoder_input_ids"),
        (
            "BartForConditionalGeneration",
            {"input_ids": [5]},
            "pass .source, target. pairs, or rows with labels or decoder_input",
        ),
        (
            "T5Model",
            {"input_ids": [5], "labels": [7, 60, -100]},
            "target of calibration row 0 has token ids 7 to 60",
        ),
        (
            "PegasusModel",
            {"input_ids": [5], "labels": [7] * 21},
            "target of calibration row 0 has 21 tokens, .* at most 20",
        ),
        ("PegasusModel", {"input_ids": [5] * 21, "labels": [7]}, "row 0 has 21 tokens, .* at most 20"),
    ],
)
def test_sources_without_a_target_that_can_be_read_are_refused(name: str, row: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        draw(name, [row], word_tokenizer())


def test_rows_with_an_empty_target_are_passed_over() -> None:
    rows = [{"input_ids": [5, 6], "labels": labels} for labels in ([], [-100, -100], [7, -100])]
    assert one("T5Model", rows)["labels"] == [7, -100]


def test_each_half_of_an_encoder_decoder_has_limits_of_its_own() -> None:
    bert = {**TEXT_SIZES, "is_decoder": True, "add_cross_attention": True}
    parts = (
        transformers.BertConfig(**TEXT_SIZES),
        transformers.BertConfig(**{**bert, "vocab_size": 30, "max_position_embeddings": 9}),
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = transformers.EncoderDecoderModel(config)
    fits = {"input_ids": [59] * 20, "labels": [29] * 9}
    assert one(model, [fits]) == fits
    for key, value, message in (
        ("input_ids", [60], "row 0 has token ids 60 to 60, the model's vocabulary has 60"),
        ("input_ids", [5] * 21, "row 0 has 21 tokens, .* at most 20"),
        ("labels", [30], "target of calibration row 0 has token ids 30 to 30, the model's vocabulary has 30"),
        ("labels", [5] * 10, "target of calibration row 0 has 10 tokens, .* at most 9"),
    ):
        with pytest.raises(CalibrationError, match=message):
            draw(model, [{**fits, key: value}])


# ---------------------------------------------------------------------------------------------------------------------
# Causal language models
# ---------------------------------------------------------------------------------------------------------------------


def test_labels_of_causal_models_are_kept_for_the_positions_that_they_leave_out() -> None:
    plain = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    masked = {"input_ids": [8, 9], "labels": [-100, 9]}
    assert one("GPT2LMHeadModel", [plain]).keys() == {"input_ids"}
    assert one("GPT2LMHeadModel", [masked]) == masked
    both = draw("GPT2LMHeadModel", [plain, masked]).rows  # they are batched: all have labels, or none has
    assert {tuple(row["input_ids"]): list(row["labels"]) for row in both} == {
        (5, 6, 7): [5, 6, 7],
        (8, 9): [-100, 9],
    }
    for labels in (np.array([-100, 9]), torch.tensor([-100, 9])):
        assert [int(label) for label in one("GPT2LMHeadModel", [{**masked, "labels": labels}])["labels"]] == [
            -100,
            9,
        ]
    assert one("GPT2LMHeadModel", [{**masked, "labels": 1}]).keys() == {
        "input_ids"
    }  # of a task, not of tokens
    assert one(shallow(head="MASKED_LM"), [masked]).keys() == {"input_ids"}
    with pytest.raises(CalibrationError, match="row 0 has 1 labels for 2 tokens; expected one each"):
        draw("GPT2LMHeadModel", [{**masked, "labels": [-100]}])


@pytest.mark.parametrize("raw", [CHAT, {"messages": CHAT}, {"messages": CHAT, "source": "a"}])
def test_chats(raw: Any) -> None:
    words = word_tokenizer()
    words.chat_template = PLAIN
    ids = [5, 6, 7, 8, 9, 10]
    assert one("GPT2LMHeadModel", [raw], words) == {"input_ids": ids, "attention_mask": [1] * 6}
    words.chat_template = TELLING
    labels = [-100, -100, 7, 8, 9, -100]
    assert one("GPT2LMHeadModel", [raw], words) == {
        "input_ids": ids,
        "attention_mask": [1] * 6,
        "labels": labels,
    }
    cut = one("GPT2LMHeadModel", [raw], words, max_seq_length=4)
    assert (cut["input_ids"], cut["labels"]) == (ids[:4], labels[:4])
    assert one(shallow(), [raw], words).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("template", [PLAIN, TELLING])
def test_chats_and_texts_may_stand_in_one_dataset(template: str, table: bool) -> None:
    words = word_tokenizer()
    words.chat_template = template
    mixture: Any = [{"messages": CHAT}, "w11 w12"]
    if table:  # in a table each row has all columns
        mixture = datasets.Dataset.from_list(
            [{"messages": CHAT, "text": None}, {"messages": None, "text": "w11 w12"}]
        )
    rows = {len(row["input_ids"]): row for row in draw("GPT2LMHeadModel", mixture, words).rows}
    assert {length: row["input_ids"] for length, row in rows.items()} == {6: [5, 6, 7, 8, 9, 10], 2: [11, 12]}
    if template == TELLING:  # of a chat only what the assistant says counts, of a text all
        assert rows[6]["labels"] == [-100, -100, 7, 8, 9, -100]
        assert rows[2]["labels"] == [11, 12]
    else:
        assert "labels" not in rows[6].keys() | rows[2].keys()


def test_chats_without_a_template_or_a_tokenizer_are_refused() -> None:
    with pytest.raises(ArgumentError, match="holds chats, .* has no chat_template: set it, or pass texts"):
        draw("GPT2LMHeadModel", [CHAT], word_tokenizer())
    with pytest.raises(ArgumentError, match="holds chats: pass processing_class"):
        draw("GPT2LMHeadModel", [{"messages": CHAT}])


# ---------------------------------------------------------------------------------------------------------------------
# Texts of a dataset, packed or not
# ---------------------------------------------------------------------------------------------------------------------


def test_a_column_of_texts_is_tokenised_if_its_name_is_known() -> None:
    texts = ["w5 w6", "w7"]
    expected = draw("GPT2LMHeadModel", texts, word_tokenizer())
    for dataset in (
        datasets.Dataset.from_dict({"text": texts}),
        datasets.Dataset.from_dict({"text": texts, "label": [0, 1]}),
        [{"text": text} for text in texts],
    ):
        assert draw("GPT2LMHeadModel", dataset, word_tokenizer()).rows == expected.rows
        with pytest.raises(CalibrationError, match="has the columns .*'text'.* tokenise the texts"):
            draw("GPT2LMHeadModel", dataset)
    with pytest.raises(
        CalibrationError, match=r"has the columns \['headline', 'title'\].* in text_columns, the names"
    ):
        draw("GPT2LMHeadModel", [{"headline": "w5", "title": "w6"}], word_tokenizer())
    with pytest.raises(CalibrationError, match="a calibration text is None, expected a string"):
        draw("GPT2LMHeadModel", [{"text": None}], word_tokenizer())


TEXTS = [words([*range(4 + i, 4 + i + n)]) if n else " \n" for i, n in enumerate((3, 0, 5, 47, 1, 0, 9))]


def stream(end: int | None) -> list[int]:
    """All texts, one after the other."""
    ids: list[int] = []
    for text in filter(str.strip, TEXTS):
        ids += [*([end] if ids and end is not None else []), *(int(word[1:]) for word in text.split())]
    return ids


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(("length", "block"), [(None, 20), (7, 7), (50, 20), (1, 1)])
def test_packed_texts_are_cut_into_blocks(end: bool, length: int | None, block: int) -> None:
    expected = stream(3 if end else None)
    blocks = [expected[i : i + block] for i in range(0, len(expected) - block + 1, block)]
    options: dict[str, Any] = {"packing": True, "max_seq_length": length}
    for dataset in (TEXTS, datasets.Dataset.from_dict({"text": TEXTS, "id": range(7)})):
        rows = draw("GPT2LMHeadModel", dataset, word_tokenizer(end), **options)
        assert all(row.keys() == {"input_ids"} for row in rows.rows)
        ids = [row["input_ids"] for row in rows.rows]
        assert sorted(ids) == sorted(blocks)
        assert len(blocks) < 5 or ids != blocks
        assert rows.tokens == len(blocks) * block
        again, other = (
            draw("GPT2LMHeadModel", dataset, word_tokenizer(end), seed=seed, **options) for seed in (42, 1)
        )
        assert again.fingerprint == rows.fingerprint
        assert len(blocks) < 5 or other.fingerprint["sha256"] != rows.fingerprint["sha256"]
    streamed = draw("GPT2LMHeadModel", iter(TEXTS), word_tokenizer(end), num_tokens=2 * block, **options)
    assert [row["input_ids"] for row in streamed.rows] == blocks[:2]


def test_a_text_that_ends_by_itself_gets_no_second_end() -> None:
    rows = draw("GPT2LMHeadModel", ["w5 [EOS]", "w6", "w7"], word_tokenizer(), packing=True, max_seq_length=5)
    assert rows.rows == [{"input_ids": [5, 3, 6, 3, 7]}]


def test_blocks_are_no_longer_than_1024_unless_asked_to_be() -> None:
    text = [words([5] * 1100)] * 2
    config = transformers.GPT2Config(**{**CONFIGS_BY_CLASS["GPT2"], "n_positions": 3000})
    for model in (transformers.GPT2LMHeadModel(config), tiny_of_class("T5EncoderModel")):
        lengths = [
            [
                len(row["input_ids"])
                for row in draw(model, text, word_tokenizer(), packing=True, max_seq_length=n).rows
            ]
            for n in (None, 2000)
        ]
        assert lengths == [[1024, 1024], [2000]]


def test_long_documents_are_packed_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    short = word_tokenizer()
    short.model_max_length = 5
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        draw("GPT2LMHeadModel", [words([5] * 60)], short, packing=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "dataset", "processing_class", "error", "message"),
    [
        (
            "GPT2LMHeadModel",
            ["w5 w6"],
            word_tokenizer(),
            CalibrationError,
            "hold 2 tokens, fewer than a block of 20; give more texts",
        ),
        (
            "GPT2LMHeadModel",
            [" ", ""],
            word_tokenizer(),
            CalibrationError,
            "the calibration dataset is empty",
        ),
        ("GPT2LMHeadModel", ["w5"], None, ArgumentError, "holds texts: pass processing_class"),
        (
            "GPT2LMHeadModel",
            [{"input_ids": [5]}],
            word_tokenizer(),
            CalibrationError,
            r"takes strings.*the columns \['input_ids'\]",
        ),
        (
            "GPT2LMHeadModel",
            [("w5", "w6")],
            word_tokenizer(),
            CalibrationError,
            r"packing takes strings.* has \('w5', 'w6'\)",
        ),
        (
            "ViTModel",
            ["w5"],
            word_tokenizer(),
            ArgumentError,
            "packing is True, expected False: ViTModel takes pixel_values, no texts",
        ),
        ("T5Model", TEXTS, word_tokenizer(), CalibrationError, "the decoder of T5Model nothing to read"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    name: str, dataset: Any, processing_class: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(name, dataset, processing_class, packing=True, max_seq_length=20)


def test_packing_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shallow().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data, out = tmp_path / "lines.txt", tmp_path / "out"
    data.write_text("\n".join(TEXTS * 4))
    options = [
        "--model_name_or_path",
        tmp_path / "model",
        "--dataset_file",
        data,
        "--packing",
        "--max_seq_length",
        8,
    ]
    assert main([str(option) for option in ("prune", *options, "--output_dir", out, "--disable_tqdm")]) == 0
    calibration = PruningReport.from_json((out / "kprune_report.json").read_text()).calibration
    expected = draw(shallow(), TEXTS * 4, word_tokenizer(), packing=True, max_seq_length=8)
    assert calibration["sha256"] == expected.fingerprint["sha256"]
    assert main([str(option) for option in ("plan", *options, "--text_columns", "text,other")]) == 2
    assert "joins the texts of one column, --text_columns names 2" in capsys.readouterr().err


def test_a_class_that_names_an_input_which_it_does_not_take_reads_what_it_takes() -> None:
    """Idefics 3's tower of images inherits the name of a text's input."""
    model = transformers.Idefics3VisionTransformer(
        transformers.AutoConfig.for_model("idefics3_vision", **IMAGE)
    )
    assert model.main_input_name == "input_ids"
    assert main_input(model) == "pixel_values"
    assert main_input(make("bert")) == "input_ids"
    assert main_input(make("whisper")) == "input_features"
