"""What is public is sorted, importable and documented, and modules import only what they say they do."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tomllib
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from transformers import HfArgumentParser

import hf_kprune
from hf_kprune import ArgumentError, KPruneArguments, errors


PACKAGE = Path(hf_kprune.__file__).parent
FIELDS = {field.name: field for field in dataclasses.fields(KPruneArguments)}


def public(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


def test_all_is_sorted_complete_and_importable() -> None:
    names = hf_kprune.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    made = {
        name
        for name, value in vars(hf_kprune).items()
        if isinstance(value, (type, FunctionType)) and name != "install"
    }
    assert made | {"__version__"} == set(names)
    star: dict[str, object] = {}
    exec("from hf_kprune import *", star)
    assert set(names) <= star.keys()


def test_every_public_name_and_method_is_documented() -> None:
    for name, value in public(hf_kprune).items():
        if isinstance(value, str):
            continue
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"
        if not isinstance(value, type):
            continue
        for method, function in vars(value).items():
            if isinstance(function, (FunctionType, classmethod, property)) and not method.startswith("_"):
                words = inspect.getdoc(getattr(value, method))
                assert words or method in ("to_json", "from_json", "to_markdown"), f"{name}.{method}"


def test_every_module_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name


def test_constructor_arguments_are_documented() -> None:
    """Every argument and field of a public class with an `Args:` section is in it."""
    checked = 0
    for name, value in public(hf_kprune).items():
        documentation = inspect.getdoc(value) or ""
        if not isinstance(value, type) or "Args:" not in documentation:
            continue
        section = documentation.split("Args:")[1].split("Raises:")[0]
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"^ +(\w+, )*{parameter}(, \w+)*:", section, re.MULTILINE), (
                f"{name}({parameter})"
            )
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_help_and_is_in_the_docstring(name: str) -> None:
    words = FIELDS[name].metadata["help"]
    assert words[0].isupper()
    assert words.endswith(".")
    assert f"`{name}`" in (KPruneArguments.__doc__ or "")


def test_the_docstring_names_no_option_that_is_not_there() -> None:
    documentation = (KPruneArguments.__doc__ or "").split("Raises:")[0]
    assert set(re.findall(r"`([a-z_]+)`", documentation)) == set(FIELDS)


def test_options_are_a_command_line() -> None:
    (args,) = HfArgumentParser(KPruneArguments).parse_args_into_dataclasses(
        ["--sparsity", "0.25", "--prune_heads", "false", "--num_measure_tokens", "50", "--pooling", "cls"]
    )
    assert args == KPruneArguments(sparsity=0.25, prune_heads=False, num_measure_tokens=50, pooling="cls")
    assert HfArgumentParser(KPruneArguments).parse_args_into_dataclasses([]) == (KPruneArguments(),)


def test_options_survive_a_dict_but_for_the_token() -> None:
    args = KPruneArguments(output_dir="out", sparsity=0.3, hub_token="secret")
    assert "secret" not in str(args.to_dict())
    assert KPruneArguments(**args.to_dict()) == KPruneArguments(output_dir="out", sparsity=0.3)


REFUSED = [
    ("sparsity", 1.0),
    ("sparsity", -0.1),
    ("sparsity", float("nan")),
    ("method", "magic"),
    ("min_heads", -1),
    ("min_neurons", -1),
    ("round_to", 0),
    ("num_tokens", 0),
    ("per_device_batch_size", 0),
    ("per_device_eval_batch_size", 0),
    ("num_measure_tokens", 0),
    ("num_measure_tokens", 100_001),
    ("max_seq_length", 0),
    ("temperature", 0.0),
    ("temperature", float("inf")),
    ("pooling", "max"),
    ("measure_dtype", "float16"),
    ("ridge", -1e-3),
    ("statistics_dtype", "bfloat16"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name} is {re.escape(repr(value))}, expected "):
        KPruneArguments(**{name: value})


def test_errors_are_a_tree_of_value_errors() -> None:
    for name, error in public(errors).items():
        assert issubclass(error, errors.KPruneError), name
        assert issubclass(error, ValueError), name
        assert error.__doc__, name
        assert name in (errors.__doc__ or ""), f"{name} is missing in the tree that errors.py draws"
    assert set(errors.__all__) <= set(hf_kprune.__all__)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|rc)\d+)?", hf_kprune.__version__)


def test_the_lower_bounds_are_versions_that_were_run() -> None:
    """constraints-lowest.txt, by which the bounds were tried, pins what pyproject.toml asks for; torch is one build."""
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(project["dependencies"]), re.M))
    pins = dict(
        re.findall(
            r"^([\w-]+)==([\d.]+)", (root / "constraints-lowest.txt").read_text(encoding="utf-8"), re.M
        )
    )
    assert {
        "transformers",
        "accelerate",
        "datasets",
        "evaluate",
        "huggingface_hub",
        "safetensors",
    } <= bounds.keys()
    for name in bounds.keys() - {"torch"}:
        assert f"{pins[name]}.".startswith(f"{bounds[name]}."), name
