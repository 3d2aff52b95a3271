"""Make sure that the heads and neurons of a model are known: by the family of its type, or by what detect.py
finds out, of which as much is kept as can be proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import find_layers, plan_of
from ..progress import unwarned
from .checks import check_built_again
from .coverage import IDLE
from .descriptions import Detected, Families, as_code, keep, model_at
from .detect import NO_LAYERS, detect
from .facts import evaluation_copy, example_inputs, to_model
from .families import FAMILIES, REFUSED, Stack
from .proof import plain_reason, prove, step
from .sublayers import find_sublayers
from .surroundings import exact_products


GUESSED = (
    " That was tried on inputs made up from its config; on a batch like those that it is used with it may go "
    "otherwise: KPrunePruner(model, args, calibration_dataset), hf_kprune.describe(model, batch), or "
    "hf-kprune inspect MODEL --batch FILE.safetensors."
)
"""What is said of a failure where the caller gave no inputs."""

NOT_RUN = "it does not run on the inputs it was tried on"

MakeBatch = Callable[[], Mapping[str, object] | None]
"""Makes what a model is called with, of the caller's data; None if there are none."""


@exact_products()
def describe(
    model: PreTrainedModel, inputs: Mapping[str, object] | None = None, head_unit: str = "group"
) -> None:
    """Make sure that hf_kprune knows where the heads and neurons of `model` are.

    Nothing is done if a family describes its model type. Else its layers are detected, the description is
    proved, and only then noted, on this model and its copies: others of the type have to be proved for
    themselves.

    Args:
        model: Dense; not changed.
        inputs: A small batch that runs all of it, with several tokens in each sample. Default:
            `example_inputs(model)`.
        head_unit: `KPruneArguments.head_unit`.

    Raises:
        UnsupportedArchitectureError: If its layers cannot be described or the proof fails, with a description
            to start from if there is one.
        UnsupportedModelError: If its config alone does not make it.

    Example:

        >>> from transformers import BertConfig, BertModel
        >>> from hf_kprune import describe
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> describe(BertModel(config))
    """
    try:
        with step("", f"{type(model).__name__} is not built as its family says, as the error above shows"):
            find_sublayers(model, head_unit)
        return
    except UnsupportedArchitectureError:
        if model.config.model_type in {*FAMILIES, *REFUSED}:
            raise
    pruned = any(plan_of(m.config) for m in model.modules() if isinstance(m, PreTrainedModel))
    if not pruned:
        check_built_again(model)
    detected = Detected({}, {})
    guessed = inputs is None
    try:
        unknown = "what its layers do could not be looked at, as the error above shows"
        with unwarned(), step("detection", unknown):
            if pruned:
                raise UnsupportedArchitectureError(
                    "it was pruned before, and its checkpoint tells sizes alone"
                )
            inputs = example_inputs(model) if inputs is None else inputs
            detected = detect(model, inputs, leave=FAMILIES, idle=idle_towers(model, inputs))
        with step("", "it could not be proved what its layers do, as the error above shows"):
            detected = _proved(model, detected, inputs, head_unit)
    except UnsupportedArchitectureError as error:
        remark = GUESSED if guessed else ""
        raise UnsupportedArchitectureError(way_out(model, detected.families, error, remark)) from error
    keep(model, detected)


def describe_on(model: PreTrainedModel, batch: MakeBatch, head_unit: str) -> None:
    """As `describe` does, and, where inputs that are made up do not prove a model or do not run all of it, on
    those that it is to be used with.

    Args:
        model: Dense; not changed.
        batch: Makes them, once they are needed.
        head_unit: `KPruneArguments.head_unit`.

    Raises:
        UnsupportedArchitectureError: If its layers cannot be described or the proof fails on both.
    """
    failure: UnsupportedArchitectureError | None = None
    try:
        describe(model, head_unit=head_unit)
    except UnsupportedArchitectureError as error:
        if model.config.model_type in {*FAMILIES, *REFUSED}:
            raise
        failure = error
    rest = model.__dict__.get(IDLE, {})
    inputs = batch() if failure or NOT_RUN in rest.values() else None
    if inputs is None:
        if failure:
            raise failure
        return
    families = {
        name: m.__dict__["kprune_family"]
        for name, m in model.named_modules()
        if "kprune_family" in m.__dict__
    }
    keep(model, Detected({}, {}))
    try:
        describe(model, inputs, head_unit)
    except UnsupportedArchitectureError as error:
        if failure:
            raise
        cause = cast(UnsupportedArchitectureError, error.__cause__)  # it says nothing of a way out
        why = f"on the calibration rows {plain_reason(cause)}"
        keep(model, Detected(families, {p: why if r == NOT_RUN else r for p, r in rest.items()}))


