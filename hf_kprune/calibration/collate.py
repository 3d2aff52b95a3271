"""Calibration rows become inputs of a model: padding, the decoder's inputs, and which tokens count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from ..errors import ArgumentError, CalibrationError
from ..structure.configs import text_config
from ..structure.facts import input_names, is_causal, label_names, main_of
from .processed import Processed
from .rows import has_choices
from .tasks import needs_targets


IGNORED = -100

Collator = Callable[[list[Any]], dict[str, Any]]

Inputs = tuple[dict[str, Tensor], Tensor | None]
"""Of a batch: what the model is called with, and which tokens count if some do not."""


def pad(sequences: list[object], value: int) -> Tensor:
    """Sequences of numbers, (B, T), filled up on the right with `value`."""
    tensors = [torch.as_tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def pad_pictures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Images and their masks, taken out of rows that have both: filled up with 0 below and on the right."""
    batch: dict[str, Any] = {}
    names = ("pixel_values", "pixel_mask")
    for name in names if {*names} <= rows[0].keys() else ():
        tensors = [torch.as_tensor(row.pop(name)) for row in rows]  # (..., height, width)
        height, width = (max(tensor.shape[place] for tensor in tensors) for place in (-2, -1))
        sides = [(0, width - tensor.shape[-1], 0, height - tensor.shape[-2]) for tensor in tensors]
        padded = map(torch.nn.functional.pad, tensors, sides)
        batch[name] = torch.stack(list(padded))
    return batch


def join_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of rows of a processor: what there is for each token, (B, T), padded on the right, and the
    other tensors one after the other.

    Raises:
        ArgumentError: If some have other shapes than others, beyond their first dimension.
    """
    batch: dict[str, Tensor] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if not isinstance(first, Tensor):
            batch[key] = pad(values, pad_token_id if key == "input_ids" else 0)
        elif len({value.shape[1:] for value in values}) == 1:
            batch[key] = torch.cat(values)
        else:
            shapes = ", ".join(sorted({str(tuple(value.shape)) for value in values}))
            raise ArgumentError(
                f"the {key} of calibration rows are {shapes}, which do not go into one batch; set "
                "per_device_batch_size=1, give images of one size, or pass a data_collator"
            )
    return batch


def pad_rows(rows: list[dict[str, Any]], processing_class: object, pad_token_id: int) -> dict[str, Any]:
    """One tensor per column: what the decoder reads or gives, then what the tokenizer pads, then floats."""
    rows = [dict(row) for row in rows]
    inputs = pad_pictures(rows)
    if "decoder_input_ids" in rows[0]:
        for row in rows:
            row.setdefault("decoder_attention_mask", [1] * len(row["decoder_input_ids"]))
    padding = {"labels": IGNORED, "decoder_input_ids": pad_token_id, "decoder_attention_mask": 0}
    for key, value in padding.items():
        if key in rows[0] and torch.as_tensor(rows[0][key]).dim() == 1:
            inputs[key] = pad([row.pop(key) for row in rows], value)
    floats = [
        key for key, value in rows[0].items() if isinstance(value, Tensor) and value.is_floating_point()
    ]
    for key in floats:
        values = [row.pop(key) for row in rows]
        if len({value.shape for value in values}) == 1:
            inputs[key] = torch.stack(values)
        else:
            extractor = getattr(processing_class, "feature_extractor", processing_class)
            # that of images pads others than these
            if key == "pixel_values" or not hasattr(extractor, "pad"):
                raise ArgumentError(
                    f"the calibration rows' {key} differ in shape and there is nothing to pad them with; "
                    "pass processing_class (the feature extractor) or data_collator"
                )
            inputs |= extractor.pad([{key: value} for value in values], return_tensors="pt")
    apart = [
        key for key in rows[0] if any(len(row[key]) != len(row.get("input_ids", row[key])) for row in rows)
    ]
    # these are not by token: sizes of an image
    if apart and all(len({len(row[key]) for row in rows}) == 1 for key in apart):
        inputs |= default_data_collator([{key: row.pop(key) for key in apart} for row in rows])
    if rows[0] and len({len(row[key]) for row in rows for key in row}) == 1:
        inputs |= default_data_collator(rows)
    elif rows[0]:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not hasattr(tokenizer, "pad") or has_choices(rows[0]):
            raise ArgumentError(
                "the calibration rows differ in length and there is nothing to pad them with; pass "
                "processing_class (the tokenizer) or data_collator"
            )
        inputs |= tokenizer.pad(rows, return_tensors="pt")
    return inputs


def shifted_right(model: PreTrainedModel, targets: Tensor) -> Tensor:
    """What the decoder reads when it is to give `targets`, (B, T), in which -100 is padding."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return cast(Tensor, model.prepare_decoder_input_ids_from_labels(targets))
    config: Any = model.config
    configs: Any = [config, text_config(config)]
    names = ("decoder_start_token_id", "bos_token_id")
    known = (getattr(each, name, None) for name in names for each in configs)
    start = next((token for token in known if token is not None), None)
    if start is None:
        raise CalibrationError(
            f"the config of {type(model).__name__} names no decoder_start_token_id, with which its decoder "
            "begins; set it, or give rows with decoder_input_ids"
        )
    shifted = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)
    pad_token_id = getattr(text_config(config), "pad_token_id", None) or 0
    return shifted.masked_fill(shifted == IGNORED, pad_token_id)


