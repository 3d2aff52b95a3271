"""Calibration: rows to batches, batches to sums, sums over processes by `accelerate`.

Every process takes each N-th row; every statistic is a sum over rows or tokens and is reduced once per sublayer; every
decision is taken by the main process and broadcast. So one process and many do the same thing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator
from transformers.utils import find_labels

from .arguments import KPruneArguments
from .errors import ArgumentError, CalibrationError, UnsupportedArchitectureError
from .heads import KnowledgeLoss
from .hooks import probed, resumed, run_sublayer, run_to_bottom, run_to_top
from .methods import Statistics
from .reconstruction import NormalEquations
from .rows import Rows, has_choices, row_length
from .sublayers import Sublayer


GRAPH_LAYERS = 3
"""Layers whose activations the measuring pass may hold for a whole batch. A deeper model takes the batch in slices, so
that memory does not grow with depth."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Let an error on any process end all of them, with its message, before they would wait for each other."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:  # Ctrl-C too: told to the others below, then raised
        error = caught
    if accelerator.num_processes > 1:
        message = None if error is None else f"{type(error).__name__}: {error}"
        for rank, told in enumerate(gather_object([message])):
            if told is not None and error is None:
                error = CalibrationError(f"process {rank} failed: {told}")
    if error is not None:
        raise error


def in_float32(outputs: Any) -> Any:
    """Model outputs with their half-precision tensors in float32."""
    for key, value in outputs.items():
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            outputs[key] = value.float()
    return outputs


