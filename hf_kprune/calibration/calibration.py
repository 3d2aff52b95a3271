"""Calibration: rows to batches, batches to sums, sums over processes by `accelerate`.

Every process takes each N-th row; every statistic is a sum over rows or tokens and is reduced once per sublayer; every
decision is taken by the main process and broadcast. So one process and many do the same thing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError, UnsupportedArchitectureError, UnsupportedModelError
from ..methods.base import Statistics
from ..methods.least_squares import Centred, NormalEquations, add_products
from ..processes import together
from ..structure.checks import prove_projections
from ..structure.facts import (
    first_run,
    frame_mask,
    in_eval_mode,
    in_half_precision,
    masks_frames,
    max_positions,
    to_model,
)
from ..structure.hooks import (
    State,
    by_token,
    check_order,
    matrix_flops,
    only_tokens,
    outputs_of,
    part_of,
    probed,
    resumed,
    run_sublayer,
    run_to_bottom,
    run_to_inputs,
    run_to_top,
)
from ..structure.sublayers import Sublayer, find_sublayers, oriented
from ..structure.surgery import in_unit_order
from .collate import Collator, collate
from .knowledge import Draws, Knowledge
from .loss_check import check_loss
from .rows import Rows, row_length


LOGITS = 2**24
"""Logits of a language model that exist at once while measuring; with more, its head runs on some tokens at a time."""

GRAPH_LAYERS = 3
"""Layers whose activations the measuring pass may hold for a whole batch. A deeper model takes the batch in slices, so
that memory does not grow with depth."""


GRADIENTS = "gradients of the knowledge loss to the output"


def in_float32(outputs: Any) -> Any:
    """Model outputs with their half-precision tensors in float32."""
    for key, value in outputs.items():
        if isinstance(value, Tensor) and in_half_precision(value):
            outputs[key] = value.float()
    return outputs


def tokens_of(
    model: PreTrainedModel, collator: Collator | None, processing_class: Any
) -> Callable[[dict[str, Any]], int]:
    """Counts the tokens that a row of an image or of audio makes, by running it to the first layer. Known shapes are not."""
    sublayers, known = find_sublayers(model), {}

    def count(row: dict[str, Any]) -> int:
        shape = tuple(row[model.main_input_name].shape)
        if shape not in known:
            inputs, _ = collate([row], collator, processing_class, model)
            with in_eval_mode(model), first_run(model, inputs):
                known[shape] = run_to_bottom(model, to_model(inputs, model), sublayers[0]).shape[1]
        return int(known[shape])

    return count


@dataclass
class Batch:
    """Collated inputs on the device, the tokens (B, T) of each stack that are not padding, those whose outputs count for
    knowledge, and which of all rows they are; whether they serve for measuring, for trials, or are held out of those."""

    inputs: dict[str, Any]
    valid: dict[str, Tensor]
    counted: Tensor
    rows: list[int] = field(default_factory=list)
    measured: bool = False
    tried: bool = False
    held_out: bool = False

    @property
    def samples(self) -> int:
        """Rows in the batch, which may be several sequences each (multiple choice)."""
        return next(len(value) for value in self.inputs.values() if isinstance(value, Tensor))

    def tokens(self, sublayer: Sublayer, like: Tensor, stack: str | None = None) -> Tensor:
        """Which tokens of `like`, (B, T, ...), in the stack of `sublayer`, or the one named, are real.

        Raises `UnsupportedModelError` if the model has added tokens of its own that are no padding.
        """
        valid = self.valid[stack or sublayer.stack_name]
        more = like.shape[1] - valid.shape[1]
        if more < 0 or (more and not sublayer.stack.pads):
            raise UnsupportedModelError(
                f"{sublayer.stack_name} runs on {like.shape[1]} tokens a sequence where the inputs have {valid.shape[1]}; "
                "which of them are real is not known. Calibrate without the inputs that add tokens"
            )
        return torch.nn.functional.pad(valid, (0, more))

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`."""
        samples = self.samples

        def of(tensor: Any) -> Any:
            return part_of(tensor, start, stop, samples) if isinstance(tensor, Tensor) else tensor

        inputs, valid = ({k: of(v) for k, v in held.items()} for held in (self.inputs, self.valid))
        return Batch(
            inputs, valid, of(self.counted), self.rows[start:stop], self.measured, self.tried, self.held_out
        )


