"""Prove of a live model that its family describes it: with units cut, it computes what it does with them
masked.

All that pruning needs of a description is checked here, on one batch, before any weight of the model changes:

    deterministic    two runs from one seed agree; every run here starts from it
    cut == masked    in what each sublayer and the model give, and generate: for odd and even units (each is
                     cut once and kept once), with sublayers emptied (each once, others not), with all of them
    not by chance    what was cut had contributed, and without it the outputs are others
    carried == run   sublayer by sublayer as from end to end; also where sublayers are empty
    saved == loaded  the config alone makes a model of the sizes that the cut one has, and its weights fit the
                     form in which checkpoints of the model type hold them

What it takes beyond that for whole experts to go, `prove_router` checks when a run is to take some.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..errors import KPruneError, UnsupportedArchitectureError
from ..modeling_kprune import has
from ..progress import unwarned
from .checks import checkpoint_of
from .facts import evaluation_copy, floats, to_model
from .hooks import State, carried, featured, first, resumed
from .probes import check_order
from .runs import run_sublayer, run_to_top
from .sublayers import Sublayer, find_sublayers
from .surgery import cut_twin, twin, with_table_per_layer


TOLERANCE = 1e-4
"""Equal values differ by less than this fraction of the largest one, and others by ten times it."""

Masks = Sequence[Tensor]
"""Which units to keep, boolean, for each sublayer."""


def prove(model: PreTrainedModel, inputs: Mapping[str, object], head_unit: str = "group") -> None:
    """Prove that the family of `model` describes it.

    Args:
        model: Dense. It is not changed, and only those of its weights are copied that are cut.
        inputs: A small batch that runs all of it.
        head_unit: What a unit is where queries are grouped, see `Unit.of`.

    Raises:
        UnsupportedArchitectureError: If a step fails; it says which one, where, and how far off the result
            is.
    """
    with unwarned():
        dense = with_table_per_layer(evaluation_copy(model))
        inputs = to_model(inputs, dense)
        sublayers = find_sublayers(dense, head_unit)
        _check_unshared(dense, sublayers)
        with step("run twice from the same random numbers"):
            one, other = (_outputs(dense, inputs, sublayers) for _ in range(2))
            _check_same(other, one, "what it was the first time, so that nothing can be compared")
        with step("run in the order described"), _seeded():
            check_order(dense, inputs, sublayers)
        masks = trial_masks(sublayers)
        with step("run with each function of attention"):
            models = list(implementations(dense, inputs))
        for variant in models:
            prove_cuts(variant, inputs, masks, head_unit)
        emptied = cut_twin(dense, list(masks.values())[-1], head_unit)
        for what, model_to_carry in (("", dense), (" when some are empty", emptied)):
            with step(f"carried from sublayer to sublayer{what}"):
                prove_carrying(model_to_carry, inputs, head_unit)
        with step(
            "built from the config that would be saved",
            "its config makes no such model, as the error above shows",
        ):
            _prove_loading(emptied)
        prove_saving(dense, [True] * len(sublayers), head_unit)


def implementations(model: PreTrainedModel, inputs: Mapping[str, object]) -> Iterator[PreTrainedModel]:
    """`model`, and a twin with the plain attention function if it uses another and gives numbers with that:
    other code may run then."""
    yield model
    if model.config._attn_implementation == "eager":
        return
    plain = twin(model).eval()
    plain.set_attn_implementation("eager")
    try:
        outputs = _outputs(plain, inputs, ())
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # the model cannot be used with it, pruned or not
        return
    if any(bool(tensor.isfinite().any()) for tensor in outputs.values()):
        yield plain


def trial_masks(sublayers: Sequence[Sublayer], groups: int = 4) -> dict[str, list[Tensor]]:
    """The masks of a proof, by what they do. A lone unit is cut once, too. Layers at one place in several
    stacks are not emptied together, as some stacks read the keys of others, layer by layer, in one cache."""
    numbers, stacks = [s.numbers for s in sublayers], list(dict.fromkeys(s.stack_name for s in sublayers))
    masks = {
        "odd units cut": [n % 2 == 0 for n in numbers],
        "even units cut": [n % 2 == 1 for n in numbers],
        "all units cut": [n < 0 for n in numbers],
    }
    places = {name: count(start) for start, name in enumerate(stacks)}
    turns = [next(places[s.stack_name]) % groups for s in sublayers]
    for turn in sorted(set(turns)):
        emptied = [n < 0 if own == turn else n % 2 == 0 for n, own in zip(numbers, turns, strict=True)]
        masks[f"one of {groups} sublayers emptied, from number {turn} on"] = emptied
    return masks


@torch.no_grad()
def prove_cuts(
    dense: PreTrainedModel,
    inputs: Mapping[str, object],
    masks: Mapping[str, Masks],
    head_unit: str = "group",
    generate: bool = True,
) -> None:
    """Prove that cutting equals masking, and not by chance.

    Args:
        dense: The model.
        inputs: A batch that runs all of it.
        masks: The units to keep of each sublayer, several times, each by its name for errors.
        head_unit: What a unit is where queries are grouped, see `Unit.of`.
        generate: Whether what the model generates is compared too, if it can.
    """

    def outputs_of(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> dict[str, Tensor]:
        return {**_outputs(model, inputs, sublayers), **(_generated(model, inputs) if generate else {})}

    sublayers = find_sublayers(dense, head_unit)
    before = _outputs(dense, inputs, sublayers)
    for what, keep in masks.items():
        with step(what):
            with _masked(sublayers, keep) as lost:
                expected = outputs_of(dense, sublayers)
            student = cut_twin(dense, keep, head_unit)
            cut_sublayers = find_sublayers(student, head_unit)
            _check_same(outputs_of(student, cut_sublayers), expected, "what it is where they are masked")
            if [s.num_units for s in cut_sublayers] != [int(mask.sum()) for mask in keep]:
                raise UnsupportedArchitectureError("other units are left than were kept")
            idle = [name for name, share in lost.items() if share <= TOLERANCE]
            changed = any(
                _apart(expected[n], before[n]) > 10 * TOLERANCE for n in before if n.startswith("output ")
            )
            if idle or (lost and not changed):
                raise UnsupportedArchitectureError(
                    f"{', '.join(idle) or 'the model'} gave the same without what was cut, so that it cannot "
                    "be seen whether it was cut rightly"
                )


@contextmanager
def step(what: str, meaning: str = "it does not run then, as the error above shows") -> Iterator[None]:
    """Say in which step of the proof an error came up, of any class: a wrong description can break anything.

    Args:
        what: The step; empty if the error itself says it.
        meaning: What an error means there that is not of hf_kprune. That error is chained, and never the
            reason.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, KPruneError) else meaning
        raise UnsupportedArchitectureError(f"{what}: {reason}" if what else reason) from error


