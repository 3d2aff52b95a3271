"""Padding on the left: every token has the position that it has in a row by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_same_plan_and_weights, plan_and_weights
from data import collate, plain_tokenizer, rows, text
from models import shallow
from torch import Tensor
from zoo import make

from hf_kprune.calibration.collate import collate as batch_of
from hf_kprune.calibration.collate import real_first


def on_the_left(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad rows before their first token, as tokenizers of decoders do."""
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([[value] * (longest - len(row[key])) + list(row[key]) for row in batch])

    return {"input_ids": padded("input_ids", 1), "attention_mask": padded("attention_mask", 0)}


def padded_before(row: dict[str, Any]) -> dict[str, Any]:
    """A row that its owner has padded to 14 tokens, on the left."""
    return {
        key: [value] * (14 - len(row[key])) + row[key]
        for key, value in (("input_ids", 1), ("attention_mask", 0))
    }


PADDED: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], Any]] = {
    "by the collator": (lambda data: data, on_the_left),
    "by the owner": (lambda data: [padded_before(row) for row in data], None),
    "by both": (lambda data: [padded_before(row) for row in data], on_the_left),
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
@pytest.mark.parametrize("case", PADDED)
def test_tokens_have_the_positions_that_they_have_in_a_row_by_itself(name: str, case: str) -> None:
    change, collator = PADDED[case]
    model, data = (shallow() if name == "bert" else make(name)).eval(), rows(6)
    inputs, _ = batch_of(change(data), collator, None, model)
    with torch.no_grad():
        together = model(**inputs)[0]
        for i, row in enumerate(data):
            alone, mask = model(**collate([row]))[0][0], inputs["attention_mask"][i].bool()
            assert inputs["input_ids"][i][mask].tolist() == row["input_ids"]
            ours = together[i] if together.dim() == 2 else together[i][mask]
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left_prunes_as_one_that_pads_on_the_right() -> None:
    results = []
    for side in ("right", "left"):
        words = plain_tokenizer()
        words.padding_side = side
        results.append(plan_and_weights([text(row) for row in rows()], processing_class=words))
    assert results[0][0] == results[1][0]
    assert_same_plan_and_weights(results[0], results[1])


def test_what_belongs_to_a_token_goes_along_with_it() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    ids, boxes, axes = (
        torch.tensor([[9, 9, 5, 6], [1, 2, 3, 9]]),
        torch.arange(16).view(2, 4, 2),
        torch.arange(24).view(3, 2, 4),
    )
    image = torch.rand(2, 4, 5, 5)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "bbox": boxes,
        "position_ids": axes,
        "pixel_values": image,
        "labels": ids,
    }
    moved = real_first(inputs, "input_ids", is_causal=True)
    assert moved["input_ids"].tolist() == moved["labels"].tolist() == [[5, 6, 9, 9], [1, 2, 3, 9]]
    assert moved["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert torch.equal(moved["bbox"], torch.stack([boxes[0].roll(-2, 0), boxes[1]]))
    assert torch.equal(moved["position_ids"], torch.stack([axes[:, 0].roll(-2, 1), axes[:, 1]], 1))
    assert moved["pixel_values"] is image
    assert real_first(inputs, "input_ids", is_causal=False)["labels"] is ids  # those of a decoder


def test_targets_padded_on_the_left_are_read_from_the_first_one() -> None:
    model = make("t5")
    labels = torch.tensor([[-100, -100, 5, 6], [7, 8, 9, 4]])
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    inputs, counted = batch_of([{}, {}], lambda _: batch, None, model)
    start = model.config.decoder_start_token_id
    assert inputs["decoder_input_ids"][0, :2].tolist() == [start, 5]
    assert inputs["decoder_input_ids"][1].tolist() == [start, 7, 8, 9]
    assert counted is not None
    assert counted.tolist() == [[True, True, False, False], [True] * 4]
