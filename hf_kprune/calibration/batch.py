"""One batch: some calibration rows as a model is called with them, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..errors import CalibrationError, UnsupportedArchitectureError, UnsupportedModelError
from ..structure.facts import (
    first_run,
    floats,
    frame_mask,
    in_eval_mode,
    main_of,
    mask_of,
    masks_frames,
    to_model,
    uncached,
)
from ..structure.hooks import by_token, carried, first, part_of
from ..structure.runs import calls_of_layers, run_to_bottom, run_to_memory
from ..structure.sublayers import Sublayer, find_sublayers
from .collate import Collator, Inputs, collate
from .nested import Row
from .rows import Rows, TokensPerRow


HIDDEN = -5e3
"""Half of the least that models add to scores of tokens that are not to be read, -1e4."""


def tokens_of(model: PreTrainedModel, collator: Collator | None, processing_class: Any) -> TokensPerRow:
    """Counts the tokens that a row of an image or of audio makes, by running it to the first layer. Known
    shapes are not."""
    sublayers, sizes = find_sublayers(model), {}

    def count(row: Row) -> int:
        shape = tuple(row[main_of(model, row)].shape)
        if shape not in sizes:
            inputs = uncached(model, collate([row], collator, processing_class, model)[0])
            with in_eval_mode(model), first_run(model, inputs):
                bottom = run_to_bottom(model, to_model(inputs, model), sublayers[0])
                sizes[shape] = bottom.shape[1:-1].numel()
        return int(sizes[shape])

    return count


@dataclass
class Batch:
    """Some rows on the device, and what they serve for.

    Args:
        inputs: What the model is called with.
        valid: The tokens of each stack that are not padding, (B, T).
        counted: The tokens whose outputs count for knowledge, (B, T).
        rows: Which of all rows they are.
        measured: Whether the model is measured on them.
        sampled: Whether a plan measures on them, too.
        tried: Whether students of trials are tuned on them.
        held_out: Whether students of trials are compared on them.
        fitted: Whether weights are tuned on them.
    """

    inputs: dict[str, Any]
    valid: dict[str, Tensor]
    counted: Tensor
    rows: list[int] = field(default_factory=list)
    measured: bool = False
    sampled: bool = False
    tried: bool = False
    held_out: bool = False
    fitted: bool = True

    @property
    def samples(self) -> int:
        """Rows in the batch, which may be several sequences each (multiple choice)."""
        tensors = (self.inputs.get("input_ids"), *self.inputs.values())  # patches lie in no rows
        return len(self.rows) or next(len(v) for v in tensors if isinstance(v, Tensor))

    def tokens(self, sublayer: Sublayer, like: Tensor, stack: str | None = None) -> Tensor:
        """Which tokens of `like`, (B, T, ...), in the stack of `sublayer`, or the one named, are real.

        Raises `UnsupportedModelError` if it is not known: of tokens of its own that the model has added, and
        of pooled ones where some were padding.
        """
        valid = self.valid[stack or sublayer.stack_name]
        if like.shape[1] == sublayer.uses * valid.shape[1]:
            return valid.repeat(1, sublayer.uses)
        more = like.shape[1] - valid.shape[1]
        if more and (more < 0 or not sublayer.stack.mask) and bool(valid.all()):  # windows, or pooled tokens
            return valid.new_ones(like.shape[:2])
        if more < 0 and valid.shape[1] % like.shape[1] == 0:
            parts = valid.view(len(valid), like.shape[1], -1)
            if bool((parts == parts[..., :1]).all()):  # no token is of real ones and of padding
                return parts[..., 0]
        if more < 0 or (more and not sublayer.stack.pads):
            way = "calibrate without the inputs that add tokens" if more > 0 else "give rows of one length"
            raise UnsupportedModelError(
                f"{sublayer.name} runs on {like.shape[1]} tokens of a sequence where {valid.shape[1]} come "
                f"to the first of its layers; which of the {like.shape[1]} are real is not known: {way}"
            )
        return F.pad(valid, (0, more))

    def by_token(self, tensor: Tensor, stack: str) -> Tensor:
        """(B, T, C) of the tokens of a stack, however a model arranges them."""
        return by_token(tensor, self.valid[stack].unsqueeze(-1))

    def halves(self, tokens: Tensor) -> list[Tensor]:
        """`tokens`, boolean (B, T), of rows of even and of odd number, whatever batch they are in."""
        odd = torch.tensor(self.rows, device=tokens.device) % 2 == 1
        by_sequence = odd.repeat_interleave(len(tokens) // self.samples).unsqueeze(1)
        return [tokens & ~by_sequence, tokens & by_sequence]

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`."""
        samples = self.samples

        def of(tensor: object) -> Any:
            return part_of(tensor, start, stop, samples) if isinstance(tensor, Tensor) else tensor

        inputs, valid = ({k: of(v) for k, v in tensors.items()} for tensors in (self.inputs, self.valid))
        return replace(self, inputs=inputs, valid=valid, counted=of(self.counted), rows=self.rows[start:stop])