def real_first(inputs: Mapping[str, object], main: str, is_causal: bool) -> dict[str, Any]:
    """Inputs whose padding on the left has been moved to the right, where no position depends on it.

    Models that count positions from the first column would see others than those of a row by itself.

    Args:
        inputs: A batch; what has the shape of a mask, (B, T) or (B, choices, T), goes along with it.
        main: The main input of the model, the one input of floats that goes along.
        is_causal: Whether `labels` are those of the tokens that are read.
    """
    moved = dict(inputs)
    for prefix in ("", "decoder_"):
        mask = inputs.get(f"{prefix}attention_mask")
        read = inputs.get(f"{prefix}input_ids", None if prefix else inputs.get(main))
        if not (isinstance(mask, Tensor) and isinstance(read, Tensor)):
            continue
        if mask.is_floating_point() or not mask.numel():
            continue
        first = mask.bool().long().argmax(-1, keepdim=True)
        if read.shape[: mask.dim()] != mask.shape or not bool(first.any()):
            continue
        order = (torch.arange(mask.shape[-1], device=mask.device) + first) % mask.shape[-1]
        for key, value in inputs.items():
            of_decoder = not is_causal if key == "labels" else key.startswith("decoder_")
            if (
                of_decoder != bool(prefix)
                or not isinstance(value, Tensor)
                or (value.is_floating_point() and key != main)
            ):
                continue
            if value.shape[: mask.dim()] == mask.shape:  # and any width of a token
                wide = order.view(*order.shape, *[1] * (value.dim() - mask.dim()))
                moved[key] = value.gather(mask.dim() - 1, wide.expand_as(value))
            elif value.shape[-mask.dim() :] == mask.shape:  # positions along several axes
                moved[key] = value.gather(-1, order.expand_as(value))
    return moved


def collate(
    rows: list[dict[str, object]], collator: Collator | None, processing_class: object, model: PreTrainedModel
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs of `model` for a batch, without labels; and, if labels tell it, the tokens (B, T) whose
    knowledge counts.

    Targets of an encoder-decoder become what its decoder reads. Targets of -100 of a causal language model
    are tokens whose prediction does not count.

    Raises:
        ArgumentError: If rows must be padded and there is nothing to do it with.
        CalibrationError: If the collator makes what the model does not take.
    """
    labels = label_names(model)
    accepted = input_names(model)
    pad_token_id = getattr(text_config(model.config), "pad_token_id", None) or 0
    if collator is not None:
        batch = collator([dict(row) for row in rows])
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"the data collator returned {batch!r:.80}, expected a dict of tensors")
        inputs = dict(batch)
    elif isinstance(rows[0], Processed):
        inputs = dict(join_rows(rows, pad_token_id))
    else:
        inputs = pad_rows(rows, processing_class, pad_token_id)
    inputs = real_first(inputs, main_of(model, inputs), is_causal(model))
    targets, counted = inputs.get("labels"), None
    if isinstance(targets, Tensor) and targets.dim() == 2 and not targets.is_floating_point():
        real = targets != IGNORED
        if is_causal(model):  # the logits of a token are for the next one
            counted = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
        elif "decoder_input_ids" in accepted and needs_targets(model):
            if "decoder_input_ids" not in inputs:
                targets = real_first({"input_ids": targets, "attention_mask": real.long()}, "", False)[
                    "input_ids"
                ]
                real = targets != IGNORED
                inputs["decoder_input_ids"] = shifted_right(model, targets)
            if "decoder_attention_mask" in accepted and "decoder_attention_mask" not in inputs:
                inputs["decoder_attention_mask"] = real.long()  # the decoder reads as many tokens as it gives
            counted = real
    if "decoder_attention_mask" not in accepted:
        inputs.pop("decoder_attention_mask", None)
    inputs = {key: value for key, value in inputs.items() if key not in labels}
    surplus = [key for key, value in inputs.items() if key not in accepted or not isinstance(value, Tensor)]
    if surplus:
        raise CalibrationError(
            f"the data collator made {sorted(surplus)}, expected tensors that {type(model).__name__} takes: "
            f"{sorted(accepted)}"
        )
    ids = inputs.get("input_ids")
    if ids is not None and (ids.is_floating_point() or ids.dim() < 2 or len(ids) != len(rows)):
        raise CalibrationError(
            f"the data collator made input_ids of {tuple(ids.shape)} in {ids.dtype} for {len(rows)} rows; "
            "expected whole numbers, (rows, tokens)"
        )
    return inputs, counted