def losses_of(loss: Knowledge, student: Any, teacher: Any, batch: Batch) -> Tensor:
    """The knowledge loss of each row of a batch, (B,).

    Raises:
        ArgumentError: If it gives anything else.
        CalibrationError: If it is not finite.
    """
    losses = loss(student, teacher, batch.counted)
    if losses.shape != (batch.samples,):
        raise ArgumentError(
            f"the knowledge loss gave {tuple(losses.shape)} for {batch.samples} samples, expected one number each"
        )
    if not bool(torch.isfinite(losses).all()):
        raise CalibrationError(
            f"NaN or Inf in the knowledge loss ({loss.name}), while the activations below it are finite; check what the head "
            "of the model, or compute_loss, makes of the calibration data"
        )
    return losses


class Calibration:
    """The calibration data of one process, and what is summed over them.

    Streams are lists with one `State` per batch.

    Args:
        accelerator: Device and processes.
        rows: The same on every process.
        collator: Data collator of the caller's, or None.
        processing_class: Tokenizer, whose padding is used if there is no collator.
        model: Whose inputs are prepared.
        args: Options.
        tokens_per_row: Counts the tokens of a row without token ids, see `tokens_of`.
        few: Measure on no more than so many tokens, or on one row, and hold none out: for a plan.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: Rows,
        collator: Collator | None,
        processing_class: Any,
        model: PreTrainedModel,
        args: KPruneArguments,
        tokens_per_row: Callable[[dict[str, Any]], int] | None = None,
        few: int | None = None,
    ):
        self.accelerator, self.rows, self.args = accelerator, rows, args
        self.dtype = getattr(torch, args.statistics_dtype or "float64")
        self.step: Callable[[float], None] = lambda steps: None
        self.batches: list[Batch] = []
        self.sublayers = find_sublayers(model, args.head_unit)
        self.tokens: dict[str, int] = {}
        self.readers: list[list[list[str]]] = []
        self.stacks_of_ids: set[str] = set()
        ends = [0, rows.measured // 2, rows.measured - rows.held_out, rows.measured, len(rows.rows)]
        self.sample = rows.first(few, tokens_per_row) if few is not None else rows.measured
        if few is not None:
            ends = [0, 0, self.sample, self.sample, len(rows.rows)]
        for start, stop in pairwise(ends):
            by_length = sorted(
                range(start, stop), key=lambda i: (row_length(rows.rows[i], tokens_per_row), i)
            )
            mine = by_length[accelerator.process_index :: accelerator.num_processes]
            for first in range(0, len(mine), args.per_device_batch_size):
                picked = mine[first : first + args.per_device_batch_size]
                inputs, counted = collate([rows.rows[i] for i in picked], collator, processing_class, model)
                batch = self._batch(model, inputs, counted)
                batch.rows, batch.measured = picked, start < self.sample
                batch.tried, batch.held_out = start < ends[1], ends[2] <= start < ends[3]
                self.batches.append(batch)

    def _batch(self, model: PreTrainedModel, tensors: dict[str, Tensor], counted: Tensor | None) -> Batch:
        inputs: dict[str, Any] = {key: value.to(self.accelerator.device) for key, value in tensors.items()}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        valid = {
            s.stack_name: self._valid(model, s, inputs)
            for s in {s.stack_name: s for s in self.sublayers}.values()
        }
        last = list(valid.values())[-1]
        return Batch(inputs, valid, last if counted is None else last & counted.to(last.device))

    def _valid(self, model: PreTrainedModel, sublayer: Sublayer, inputs: dict[str, Any]) -> Tensor:
        """Tokens of the batch that are not padding in the stack of `sublayer`, (B, T)."""
        name = sublayer.stack_name
        key = sublayer.stack.mask
        if key == "decoder_attention_mask" and "decoder_input_ids" not in inputs:
            key = "attention_mask"  # the model makes the decoder's inputs of the encoder's
        mask, ids = inputs.get(key), inputs.get(key.replace("attention_mask", "input_ids"))
        if ids is not None:
            self.stacks_of_ids.add(name)
            return cast(Tensor, (torch.ones_like(ids) if mask is None else mask).flatten(0, -2).bool())
        samples = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
        if (
            mask is not None or name not in self.tokens
        ):  # images, audio: how many tokens they make is the model's business
            with in_eval_mode(model), first_run(model, inputs):
                bottom = run_to_bottom(model, to_model(inputs, model), sublayer)
            self.tokens[name] = bottom.shape[1]
            if mask is not None and mask.shape == (samples, self.tokens[name]):
                return cast(Tensor, mask.bool())
            if mask is not None and masks_frames(model):
                return frame_mask(model, mask, self.tokens[name])
        return torch.ones(samples, self.tokens[name], dtype=torch.bool, device=self.accelerator.device)

    @cached_property
    def lengths(self) -> dict[str, float]:
        """Mean tokens of a sequence in each stack, over all processes."""
        names = list(dict.fromkeys(s.stack_name for s in self.sublayers))
        sums = [
            torch.tensor(
                [sum(int(b.valid[n].sum()) for b in self.batches), sum(len(b.valid[n]) for b in self.batches)]
            )
            for n in names
        ]
        sums = [s.double().to(self.accelerator.device) for s in sums]
        self._reduce(sums)
        return {name: float(s[0] / s[1]) for name, s in zip(names, sums, strict=True)}

    @cached_property
    def flops_lengths(self) -> dict[str, float]:
        """Tokens of a sequence in each stack that FLOPs are counted for."""
        return self.lengths if self.args.flops_length is None else self.lengths_at(self.args.flops_length)

    def lengths_at(self, length: int) -> dict[str, float]:
        """Tokens of a sequence in each stack if texts have `length`; what an image or a sound makes stays as it is."""
        return {name: float(length) if name in self.texts else mean for name, mean in self.lengths.items()}

    @cached_property
    def texts(self) -> set[str]:
        """The stacks that read token ids."""
        (names,) = broadcast_object_list([sorted(self.stacks_of_ids)])  # a process may have no rows
        return set(names)

    def check_flops_length(self, model: PreTrainedModel) -> None:
        """Raise `ArgumentError` if `flops_length` is given and means nothing to `model`."""
        length, limit = self.args.flops_length, max_positions(model)
        if length is not None and not self.texts:
            raise ArgumentError(
                f"flops_length is {length}, but {type(model).__name__} reads no token ids: how many tokens an image or a "
                "sound makes is up to the model; leave flops_length at None"
            )
        if length is not None and limit is not None and length > limit:
            raise ArgumentError(
                f"flops_length is {length}, {type(model).__name__} takes at most {limit} tokens"
            )

    def all_flops(self, model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> float:
        """FLOPs of all of `model` for one sequence, as `prunable_flops` of a part of it, by running one row.

        What is not prunable counts by the token: experts, for those that are sent to them, and the head over the vocabulary
        among it.
        """
        other = 0.0
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                row = self.batches[0].part(0, 1)
                tokens = {name: float(valid.shape[1]) for name, valid in row.valid.items()}
                products = sum(s.num_units * s.unit_products(tokens) for s in sublayers)
                sequences = max(len(valid) for valid in row.valid.values())
                total = matrix_flops(model, row.inputs) / sequences + products
                prunable = sum(s.num_units * s.unit_flops(tokens) for s in sublayers)
                other = max(total - prunable, 0.0) * sum(self.flops_lengths.values()) / sum(tokens.values())
        (other,) = broadcast_object_list([other])
        return float(other) + sum(s.num_units * s.unit_flops(self.flops_lengths) for s in sublayers)

    def _reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of float64 over all processes, in place, by one call."""
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_same_rows(self) -> None:
        """Raise `CalibrationError` on every process if they drew different rows, as from a dataset shared out before."""
        if (
            self.accelerator.num_processes > 1
            and len(set(gather_object([self.rows.fingerprint["sha256"]]))) > 1
        ):
            raise CalibrationError(
                "the processes drew different calibration rows; give all of them the whole dataset, it is shared out here"
            )

    def check_enough_tokens(self) -> None:
        """Raise `CalibrationError` if there are fewer tokens in a stack than weights that each must determine."""
        for sublayer in self.sublayers if self.args.tune else ():
            tokens = round(self.lengths[sublayer.stack_name] * self.rows.sequences)
            columns = sublayer.weight.shape[1]
            if tokens < columns:
                raise CalibrationError(
                    f"{tokens} calibration tokens (in {len(self.rows.rows)} rows) are fewer than the {columns} columns of "
                    f"{sublayer.name}, whose weights they must determine; raise num_tokens (now {self.args.num_tokens}) "
                    "or give more rows"
                )

    def agree(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of the main process, on every process."""
        if self.accelerator.num_processes == 1:
            return tensors
        return cast(list[Tensor], broadcast([t.to(self.accelerator.device) for t in tensors], from_process=0))

    def bottom(self) -> list[State]:
        """The states below the first sublayer: nothing has run."""
        return [State() for _ in self.batches]

    def check(self, model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> None:
        """Carry one batch up sublayer by sublayer, and note which input projections read the same.

        Raises `UnsupportedArchitectureError` if it does not arrive where the model as a whole does: then the model's family
        describes it wrongly, though cutting may work.
        """
        readers: list[list[list[str]]] = []
        with together(self.accelerator):
            for batch in self.batches[:1]:
                if batch.samples == batch.counted.shape[1] > 1:  # so that rows are not taken for tokens below
                    batch = batch.part(0, batch.samples - 1)
                check_order(model, batch.inputs, sublayers)
                prove_projections(model, batch.inputs, self.args.head_unit)
                with torch.no_grad():
                    state, expected = State(), run_to_top(model, batch.inputs, sublayers)
                for position, sublayer in enumerate(sublayers):
                    tap = run_sublayer(model, batch.inputs, sublayers, position, state)
                    state, groups = tap.above, dict[tuple[int, bool], list[str]]()
                    for path, tensors in tap.reads.items():
                        # not where one serves several ends, or reads something else than tokens, or in another order
                        if len(tensors) == 1 and self.reads_tokens(batch, sublayer, path, tensors[0]):
                            biased = sublayer.layer.get_submodule(path).bias is not None
                            groups.setdefault((id(tensors[0]), biased), []).append(path)
                    readers.append(list(groups.values()))
                for name, top in expected.inputs.items():
                    valid = batch.tokens(next(s for s in sublayers if s.stack_name == name), top)
                    error, size = (state.inputs[name] - top)[valid].abs().max(), top[valid].abs().max()
                    if error > 1e-3 * size:
                        raise UnsupportedArchitectureError(
                            f"run by single sublayers, {type(model).__name__} ends {float(error / size):.1e} away from where "
                            f"it does as a whole; its family {model.config.model_type!r} does not tell what its layers give: "
                            "docs/add_a_family.md"
                        )
                self._check_head(model, sublayers, expected, batch.part(0, 1), batch.samples)
        (self.readers,) = broadcast_object_list([readers])

    def reads_tokens(self, batch: Batch, sublayer: Sublayer, path: str, tensor: Tensor) -> bool:
        """Whether what a projection reads is (B, T, D), or (B * T, D), of the tokens of its stack."""
        stack = sublayer.reads if sublayer.block.inputs[path] == "kv" else sublayer.stack_name
        rows, tokens = batch.valid[stack].shape
        if tensor.dim() == 3 and sublayer.stack.pads:
            return tensor.shape[0] == rows and tensor.shape[1] >= tokens
        return tuple(tensor.shape[:-1]) in ((rows, tokens), (rows * tokens,))

    @torch.no_grad()
    def top(self, model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> list[State | None]:
        """The states above the last sublayer, of the batches that are measured."""
        with together(self.accelerator):
            return [
                run_to_top(model, batch.inputs, sublayers) if batch.measured else None
                for batch in self.batches
            ]

    def _check_head(
        self, model: PreTrainedModel, sublayers: Sequence[Sublayer], top: State, sample: Batch, samples: int
    ) -> None:
        """Raise `UnsupportedModelError` if the head makes something else of the top alone than of the whole model."""
        chunk = self.chunk(model, sample)
        few = only_tokens(model.get_output_embeddings(), 0, chunk) if chunk else nullcontext()
        with torch.no_grad(), few:
            whole = model(**sample.inputs, return_dict=True)
            with resumed(sublayers, len(sublayers), top.part(0, 1, samples)):
                alone = model(**sample.inputs, return_dict=True)
        for name, value in whole.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                made = alone[name]
                if value.shape[:2] == sample.counted.shape:
                    value, made = value[sample.counted], made[sample.counted]
                if value.numel() and (made - value).abs().max() > 1e-3 * value.abs().max():
                    raise UnsupportedModelError(
                        f"the {name} of {type(model).__name__} do not follow from its last layer alone: its head reads lower "
                        "layers too, which is not carried here; use a head on the last layer (for instance "
                        "use_weighted_layer_sum=False)"
                    )

    @torch.no_grad()
    def try_loss(self, model: PreTrainedModel, loss: Knowledge) -> tuple[list[str], list[str]]:
        """Names of the outputs that a loss reads, and of the others, see `check_loss`.

        Raises `CalibrationError` for activations below it that are not finite.
        """
        sublayers = find_sublayers(model, self.args.head_unit)
        for whole in self.batches[:1]:
            sample = (
                whole if loss.kinds is None else whole.part(0, min(2, whole.samples))
            )  # the caller may count on many
            chunk = self.chunk(model, sample) if loss.per_token else 0
            counted = sample.counted[:, :chunk] if chunk else sample.counted
            few = only_tokens(model.get_output_embeddings(), 0, chunk) if chunk else nullcontext()
            with few, first_run(model, sample.inputs), outputs_of(sublayers) as activations:
                outputs = in_float32(model(**sample.inputs, return_dict=True))
            for place, y in activations.items():
                y = by_token(y, sample.valid[sublayers[place].stack_name].unsqueeze(-1))
                self.check_finite(sublayers[place], (y[sample.tokens(sublayers[place], y)].sum(),))
            return check_loss(
                loss, outputs, counted, Draws(self.args.seed, sample.rows, counted), sample.samples
            )
        return [], []

    def measure(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        position: int,
        streams: list[State],
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_top: list[State | None],
        loss: Knowledge | None,
    ) -> list[Statistics]:
        """Knowledge measurement on all units of the sublayers from `position` up, by a forward and backward pass.

        Args:
            student: Frozen; gradients are taken with respect to masks only.
            sublayers: The student's.
            position: Of the target sublayer.
            streams: The student's, below the target.
            teacher: Whose head turns `teacher_top` into the outputs that the student's are compared with.
            teacher_sublayers: The teacher's.
            teacher_top: The teacher's states above its last sublayer.
            loss: Predictive knowledge, or None where it is zero because student and teacher are still the same.
        """
        targets = sublayers[position:]
        device = self.accelerator.device
        columns = [t.weight.shape[1] for t in targets]
        energy, linear, total, square = (
            [torch.zeros(c, dtype=torch.float64, device=device) for c in columns] for _ in range(4)
        )
        samples = torch.zeros(1, dtype=torch.float64, device=device)
        tokens = torch.zeros(len(targets), dtype=torch.float64, device=device)
        slices = -(-len(targets) // (2 * GRAPH_LAYERS)) if loss is not None else 1
        half = self.args.measure_dtype == "bfloat16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with together(self.accelerator):
            for batch, stream, top in zip(self.batches, streams, teacher_top, strict=True):
                if not batch.measured:
                    continue
                count = batch.samples
                size = -(-count // slices)
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    part, state = batch.part(start, stop), stream.part(start, stop, count)
                    samples += stop - start
                    chunk = self.chunk(student, part) if loss is not None and loss.per_token else 0
                    grad = torch.enable_grad() if loss is not None else torch.no_grad()
                    with grad, autocast, resumed(sublayers, position, state), probed(targets) as features:
                        reached = run_to_top(student, part.inputs, sublayers) if chunk else None
                        outputs = student(**part.inputs, return_dict=True) if reached is None else None
                    self.step((3 if loss is not None else 1) * len(targets) * (stop - start) / count)
                    for place, a in features.items():
                        a = by_token(a.detach(), part.valid[targets[place].stack_name].unsqueeze(-1))
                        valid = part.tokens(targets[place], a)
                        self.check_finite(targets[place], (a[valid].sum(),))
                        energy[place] += a[valid].float().square().sum(0)
                        linear[place] += a[valid].float().sum(0)
                        tokens[place] += valid.sum()
                    if loss is None:
                        continue
                    assert top is not None
                    above = top.part(start, stop, count)
                    if reached is not None:
                        with autocast:
                            pulled, pull = self.pull_on_top(
                                student,
                                sublayers,
                                reached,
                                teacher,
                                teacher_sublayers,
                                above,
                                part,
                                loss,
                                chunk,
                            )
                        gradients = torch.autograd.grad(
                            pulled, list(features.values()), pull, allow_unused=True
                        )
                    else:
                        with (
                            torch.no_grad(),
                            autocast,
                            resumed(teacher_sublayers, len(teacher_sublayers), above),
                        ):
                            expected = teacher(**part.inputs, return_dict=True)
                        losses = losses_of(loss, in_float32(outputs), in_float32(expected), part)
                        gradients = torch.autograd.grad(
                            losses.sum(), list(features.values()), allow_unused=True
                        )
                    for (place, a), gradient in zip(features.items(), gradients, strict=True):
                        if (
                            gradient is not None
                        ):  # of several sequences per sample (choices), one mask serves all
                            like = part.valid[targets[place].stack_name].unsqueeze(-1)
                            a, gradient = by_token(a.detach(), like).float(), by_token(gradient, like).float()
                            by_mask = torch.einsum("btc,btc->bc", a, gradient).double()
                            g = by_mask.view(
                                stop - start, len(by_mask) // (stop - start), by_mask.shape[1]
                            ).sum(1)
                            total[place] += g.sum(0)
                            square[place] += g.square().sum(0)
        self._reduce([*energy, *linear, *total, *square, samples, tokens])
        for target, e in zip(targets, energy, strict=True):
            self.check_finite(target, (e,))
        for target, t, q in reversed(list(zip(targets, total, square, strict=True))):  # NaN goes on downwards
            self.check_finite(target, (t, q), GRADIENTS)
        measured = []
        for i, target in enumerate(targets):
            sums = {
                "energy": energy[i],
                "feature_sum": linear[i],
                "gradient_sum": total[i],
                "gradient_square": square[i],
            }
            measured.append(self._statistics(target, float(tokens[i]), float(samples), sums))
        return measured

    def measure_dense(
        self, model: PreTrainedModel, sublayers: Sequence[Sublayer], needs: Collection[str], loss: Knowledge
    ) -> Iterator[Statistics]:
        """Measure the dense model for a one-shot method, sublayer by sublayer. Only Fisher information grows with depth.

        Args:
            model: Frozen.
            sublayers: All of it.
            needs: `Method.needs`.
            loss: Against draws from which the Fisher information is taken.
        """
        drawn = {"curvature", "fisher"} & set(needs)
        fisher = self._fisher(model, sublayers, loss, "fisher" in needs) if drawn else [{} for _ in sublayers]
        batches = [batch for batch in self.batches if batch.measured]
        states = [State() for _ in batches]
        count = torch.tensor(
            [sum(b.samples for b in batches)], dtype=torch.float64, device=self.accelerator.device
        )
        self._reduce([count])
        for position, sublayer in enumerate(sublayers):
            columns = sublayer.weight.shape[1]
            shapes = {"energy": (columns,), "feature_sum": (columns,), "tokens": ()}
            if "curvature" in needs:
                shapes["gram"] = (columns, columns)
            sums = {
                k: torch.zeros(v, dtype=torch.float64, device=self.accelerator.device)
                for k, v in shapes.items()
            }
            with together(self.accelerator):
                for i, batch in enumerate(batches):
                    tap = run_sublayer(model, batch.inputs, sublayers, position, states[i])
                    a = tap.features[batch.tokens(sublayer, tap.output)]
                    sums["energy"] += a.double().square().sum(0)
                    sums["feature_sum"] += a.sum(0, dtype=torch.float64)
                    sums["tokens"] += len(a)
                    if "gram" in sums:
                        centred = Centred.of(a, self.dtype)
                        add_products(sums["gram"], centred, centred)
                    states[i] = tap.above
                    self.step(1)
            self._reduce(list(sums.values()))
            self.check_finite(sublayer, list(sums.values()))
            yield self._statistics(sublayer, float(sums.pop("tokens")), float(count), sums | fisher[position])

    def _fisher(
        self, model: PreTrainedModel, sublayers: Sequence[Sublayer], loss: Knowledge, masks: bool
    ) -> list[dict[str, Tensor]]:
        """Fisher information of the output of each sublayer, or else of its units' masks: see `Statistics`."""
        device = self.accelerator.device
        zeros = [
            {"fisher": (s.num_units, s.num_units), "absolute": (s.num_units,)}
            if masks
            else {"metric": (len(s.weight),) * 2}
            for s in sublayers
        ]
        sums = [
            {k: torch.zeros(v, dtype=torch.float64, device=device) for k, v in shapes.items()}
            for shapes in zeros
        ]
        slices = -(-len(sublayers) // (2 * GRAPH_LAYERS))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.args.measure_dtype == "bfloat16")
        with together(self.accelerator):
            for whole in self.batches:
                if not whole.measured:
                    continue
                size = -(-whole.samples // slices)
                for start in range(0, whole.samples, size):
                    batch = whole.part(start, min(start + size, whole.samples))
                    draws = Draws(self.args.seed, batch.rows, batch.counted)
                    chunk = self.chunk(model, batch) if loss.per_token else 0
                    with (
                        torch.enable_grad(),
                        autocast,
                        probed(sublayers) as features,
                        outputs_of(sublayers) as outputs,
                    ):
                        reached = run_to_top(model, batch.inputs, sublayers) if chunk else None
                        made = model(**batch.inputs, return_dict=True) if reached is None else None
                    for place, a in features.items():
                        like = batch.valid[sublayers[place].stack_name].unsqueeze(-1)
                        a = by_token(a.detach(), like)
                        self.check_finite(sublayers[place], (a[batch.tokens(sublayers[place], a)].sum(),))
                    given = list(outputs.values())
                    if reached is None:
                        made = in_float32(made)
                        drawn = loss.draw(made, loss.noise(made, draws), batch.counted)
                        losses = losses_of(loss, made, drawn, batch)
                        gradients = torch.autograd.grad(losses.sum(), given, allow_unused=True)
                    else:
                        below = State({name: value.detach() for name, value in reached.inputs.items()})
                        noise = draws.uniform_of_tokens()
                        with autocast:
                            pulled, pull = self.pull_on_top(
                                model, sublayers, reached, model, sublayers, below, batch, loss, chunk, noise
                            )
                        gradients = torch.autograd.grad(pulled, given, pull, allow_unused=True)
                    for (place, _), gradient in zip(outputs.items(), gradients, strict=True):
                        if gradient is not None:
                            like = batch.valid[sublayers[place].stack_name].unsqueeze(-1)
                            g, a = (
                                by_token(gradient, like).float(),
                                by_token(features[place].detach(), like).float(),
                            )
                            valid = batch.tokens(sublayers[place], g)
                            if masks:
                                self._add_masks(
                                    sums[place], sublayers[place], a, g * valid.unsqueeze(-1), batch.samples
                                )
                            else:
                                g = g[valid].to(self.dtype)
                                sums[place]["metric"] += g.T @ g
                    self.step(3 * len(sublayers) * batch.samples / whole.samples)
        self._reduce([tensor for held in sums for tensor in held.values()])
        for sublayer, held in reversed(
            list(zip(sublayers, sums, strict=True))
        ):  # what is not finite goes on downwards
            self.check_finite(sublayer, list(held.values()), GRADIENTS)
        return sums

    def _add_masks(
        self, sums: dict[str, Tensor], sublayer: Sublayer, a: Tensor, g: Tensor, samples: int
    ) -> None:
        """Add what features (B, T, C) and gradients to the output (B, T, D) say of the units' masks."""
        by_column = torch.einsum("btc,btc->bc", a, g @ sublayer.weight.float()).double()
        by_unit = by_column[:, sublayer.columns.to(a.device)].sum(2)
        by_sample = by_unit.view(samples, len(by_unit) // samples, by_unit.shape[1]).sum(1)
        sums["fisher"] += by_sample.T @ by_sample
        sums["absolute"] += by_sample.abs().sum(0)

    def _statistics(
        self, sublayer: Sublayer, tokens: float, samples: float, sums: dict[str, Tensor]
    ) -> Statistics:
        """Statistics, their columns in the order of the units."""
        order = (
            sublayer.columns.flatten().to(self.accelerator.device) if sublayer.unit.strided else slice(None)
        )
        by_column = {
            name: sums[name][order] for name in sums.keys() - {"metric", "fisher", "absolute", "gram"}
        }
        by_two = {"gram": sums["gram"][order][:, order]} if "gram" in sums else {}
        return Statistics(
            sublayer.unit.has_heads,
            sublayer.unit_width,
            sublayer.unit_flops(self.flops_lengths),
            in_unit_order(sublayer),
            sublayer.bias is not None,
            sublayer.magnitude,
            tokens=round(tokens),
            samples=round(samples),
            **{**sums, **by_column, **by_two},
        )

    def check_held_out(self) -> None:
        """Raise `CalibrationError` if there are too few rows to hold some out."""
        if not self.rows.held_out:
            raise CalibrationError(
                f"{self.rows.measured} calibration rows are measured on, expected at least 4, so that models can be compared "
                "on those held out; give more rows, shorter ones if need be, and a larger num_measure_tokens"
            )

    def without_held_out(self) -> Calibration:
        """All rows but those on which models are compared."""
        made = copy.copy(self)
        made.batches = [batch for batch in self.batches if not batch.held_out]
        return made

    def trial(self) -> Calibration:
        """The rows on which ways to split the budget are tried: the first half of those that are measured."""
        made = copy.copy(self)
        made.batches = [batch for batch in self.batches if batch.tried]
        return made

    @torch.no_grad()
    def distance(self, student: PreTrainedModel, teacher: PreTrainedModel, loss: Knowledge) -> float:
        """Mean knowledge loss of the student on the rows held out."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        with together(self.accelerator), in_eval_mode(student), in_eval_mode(teacher):
            for whole in self.batches:
                chunk = self.chunk(teacher, whole) if loss.per_token else 0
                size = max(1, whole.samples * chunk // whole.counted.shape[1]) if chunk else whole.samples
                for start in range(0, whole.samples if whole.held_out else 0, size):
                    batch = whole.part(start, min(start + size, whole.samples))
                    both = (
                        (m, to_model(batch.inputs, m)) for m in (student, teacher)
                    )  # which may differ in dtype
                    made, expected = (in_float32(m(**inputs, return_dict=True)) for m, inputs in both)
                    losses = losses_of(loss, made, expected, batch)
                    sums += torch.stack(
                        [losses.double().sum(), torch.tensor(float(len(losses)), device=sums.device).double()]
                    )
                    self.step(2 * len(self.sublayers) * batch.samples / whole.samples)
        self._reduce([sums])
        return float(sums[0] / sums[1])

    def chunk(self, model: PreTrainedModel, batch: Batch) -> int:
        """Tokens of a batch whose logits over the vocabulary may exist at once; 0 if those of all may."""
        vocabulary = model.get_output_embeddings()
        if vocabulary is None or batch.counted.numel() * len(vocabulary.weight) <= LOGITS:
            return 0
        return max(1, LOGITS // (len(batch.counted) * len(vocabulary.weight)))

    def pull_on_top(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        top: State,
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_top: State,
        batch: Batch,
        loss: Knowledge,
        chunk: int,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The hidden states below the student's head, (B, T, D), and the gradient of the summed knowledge loss to them.

        The heads of both run on `chunk` tokens at a time. With `noise`, (B, T), the loss is against draws from the teacher.
        """
        name = sublayers[-1].stack_name
        hidden, counts = top.inputs[name], batch.counted.sum(1)
        leaf = hidden.detach().requires_grad_()
        pull = torch.zeros_like(hidden)
        pairs = (
            (student, sublayers, State({**top.inputs, name: leaf})),
            (teacher, teacher_sublayers, teacher_top),
        )
        for start in range(0, hidden.shape[1], chunk):
            counted = batch.counted[:, start : start + chunk]
            made = []
            for model, layers, state in pairs:
                with torch.set_grad_enabled(model is student), resumed(layers, len(layers), state):
                    with only_tokens(model.get_output_embeddings(), start, start + chunk):
                        made.append(in_float32(model(**batch.inputs, return_dict=True)))
            if noise is not None:
                made[1] = loss.draw(made[1], {"logits": noise[:, start : start + chunk]}, counted)
            losses = loss(made[0], made[1], counted) * counted.sum(1) / counts.clamp(min=1)
            pull += torch.autograd.grad(losses.sum(), leaf)[0]
        return hidden, pull

    def normal_equations(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        streams: list[State],
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_streams: list[State],
        position: int,
    ) -> NormalEquations:
        """The sums that fit the student's target sublayer to the teacher's, for the columns that it still has, unit by unit.

        Carries `teacher_streams` above the target, in place, as its outputs are at hand.
        """
        sublayer = sublayers[position]
        rows, columns = sublayer.weight.shape
        equations = NormalEquations.zeros(columns, rows, self.accelerator.device)
        order = (
            sublayer.columns.flatten().to(self.accelerator.device) if sublayer.unit.strided else slice(None)
        )
        with together(self.accelerator):
            for i, batch in enumerate(self.batches):
                told = run_sublayer(teacher, batch.inputs, teacher_sublayers, position, teacher_streams[i])
                tap = run_sublayer(student, batch.inputs, sublayers, position, streams[i])
                valid = batch.tokens(sublayer, told.output)
                reference = (told.stream + told.output)[valid]
                equations.add(
                    tap.features[valid][:, order], reference - tap.stream[valid], reference, self.dtype
                )
                teacher_streams[i] = told.above
                self.step(2)
        self._reduce(equations.tensors())
        self.check_finite(sublayer, equations.tensors())
        return equations

    def input_equations(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        streams: list[State],
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_streams: list[State],
        position: int,
    ) -> list[tuple[list[str], NormalEquations]]:
        """The sums that fit what the student's input projections read to what the teacher's do, for each tensor that is read,
        with the paths of the projections that read it, all with or all without a bias."""
        sublayer, groups = sublayers[position], self.readers[position]
        widths = [oriented(sublayer.layer.get_submodule(paths[0])).shape[1] for paths in groups]
        made = [NormalEquations.zeros(width, width, self.accelerator.device) for width in widths]
        first = [paths[0] for paths in groups]
        with together(self.accelerator):
            for i, batch in enumerate(self.batches if groups else []):
                told = run_to_inputs(
                    teacher, batch.inputs, teacher_sublayers, position, teacher_streams[i], first
                )
                reads = run_to_inputs(student, batch.inputs, sublayers, position, streams[i], first)
                for path, equations in zip(first, made, strict=True):
                    stack = sublayer.reads if sublayer.block.inputs[path] == "kv" else sublayer.stack_name
                    like = batch.valid[stack].unsqueeze(-1)
                    x, y = (by_token(tensors[path], like) for tensors in (reads, told))
                    valid = batch.tokens(sublayer, x, stack)
                    equations.add(x[valid], y[valid], y[valid], self.dtype)
                self.step(2)
        self._reduce([tensor for equations in made for tensor in equations.tensors()])
        for equations in made:
            self.check_finite(sublayer, equations.tensors())
        return list(zip(groups, made, strict=True))

    def advance(
        self, model: PreTrainedModel, sublayers: Sequence[Sublayer], position: int, streams: list[State]
    ) -> None:
        """Carry the streams of `model` above the sublayer at `position`, in place."""
        with together(self.accelerator):
            for i, batch in enumerate(self.batches):
                streams[i] = run_sublayer(model, batch.inputs, sublayers, position, streams[i]).above
                self.step(1)

    def check_finite(self, sublayer: Sublayer, sums: Sequence[Tensor], what: str = "activations") -> None:
        """Raise `CalibrationError`, naming the sublayer, if any of its sums is NaN or infinite."""
        if not all(bool(torch.isfinite(t).all()) for t in sums):
            raise CalibrationError(
                f"NaN or Inf in the {what} of {sublayer.name}; check that the model gives finite outputs on the "
                "calibration data, and that its weights are finite"
            )