def plain_reason(error: UnsupportedArchitectureError) -> str:
    """What an error says where it is kept and shown without the error that it came from."""
    return str(error).replace(", as the error above shows", "")


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw the same random numbers each time, in models that draw some, and then give back the caller's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _outputs(
    model: PreTrainedModel, inputs: Mapping[str, object], sublayers: Sequence[Sublayer]
) -> dict[str, Tensor]:
    """What the output projection of each sublayer returns, and all float outputs of the model, by name."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for s in sublayers:

            def note(_: nn.Module, __: object, output: Tensor, name: str = s.name) -> None:
                tensors[name] = output.clone()

            hooks.callback(s.output.register_forward_hook(note).remove)
        with torch.no_grad(), _seeded():
            outputs = floats(model(**inputs))
    return {**tensors, **{f"output {i}": tensor for i, tensor in enumerate(outputs)}}


def _generated(model: PreTrainedModel, inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """Logits of the tokens that a model generates next, by name; none if it cannot from these inputs."""
    if not model.can_generate():
        return {}
    # copies, as BLIP writes into its prompts
    prompt = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in inputs.items()
        if key != "use_cache"
    }
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    try:
        with _seeded():
            generated = model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True)
    except Exception:
        return {}
    return {f"generated token {i}": cast(Tensor, logits) for i, logits in enumerate(generated.logits)}


@contextmanager
def _masked(sublayers: Sequence[Sublayer], masks: Masks) -> Iterator[dict[str, float]]:
    """Multiply the features of the units that are not kept by zero.

    Yields, by the name of the sublayer, their largest output as a fraction of that of all units.
    """
    lost: dict[str, float] = {}
    with ExitStack() as hooks:
        for s, keep in zip(sublayers, masks, strict=True):
            if bool(keep.all()):
                continue
            weight = s.weight
            columns = torch.ones(weight.shape[1], device=weight.device)
            columns[s.columns[~keep].flatten()] = 0

            def scale(features: Tensor, columns: Tensor = columns, s: Sublayer = s) -> Tensor:
                weight, numbers = s.weight, features.nan_to_num(0)  # NaN is of tokens that are padding
                gone, all_ = (linear(t, weight).abs().max() for t in (numbers * (1 - columns), numbers))
                lost[s.name] = float((gone / all_).nan_to_num(0))
                return features * columns

            hooks.enter_context(featured(s, scale))
        yield lost


def _apart(result: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest value; NaN equals NaN."""
    if result.shape != expected.shape or not torch.equal(result.isnan(), expected.isnan()):
        return float("inf")
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.zeros(())
    difference = (result - expected).nan_to_num(0, posinf=1e30, neginf=-1e30).abs()
    return float(difference.max() / scale.clamp(min=1e-12)) if difference.numel() else 0.0


