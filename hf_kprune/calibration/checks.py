"""What is tried on one batch before any work: that the model can be walked, that its head follows, and that
the loss can be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError, UnsupportedModelError
from ..processes import together
from ..structure.checks import prove_projections
from ..structure.facts import first_run, in_eval_mode
from ..structure.hooks import State, in_turn, stack_of
from ..structure.probes import check_order, outputs_of
from ..structure.proof import prove_router
from ..structure.runs import Tap
from ..structure.sublayers import Sublayer, find_sublayers
from ..structure.surroundings import exact_products
from ..structure.walk import Walk
from ..structure.workbench import workbench_of
from .backward import Head
from .batch import Batch
from .batches import Calibration
from .knowledge import Draws, Knowledge
from .loss_check import check_loss
from .outputs import answers_of, chunk_of, narrowed, outputs_for


CHECK_ROWS = 2
"""Rows on which a model is checked."""


@exact_products()
def check_walk(
    calibration: Calibration, model: PreTrainedModel, sublayers: Sequence[Sublayer], head: bool = True
) -> None:
    """Carry one batch up sublayer by sublayer, and note in `calibration.readers` which input projections read
    the same. Unless `head` is False, check too that its head reads the top alone.

    Raises:
        UnsupportedArchitectureError: If it does not arrive where the model as a whole does. Then the model's
            family describes it wrongly, though cutting may work.
    """
    args, readers = calibration.args, list[list[list[str]]]()
    with together(calibration.accelerator):
        for batch in calibration.batches[:1]:
            rows = min(CHECK_ROWS, batch.samples)
            if rows == batch.counted.shape[1] > 1:  # so that rows are not taken for tokens below
                rows -= 1
            batch = batch.part(0, rows)
            check_order(model, batch.inputs, sublayers)
            prove_projections(model, batch.inputs, args.head_unit)
            whole = args.expert_unit == "expert" and args.prune_experts
            if whole and workbench_of(model) is None:  # there only the layer that runs has its weights
                prove_router(model, batch.inputs, args.head_unit)
            walk = Walk(model, sublayers, [batch.inputs])
            top = walk.top(0)
            for sublayer in walk.sublayers:
                tap = walk.step(0)
                if tap.stream.shape != tap.output.shape:
                    raise UnsupportedArchitectureError(
                        f"{sublayer.name} gives {tuple(tap.output.shape)} where {tuple(tap.stream.shape)} is "
                        "carried past it, so that its tokens cannot be told from each other, and it cannot "
                        f"be tuned; {type(model).__name__} cannot be pruned by its {sublayer.kind}"
                    )
                readers.append(readers_of(batch, sublayer, tap))
                walk.advance()
            for name, expected in top.inputs.items():
                stack = stack_of(name)
                carried, expected = (
                    batch.by_token(hidden, stack) for hidden in (walk.states[0].inputs[name], expected)
                )
                valid = batch.tokens(next(s for s in sublayers if s.stack_name == stack), expected)
                error = (carried - expected)[valid].abs().max()
                size = expected[valid].abs().max()
                if not error <= 1e-3 * size:
                    raise UnsupportedArchitectureError(
                        f"run by single sublayers, {type(model).__name__} ends {float(error / size):.1e} "
                        f"away from where it does as a whole on the calibration rows, so that its layers "
                        "cannot be pruned one after the other; if you have described its family, that does "
                        "not say what its layers give: docs/add_a_family.md"
                    )
            if head:
                check_head(walk, top.part(0, 1, batch.samples), batch.part(0, 1))
    (calibration.readers,) = broadcast_object_list([readers])


def readers_of(batch: Batch, sublayer: Sublayer, tap: Tap) -> list[list[str]]:
    """Paths of the input projections of a sublayer, those that read one tensor together, all with or all
    without a bias.

    Those are left out that serve several ends, or read something else than tokens, or tokens in another
    order.
    """
    groups: dict[tuple[int, bool], list[str]] = {}
    for path, tensors in tap.reads.items():
        if len(tensors) == sublayer.uses and reads_tokens(batch, sublayer, path, tensors[0]):
            biased = sublayer.layer.get_submodule(path).bias is not None
            groups.setdefault((id(tensors[0]), biased), []).append(path)
    return list(groups.values())


def reads_tokens(batch: Batch, sublayer: Sublayer, path: str, tensor: Tensor) -> bool:
    """Whether what a projection reads is (B, T, D), (B * T, D) or (B, height, width, D), of the tokens of its
    stack."""
    rows, tokens = batch.valid[sublayer.source_of(path)].shape
    if tensor.dim() == 3 and sublayer.stack.pads:
        return tensor.shape[0] == rows and tensor.shape[1] >= tokens
    places = tensor.shape[:-1]
    return places.numel() == rows * tokens and places[0] in (rows, rows * tokens)


@torch.no_grad()
def check_head(walk: Walk, top: State, sample: Batch) -> None:
    """Compare what the head makes of the top alone with what the model makes as a whole.

    Raises:
        UnsupportedModelError: If they differ.
    """
    model = walk.model
    chunk = chunk_of(model, sample)
    with narrowed(model, chunk):
        outputs = answers_of(model, sample.inputs)
    above = Head(walk, top)(sample, chunk)
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            alone = above[name]
            if value.shape[:2] == sample.counted.shape:
                value, alone = value[sample.counted], alone[sample.counted]
            if value.numel() and not (alone - value).abs().max() <= 1e-3 * value.abs().max():
                raise UnsupportedModelError(
                    f"the {name} of {type(model).__name__} do not follow from its last layer alone: its head "
                    "may read lower layers too, which are not carried here; where the config has an option "
                    "for that (use_weighted_layer_sum), turn it off, or prune the model below the head alone"
                )


@torch.no_grad()
def gives_embeddings(calibration: Calibration, model: PreTrainedModel) -> bool:
    """Whether outputs of `model`, which has no head, hold what `losses.of_embeddings` compares."""
    for batch in calibration.batches[:1]:
        sample = batch.part(0, 1)
        with in_eval_mode(model), first_run(model, sample.inputs):
            outputs = answers_of(model, sample.inputs)
        hidden = outputs.get("last_hidden_state")
        if hidden is None:
            return bool(outputs.keys() & {"text_embeds", "pooler_output"})
        return bool(hidden.dim() == 3)
    return True


@torch.no_grad()
def try_loss(
    calibration: Calibration, model: PreTrainedModel, loss: Knowledge
) -> tuple[list[str], list[str]]:
    """Names of the outputs that a loss reads, and of the others, see `check_loss`.

    Raises:
        CalibrationError: If activations below it are not finite.
    """
    args = calibration.args
    sublayers = find_sublayers(model, *args.units)
    for batch in calibration.batches[:1]:
        # the caller's own loss may count on many rows
        sample = batch if loss.kinds is None else batch.part(0, min(2, batch.samples))
        chunk = chunk_of(model, sample) if loss.per_token else 0
        counted = sample.counted[:, :chunk] if chunk else sample.counted
        with (
            narrowed(model, chunk),
            first_run(model, sample.inputs),
            outputs_of(sublayers) as activations,
        ):
            outputs = outputs_for(loss, model, sublayers, sample)
        for place, each in activations.items():
            y = in_turn([sample.by_token(part, sublayers[place].stack_name) for part in each])
            calibration.check_finite(sublayers[place], (y[sample.tokens(sublayers[place], y)].sum(),))
        return check_loss(loss, outputs, counted, Draws(args.seed, sample.rows, counted), sample.samples)
    return [], []
