"""Rows with images: chats as processors make them, folders of images and tables on the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from data import draw, word_tokenizer
from models import IMAGE_TOKEN, seeing
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    DetrImageProcessor,
    LlavaProcessor,
    Qwen2VLImageProcessor,
    ViTImageProcessor,
)
from zoo import make

from hf_kprune import CalibrationError, KPruneArguments, KPruneError, KPrunePruner
from hf_kprune.calibration.collate import collate, join_rows
from hf_kprune.calibration.processed import with_patches_joined
from hf_kprune.cli.terminal import main


TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


def pictures(count: int, side: int = 12) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(side, side + 4 * (i % 2), 3) for i in range(count)]
    return [Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)) for size in sizes]


def chats(count: int, side: int = 12) -> list[dict[str, Any]]:
    """Of texts of several lengths, each about an image."""
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": " ".join(["w5"] * (i % 4 + 1))}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"w{i + 6}"}]},
            ],
            "images": [image],
        }
        for i, image in enumerate(pictures(count, side))
    ]


def llava_processor() -> LlavaProcessor:
    words = word_tokenizer()
    words.add_tokens([f"[{i}]" for i in range(len(words), IMAGE_TOKEN)])
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(images, words, chat_template=TEMPLATE, num_additional_image_tokens=1, **settings)


class PackingProcessor:
    """Packs the patches of all images as that of Qwen2-VL does, which is not to be had without a library for videos."""

    chat_template = TEMPLATE

    def __init__(self) -> None:
        self.tokenizer = llava_processor().tokenizer
        self.images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)

    def apply_chat_template(
        self, chats: Any, padding: bool = False, **options: Any
    ) -> dict[str, torch.Tensor]:
        chats = chats if isinstance(chats[0], list) else [chats]
        parts = [part for chat in chats for message in chat for part in message["content"]]
        images = self.images(
            [part["image"] for part in parts if part["type"] == "image"], return_tensors="pt"
        )
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, chat_template=TEMPLATE)
        for i, grid in enumerate(images["image_grid_thw"]):
            texts[i] = texts[i].replace("<image>", " ".join(["<image>"] * (int(grid.prod()) // 4)))
        return dict(self.tokenizer(texts, padding=padding, return_tensors="pt")) | dict(images)


@pytest.mark.parametrize("name", ["llava", "packing"])
def test_rows_of_chats_with_images_make_the_batch_that_their_processor_makes_of_all(name: str) -> None:
    """From a dataset with a column of images; sizes of images and lengths of texts differ."""
    processor: Any = llava_processor() if name == "llava" else PackingProcessor()
    data = datasets.Dataset.from_list(chats(5, 12 if name == "llava" else 16))
    model = seeing("llava")
    model.forward = lambda input_ids, pixel_values, image_grid_thw, attention_mask: None  # what is accepted
    rows = draw(model, data, processor, num_tokens=1000).rows
    assert len(rows) == 5
    turns = [
        [
            {
                **m,
                "content": [
                    p | ({"image": row["images"][0]} if p["type"] == "image" else {}) for p in m["content"]
                ],
            }
            for m in row["messages"]
        ]
        for row in chats(5, 12 if name == "llava" else 16)
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    expected = processor.apply_chat_template(turns, **options)
    order = [
        next(
            i
            for i, ids in enumerate(expected["input_ids"].tolist())
            if row["input_ids"] == [t for t in ids if t != 1]
        )
        for row in rows
    ]
    batch = join_rows([rows[order.index(i)] for i in range(5)], pad_token_id=1)
    assert batch.keys() == expected.keys()
    for key, value in batch.items():
        assert torch.equal(value, expected[key]), key


def test_images_of_several_sizes_with_a_mask_make_the_batch_that_their_processor_makes_of_all() -> None:
    processor, model = DetrImageProcessor(size={"shortest_edge": 16, "longest_edge": 24}), make("detr")
    images = pictures(4)
    rows = [draw(model, [image], processor, lambda _: 1).rows[0] for image in images]
    batch, _ = collate(rows, None, processor, model)
    expected = processor(images, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert not bool(expected["pixel_mask"].all())
    for key, value in batch.items():
        assert torch.equal(value, expected[key]), key


def test_an_image_with_a_text_or_alone_is_asked_about_by_the_template() -> None:
    model, processor, (image, *_) = seeing("llava"), llava_processor(), pictures(1)
    rows = [
        draw(model, [row], processor).rows[0] for row in ({"image": image, "text": "w7 w8"}, {"image": image})
    ]
    assert [row["input_ids"] for row in rows] == [[*[IMAGE_TOKEN] * 4, 7, 8], [IMAGE_TOKEN] * 4]
    assert torch.equal(rows[0]["pixel_values"], rows[1]["pixel_values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "speaks of more images than the 0 of its row"),
        ({"images": pictures(2)}, "has 2 images and its chat speaks of 1"),
    ],
)
def test_chats_that_do_not_go_with_their_images_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        draw(seeing("llava"), [{**chats(1)[0], **change}], llava_processor())


def test_a_processor_without_a_template_is_told_to_have_one() -> None:
    processor = llava_processor()
    processor.chat_template = None
    with pytest.raises(KPruneError, match="chats with images, LlavaProcessor has no chat_template"):
        draw(seeing("llava"), chats(1), processor)


@pytest.mark.slow
def test_chats_with_images_prune_both_towers_however_they_are_batched() -> None:
    kept = []
    for size in (1, 6):
        model = seeing("llava")
        args = KPruneArguments(
            sparsity=0.4,
            num_tokens=200,
            per_device_batch_size=size,
            min_heads=1,
            disable_tqdm=True,
            use_cpu=True,
        )
        report = KPrunePruner(model, args, chats(30), processing_class=llava_processor()).prune()
        assert {s.name.split(".")[1] for s in report.sublayers} == {"vision_tower", "language_model"}
        kept.append([entry.kept for entry in report.sublayers])
    assert kept[0] == kept[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in folders by class, and a table of their files."""
    path, files = tmp_path_factory.mktemp("images"), []
    for i, image in enumerate(pictures(24)):
        place = path / "folder" / f"LABEL_{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
        files.append(
            {"picture": {"bytes": place.read_bytes(), "path": None}, "caption": f"w{i + 5}", "label": i % 2}
        )
    pd.DataFrame(files).to_parquet(path / "table.parquet")
    make("vit").save_pretrained(path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path / "vit")
    seeing("llava").save_pretrained(path / "llava")
    llava_processor().save_pretrained(path / "llava")
    return path


