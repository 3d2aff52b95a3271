"""Recovery: a pruned model learns from the dense one, on calibration rows and without labels, by `Trainer`.

The loss is the distance of outputs that units were chosen by, and the distance of the hidden states that the
head reads. A tenth of the rows, up to `HELD_OUT` tokens, is held out. On them the model is judged from time
to time, and the best one is what stays, so that recovery never leaves a worse model, by that distance, than
it began with.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
)

from .checkpoint.lineage import write_cuts
from .checkpoint.loading import Offload, load_model
from .distillation import Distillation, Lesson, Watch
from .errors import ArgumentError
from .history import Recovery
from .preparation import calibrate, knowledge_of
from .state import Pruner, begin_phase, one_run
from .structure.offload import duplicate, is_dispatched
from .structure.reach import leaving
from .structure.readiness import bare_model, describe_units
from .structure.sublayers import LEFT_ALONE, find_sublayers
from .structure.surroundings import plain_modes, undisturbed
from .validation import checked_arguments


HELD_OUT = 4_000
"""Tokens of the rows that are held out, at most."""

TOKENS_OF_STEP = 1_000
"""Tokens of a step, about, where rows are long: in minutes, many small steps teach more than few large
ones."""

RATE, RATE_BY_TOKEN = 3e-4, 5e-5
"""Learning rates, the second where each token is an answer, as in language models."""

LEAST_ROWS = 8
"""Rows of a step, at least, where a row is one answer and not one by token."""


def recover(
    pruner: Pruner,
    minutes: float,
    dataset: Any,
    dense: PreTrainedModel | str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> Recovery:
    """Let the model of a pruner learn from the dense one, as `KPrunePruner.recover` documents."""
    check(pruner, minutes, options)
    model = pruner.model
    with one_run(pruner), leaving(model, ()):
        begin_phase(pruner, "recover")
        teacher = teacher_of(pruner, dense)
        args = copy.copy(pruner.args)
        args.num_measure_tokens = min(2 * HELD_OUT, max(1, args.num_tokens // 5))
        rows = pruner.calibration_dataset if dataset is None else dataset
        calibration, _ = calibrate(pruner, args, rows)  # half as much as is measured is held out
        calibration.check_held_out()
        calibration.check_counted()
        student = duplicate(model).float()
        loss = knowledge_of(pruner, calibration, [dataset, pruner.calibration_dataset, pruner.eval_dataset])
        lesson = Lesson(calibration, loss, student, teacher)
        recovery = learn(pruner, lesson, minutes, options)
        settle(student, model)
        if recovery.steps and model.dtype != torch.float32:  # rounded, it is another model
            recovery.distance_after = min(lesson.distance(), recovery.distance_before)
        if recovery.distance_after < recovery.distance_before:
            model.__dict__.update(student.__dict__)  # one step: nothing can come between
            pruner.checkpoint = None
    if pruner.report is not None:
        pruner.report.recovery = recovery
        write_cuts(model, [*pruner.report.lineage, pruner.report.cut()])
    return recovery


def check(pruner: Pruner, minutes: float, options: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` for what cannot be trained, or options that cannot be."""
    if not minutes > 0:
        raise ArgumentError(f"minutes is {minutes!r}, expected a number over 0")
    names = set(TrainingArguments.__dataclass_fields__) - {"output_dir"}
    if unknown := sorted(options.keys() - names):
        raise ArgumentError(
            f"recover() has no options {', '.join(unknown)}, expected options of "
            "transformers.TrainingArguments, such as learning_rate"
        )
    if pruner.accelerator.num_processes > 1:
        raise ArgumentError(
            f"recovery runs in one process, and there are {pruner.accelerator.num_processes}; prune and save "
            "without it, and let the pruned model recover in a process of its own"
        )
    if is_dispatched(pruner.model):
        raise ArgumentError(
            f"layers of {type(pruner.model).__name__} wait elsewhere, and recovery trains a model that lies "
            "on one device as a whole; load it without offload or device_map"
        )


def teacher_of(pruner: Pruner, dense: PreTrainedModel | str | os.PathLike[str] | None) -> PreTrainedModel:
    """The dense model: what is passed, what the pruner has kept, or what it is loaded from once more.

    Raises:
        ArgumentError: If there is none.
    """
    dense = dense or pruner.dense_model or pruner.source
    if dense is None:
        raise ArgumentError(
            "recover() learns from the dense model, and prune() has changed it in place; keep it by "
            "prune(inplace=False), give KPrunePruner the name of a model, which is loaded again, or pass "
            "dense_model"
        )
    device = pruner.accelerator.device
    is_name = isinstance(dense, (str, os.PathLike))
    teacher = bare_model(load_model(os.fspath(dense), Offload(None, device)) if is_name else dense)
    describe_units(teacher, pruner.args.head_unit)
    if teacher is pruner.model:
        raise ArgumentError("the dense model is the pruned one itself, expected it as it was before")
    ours, theirs = ([s.name for s in find_sublayers(each)] for each in (pruner.model, teacher))
    if ours != theirs:
        raise ArgumentError(
            f"the dense model is a {type(teacher).__name__} of other layers than the pruned "
            f"{type(pruner.model).__name__}, expected it as it was before it was pruned"
        )
    return teacher.to(device)


