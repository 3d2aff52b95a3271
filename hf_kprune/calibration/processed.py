"""Chats and texts with images become rows as the processor of a model makes them, and batches of such rows.

What a processor makes of one row has no one form: pixels of (1, channels, height, width), patches of all
images as (patches, width) beside the sizes of the images, tiles of which each image has another number. All
of them are what a batch of one row is; `collate.join_rows` joins such batches along their first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..errors import CalibrationError
from .nested import Row, depth, flat


PICTURES = ("image", "images")
"""Names under which datasets hold an image, or those of a row."""

Chat = Sequence[Mapping[str, Any]]


class Processed(Row):
    """A row of a processor: lists of one number for each token, and tensors of all else, as in a batch of one
    row."""


def with_patches_joined(row: Row) -> Row:
    """A row with the patches of all its images as one sequence, (patches, width), as many as a grid in it
    counts, (images, 2 or 3), as a row of a processor; any other row as it is.

    Example:

        >>> row = {"pixel_values": torch.zeros(8, 5), "grid_thw": [[1, 2, 4]], "input_ids": [3, 4]}
        >>> type(with_patches_joined(row)).__name__
        'Processed'
    """
    tensors = [value for value in row.values() if isinstance(value, Tensor)]
    patches = {len(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 2}
    grids = [value for key, value in row.items() if "mask" not in key and is_grid(value)]
    if not patches & {int(torch.as_tensor(grid).prod(1).sum()) for grid in grids}:
        return row
    length = len(row.get("input_ids", ()))
    of_tokens = {key for key, value in row.items() if depth(value) == 1 and len(value) == length}
    return Processed(
        {key: [*flat(value)] if key in of_tokens else as_batch(value) for key, value in row.items()}
    )


def as_batch(value: Any) -> Any:
    """A tensor of what has several dimensions, anything else as it is."""
    return torch.as_tensor(value) if depth(value) > 1 else value


def is_grid(value: Any) -> bool:
    """Whether an input tells numbers of patches, (images, 2 or 3), each a whole number above 0."""
    if depth(value) != 2 or {*map(depth, value)} != {1} or {*map(len, value)} not in ({2}, {3}):
        return False
    return all(type(entry) is int and entry > 0 for entry in flat(value))


def pictures_of(columns: Mapping[str, Any]) -> list[Any]:
    """The images in the columns of a row."""
    values = [columns[name] for name in PICTURES if columns.get(name) is not None]
    return [image for value in values for image in (value if isinstance(value, (list, tuple)) else [value])]


def has_pictures(chat: object) -> bool:
    """Whether a chat has messages with a part for an image."""
    messages = chat if isinstance(chat, (list, tuple)) else ()
    parts = [m.get("content") for m in messages if isinstance(m, Mapping)]
    return any(
        isinstance(part, Mapping) and part.get("type") == "image"
        for content in parts
        if isinstance(content, list)
        for part in content
    )


def question_about(text: str | None, images: Sequence[Any]) -> Chat:
    """A chat of one message about images."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


def process(processor: Any, chat: Chat, images: Sequence[Any]) -> Processed:
    """What a processor makes of a chat.

    Args:
        processor: It has a chat template, a tokenizer and what prepares images.
        chat: Messages with `role` and `content`, a text or parts such as `{"type": "image"}`.
        images: Those for parts that do not bring theirs (`image`, `url`, `path`), in their order.

    Raises:
        CalibrationError: If there are more or fewer images than such parts, or if the template does not
            take the chat.
    """
    name, waiting = type(processor).__name__, list(images)
    turns = []
    for message in chat:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        filled = []
        for part in parts:
            part = {key: value for key, value in part.items() if value is not None}  # a table fills up
            if part.get("type") == "image" and not part.keys() & {"image", "url", "path", "base64"}:
                if not waiting:
                    raise CalibrationError(
                        f"a calibration chat speaks of more images than the {len(images)} of its row; give "
                        "each {'type': 'image'} an image, in its order, in a column 'images'"
                    )
                part["image"] = waiting.pop(0)
            filled.append(part)
        turns.append({**message, "content": filled})
    if waiting:
        raise CalibrationError(
            f"a calibration row has {len(images)} images and its chat speaks of "
            f"{len(images) - len(waiting)}; give each a part {{'type': 'image'}} in a message"
        )
    try:
        encoded = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    except TemplateError as error:
        raise CalibrationError(
            f"the chat_template of {name} takes no such chat, of the roles "
            f"{', '.join(str(turn.get('role')) for turn in turns):.200}; leave such chats out"
        ) from error
    length = encoded["input_ids"].shape[-1]
    return Processed(
        {
            key: value[0].tolist() if value.shape == (1, length) and not value.is_floating_point() else value
            for key, value in encoded.items()
            if isinstance(value, Tensor)
        }
    )
