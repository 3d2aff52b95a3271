"""Which options go together, and which are without effect beside the others.

PyTorch is imported by what looks at methods.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, cast

from .errors import ArgumentError
from .options import check_values, expect, from_json, has_size
from .validation import check_fields, suggestion


IN_METHOD_KWARGS = ("lambda_pred", "lambda_rep", "mu")
"""Options of earlier releases that are in `method_kwargs` now."""

TIMES = ("target_latency", "target_speedup")
"""The budgets of time."""


class Options(Protocol):
    """The options that are looked at here. `KPruneArguments`, which documents them, is the only one that has
    them.
    """

    method: str
    method_kwargs: dict[str, Any] | str | None
    card_metadata: dict[str, Any] | str | None
    prune_heads: bool
    prune_ffn: bool
    prune_experts: bool
    expert_unit: str
    uniform: bool
    text_columns: list[str] | None
    towers: list[str] | None
    num_tokens: int
    num_measure_tokens: int | None
    tune: bool
    max_shard_size: str

    @property
    def budget(self) -> tuple[str, float]: ...


def check_combinations(args: Options) -> None:
    """The values go together, and are what other modules take."""
    from .methods import METHODS

    check = partial(expect, args)
    near = suggestion(args.method, METHODS)
    check("method", args.method in METHODS, f"one of {', '.join(METHODS)}{near}")
    check_method_kwargs(args)
    args.card_metadata = from_json("card_metadata", args.card_metadata, '{"license": "mit"}') or None
    tokens = args.num_measure_tokens
    check("num_measure_tokens", tokens is None or 1 <= tokens <= args.num_tokens, "from 1 to num_tokens")
    names = args.text_columns is None or bool(args.text_columns and all(args.text_columns))
    check("text_columns", names, 'a list of names of columns, such as ["premise", "hypothesis"]')
    names = args.towers is None or bool(args.towers and all(args.towers))
    check("towers", names, 'None, or a list of names of parts of the model, such as ["language"]')
    size = has_size(args.max_shard_size)
    check("max_shard_size", size, "a number over 0 with TB, GB, MB or KB, such as 5GB")
    budget, value = args.budget
    if budget in TIMES:
        able = [name for name, method in METHODS.items() if method.in_time]
        check("method", args.method in able, f"with {budget}, one of {', '.join(able)}")
        check("uniform", not args.uniform, f"False with {budget}")
        wish = f"neuron with {budget}, as whole experts save no time"
        check("expert_unit", args.expert_unit == "neuron", wish)
    if args.prune_experts and args.expert_unit == "expert":
        able = [name for name, method in METHODS.items() if method.in_whole_experts]
        check("method", args.method in able, f"with expert_unit='expert', one of {', '.join(able)}")
    some = args.prune_heads or args.prune_ffn or args.prune_experts or (budget, value) == ("sparsity", 0)
    check("prune_heads", some, "True, or prune_ffn=True, or prune_experts=True, or sparsity=0")
    for name in ("tune_bias", "tune_inputs"):
        idle = not args.tune and getattr(args, name)
        check(name, not idle, "False or None with tune=False, which tunes nothing")


def check_method_kwargs(args: Options) -> None:
    """The options of the method are those that it takes, with values that they may have; those of earlier
    releases join them."""
    from .methods import METHODS

    method = METHODS[args.method]
    known = method.kwargs_names()
    early = {name: getattr(args, name) for name in IN_METHOD_KWARGS if name in known}
    early = {name: value for name, value in early.items() if value is not None}
    kwargs = from_json("method_kwargs", args.method_kwargs) | early
    for name in (name for name in kwargs if name not in known):
        users = [repr(key) for key, each in METHODS.items() if name in each.kwargs_names()]
        near = f"; {' and '.join(users)} does" if users else suggestion(str(name), known)
        listed = ", ".join(known) or "none"
        raise ArgumentError(
            f"method_kwargs names {name!r}, which method {args.method!r} does not take: it takes "
            f"{listed}{near}"
        )
    options = method.kwargs_class(**kwargs)
    check_fields(options)
    check_values(options)
    args.method_kwargs = {name: getattr(options, name) for name in kwargs} or None
    if early:
        warnings.warn(
            f"pass {', '.join(early)} in method_kwargs: '{json.dumps(early)}'",
            FutureWarning,
            stacklevel=7,
        )
        for name in early:
            setattr(args, name, None)


def without_effect(args: Options) -> dict[str, str]:
    """Options that differ from their defaults and that the others leave without effect, and why."""
    from .methods import METHODS

    method, reasons = METHODS[args.method], dict[str, str]()
    readers = {key: each.options.union(each.kwargs_names()) for key, each in METHODS.items()}
    for name in sorted(set().union(*readers.values()) - readers[args.method]):
        users = ", ".join(repr(key) for key, names in readers.items() if name in names)
        reasons[name] = f"method {args.method!r} does not use it; {users} does"
    if not args.prune_heads:
        reasons["min_heads"] = "prune_heads is False, so every head stays"
    if not (args.prune_ffn or args.prune_experts):
        reason = "prune_ffn and prune_experts are False, so every neuron stays"
        reasons |= dict.fromkeys(("min_neurons", "round_to"), reason)
    if not (args.tune and method.tunes):
        reasons["statistics_dtype"] = "nothing is tuned" + ("" if args.tune else ", as tune is False")
        if args.method == "kprune":
            reasons["ridge"] = "nothing is tuned, as tune is False"
    if not method.needs:
        reasons["measure_dtype"] = f"method {args.method!r} measures no knowledge"
    defaults = {each.name: each.default for each in fields(cast(Any, args))}
    return {
        name: why
        for name, why in reasons.items()
        if name in defaults and getattr(args, name) != defaults[name]
    }