def learn(pruner: Pruner, lesson: Lesson, minutes: float, options: Mapping[str, Any]) -> Recovery:
    """Train the student of a lesson, which ends as it was at its best, and say how that went."""
    begin, student = time.monotonic(), lesson.student
    before = lesson.distance()
    rows = lesson.calibration.rows
    held_out = rows.held_out
    train = [row for number, row in enumerate(rows.rows) if number not in held_out]
    recovery = Recovery(minutes, len(train), len(held_out), before, before)
    if not before:  # there is nothing to learn
        return recovery
    with tempfile.TemporaryDirectory() as unused, undisturbed(student), lesson.flags():
        least, rate = (1, RATE_BY_TOKEN) if lesson.loss.per_token else (LEAST_ROWS, RATE)
        rows_of_step = max(least, round(TOKENS_OF_STEP * len(train) / max(1, rows.tokens)))
        sizes = {
            "learning_rate": rate,
            "per_device_train_batch_size": min(pruner.args.per_device_batch_size, rows_of_step),
        }
        arguments = arguments_of(pruner, unused, "input_ids" in train[0], {**sizes, **options})
        watch = Watch(pruner, lesson, recovery, begin + 60 * minutes)
        trainer = Distillation(lesson, watch, arguments, train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        watch.look(trainer.state.global_step)
    student.load_state_dict(watch.best, strict=False)
    recovery.steps, recovery.seconds = trainer.state.global_step, time.monotonic() - begin
    names = ("learning_rate", "per_device_train_batch_size", "bf16", "fp16", "max_steps", "seed", *options)
    recovery.arguments = {name: str(getattr(arguments, name)) for name in dict.fromkeys(names)}
    return recovery


def arguments_of(
    pruner: Pruner, output_dir: str, texts: bool, options: Mapping[str, Any]
) -> TrainingArguments:
    """The options of the training: those of the caller, and else those that serve short ones."""
    device = pruner.accelerator.device.type
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else device == "cpu" and multiplies_bfloat16()
    defaults = {
        "num_train_epochs": 1e6,  # the watch ends it
        "bf16": fast and not options.get("fp16"),
        "train_sampling_strategy": "group_by_length" if texts else "random",
        "seed": pruner.args.seed,
        "use_cpu": device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # there is one bar
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir=output_dir, **{**defaults, **options})


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, without which it is slower than float32."""
    able = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return any(each() for each in able)


def settle(student: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give the tensors of a student the dtypes and flags of those of the model."""
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        tensor.data = tensor.data.to(originals[name].dtype)
        tensor.requires_grad_(originals[name].requires_grad)
    student.__dict__.pop(LEFT_ALONE, None)


class Learner:
    """What of a pruner makes its pruned model learn."""

    @checked_arguments(dense_model="the model before it was pruned, or its name or path")
    @plain_modes()
    def recover(
        self: Pruner,
        minutes: float = 2.0,
        calibration_dataset: Any = None,
        dense_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Recovery:
        """Let the pruned model learn from the dense one for some minutes, without labels.

        `Trainer` makes its outputs, and what leaves its highest layers, like those of the dense model on the
        calibration rows. Of these a tenth, and 4,000 tokens at most, are held out; by the distance there,
        the model is left as it was at its best, so never worse than it was. Layers are trained, embeddings
        and heads stay. It takes memory for the dense model, and five times that of the pruned one.

        Args:
            minutes: How long it takes, about.
            calibration_dataset: Instead of the pruner's.
            dense_model: Default: the one that `prune(inplace=False)` has kept, or else what the pruner was
                given the name of, loaded again.
            kwargs: Options of `TrainingArguments`, such as `learning_rate`, `per_device_train_batch_size`,
                `bf16` or `max_steps`.

        Raises:
            ArgumentError: If there is no dense model, or for options that cannot be.
            CalibrationError: If the calibration data cannot be used.

        Example:

            >>> from hf_kprune import KPruneArguments, KPrunePruner
            >>> texts = ["a warm and funny film", "a dull and lifeless sequel"] * 20
            >>> args = KPruneArguments(sparsity=0.7, num_tokens=100, tune=False, disable_tqdm=True)
            >>> pruner = KPrunePruner("examples/sst2-tiny", args, texts)
            >>> report = pruner.prune()
            >>> recovery = pruner.recover(minutes=1, max_steps=3)
            >>> recovery.distance_after <= recovery.distance_before
            True
        """
        return recover(self, minutes, calibration_dataset, dense_model, kwargs)
