"""Calibration: rows to batches, batches to sums, sums over processes by `accelerate`.

Every process takes each N-th row; every statistic is a sum over rows or tokens and is reduced once per
sublayer; every decision is taken by the main process and broadcast. So one process and many do the same
thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..errors import ArgumentError, CalibrationError
from ..methods import METHODS
from ..methods.least_squares import all_finite
from ..processes import together
from ..structure.facts import max_positions
from ..structure.probes import matrix_flops
from ..structure.reach import last_stack
from ..structure.sublayers import Sublayer, find_sublayers
from ..structure.walk import Walk
from .batch import Batch, BatchMaker
from .collate import Inputs
from .rows import Rows, TokensPerRow, row_length


def untimed(_: str) -> AbstractContextManager[None]:
    """A phase of the work whose time nobody takes."""
    return nullcontext()


class Calibration:
    """The calibration data of one process, and what is summed over them.

    `step` counts the work that is done, about one sublayer on one batch, and `phase` takes the time of a part
    of the work by its name; whoever runs the calibration replaces them.

    Args:
        accelerator: Device and processes.
        rows: The same on every process.
        collate: Makes inputs, and which tokens count if some do not, of a list of rows, see collate.py.
        model: Whose inputs are prepared.
        args: Options.
        tokens_per_row: Counts the tokens of a row without token ids, see `tokens_of`.
        few: A plan measures on no more than so many tokens, or on one row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: Rows,
        collate: Callable[[list[Any]], Inputs],
        model: PreTrainedModel,
        args: KPruneArguments,
        tokens_per_row: TokensPerRow | None = None,
        few: int | None = None,
    ):
        self.accelerator, self.rows, self.args = accelerator, rows, args
        self.collate = collate
        self.dtype = getattr(torch, args.statistics_dtype or "float64")
        self.step: Callable[[float], None] = lambda _: None
        self.phase: Callable[[str], AbstractContextManager[None]] = untimed
        self.batches: list[Batch] = []
        self.sublayers = find_sublayers(model, *args.units)
        # whose tokens the outputs are of, also where other towers alone are pruned
        self.last = last_stack(model) if args.towers else self.sublayers[-1]
        self.maker = BatchMaker(accelerator.device, model, self.sublayers, self.last)
        self.readers: list[list[list[str]]] = []
        tried, held_out = range(rows.measured // 2), rows.held_out
        ends = [0, tried.stop, held_out.start, held_out.stop, rows.measured, len(rows.rows)]
        self.sample = rows.first(few, tokens_per_row) if few is not None else rows.measured
        for start, stop in pairwise(sorted([*ends, self.sample])):
            by_length = sorted(
                range(start, stop), key=lambda i: (row_length(rows.rows[i], tokens_per_row), i)
            )
            mine = by_length[accelerator.process_index :: accelerator.num_processes]
            for batch in self.maker.batches(rows, mine, args.per_device_batch_size, collate):
                batch.measured = start < rows.measured
                batch.sampled = start < self.sample
                batch.tried, batch.held_out = start in tried, start in held_out
                self.batches.append(batch)

    @cached_property
    def lengths(self) -> dict[str, float]:
        """Mean tokens of a sequence in each stack, over all processes."""
        return {name: tokens / sequences for name, (tokens, sequences) in self.totals.items()}

    @cached_property
    def totals(self) -> dict[str, tuple[float, float]]:
        """Tokens and sequences in each stack, over all processes."""
        names = list(dict.fromkeys(name for s in self.sublayers for name in (s.stack_name, s.reads)))
        sums = [self.zeros(2) for _ in names]
        for name, total in zip(names, sums, strict=True):
            total[0] = sum(int(batch.valid[name].sum()) for batch in self.batches)
            total[1] = sum(self.sequences(batch, name) for batch in self.batches)
        self.reduce(sums)
        return {name: (float(total[0]), float(total[1])) for name, total in zip(names, sums, strict=True)}

    def sequences(self, batch: Batch, stack: str) -> int:
        """Sequences of a batch in a stack, of which the images of a row are one."""
        return len(batch.valid[stack]) if stack in self.maker.stacks_of_ids else batch.samples

    @cached_property
    def spans(self) -> dict[str, float]:
        """Tokens that each token of an image or a sound reads in each attention, by its name, over all
        processes: no more than those of its own image or window."""
        attentions = [s for s in self.sublayers if s.unit.has_heads and s.reads == s.stack_name]
        several = {s.stack_name: s for s in attentions if s.stack_name not in self.texts}
        pairs = {name: self.zeros(len(s.layers)) for name, s in several.items()}
        for batch in self.batches:
            for name, sublayer in several.items():
                pairs[name] += torch.tensor(self.maker.pairs(batch, sublayer), dtype=torch.float64).to(
                    pairs[name]
                )
        self.reduce(list(pairs.values()))
        return {
            s.name: float(pairs[s.stack_name][s.index]) / self.totals[s.stack_name][0]
            for s in attentions
            if s.stack_name in several
        }

    @cached_property
    def flops_lengths(self) -> dict[str, float]:
        """Tokens of a sequence in each stack that FLOPs are counted for, and of each sublayer that its tokens
        read where those are of images or sounds."""
        length = self.args.flops_length
        return {**self.lengths, **self.spans} if length is None else self.lengths_at(length)

    def lengths_at(self, length: int) -> dict[str, float]:
        """As `flops_lengths`, if texts have `length`; what an image or a sound makes stays as it is."""
        lengths = {name: float(length) if name in self.texts else mean for name, mean in self.lengths.items()}
        return {**lengths, **self.spans}

    @cached_property
    def texts(self) -> set[str]:
        """The stacks that read token ids."""
        (names,) = broadcast_object_list([sorted(self.maker.stacks_of_ids)])  # a process may have no rows
        return set(names)

    def check_flops_length(self, model: PreTrainedModel) -> None:
        """Raise `ArgumentError` if `flops_length` is given and means nothing to `model`."""
        length, limit = self.args.flops_length, max_positions(model)
        if length is not None and not self.texts:
            raise ArgumentError(
                f"flops_length is {length}, but {type(model).__name__} reads no token ids: how many tokens "
                "an image or a sound makes is up to the model; leave flops_length at None"
            )
        if length is not None and limit is not None and length > limit:
            raise ArgumentError(
                f"flops_length is {length}, {type(model).__name__} takes at most {limit} tokens"
            )

    def all_flops(self, model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> float:
        """FLOPs of all of `model` for one sequence, as `prunable_flops` of a part of it, by running one row.

        What is not prunable counts by the token: experts, for those that are sent to them, and the head over
        the vocabulary among it.
        """
        other = 0.0
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                row = self.batches[0].part(0, 1)
                counts = {name: self.sequences(row, name) for name in row.valid}
                tokens = {name: valid.numel() / counts[name] for name, valid in row.valid.items()}
                products = sum(s.num_units * s.unit_products(tokens) for s in sublayers)
                total = matrix_flops(model, row.inputs) / max(counts.values()) + products
                prunable = sum(s.num_units * s.unit_flops(tokens) for s in sublayers)
                counted = sum(self.flops_lengths[name] for name in tokens)
                other = max(total - prunable, 0.0) * counted / sum(tokens.values())
        (other,) = broadcast_object_list([other])
        return float(other) + sum(s.num_units * s.unit_flops(self.flops_lengths) for s in sublayers)

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of float64 over all processes, in place, by one call."""
        if tensors and self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_same_rows(self) -> None:
        """Raise `CalibrationError` on every process if they drew different rows, as from a dataset shared out
        before."""
        if (
            self.accelerator.num_processes > 1
            and len(set(gather_object([self.rows.fingerprint["sha256"]]))) > 1
        ):
            raise CalibrationError(
                "the processes drew different calibration rows; give all of them the whole dataset, it is "
                "shared out here"
            )

    def check_enough_tokens(self) -> None:
        """Raise `CalibrationError` if there are fewer tokens in a stack than weights that each must
        determine, of experts if each were sent as many."""
        tunes = self.args.tune and METHODS[self.args.method].tunes
        for sublayer in self.sublayers if tunes else ():
            tokens = round(self.lengths[sublayer.stack_name] * self.rows.sequences * sublayer.uses)
            reach, columns = round(tokens * sublayer.share), sublayer.shape[1] // sublayer.experts
            if reach < columns:
                part = f", of which {reach} reach an expert on average," if sublayer.is_mixture else ""
                most = self.args.num_tokens
                way = "give more rows" if self.rows.tokens < most else f"raise num_tokens (now {most})"
                raise CalibrationError(
                    f"{tokens} calibration tokens (in {len(self.rows.rows)} rows){part} are fewer than the "
                    f"{columns} columns of {sublayer.name}, whose weights they must determine; {way}"
                )

    def check_counted(self) -> None:
        """Raise `CalibrationError` if no token counts of the rows that are measured, or of those by which
        students are compared: all models would be alike."""
        method = METHODS[self.args.method]
        measured, held_out = self.zeros(1), self.zeros(1)
        for batch in self.batches:
            measured += batch.counted.sum() * batch.measured
            held_out += batch.counted.sum() * batch.held_out
        self.reduce([measured, held_out])
        parts = [("are measured", measured, self.rows.measured)] if method.needs else []
        if len(method.exponents) > 1:
            parts.append(("are held out to compare students by", held_out, len(self.rows.held_out)))
        for what, count, rows in parts:
            if rows and not count:
                raise CalibrationError(
                    f"no token counts in the {rows} calibration rows that {what}: all their labels are -100, "
                    "or they are padding alone; give rows with tokens that count, and where these were cut "
                    f"off, a larger max_seq_length (now {self.args.max_seq_length})"
                )

    def agree(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of the main process, on every process."""
        if self.accelerator.num_processes == 1:
            return tensors
        return cast(list[Tensor], broadcast([t.to(self.accelerator.device) for t in tensors], from_process=0))

    def walk(self, model: PreTrainedModel, sublayers: Sequence[Sublayer] | None = None) -> Walk:
        """`model` below its lowest sublayer, with all batches.

        Args:
            model: The model.
            sublayers: Its sublayers, if they are at hand already.
        """
        if sublayers is None:
            sublayers = find_sublayers(model, *self.args.units)
        return Walk(model, sublayers, [batch.inputs for batch in self.batches])

    def advance(self, walk: Walk) -> None:
        """Carry all batches of a walk above its sublayer."""
        with self.phase("tune"), together(self.accelerator):
            for batch in walk.behind:
                walk.lift(batch)
                self.step(1)
            walk.advance()

    @property
    def measured(self) -> dict[int, Batch]:
        """The batches that are measured, by number."""
        return {i: batch for i, batch in enumerate(self.batches) if batch.measured}

    def autocast(self) -> torch.autocast:
        """The precision of what is measured."""
        half = self.args.measure_dtype == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half)

    def zeros(self, *shape: int) -> Tensor:
        """Sums to add to, in float64 on the device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.accelerator.device)

    def check_held_out(self) -> None:
        """Raise `CalibrationError` if there are too few rows to hold some out."""
        if not self.rows.held_out:
            raise CalibrationError(
                f"{self.rows.measured} calibration rows are measured on, expected at least 4, so that "
                "models can be compared on those held out; give more rows, shorter ones if need be, and a "
                "larger num_measure_tokens"
            )

    def only(self, chosen: Callable[[Batch], bool]) -> Calibration:
        """The same calibration with some of its batches."""
        part = copy.copy(self)
        part.batches = [batch for batch in self.batches if chosen(batch)]
        return part

    def trial(self) -> Calibration:
        """The same calibration with the batches of a trial: those that it tunes on, and those that are held
        out of it, which it carries along."""
        part = self.only(lambda batch: batch.tried or batch.held_out)
        part.batches = [replace(batch, fitted=batch.tried) for batch in part.batches]
        return part

    def check_finite(self, sublayer: Sublayer, sums: Sequence[Tensor], what: str = "activations") -> None:
        """Raise `CalibrationError`, naming the sublayer, if any of its sums is NaN or infinite."""
        if not all_finite(sums):
            raise CalibrationError(
                f"NaN or Inf in the {what} of {sublayer.name}; check that the model gives finite outputs on "
                "the calibration data, and that its weights are finite"
            )