class BatchMaker:
    """Makes batches of what `collate` gives.

    Args:
        device: Where batches are.
        model: Whose inputs are prepared.
        sublayers: Those of it that are pruned.
        last: The last sublayer of the model, whose tokens its outputs are of.
    """

    def __init__(
        self, device: torch.device, model: PreTrainedModel, sublayers: Sequence[Sublayer], last: Sublayer
    ):
        self.device, self.model, self.sublayers, self.last = device, model, sublayers, last
        self.sizes: dict[str, torch.Size] = {}
        self.stacks_of_ids: set[str] = set()
        self.streams: set[str] = set()
        """The stacks whose layers carry several streams of each token, (B, T, streams, D)."""

    def batch(self, tensors: dict[str, Tensor], counted: Tensor | None) -> Batch:
        """A batch of what `collate` has made, on the device."""
        model = self.model
        inputs = uncached(model, {key: value.to(self.device) for key, value in tensors.items()})
        valid = dict[str, Tensor]()
        for sublayer in {s.stack_name: s for s in self.sublayers}.values():
            valid[sublayer.stack_name] = self._valid(sublayer, inputs, mask_of(model, sublayer))
        last = valid.get(self.last.stack_name)
        if last is None:
            last = self._valid(self.last, inputs, mask_of(model, self.last))
        if self.streams and "input_ids" in inputs:
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            for name in self.streams & valid.keys():
                valid[name] = real.repeat_interleave(valid[name].shape[1] // real.shape[1], 1)
            if self.last.stack_name in self.streams:  # the head answers for each token once
                last = real
        for sublayer in self.sublayers:
            if sublayer.reads not in valid:
                texts = "attention_mask" if mask_of(model, sublayer).startswith("decoder_") else ""
                valid[sublayer.reads] = self._valid(sublayer, inputs, texts, memory=True)
        return Batch(inputs, valid, last if counted is None else last & counted.to(last.device))

    def batches(
        self, rows: Rows, numbers: Sequence[int], size: int, collate: Callable[[list[Any]], Inputs]
    ) -> Iterator[Batch]:
        """Batches of at most `size` of the rows that have these numbers.

        A row is a batch by itself where several do not lie one by one, in the inputs or in a stack: patches
        of all images as one sequence, or images of rows of which each has any number. No part of such a batch
        could be told from the rest. Of token ids each row may have several sequences (choices).
        """
        for start in range(0, len(numbers), size):
            several = list(numbers[start : start + size])
            count = len(several)
            inputs, counts = collate([rows.rows[i] for i in several])
            if count == 1 or all(tensor.shape[:1] == (count,) for tensor in inputs.values()):
                batch = replace(self.batch(inputs, counts), rows=several)
                entries = {len(v) for name, v in batch.valid.items() if name not in self.stacks_of_ids}
                if count == 1 or entries <= {count}:
                    yield batch
                    continue
            for i in several:
                yield replace(self.batch(*collate([rows.rows[i]])), rows=[i])

    def _valid(self, sublayer: Sublayer, inputs: dict[str, Any], key: str, memory: bool = False) -> Tensor:
        """Tokens of the batch that are not padding in the stack of `sublayer`, (B, T), or in what its
        cross-attention reads of another model. `key` is the input that marks them."""
        model, name = self.model, sublayer.reads if memory else sublayer.stack_name
        if key == "decoder_attention_mask" and "decoder_input_ids" not in inputs:
            key = "attention_mask"  # the model makes the decoder's inputs of the encoder's
        mask, ids = inputs.get(key), inputs.get(key.replace("attention_mask", "input_ids") or "input_ids")
        if ids is not None and key in ("attention_mask", "decoder_attention_mask"):
            self.stacks_of_ids.add(name)
            return cast(Tensor, (torch.ones_like(ids) if mask is None else mask).flatten(0, -2).bool())
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        samples = len(inputs["input_ids"] if "input_ids" in inputs else tensors[0])
        call: dict[str, Any] = {}
        # how many tokens an image or a sound makes is the model's business
        shapes = [str(each.shape) for each in list(filter(floats, tensors)) or tensors]
        form = " ".join([name, *shapes])
        # of rows with several images, padding may be left out, and other inputs may say what else is padding
        stale = form not in self.sizes or self.sizes[form][0] != samples or (not memory and len(tensors) > 1)
        if mask is not None or stale:
            with in_eval_mode(model), first_run(model, inputs):
                on_device = to_model(inputs, model)
                try:
                    if memory:
                        below = run_to_memory(model, on_device, sublayer)
                    else:
                        (call,) = calls_of_layers(model, on_device, sublayer, 1)
                        below = carried(sublayer, first((), call))
                except UnsupportedArchitectureError as error:
                    raise CalibrationError(
                        f"{sublayer.stack_name} does not run on some calibration rows, of which the model "
                        f"gets {', '.join(inputs)}; give rows that all run it, or name in towers those parts "
                        "of the model that run on all"
                    ) from error
                self.sizes[form] = torch.Size((len(below), below.shape[1:-1].numel()))
                if ids is not None and below.dim() == 4 and below.shape[:2] == ids.shape:
                    self.streams.add(name)
            tokens = self.sizes[form][1]
            framing = next((module for module in model.modules() if masks_frames(module)), None)
            if mask is not None and mask.shape != (samples, tokens) and framing is not None:
                return frame_mask(framing, mask, tokens)
            if mask is not None and mask.dim() == 2 and mask.shape[1] <= tokens:  # queries come first
                return F.pad(mask.bool(), (tokens - mask.shape[1], 0), value=True)
        return real_tokens(call, self.sizes[form]).to(self.device)

    def pairs(self, batch: Batch, sublayer: Sublayer) -> list[float]:
        """Of each layer of the stack of `sublayer`, which runs on no token ids, the pairs of tokens of a
        batch that read each other in its attention."""
        model, count = self.model, len(sublayer.layers)
        with in_eval_mode(model):
            calls = calls_of_layers(model, to_model(batch.inputs, model), sublayer, count)
        return [pairs_of_tokens(call, batch.valid[sublayer.stack_name]) for call in calls]


def visible_tokens(mask: Tensor) -> Tensor:
    """Which entries of a mask may be read: a boolean one, of numbers 0 and 1, or to be added to scores."""
    if mask.is_floating_point() and not bool((mask >= 0).all() and mask.any()):  # to be added
        return mask > HIDDEN
    return mask.bool()


def real_tokens(call: Mapping[str, Any], size: torch.Size) -> Tensor:
    """The tokens of a layer that are not padding, (B, T), of which `size` is: those that its attention
    mask, (B, T) or (B, heads, T, T), lets any token read.

    Args:
        call: What the layer is called with, by name.
        size: B and T.
    """
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape[-1] == size[1] and len(mask) in (1, size[0]):
        visible = visible_tokens(mask)
        return (visible.flatten(1, -2).any(1) if visible.dim() > 2 else visible).expand(size)
    return torch.ones(size, dtype=torch.bool)


def pairs_of_tokens(call: Mapping[str, Any], valid: Tensor) -> float:
    """Pairs of tokens that read each other in the attention of a layer: those within one image or one window
    where its call says where these begin, in `cu_seqlens` or by a mask, else all of an entry of the batch.

    Args:
        call: What the layer is called with, by name.
        valid: The tokens that are not padding, (B, T).

    Example:

        >>> call = {"cu_seqlens": torch.tensor([0, 2, 5])}
        >>> pairs_of_tokens(call, torch.ones(1, 5).bool())
        13.0
    """
    starts, mask = call.get("cu_seqlens"), call.get("attention_mask")
    if isinstance(starts, Tensor):
        return float(starts.diff().double().square().sum())
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == valid.shape[1:] * 2:
        visible = visible_tokens(mask[:, 0]).to(valid.device)
        both = (visible | visible.mT) & valid.unsqueeze(1) & valid.unsqueeze(2)
        return float(both.sum())
    return float(valid.sum(1).double().square().sum())
