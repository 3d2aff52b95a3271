"""What a run works with: the rows, which towers of the model run on them, the distance of outputs, times."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .budgets import Timing
from .calibration.batch import tokens_of
from .calibration.batches import Calibration
from .calibration.checks import gives_embeddings
from .calibration.collate import collate
from .calibration.draw import draw_rows
from .calibration.knowledge import Knowledge
from .calibration.sources import first_label, is_sized
from .calibration.tasks import EMBEDDINGS, knowledge_loss, knowledge_of_hidden_states, text_inputs
from .errors import ArgumentError
from .latency.table import LatencyTable
from .methods import METHODS
from .processes import together
from .state import Pruner, begin_phase
from .structure.facts import in_eval_mode, uncached
from .structure.reach import last_stack, towers_left_alone
from .structure.sublayers import LEFT_ALONE


PLAN_TOKENS = 2_000
"""Tokens that a plan measures at most."""

SEVERAL = 3
"""Rows of a batch that a model is proved on."""


def first_batch(pruner: Pruner, model: PreTrainedModel) -> dict[str, Any] | None:
    """What a model that is to be pruned is called with on a few calibration rows; None if these are a stream,
    which can be read only once, or not there yet."""
    dataset, collator, reader = pruner.calibration_dataset, pruner.data_collator, pruner.processing_class
    if dataset is None or not is_sized(dataset):
        return None
    rows = draw_rows(model, dataset, reader, pruner.args, collator is not None, lambda _: 1, most=SEVERAL)
    return uncached(model, collate(rows.rows, collator, reader, model)[0])


def calibrate(
    pruner: Pruner, options: KPruneArguments, dataset: Any, dry: bool = False
) -> tuple[Calibration, dict[str, str]]:
    """Draw the rows; find out which towers of the model run on them, and let the others be left alone until
    `leaving` ends.

    Args:
        pruner: It holds the model.
        options: Of the run.
        dataset: The calibration data.
        dry: Whether a few rows are enough.

    Returns:
        The calibration, and what is left alone, path to reason.

    Raises:
        ArgumentError: If there are no data.
    """
    if dataset is None:
        raise ArgumentError("no calibration_dataset: pass it to KPrunePruner or to prune()")
    model, processing_class = pruner.model, pruner.processing_class
    count = tokens_of(model, pruner.data_collator, processing_class)
    args, method = copy.copy(options), METHODS[options.method]
    if pruner.sentence_folder is not None:
        args.max_seq_length = pruner.sentence_folder.longest(args.max_seq_length, processing_class)
        processing_class = pruner.sentence_folder.reader(processing_class)
    if args.num_measure_tokens is None and method.measure_tokens is not None:
        args.num_measure_tokens = min(method.measure_tokens, args.num_tokens)
    args.statistics_dtype = args.statistics_dtype or method.dtype
    collates = pruner.data_collator is not None
    rows = draw_rows(model, dataset, processing_class, args, collates, count)
    make_batch = partial(
        collate,
        collator=pruner.data_collator,
        processing_class=pruner.processing_class,
        model=model,
    )
    inputs = uncached(model, make_batch(rows.rows[:2])[0])
    with in_eval_mode(model):
        left_alone = towers_left_alone(model, inputs, args.head_unit, args.towers)
    model.__dict__[LEFT_ALONE] = frozenset(left_alone)
    few = PLAN_TOKENS if dry else None
    calibration = Calibration(pruner.accelerator, rows, make_batch, model, args, count, few)
    return calibration, {path.rstrip("."): reason for path, reason in left_alone.items()}


def times_of(pruner: Pruner, model: PreTrainedModel, calibration: Calibration) -> Timing:
    """The look-up table of a model, which the main process measures, or finds in the cache."""
    entry, args = None, pruner.args
    with together(pruner.accelerator):
        if pruner.accelerator.is_main_process:
            inputs = calibration.batches[0].inputs
            if "input_ids" in inputs and "pixel_values" not in inputs:
                length = args.latency_length or math.ceil(max(calibration.lengths.values()))
                inputs = dict(text_inputs(model, args.latency_batch_size, length))
            begin_phase(pruner, "time")
            entry = LatencyTable.cached(model, inputs, head_unit=args.head_unit), inputs
    table, inputs = broadcast_object_list([entry])[0]
    return Timing(model, table, inputs)


def knowledge_of(pruner: Pruner, calibration: Calibration, datasets: Sequence[Any]) -> Knowledge:
    """The distance of outputs: the caller's, that of what `encode` gives, that of the model's head, or that
    of its hidden states.

    Args:
        pruner: It holds the model and the caller's distance.
        calibration: Of the model.
        datasets: The first that has labels tells what they are.
    """
    args, folder, model = pruner.args, pruner.sentence_folder, pruner.model
    if pruner.compute_loss is not None:
        return Knowledge("custom", pruner.compute_loss, args.temperature, None)
    if folder is not None and args.pooling is None:
        loss = folder.knowledge(args.temperature)
        if loss is not None:
            return loss
    labels = (first_label(dataset) for dataset in datasets)
    label, sublayers = next((label for label in labels if label is not None), None), calibration.sublayers
    loss = knowledge_loss(model, args.temperature, args.pooling or "mean", label, sublayers)
    if loss.kinds is EMBEDDINGS:
        (embeds,) = broadcast_object_list([gives_embeddings(calibration, model)])
        if not embeds:
            return knowledge_of_hidden_states(model, args.temperature, sublayers)
    # logits can be taken in parts only above the stack that gives them
    apart = sublayers[-1].stack_name != last_stack(model).stack_name
    return replace(loss, per_token=False) if loss.per_token and apart else loss