def _proved(
    model: PreTrainedModel, detected: Detected, inputs: Mapping[str, object], head_unit: str
) -> Detected:
    """What of it can be proved: all, or those lists of layers that can be by themselves."""

    def failure_of(part: Detected) -> UnsupportedArchitectureError | None:
        try:
            prove(keep(evaluation_copy(model), part), inputs, head_unit)
        except UnsupportedArchitectureError as error:
            return error
        return None

    every = [stack for stacks in detected.families.values() for stack in stacks]
    failure = failure_of(detected)
    if failure and len(every) > 1:
        failures = [failure_of(_only(model, detected, [stack], "")) for stack in every]
        right = [stack for stack, of_it in zip(every, failures, strict=True) if not of_it]
        why = plain_reason(next((of_it for of_it in failures if of_it), failure))
        part = _only(model, detected, right, why)
        if right and len(right) < len(every) and not failure_of(part):
            return part
    if failure:
        raise failure
    return detected


def _only(model: PreTrainedModel, detected: Detected, chosen: Sequence[Stack], why: str) -> Detected:
    """Some of the stacks that were detected, with those whose tokens they read; the others stay, as is
    said."""
    families, rest = dict[str, tuple[Stack, ...]](), dict(detected.rest)
    for owner, stacks in detected.families.items():
        mine = [stack for stack in stacks if any(stack is other for other in chosen)]
        reads = {stack.reads for stack in mine}
        mine = [stack for stack in stacks if stack in mine or stack.layers in reads]
        families |= {owner: tuple(mine)} if mine else {}
        gone = [find_layers(model_at(model, owner), stack.layers) for stack in stacks if stack not in mine]
        rest |= {f"{name}.": why for name, m in model.named_modules() if any(m is layers for layers in gone)}
    return Detected(families, rest)


def idle_towers(model: PreTrainedModel, inputs: Mapping[str, object]) -> dict[str, str]:
    """The models inside `model` that do not run on these inputs, such as a tower of images on texts, path to
    reason. They stay as they are.

    Raises:
        UnsupportedArchitectureError: If the model does not run on them.
    """
    dense, ran = evaluation_copy(model), set[int]()
    inner = {name: m for name, m in dense.named_modules() if name and isinstance(m, PreTrainedModel)}
    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng():
        for module in dense.modules():
            hooks.callback(module.register_forward_hook(lambda m, *_: ran.add(id(m))).remove)
        with step("running it", "it does not run on these inputs, as the error above shows"):
            dense(**to_model(inputs, dense))
    idle = [name for name, m in inner.items() if not any(id(part) in ran for part in m.modules())]
    outermost = [name for name in idle if not any(name.startswith(f"{other}.") for other in idle)]
    return dict.fromkeys((f"{name}." for name in outermost), NOT_RUN)


def way_out(model: PreTrainedModel, families: Families, error: Exception, remark: str = "") -> str:
    """What to do about a model whose layers could not be described for this error, of which there may be a
    remark: describe one by hand, from what was detected."""
    start = "".join(
        f"\n\n{as_code(model_at(model, path).config.model_type, stacks)}" for path, stacks in families.items()
    )
    if NO_LAYERS in str(error):
        return f"{type(model).__name__} cannot be pruned: {error}"
    return (
        f"no family describes model_type {model.config.model_type!r} ({type(model).__name__}), and it "
        f"was not found out what its layers do; {error}.{remark} Describe one of them in ten lines with "
        "hf_kprune.register_family: "
        f"docs/add_a_family.md{' has the steps; to start from:' if start else ''}{start}"
    )
