"""Which towers of a model made of several can be pruned on the calibration rows. The others are left alone.

The model runs once on a few rows. A tower that does not run on them, such as that of images on texts, cannot
be measured, nor can one of which the model reads an inner layer. One after the other, from the last, each
tower is carried from sublayer to sublayer as pruning will carry it, and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from transformers import Cache, PreTrainedModel

from ..errors import ArgumentError, UnsupportedModelError
from ..modeling_kprune import find_layers
from ..progress import unwarned
from .coverage import described, family_of, untouched
from .facts import first_run, input_names, to_model
from .probes import only_tokens
from .proof import prove_carrying
from .sublayers import LEFT_ALONE, Sublayer, find_sublayers
from .surgery import with_table_per_layer


ROLES = {
    "language": {"input_ids"},
    "text": {"input_ids"},
    "vision": {"pixel_values", "grid_thw"},
    "audio": {"input_values", "input_features"},
}
"""What towers are called by the inputs that they read."""


@contextmanager
def leaving(model: PreTrainedModel, paths: Collection[str]) -> Iterator[None]:
    """Let `find_sublayers` pass over the towers at these paths, in `model` and its copies."""
    before = model.__dict__.get(LEFT_ALONE)
    model.__dict__[LEFT_ALONE] = frozenset(paths)
    try:
        yield
    finally:
        model.__dict__.pop(LEFT_ALONE, None)
        if before is not None:
            model.__dict__[LEFT_ALONE] = before


def last_stack(model: PreTrainedModel) -> Sublayer:
    """The last sublayer of `model`, whether it is left alone or not."""
    with leaving(model, ()):
        return find_sublayers(model)[-1]


def names_of(path: str, tower: PreTrainedModel) -> list[str]:
    """What users may call a tower at `path`: by what it reads, or by its name in the model."""
    roles = [role for role, reads in ROLES.items() if reads & input_names(tower)]
    place = path.rstrip(".")
    return list(dict.fromkeys([*roles, place.rpartition(".")[2], place]))


def towers_not_asked_for(model: PreTrainedModel, wanted: Sequence[str] | None) -> dict[str, str]:
    """The towers of `model` that none of the names in `wanted` means, path to reason; none if that is None.

    Raises:
        ArgumentError: If a name means no tower.
    """
    if wanted is None:
        return {}
    towers = dict(described(model))
    names = {path: names_of(path, tower) for path, tower in towers.items() if path} or names_of_lists(model)
    for name in wanted:
        if not any(name in known for known in names.values()):
            parts = [f"{' or '.join(known[:-1])} ({known[-1]})" for known in names.values()]
            out = "; ".join(
                f"{path.rstrip('.')} stays, as {reason}" for path, reason in untouched(model).items()
            )
            raise ArgumentError(
                f"towers names {name!r}, expected parts of {type(model).__name__} that can be pruned: "
                f"{', '.join(parts) or 'it is not made of several models, so leave towers at None'}"
                + (f"; {out}" if out else "")
            )
    reason = f"towers asks for {', '.join(wanted)} alone"
    paths = names.keys() if [*towers] == [""] else towers.keys()
    return {path: reason for path in paths if not {*wanted} & {*names.get(path, ())}}


def names_of_lists(model: PreTrainedModel) -> dict[str, list[str]]:
    """What users may call the lists of layers of `model`, where it has several, such as an encoder and a
    decoder: by the part of it that they are in."""
    with leaving(model, ()):
        lists = dict.fromkeys(s.stack_name for s in find_sublayers(model))
    names = {f"{path}.": [path.partition(".")[0], path] for path in lists}
    return names if len({name for name, _ in names.values()}) == len(names) > 1 else {}


def towers_left_alone(
    model: PreTrainedModel,
    inputs: Mapping[str, object],
    head_unit: str,
    wanted: Sequence[str] | None = None,
) -> dict[str, str]:
    """The towers of `model` that cannot be pruned on `inputs`, a few rows, and the parts of layers that never
    are: path to reason.

    Args:
        model: In evaluation mode; not changed.
        inputs: What its `forward` takes.
        head_unit: What a unit is where queries are grouped, see `Unit.of`.
        wanted: Names of those that are to be pruned. None: all.

    Raises:
        ArgumentError: If a name means no tower.
        CalibrationError: If the model does not run on these inputs.
        UnsupportedModelError: If no tower is left.
    """
    inputs = to_model(inputs, model)
    towers: dict[str, list[Sublayer]] = {path: [] for path, _ in described(model)}
    for sublayer in find_sublayers(model, head_unit):
        towers[next(path for path in towers if sublayer.name.startswith(path))].append(sublayer)
    spared = towers_not_asked_for(model, wanted)
    reasons = {**untouched(model), **parts_left_alone(model), **spared}
    if len(towers) == 1 and spared and not walks(model, inputs, head_unit, spared):
        raise UnsupportedModelError(
            f"towers asks for {', '.join(wanted or ())} alone, but the layers of {type(model).__name__} "
            "cannot be carried one by one without the others; leave towers at None"
        )
    if len(towers) == 1:
        return outermost(reasons)
    with ExitStack() as hooks:
        runs = count_runs(hooks, [s for sublayers in towers.values() for s in sublayers])
        caches = note_caches(hooks, towers)
        run_once(model, inputs)
    # a later tower reads the keys of these, where heads that are cut would be missing
    in_caches = {path for _, paths in caches.values() for path in paths if path != paths[-1]}
    walkable: list[str] = []
    for path, sublayers in reversed(towers.items()):
        if path in spared:
            continue
        counts = {runs[s.name] / s.uses for s in sublayers}
        if counts == {0}:
            reasons[path] = "it does not run on the calibration rows"
        elif counts != {1}:
            reasons[path] = "on the calibration rows not all of its layers run as often as in one pass"
        elif path in in_caches:
            reasons[path] = "another part of the model reads its keys and values, in one cache with its own"
        elif not walks(model, inputs, head_unit, towers.keys() - {*walkable, path}):
            reasons[path] = "the model does not give the same where its layers are run one by one"
        else:
            walkable.append(path)
    if not walkable:
        why = "; ".join(f"{path.rstrip('.')}: {reason}" for path, reason in reasons.items())
        raise UnsupportedModelError(
            f"no part of {type(model).__name__} can be pruned on these calibration rows, which have "
            f"{', '.join(inputs)} ({why}); give rows on which it runs as a whole, or prune a part by itself"
        )
    return outermost(reasons)


def outermost(reasons: Mapping[str, str]) -> dict[str, str]:
    """Of what stays, path to reason, that which lies in nothing else that stays."""
    return {
        path: reason
        for path, reason in reasons.items()
        if not any(path != other and path.startswith(other) for other in reasons)
    }


def parts_left_alone(model: PreTrainedModel) -> dict[str, str]:
    """The parts of the layers of `model` that stay as they are though they have heads or neurons: path to
    reason."""
    return {
        f"{path}{stack.layers}.*.{part}": why
        for path, owner in described(model)
        for stack in family_of(owner) or ()
        if isinstance(stack.untouched, Mapping) and find_layers(owner, stack.layers) is not None
        for part, why in stack.untouched.items()
        if why
    }


def count_runs(hooks: ExitStack, sublayers: Sequence[Sublayer]) -> dict[str, int]:
    """How often each sublayer runs while `hooks` are open, by name."""
    runs = dict.fromkeys((s.name for s in sublayers), 0)
    for s in sublayers:

        def count(*_: object, name: str = s.name) -> None:
            runs[name] += 1

        hooks.callback(s.output.register_forward_hook(count).remove)
    return runs


def note_caches(
    hooks: ExitStack, towers: Mapping[str, Sequence[Sublayer]]
) -> dict[int, tuple[Cache, list[str]]]:
    """The caches that layers are called with while `hooks` are open, each with the paths of the towers of
    these layers, in the order of the calls."""
    users: dict[int, tuple[Cache, list[str]]] = {}
    for path, sublayers in towers.items():

        def note(_: object, args: tuple[object, ...], kwargs: dict[str, object], path: str = path) -> None:
            for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
                users.setdefault(id(cache), (cache, []))[1].append(path)

        for layer in {id(s.layer): s.layer for s in sublayers}.values():
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
    return users


def run_once(model: PreTrainedModel, inputs: Mapping[str, object]) -> None:
    """Run `model`, with its head on one token of each row, for what hooks see of it.

    Raises:
        CalibrationError: If it does not run on `inputs`.
    """
    head = model.get_output_embeddings() if model.can_generate() else None
    narrow = nullcontext() if head is None else only_tokens(head, 0, 1)
    with narrow, first_run(model, inputs), torch.no_grad(), torch.random.fork_rng():
        model(**inputs)


def walks(
    model: PreTrainedModel, inputs: Mapping[str, object], head_unit: str, others: Collection[str]
) -> bool:
    """Whether all towers but those at the paths `others` can be carried from sublayer to sublayer."""
    with leaving(model, others), unwarned():
        try:
            prove_carrying(with_table_per_layer(model), inputs, head_unit)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # whatever a forward pass raises that finds something missing
            return False
    return True
