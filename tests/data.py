"""Rows, texts and tokenizers, and where the evaluation pack lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import VOCABULARY, tiny_of_class
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from zoo import MARKS, ZOO, as_taken, counted_batch, counted_rows, inputs_for

from hf_kprune import KPruneArguments
from hf_kprune.calibration.draw import draw_rows
from hf_kprune.calibration.rows import Rows


ROOT = Path(__file__).parents[1]
PACK = Path(os.environ.get("HF_KPRUNE_PACK", ROOT.parent / "shared" / "pack"))


def rows(count: int = 24, seed: int = 0, choices: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Tokenised rows of different lengths; with `choices`, of that many sequences each, padded to one length."""
    generator = torch.Generator().manual_seed(seed)
    rows_ = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        shape = (choices, length) if choices else (length,)
        ids = torch.randint(2, 60, shape, generator=generator)
        rows_.append({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    return rows_


def calibration_rows(model: PreTrainedModel, kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows as a dataset has them: one at a time, of different lengths where there is padding."""
    if kind in ("text", "unpadded") and type(model).__name__ != "LongformerForSequenceClassification":
        return rows(count, longest=9)
    if kind == "packed":
        batches = (inputs_for(model, kind, seed, batch=1) for seed in range(count))
        return [
            {
                "input_ids": each["input_ids"][each["attention_mask"].bool()].tolist(),
                "pixel_values": each["pixel_values"],
                "image_grid_thw": each["image_grid_thw"][0].tolist(),
            }
            for each in batches
        ]  # what a model takes beside that, `collator_for` adds
    if kind == "counted":
        torch.manual_seed(0)
        return counted_rows(model.config.model_type, 0, count)
    data = []
    for seed in range(count // 4):
        inputs = inputs_for(model, kind, seed=seed)
        for i in range(4):
            row: dict[str, Any] = {key: value[i] for key, value in inputs.items()}
            for prefix in ("", "decoder_"):
                mask = row.pop(f"{prefix}attention_mask", None)
                if mask is not None:
                    row[f"{prefix}input_ids"] = row[f"{prefix}input_ids"][mask.bool()].tolist()
            data.append(row)
    return data


def pack(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of kind packed as the processors of their models do; patches come first, so that no order of inputs is taken
    for granted. Rows without an image are texts."""
    padded = Padding().pad([{"input_ids": row["input_ids"]} for row in batch])
    images = [row for row in batch if "pixel_values" in row]
    if not images:
        return padded
    return {
        "pixel_values": torch.cat([torch.as_tensor(row["pixel_values"]) for row in images]),
        "image_grid_thw": torch.tensor([row["image_grid_thw"] for row in images]),
        **padded,
        "mm_token_type_ids": (padded["input_ids"] == MARKS["image_token_id"]).long(),
    }


def collator_for(name: str) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None:
    """What makes batches of calibration rows of a model of the zoo, where it takes more than padding."""
    kind = ZOO[name][2]
    if kind == "packed":
        return lambda batch: as_taken(name, pack(batch))
    return partial(counted_batch, model_type=name) if kind == "counted" else None


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows, of one or several sequences, to the longest."""
    longest = max(torch.tensor(row["input_ids"]).shape[-1] for row in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(row[key]) for row in batch]
        return torch.stack(
            [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors]
        )

    return {"input_ids": padded("input_ids", 1), "attention_mask": padded("attention_mask", 0)}


def tokenizer() -> PreTrainedTokenizerFast:
    """60 words; `<pad>` is 1 as in the configs of the models."""
    vocabulary = {
        word: i
        for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(55))])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=30,
    )


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 ... w59 with their numbers as ids, padded with 1; `tokenizer(text)` adds nothing, a pair gets w2 between."""
    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 60)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A w2 $B:1", special_tokens=[("w2", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def text(row: dict[str, Any]) -> str:
    return " ".join(f"w{i}" for i in row["input_ids"])


def word_tokenizer(end: bool = True) -> PreTrainedTokenizerFast:
    """Words w4 ... w59 with their numbers as ids, padded with 1; nothing is added to a text, a pair gets w4 between."""
    vocabulary = {
        "[UNK]": 0,
        "[PAD]": 1,
        "[BOS]": 2,
        "[EOS]": 3,
        **{f"w{i}": i for i in range(4, VOCABULARY)},
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A w4 $B:1", special_tokens=[("w4", 4)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", **({"eos_token": "[EOS]"} if end else {})}
    return PreTrainedTokenizerFast(tokenizer_object=words, return_token_type_ids=False, **special)


def draw(
    model: PreTrainedModel | str,
    dataset: Any,
    processing_class: Any = None,
    tokens_per_row: Callable[[dict[str, Any]], int] | None = None,
    keep_labels: bool = False,
    **options: Any,
) -> Rows:
    model = tiny_of_class(model) if isinstance(model, str) else model
    return draw_rows(
        model, dataset, processing_class, KPruneArguments(**options), keep_labels, tokens_per_row
    )


CHAT = [
    {"role": "user", "content": "w5 w6"},
    {"role": "assistant", "content": "w7 w8 w9"},
    {"role": "user", "content": "w10"},
]
TELLING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
WORDS = [f"w{i}" for i in range(55)]


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(0, 55, (n,), generator=generator)) for n in lengths]


class Padding:
    """What pads token ids, as a tokenizer does."""

    def pad(self, batch: list[dict[str, Any]], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        return collate([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch])

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def save_with_words(model: Any, path: Path) -> str:
    model.save_pretrained(path)
    BertTokenizer(
        {w: i for i, w in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    ).save_pretrained(path)
    return str(path)