@dataclass
class Batch:
    """Collated inputs on the device, the tokens that are not padding (B, T), and whether they serve for measuring."""

    inputs: dict[str, Tensor]
    valid: Tensor
    measured: bool

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`, which may be several sequences each (multiple choice)."""
        samples = len(next(iter(self.inputs.values())))
        each = len(self.valid) // samples
        inputs = {key: value[start:stop] for key, value in self.inputs.items()}
        return Batch(inputs, self.valid[start * each : stop * each], self.measured)


class Calibration:
    """The calibration data of one process, and what is summed over them.

    Streams are lists with one tensor (B, T, D) per batch.

    Args:
        accelerator: Device and processes.
        rows: The same on every process.
        collator: Data collator of the caller's, or None.
        processing_class: Tokenizer, whose padding is used if there is no collator.
        model: Whose inputs are prepared.
        args: Options.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rows: Rows,
        collator: Callable[[list[Any]], dict[str, Any]] | None,
        processing_class: Any,
        model: PreTrainedModel,
        args: KPruneArguments,
    ):
        self.accelerator, self.rows, self.args = accelerator, rows, args
        self.dtype = getattr(torch, args.statistics_dtype)
        self.mean_tokens = rows.tokens / rows.sequences
        self.batches: list[Batch] = []
        for measured, part in ((True, rows.rows[: rows.measured]), (False, rows.rows[rows.measured :])):
            by_length = sorted(range(len(part)), key=lambda i: (row_length(part[i]), i))
            mine = by_length[accelerator.process_index :: accelerator.num_processes]
            for start in range(0, len(mine), args.per_device_batch_size):
                batch = [part[i] for i in mine[start : start + args.per_device_batch_size]]
                self.batches.append(self._collate(batch, collator, processing_class, model, measured))

    def _collate(
        self, rows: list[dict[str, Any]], collator: Any, processing_class: Any, model: PreTrainedModel, measured: bool
    ) -> Batch:
        labels = {"label", "labels", "label_ids", *find_labels(type(model))}
        if collator is not None:
            inputs = dict(collator([dict(row) for row in rows]))
        elif processing_class is not None and not has_choices(rows[0]):
            inputs = dict(DataCollatorWithPadding(processing_class)([dict(row) for row in rows]))
        elif len({row_length(row) for row in rows}) == 1:
            inputs = default_data_collator([dict(row) for row in rows])
        else:
            raise ArgumentError(
                "the calibration rows differ in length and there is nothing to pad them with; pass processing_class (the "
                "tokenizer) or data_collator"
            )
        inputs = {key: value for key, value in inputs.items() if key not in labels}
        accepted = set(inspect.signature(model.forward).parameters)
        surplus = [key for key, value in inputs.items() if key not in accepted or not isinstance(value, Tensor)]
        if surplus:
            raise CalibrationError(
                f"the data collator made {sorted(surplus)}, expected tensors that {type(model).__name__} takes: "
                f"{sorted(accepted - labels)}"
            )
        inputs = {key: value.to(self.accelerator.device) for key, value in inputs.items()}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return Batch(inputs, mask.flatten(0, -2).bool(), measured)

    def _reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of float64 over all processes, in place, by one call."""
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([t.flatten() for t in tensors]), reduction="sum")
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_same_rows(self) -> None:
        """Raise `CalibrationError` on every process if they drew different rows, as from a dataset shared out before."""
        if self.accelerator.num_processes > 1 and len(set(gather_object([self.rows.fingerprint["sha256"]]))) > 1:
            raise CalibrationError(
                "the processes drew different calibration rows; give all of them the whole dataset, it is shared out here"
            )

    def agree(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of the main process, on every process."""
        if self.accelerator.num_processes == 1:
            return tensors
        return cast(list[Tensor], broadcast([t.to(self.accelerator.device) for t in tensors], from_process=0))

    def bottom(self, model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> list[Tensor]:
        """The streams below the first sublayer."""
        with together(self.accelerator):
            return [run_to_bottom(model, batch.inputs, sublayers) for batch in self.batches]

    def top(self, model: PreTrainedModel, sublayers: Sequence[Sublayer], streams: list[Tensor]) -> list[Tensor | None]:
        """The streams above the last sublayer, of the batches that are measured.

        Raises `UnsupportedArchitectureError` if carrying a batch up sublayer by sublayer does not arrive there: then the
        model's family describes it wrongly, though cutting may work (parallel blocks do not add up one after the other).
        """
        with together(self.accelerator):
            for batch, carried in zip(self.batches[:1], streams, strict=False):
                for position in range(len(sublayers)):
                    carried = run_sublayer(model, batch.inputs, sublayers, position, carried).above
                expected = run_to_top(model, batch.inputs, sublayers, streams[0])
                error, size = (carried - expected)[batch.valid].abs().max(), expected[batch.valid].abs().max()
                if error > 1e-3 * size:
                    raise UnsupportedArchitectureError(
                        f"run by single sublayers, {type(model).__name__} ends {float(error / size):.1e} away from where it "
                        f"does as a whole; its family {model.config.model_type!r} does not tell how its layers add up "
                        "(blocks that run in parallel?): docs/add_a_family.md"
                    )
            return [
                run_to_top(model, batch.inputs, sublayers, stream) if batch.measured else None
                for batch, stream in zip(self.batches, streams, strict=True)
            ]

    def measure(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        position: int,
        streams: list[Tensor],
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_top: list[Tensor | None],
        loss: KnowledgeLoss | None,
    ) -> list[Statistics]:
        """Knowledge measurement on all units of the sublayers from `position` up, by a forward and backward pass.

        Args:
            student: Frozen; gradients are taken with respect to masks only.
            sublayers: The student's.
            position: Of the target sublayer.
            streams: The student's, below the target.
            teacher: Whose head turns `teacher_top` into the outputs that the student's are compared with.
            teacher_sublayers: The teacher's.
            teacher_top: The teacher's streams above its last sublayer.
            loss: Predictive knowledge, or None where it is zero because student and teacher are still the same.
        """
        targets = sublayers[position:]
        device = self.accelerator.device
        columns = [t.output.in_features for t in targets]
        energy, total, square = ([torch.zeros(c, dtype=torch.float64, device=device) for c in columns] for _ in range(3))
        samples = torch.zeros(1, dtype=torch.float64, device=device)
        tokens = torch.zeros(1, dtype=torch.float64, device=device)
        slices = -(-len(targets) // (2 * GRAPH_LAYERS)) if loss is not None else 1
        half = self.args.measure_dtype == "bfloat16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with together(self.accelerator):
            for batch, stream, top in zip(self.batches, streams, teacher_top, strict=True):
                if not batch.measured:
                    continue
                count = len(next(iter(batch.inputs.values())))
                each, size = len(batch.valid) // count, -(-count // slices)
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    part, rows = batch.part(start, stop), slice(start * each, stop * each)
                    samples += stop - start
                    tokens += part.valid.sum()
                    grad = torch.enable_grad() if loss is not None else torch.no_grad()
                    with grad, autocast, resumed(sublayers, position, stream[rows]), probed(targets) as features:
                        outputs = student(**part.inputs, return_dict=True)
                    valid = part.valid.unsqueeze(-1)
                    for place, a in features.items():
                        energy[place] += a.detach().float().square().mul(valid).sum((0, 1))
                    if loss is None:
                        continue
                    assert top is not None
                    with torch.no_grad(), autocast, resumed(teacher_sublayers, len(teacher_sublayers), top[rows]):
                        expected = teacher(**part.inputs, return_dict=True)
                    losses = loss(in_float32(outputs), in_float32(expected), part.valid)
                    if losses.shape != (stop - start,):
                        raise ArgumentError(
                            f"the knowledge loss gave {tuple(losses.shape)} for {stop - start} samples, "
                            "expected one number each"
                        )
                    gradients = torch.autograd.grad(losses.sum(), list(features.values()), allow_unused=True)
                    for (place, a), gradient in zip(features.items(), gradients, strict=True):
                        if gradient is not None:  # of several sequences per sample (choices), one mask serves all
                            by_mask = torch.einsum("btc,btc->bc", a.detach().float(), gradient.float()).double()
                            g = by_mask.view(stop - start, each, -1).sum(1)
                            total[place] += g.sum(0)
                            square[place] += g.square().sum(0)
        self._reduce([*energy, *total, *square, samples, tokens])
        for target, e in zip(targets, energy, strict=True):  # all before the gradients, which carry NaN downwards
            self.check_finite(target, (e,))
        measured = []
        for target, e, g, g2 in zip(targets, energy, total, square, strict=True):
            self.check_finite(target, (g, g2))
            cost, weight = target.unit_flops(self.mean_tokens), target.output.weight
            measured.append(Statistics(target.kind, target.unit_width, cost, weight, e, g, g2, int(tokens), int(samples)))
        return measured

    def normal_equations(
        self,
        student: PreTrainedModel,
        sublayers: Sequence[Sublayer],
        streams: list[Tensor],
        teacher: PreTrainedModel,
        teacher_sublayers: Sequence[Sublayer],
        teacher_streams: list[Tensor],
        position: int,
    ) -> NormalEquations:
        """The sums that fit the student's target sublayer to the teacher's, for the columns that it still has.

        Carries `teacher_streams` above the target, in place, as its outputs are at hand.
        """
        output = sublayers[position].output
        equations = NormalEquations.zeros(output.in_features, output.out_features, self.accelerator.device)
        with together(self.accelerator):
            for i, batch in enumerate(self.batches):
                told = run_sublayer(teacher, batch.inputs, teacher_sublayers, position, teacher_streams[i])
                tap = run_sublayer(student, batch.inputs, sublayers, position, streams[i])
                reference = (told.stream + told.output)[batch.valid]
                equations.add(tap.features[batch.valid], reference - tap.stream[batch.valid], reference, self.dtype)
                teacher_streams[i] = told.above
        self._reduce(equations.tensors())
        self.check_finite(sublayers[position], equations.tensors())
        return equations

    def advance(self, model: PreTrainedModel, sublayers: Sequence[Sublayer], position: int, streams: list[Tensor]) -> None:
        """Carry the streams of `model` above the sublayer at `position`, in place."""
        with together(self.accelerator):
            for i, batch in enumerate(self.batches):
                streams[i] = run_sublayer(model, batch.inputs, sublayers, position, streams[i]).above

    def check_finite(self, sublayer: Sublayer, sums: Sequence[Tensor]) -> None:
        """Raise `CalibrationError`, naming the sublayer, if any of its sums is NaN or infinite."""
        if not all(bool(torch.isfinite(t).all()) for t in sums):
            raise CalibrationError(
                f"NaN or Inf in the activations of {sublayer.name}; check that the model gives finite outputs on the "
                "calibration data, and that its weights are finite"
            )
