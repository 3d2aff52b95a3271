"""Values checked by the annotations of the fields and arguments that they are for, once. Standard library
only.

Numbers of NumPy and PyTorch are taken as numbers, paths as strings, and a single string as a list of one.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union

from .errors import ArgumentError


WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dict",
    type(None): "None",
    list[str]: "a list of strings",
    list[float]: "a list of numbers",
}

WHOLE = 2**63
"""Whole numbers are below this, as the libraries that they are passed to hold them in 64 bits."""

Class = TypeVar("Class")
Function = TypeVar("Function", bound=Callable[..., Any])


class Line(reprlib.Repr):
    """Writes a value in one short line: a plain one as Python does, any other by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_instance(self, value: object, level: int) -> str:
        if isinstance(value, type):
            return f"the class {value.__name__}"
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
            return f"the function {value.__name__}"
        if value is None or isinstance(value, (numbers.Number, str, os.PathLike)):
            return super().repr_instance(value, level)
        return f"of type {type(value).__name__}"


show = Line().repr


def suggestion(word: str, known: Iterable[str]) -> str:
    """The known word that an unknown one may stand for, as the end of a sentence; nothing if none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1) or [
        name for name in known if word and name.startswith(word)
    ]
    return f"; did you mean {near[0]}?" if near else ""


def name_of(kind: Any) -> str:
    """What a value of an annotated kind is called."""
    if kind in WORDS:
        return WORDS[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(name_of(part) for part in parts))
    if origin is typing.Literal:
        return " or ".join(map(repr, parts))
    if origin is Callable:
        return "a function"
    if origin is type:
        return f"a class of {parts[0].__name__}"
    if origin in (list, Sequence):
        return f"a list, each {name_of(parts[0])}"
    return f"a {(origin or kind).__name__}"


def convert(value: object, kind: object) -> Any:
    """The value as the annotated kind has it. Raises `TypeError` if it is of another kind."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return convert(value, part)
            except TypeError:
                continue
        raise TypeError
    if kind is Any or isinstance(kind, TypeVar):
        return value
    if origin is typing.Literal:
        if not any(type(value) is type(part) and value == part for part in parts):
            raise TypeError
        return value
    if origin in (list, Sequence):
        return to_list(value, parts[0])
    if kind in (bool, int, float) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of NumPy or PyTorch
    if kind in (int, float):
        return to_number(value, kind)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not is_of(value, kind):
        raise TypeError
    return value


def is_of(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated kind as it is: a function, a class, or an instance of a class."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Callable:
        return callable(value) and not isinstance(value, type)
    if origin is type:
        return isinstance(value, type) and issubclass(value, parts[0])
    return isinstance(value, origin or kind) and not (kind is str and "\0" in value)


def to_list(value: object, kind: object) -> list[Any]:
    """A list of values of an annotated kind; one text is a list of it. Raises `TypeError` for what is no
    list."""
    if isinstance(value, str) and kind is str:
        return [value]
    if len(getattr(value, "shape", ())) == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        raise TypeError
    return [convert(entry, kind) for entry in value]


def to_number(value: object, kind: type[int] | type[float]) -> int | float:
    """A whole number for `int`, any finite one for `float`. Raises `TypeError` for another, and for a truth
    value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        raise TypeError
    number: Any = value if isinstance(value, (int, float)) else kind(typing.cast(Any, value))
    if not abs(number) <= (WHOLE - 1 if kind is int else sys.float_info.max):  # neither is NaN
        raise TypeError
    return typing.cast("int | float", number)


def checked(name: str, value: object, kind: object, way_out: str = "", secret: bool = False) -> Any:
    """The value as the annotated kind has it.

    Args:
        name: Of the option or argument.
        value: What was passed.
        kind: Its annotation.
        way_out: End of the message.
        secret: Whether the value must not be in the message.

    Raises:
        ArgumentError: With the name, the value, what was expected and the way out.
    """
    try:
        return convert(value, kind)
    except TypeError:
        expected = name_of(kind)
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("a number", "a finite number")
    elif isinstance(value, float) and value.is_integer() and "whole number" in expected:
        way_out = f": {value:.0f}"
    elif isinstance(value, int) and "whole number" in expected and abs(value) >= WHOLE:
        expected += " below 2**63"
    elif isinstance(value, str) and "\0" in value:
        expected += " without NUL characters"
    elif isinstance(value, str):
        way_out = unquoted(value, kind) or way_out
    shown = f"of type {type(value).__name__}" if secret else show(value)
    raise ArgumentError(f"{name} is {shown}, expected {expected}{way_out}")


def unquoted(text: str, kind: object) -> str:
    """The way out for a number or a truth value that was passed as a string; nothing if it is no such
    string.
    """
    for literal in (text.strip(), text.strip().capitalize()):
        try:
            value = ast.literal_eval(literal)
            value = int(value) if isinstance(value, float) and value.is_integer() and kind is int else value
            convert(value, kind)
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return f": {value!r}, without quotes"
    return ""


@functools.cache
def hints_of(annotated: Any, include_extras: bool = False) -> dict[str, Any]:
    """The annotations of a class or a function, resolved once."""
    return typing.get_type_hints(annotated, include_extras=include_extras)


def check_fields(options: Any) -> None:
    """Check every field of a dataclass by its annotation, and put what can be taken in its right form.

    Raises:
        ArgumentError: If a value is of another kind, or if something was assigned to a name that is no field.
    """
    kind: Any = type(options)
    kinds, known = hints_of(kind), [field.name for field in fields(options)]
    check_names(type(options).__name__, vars(options), known)
    for field in fields(options):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        way_out = "" if default in (MISSING, None) else f" (default: {default!r})"
        value, secret = getattr(options, field.name), "token" in field.name.split("_")
        setattr(options, field.name, checked(field.name, value, kinds[field.name], way_out, secret))


def check_names(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ArgumentError`, with a suggestion, for a name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ArgumentError(
                f"{owner} has no option {name}{suggestion(name, known) or f'; see help({owner})'}"
            )


def known_keywords(cls: type[Class]) -> type[Class]:
    """Class decorator: a keyword that a dataclass has no field for is an `ArgumentError` with a
    suggestion.
    """
    make = cls.__init__

    @functools.wraps(make)
    def make_checked(self: Any, *args: object, **kwargs: object) -> None:
        check_names(cls.__name__, kwargs, [field.name for field in fields(type(self)) if field.init])
        make(self, *args, **kwargs)

    cls.__init__ = make_checked  # type: ignore[method-assign]
    return cls


def checked_arguments(*but: str, **ways_out: str) -> Callable[[Function], Function]:
    """Decorator: the arguments of a function are checked by their annotations, its keywords by their names.

    Args:
        but: Names of arguments that the function checks itself.
        ways_out: What is said beside what was expected, by the name of an argument.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [
            p.name
            for p in signature.parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY
        ]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            kinds = hints_of(typing.cast(Any, function))
            if not takes_any:
                check_names(title, kwargs, named[1:])
            bound = signature.bind(*args, **kwargs)
            for name in (bound.arguments.keys() & set(named) & kinds.keys()) - {"self", *but}:
                way_out = f": {ways_out[name]}" if name in ways_out else ""
                bound.arguments[name] = checked(name, bound.arguments[name], kinds[name], way_out)
            return function(*bound.args, **bound.kwargs)

        return typing.cast(Function, call)

    return decorate
