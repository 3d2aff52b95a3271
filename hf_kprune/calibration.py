"""Calibration: rows to batches, batches to sums, sums over processes. The only module with `accelerate` in it.

Every process takes each N-th row; every statistic is a sum over rows or tokens and is reduced once per sublayer; every
decision is taken by the main process and broadcast. So one process and many do the same thing.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator
from transformers.utils import find_labels, logging

from .arguments import KPruneArguments
from .errors import ArgumentError, CalibrationError
from .heads import KnowledgeLoss
from .hooks import probed, resumed, run_sublayer, run_to_bottom, run_to_top
from .methods import Statistics
from .reconstruction import NormalEquations
from .sublayers import Sublayer


logger = logging.get_logger(__name__)

GRAPH_LAYERS = 4
"""Layers whose activations the measuring pass may hold for a whole batch. A deeper model takes the batch in slices, so
that memory does not grow with depth."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model's position embeddings can tell apart; None if nothing limits them."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # models that number positions from padding_idx + 1 (RoBERTa's kin) lose the first ones
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def tokenize(texts: Sequence[Any], processing_class: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Tokenise texts, or pairs of texts, each into a row of its own."""
    rows = []
    for text in texts:
        pair = (text,) if isinstance(text, str) else tuple(text)
        if len(pair) not in (1, 2) or not all(isinstance(part, str) for part in pair):
            raise CalibrationError(f"a calibration text is {text!r}, expected a string or a pair of strings")
        rows.append(dict(processing_class(*pair, truncation=max_length is not None, max_length=max_length)))
    return rows


def flat(value: Any) -> Iterator[int]:
    """The numbers in a list, array or tensor, or in lists of them of any lengths (choices)."""
    for entry in value.tolist() if hasattr(value, "tolist") else value:
        yield from flat(entry) if hasattr(entry, "__len__") else (entry,)


def row_tokens(row: dict[str, Any]) -> int:
    """Tokens of a row that are not padding (of all its choices, for multiple choice)."""
    return sum(flat(row["attention_mask"])) if "attention_mask" in row else sum(1 for _ in flat(row["input_ids"]))


def has_choices(row: dict[str, Any]) -> bool:
    """Whether a row holds several sequences (multiple choice)."""
    ids = row["input_ids"]
    return ids.ndim > 1 if hasattr(ids, "ndim") else len(ids) > 0 and hasattr(ids[0], "__len__")


def row_length(row: dict[str, Any]) -> int:
    """Positions that a row takes, padding included."""
    return max(map(len, row["input_ids"]), default=0) if has_choices(row) else len(row["input_ids"])


@dataclass
class Rows:
    """The rows that were drawn, in the order of the draw.

    `measured` of them, the first, serve for measuring too; `tokens` counts the tokens of all.
    """

    rows: list[dict[str, Any]]
    measured: int
    tokens: int
    fingerprint: dict[str, Any]


def draw_rows(model: PreTrainedModel, dataset: Any, processing_class: Any, args: KPruneArguments, keep_labels: bool) -> Rows:
    """Draw rows without replacement until they hold `args.num_tokens` tokens, and check them.

    A dataset with a length is drawn from at random (`args.seed`), a stream is read from its beginning. Labels are
    dropped unless a data collator of the caller's may want to see them (`keep_labels`); nothing here uses them.
    """
    if isinstance(dataset, (str, Mapping)):  # both have a length and items, which are no rows
        raise CalibrationError(
            f"the calibration dataset is a {type(dataset).__name__}, expected a dataset of rows or a list of texts (of a "
            "DatasetDict, pass one split)"
        )
    limit = max_positions(model)
    labels = {"label", "labels", "label_ids", *find_labels(type(model))}
    accepted = set(inspect.signature(model.forward).parameters) - labels
    seen_columns: dict[str, None] = {}

    def prepare(row: Any) -> dict[str, Any]:
        if isinstance(row, (str, tuple, list)):
            if processing_class is None:
                raise ArgumentError("the calibration dataset holds texts: pass processing_class, the model's tokenizer")
            longest = [n for n in (args.max_seq_length, limit) if n is not None]
            row = tokenize([row], processing_class, min(longest, default=None))[0]
            row = {key: value for key, value in row.items() if key in accepted}
        columns = dict.fromkeys(row)
        kept = {key for key in columns if key in accepted or (keep_labels and key in labels)}
        surplus = [key for key in columns if key not in kept and key not in labels]
        if "input_ids" not in kept or (surplus and not args.remove_unused_columns):
            raise CalibrationError(
                f"the calibration dataset has the columns {sorted(columns)}, {type(model).__name__} takes "
                f"{sorted(accepted)}; tokenise the texts (dataset.map), or pass them as a plain list of strings with "
                "processing_class" + (", and drop the other columns or set remove_unused_columns=True" if surplus else "")
            )
        if surplus and not seen_columns:
            logger.info("not used for calibration: the columns %s", ", ".join(sorted(surplus)))
        seen_columns.update(columns)
        return {key: row[key] for key in columns if key in kept}

    order: Iterable[Any]
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        draw = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
        order = (dataset[index] for index in draw)
    else:
        order = iter(dataset)

    rows: list[dict[str, Any]] = []
    tokens, measured, digest = 0, 0, hashlib.sha256()
    vocabulary = model.get_input_embeddings().num_embeddings
    for raw in order:
        row = prepare(raw)
        count, length = row_tokens(row), row_length(row)
        if limit is not None and length > limit:
            raise CalibrationError(
                f"calibration row {len(rows)} has {length} tokens, {type(model).__name__} takes at most {limit}; tokenise "
                f"with truncation=True, max_length={limit}, or pass texts and set max_seq_length"
            )
        ids = torch.tensor(list(flat(row["input_ids"])))
        if count == 0:
            continue
        if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
            raise CalibrationError(
                f"calibration row {len(rows)} has token ids {int(ids.min())} to {int(ids.max())}, the model's vocabulary "
                f"has {vocabulary}; was it made with another tokenizer?"
            )
        rows.append(row)
        digest.update(ids.to(torch.int64).numpy().tobytes())
        if tokens < (args.num_measure_tokens or args.num_tokens):
            measured = len(rows)
        tokens += count
        if tokens >= args.num_tokens:
            break
    if not rows:
        raise CalibrationError("the calibration dataset is empty; a few hundred texts like those the model will see will do")
    fingerprint = {
        "dataset": getattr(dataset, "_fingerprint", None) or type(dataset).__name__,
        "rows": len(rows),
        "rows_measured": measured,
        "tokens": tokens,
        "seed": args.seed,
        "sha256": digest.hexdigest(),
    }
    return Rows(rows, measured, tokens, fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and sums
# ---------------------------------------------------------------------------------------------------------------------


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
        self.mean_tokens = rows.tokens / len(rows.rows)
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
        """The streams above the last sublayer, of the batches that are measured."""
        with together(self.accelerator):
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
                        outputs = student(**part.inputs)
                    valid = part.valid.unsqueeze(-1)
                    for place, a in features.items():
                        energy[place] += a.detach().float().square().mul(valid).sum((0, 1))
                    if loss is None:
                        continue
                    assert top is not None
                    with torch.no_grad(), autocast, resumed(teacher_sublayers, len(teacher_sublayers), top[rows]):
                        expected = teacher(**part.inputs)
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