@pytest.mark.slow
def test_the_command_line_takes_folders_of_images_and_tables_with_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shared = [
        "--sparsity",
        "0.4",
        "--method",
        "magnitude",
        "--disable_tqdm",
        "--num_tokens",
        "100",
        "--use_cpu",
    ]
    shared += ["--min_heads", "1", "--min_neurons", "1"]

    def run(model: str, *words: str) -> str:
        code = main(
            [
                "prune",
                "--model_name_or_path",
                str(folder / model),
                "--output_dir",
                str(tmp_path / model),
                *words,
                *shared,
            ]
        )
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    images, table = str(folder / "folder"), str(folder / "table.parquet")
    out = run("vit", "--dataset_name", images, "--eval_file", table)
    assert "accuracy" in out
    assert type(make("vit")).from_pretrained(tmp_path / "vit").config.kprune
    assert ViTImageProcessor.from_pretrained(tmp_path / "vit").size == {"height": 8, "width": 8}
    run("llava", "--dataset_file", table, "--text_columns", "caption")
    assert type(seeing("llava")).from_pretrained(tmp_path / "llava").config.text_config.kprune
    code = main(
        [
            "plan",
            "--model_name_or_path",
            str(folder / "vit"),
            "--dataset_file",
            table,
            "--text_columns",
            "no",
            *shared,
        ]
    )
    assert (code, "text_columns names no" in capsys.readouterr().err) == (2, True)


def test_patches_that_a_grid_counts_are_joined_and_others_are_not() -> None:
    grids = [[[1, 2, 4]], [[1, 2, 2], [1, 4, 2]]]
    patches = [torch.randn(sum(math.prod(sides) for sides in grid), 5) for grid in grids]
    rows: list[dict[str, Any]] = [
        {"pixel_values": pixels, "grid_thw": grid, "input_ids": [3, 4]}
        for pixels, grid in zip(patches, grids, strict=True)
    ]
    batch = join_rows([with_patches_joined(row) for row in rows], pad_token_id=1)
    assert torch.equal(batch["pixel_values"], torch.cat(patches))
    assert batch["grid_thw"].tolist() == [*grids[0], *grids[1]]
    assert batch["input_ids"].shape == (2, 2)
    of_tensors = [{**row, "input_ids": torch.tensor([3, 4]), "seconds": torch.tensor([0.5])} for row in rows]
    batch = join_rows([with_patches_joined(row) for row in of_tensors], pad_token_id=1)
    assert (batch["input_ids"].tolist(), batch["seconds"].tolist()) == ([[3, 4], [3, 4]], [0.5, 0.5])
    other = {**rows[0], "grid_thw": [[1, 2, 3]]}
    assert with_patches_joined(other) is other
    series = torch.randn(16, 3)
    masked = {"past_values": series, "past_observed_mask": [[1, 1, 1]] * 16}
    assert with_patches_joined(masked) is masked
    for value in ([[1, 16], [1]], [[1, 16], None], [[0.5, 32.0]], [[-1, -16]]):
        row = {"past_values": series, "value": value}
        assert with_patches_joined(row) is row
    series[3, 1] = torch.nan
    alone = {"past_values": series}
    assert with_patches_joined(alone) is alone