def _check_same(results: Mapping[str, Tensor], expected: Mapping[str, Tensor], meaning: str) -> None:
    """Raise `UnsupportedArchitectureError` unless tensors of the same names are equal up to `TOLERANCE`,
    and say what is expected by its `meaning`."""
    if results.keys() != expected.keys():
        others = sorted(results.keys() ^ expected.keys())
        raise UnsupportedArchitectureError(f"{', '.join(others[:3])} came out of only one of the two")
    for name, tensor in results.items():
        error = _apart(tensor, expected[name])
        if error > TOLERANCE:
            raise UnsupportedArchitectureError(f"{name} is {error:.1e} of its largest value off {meaning}")


def _check_unshared(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> None:
    """Refuse projections that share a weight: cutting would part them, and loading join them again."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for s in sublayers:
        for path in (s.block.output, *s.block.inputs):
            module = s.layer.get_submodule(path) if has(s.layer, path) else nn.Module()
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and len(shared := names[id(parameter)]) > 1:
                    raise UnsupportedArchitectureError(f"{' and '.join(shared)} are one and the same weight")


def prove_carrying(model: PreTrainedModel, inputs: Mapping[str, object], head_unit: str) -> None:
    """Prove that `model` gives the same, run sublayer by sublayer and from end to end."""
    sublayers, state = find_sublayers(model, head_unit), State()
    entries: dict[int, Tensor] = {}
    for position, sublayer in enumerate(sublayers):
        if sublayer.stack_name in state.inputs:
            entries.setdefault(id(sublayer.layer), state.inputs[sublayer.stack_name])
        with _seeded():
            state = run_sublayer(model, inputs, sublayers, position, state).above
    with torch.no_grad(), _seeded():
        tops = run_to_top(model, inputs, sublayers).inputs
    try:
        _check_same(state.inputs, tops, "what it is in the model")
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"{_parting(model, inputs, sublayers, entries)}, so that they cannot be pruned one after the "
            f"other ({error})"
        ) from error
    with resumed(sublayers, len(sublayers), state):
        outputs = _outputs(model, inputs, ())
    try:
        _check_same(outputs, _outputs(model, inputs, ()), "what it is in the model")
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"the model gives something else where it gets nothing of {_lists(sublayers)} but what the last "
            f"layer gives; it may read what layers below that give, too ({error})"
        ) from error


def _lists(sublayers: Sequence[Sublayer]) -> str:
    return " and ".join(dict.fromkeys(s.stack_name for s in sublayers))


def _parting(
    model: PreTrainedModel,
    inputs: Mapping[str, object],
    sublayers: Sequence[Sublayer],
    entries: Mapping[int, Tensor],
) -> str:
    """Which layer is the first to read something else where layers run one by one, in words.

    Args:
        model: The model.
        inputs: A batch.
        sublayers: Its sublayers.
        entries: What layers have read where they ran one by one, by their ids.
    """
    places: list[str] = []
    with ExitStack() as hooks, torch.no_grad(), _seeded():
        for s in {id(s.layer): s for s in sublayers if id(s.layer) in entries}.values():

            def compare(
                _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], s: Sublayer = s
            ) -> None:
                if _apart(carried(s, first(args, kwargs)), entries[id(s.layer)]) > TOLERANCE:
                    places.append(f"{s.stack_name}.{s.index}")

            hooks.callback(s.layer.register_forward_pre_hook(compare, with_kwargs=True).remove)
        model(**inputs)
    what = places[0] if places else f"the model above {_lists(sublayers)}"
    return f"run one by one, each on what the one below gives, {what} reads something else than in the model"


@torch.no_grad()
def prove_router(model: PreTrainedModel, inputs: Mapping[str, object], head_unit: str) -> None:
    """Prove that whole experts can go: without some of the lowest mixture its router gives the same logits
    for the others, and the model runs."""
    sublayers = find_sublayers(model, head_unit, "expert")
    place = next((i for i, s in enumerate(sublayers) if s.is_mixture), None)
    if (
        place is None
        or sublayers[place].num_units <= sublayers[place].unit.least(None) * sublayers[place].parts
    ):
        return
    masks = [s.numbers != 0 if i == place else s.numbers >= 0 for i, s in enumerate(sublayers)]

    def logits_of(owner: PreTrainedModel, s: Sublayer) -> Tensor:
        logits: list[Tensor] = []

        def note(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
            logits.append(output[0])

        with _seeded(), ExitStack() as hooks:
            hooks.callback(s.layer.get_submodule(s.plan["router"]).register_forward_hook(note).remove)
            owner(**inputs)
        return logits[0][..., : s.num_units]  # after them, those of experts that have gone

    meaning = "it does not run then, as the error above shows; name in Block(router=...) what else has slices"
    with step(f"without some experts of {sublayers[place].name}", meaning):
        student = cut_twin(model, masks, head_unit, "expert")
        dense = logits_of(model, sublayers[place])[..., masks[place].to(model.device)]
        left = logits_of(student, find_sublayers(student, head_unit, "expert")[place])
        name = "the logits of its router"
        _check_same({name: left}, {name: dense}, "what it is with all of them")


def _prove_loading(student: PreTrainedModel) -> None:
    """Prove that the config alone makes a model of the same shapes."""
    config = type(student.config).from_dict(copy.deepcopy(student.config.to_dict()))
    with torch.device("meta"):
        again = type(student)(config)
    shapes, expected = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (again, student))
    if shapes != expected:
        which = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        raise UnsupportedArchitectureError(f"{', '.join(which[:3])} would have another size")


@torch.no_grad()
def prove_saving(dense: PreTrainedModel, chosen: Sequence[bool], head_unit: str = "group") -> None:
    """Prove that the weights of `dense`, with one unit or none of the chosen sublayers, can be written as the
    checkpoints of its model type hold them, see `checkpoint_of`."""
    with step(
        "saved as the checkpoints of its model type are",
        "Transformers gives its weights another form there, which they do not fit, as the error above shows",
    ):
        for units in (0, 1):
            masks = [
                s.numbers < units if cut else s.numbers >= 0
                for s, cut in zip(find_sublayers(dense, head_unit), chosen, strict=True)
            ]
            checkpoint_of(cut_twin(dense, masks, head_unit))
