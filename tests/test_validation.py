"""Wrong types are refused by one sentence with the value, what was expected, and the way out; what is harmless is taken."""

from __future__ import annotations

import dataclasses
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from data import collate, rows
from models import shallow
from transformers import BertConfig, BertModel, TrainerCallback, TrainingArguments

from hf_kprune import ArgumentError, KPruneArguments, KPruneCallback, KPrunePruner
from hf_kprune.cli.commands import DataArguments, ResumeArguments, SweepArguments
from hf_kprune.validation import show


KINDS = get_type_hints(KPruneArguments)
STRANGE: list[Any] = [
    object(),
    b"0.5",
    {},
    {1},
    1j,
    Decimal(1),
    "",
    KPruneArguments,
    len,
    torch.ones(2),
    float("nan"),
    [None],
]
RIGHT: dict[Any, list[Any]] = {
    bool: [True, np.bool_(True), torch.tensor(True)],
    int: [7, np.int64(7), np.uint8(7), torch.tensor(7)],
    float: [0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2), np.array(0.5)],
    str: ["a", np.str_("a"), Path("a")],
    list[str]: [["a"], ("a",), "a", np.array(["a"])],
    list[float]: [[0.5], (np.float64(0.5),), np.array([0.5])],
    dict[str, Any] | str: [{}, "{}"],
}
PLAIN = {kind: values[0] for kind, values in RIGHT.items()}


def plain(kind: Any) -> Any:
    """An annotation without its None."""
    return next((part for part in RIGHT if kind in (part, part | None)), kind)


def wrong_for(kind: Any) -> list[Any]:
    """Values of other kinds, which an option must refuse."""
    others = {
        bool: [0, 1, 1.0, "true", "False"],
        int: [True, 2.5, 1.0, "42", 2**63, np.float64(2.0), np.ones(2)],
        float: [True, "0.5", float("inf"), 10**400, [0.5]],
        str: [True, 5, 0.5, ["a"], "a\0b"],
        list[str]: [5, [1], [["a"]], {"a": 1}],
        list[float]: [0.5, "0.5", ["0.5"], [True], [float("nan")]],
        dict[str, Any] | str: [True, 5, ["a"], "a", "[]", "a\0b"],
    }
    right = plain(kind)
    fine = {str: (str,), list[str]: (str,), dict[str, Any] | str: (dict,)}.get(right, ())
    values = others[right] + [value for value in STRANGE if not isinstance(value, fine)]
    return values if kind != right else [*values, None]


@pytest.mark.parametrize("name", KINDS)
def test_every_option_refuses_what_its_annotation_does_not_take(name: str) -> None:
    for value in wrong_for(KINDS[name]):
        with pytest.raises(ArgumentError) as error:
            KPruneArguments(**{name: value})
        line = str(error.value)
        assert line.startswith(f"{name} is "), line
        assert ", expected " in line, line
        assert "\n" not in line
        assert len(line) < 300

    args = KPruneArguments()
    setattr(args, name, value)  # which no pruner starts with
    with pytest.raises(ArgumentError, match=f"^{name} is "):
        args.check()


@pytest.mark.parametrize("name", [name for name in KINDS if plain(KINDS[name]) in (bool, str, list[str])])
def test_what_is_harmless_is_taken_in_its_plain_form(name: str) -> None:
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(KPruneArguments)}[name]
    for value in (
        RIGHT[plain(KINDS[name])]
        if choices is None and name not in ("statistics_dtype", "max_shard_size")
        else []
    ):
        taken = getattr(KPruneArguments(**{name: value}), name)
        assert taken == PLAIN[plain(KINDS[name])]
        assert type(taken) in (bool, str, list) or isinstance(taken, str)


@pytest.mark.parametrize("value", RIGHT[float])
def test_numbers_of_other_libraries_are_taken(value: Any) -> None:
    args = KPruneArguments(sparsity=value, ridge=value, target_speedup=None)
    assert type(args.sparsity) is type(args.ridge) is float
    assert args.sparsity == args.ridge == 0.5


@pytest.mark.parametrize("value", RIGHT[int])
def test_whole_numbers_of_other_libraries_are_taken(value: Any) -> None:
    args = KPruneArguments(seed=value, num_tokens=value, temperature=value)
    assert type(args.seed) is type(args.num_tokens) is int
    assert args.seed == args.num_tokens == args.temperature == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "0.5"}, "sparsity is '0.5', expected a number or None: 0.5, without quotes"),
        ({"seed": None}, "seed is None, expected a whole number (default: 42)"),
        (
            {"per_device_batch_size": 2.5},
            "per_device_batch_size is 2.5, expected a whole number (default: 32)",
        ),
        ({"num_tokens": 1e5}, "num_tokens is 100000.0, expected a whole number: 100000"),
        ({"tune": "false"}, "tune is 'false', expected True or False: False, without quotes"),
        ({"temperature": float("nan")}, "temperature is nan, expected a finite number (default: 2.0)"),
        ({"method": "kprun"}, "; did you mean kprune?"),
        ({"sparsty": 0.5}, "KPruneArguments has no option sparsty; did you mean sparsity?"),
        ({"zzz": 0.5}, "KPruneArguments has no option zzz; see help(KPruneArguments)"),
        ({"seed": -1}, "seed is -1, expected from 0 to 2**32 - 1"),
    ],
)
def test_the_sentence_has_the_value_what_was_expected_and_the_way_out(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError) as error:
        KPruneArguments(**options)
    assert str(error.value).endswith(message)


def test_a_token_of_the_wrong_kind_is_not_shown() -> None:
    with pytest.raises(ArgumentError) as error:
        KPruneArguments(hub_token=["hf_secret"])  # type: ignore[arg-type]
    assert "secret" not in str(error.value)


def test_an_option_that_is_misspelt_when_it_is_assigned_is_refused_when_the_pruner_starts() -> None:
    pruner = KPrunePruner(shallow(), None, rows(), collate)
    pruner.args.sparsty = 0.8  # type: ignore[attr-defined]
    for start in (pruner.prune, pruner.plan, pruner.sweep):
        with pytest.raises(ArgumentError, match="no option sparsty; did you mean sparsity"):
            start()


def test_an_option_of_the_wrong_kind_is_refused_when_the_pruner_starts() -> None:
    pruner = KPrunePruner(shallow(), None, rows(), collate)
    pruner.args.sparsity = "0.8"  # type: ignore[assignment]
    for start in (pruner.prune, pruner.plan, pruner.sweep, lambda: KPrunePruner(shallow(), pruner.args)):
        with pytest.raises(ArgumentError, match="sparsity is '0.8', expected a number or None: 0.8"):
            start()


def test_options_of_the_command_line_are_checked_alike() -> None:
    commands: list[tuple[Any, dict[str, Any]]] = [
        (DataArguments, {"model_name_or_path": "m", "dataset_file": "f.csv"}),
        (ResumeArguments, {}),
        (SweepArguments, {}),
    ]
    for kind, right in commands:
        kinds = get_type_hints(kind)
        kind(**right)
        for field in dataclasses.fields(kind):
            with pytest.raises(ArgumentError, match=f"^{field.name} is .*, expected "):
                kind(**{**right, field.name: object()})
            assert kinds[field.name] is not Any
        with pytest.raises(ArgumentError, match="has no option modell"):
            kind(**right, modell="m")


class Teller(TrainerCallback):
    """Of the other library."""


PRUNER: dict[str, tuple[dict[str, Any], str]] = {
    "no model": (
        {"model": None},
        "model is None, expected a transformers PreTrainedModel or the name or path of one",
    ),
    "empty name": ({"model": ""}, "model is '', expected a transformers PreTrainedModel"),
    "number": ({"model": 5}, "model is 5, expected "),
    "config": ({"model": BertConfig()}, "model is of type BertConfig, expected .*from_config"),
    "class": ({"model": BertModel}, "model is the class BertModel, expected .*BertModel.from_pretrained"),
    "dict of options": ({"args": {}}, r"args is \{\}, expected a KPruneArguments or None: KPruneArguments\("),
    "training": ({"args": "training"}, "args is of type TrainingArguments, expected a KPruneArguments"),
    "trainer callback": (
        {"callbacks": [Teller()]},
        "callbacks is .*Teller.*, expected .*KPruneCallback.*no TrainerCallback",
    ),
    "its class": ({"callbacks": [Teller]}, "callbacks is .*Teller.*, expected .*KPruneCallback"),
    "one callback": ({"callbacks": KPruneCallback()}, r"callbacks is .*, expected a list.*: \[callback\]"),
    "tokenizer by name": (
        {"processing_class": "bert"},
        "processing_class is 'bert', expected a tokenizer.*from_pretrained",
    ),
    "tokenizer's class": (
        {"processing_class": dict},
        "processing_class is the class dict, expected a tokenizer",
    ),
    "tokenizer is config": (
        {"processing_class": BertConfig()},
        "processing_class is of type BertConfig, expected a tokenizer",
    ),
    "metrics": ({"compute_metrics": "accuracy"}, "compute_metrics is 'accuracy', expected a function"),
    "loss": ({"compute_loss": 0.5}, "compute_loss is 0.5, expected a function"),
    "collator": ({"data_collator": "pad"}, "data_collator is 'pad', expected a function"),
    "collator's class": (
        {"data_collator": KPruneCallback},
        "data_collator is the class KPruneCallback, expected a function",
    ),
    "evaluation by name": ({"eval_dataset": "glue"}, "eval_dataset is 'glue', expected a dataset"),
    "unknown keyword": (
        {"calibration_data": []},
        "KPrunePruner has no option calibration_data; did you mean calibration_d",
    ),
}


@pytest.mark.parametrize("case", PRUNER)
def test_arguments_of_the_pruner_are_refused_before_anything_else(case: str, tmp_path: Path) -> None:
    options, message = PRUNER[case]
    if options.get("args") == "training":
        options = {"args": TrainingArguments(output_dir=str(tmp_path))}
    with pytest.raises(ArgumentError, match=message) as error:
        KPrunePruner(**{"model": shallow(), **options})
    assert "\n" not in str(error.value)


METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "budgets as a number": ("sweep", {"budgets": 0.5}, "budgets is 0.5, expected a list"),
    "budgets as a string": ("sweep", {"budgets": "0.5"}, "budgets is '0.5', expected a list"),
    "a budget as a string": ("sweep", {"budgets": ["0.5"]}, r"budgets is \['0.5'\], expected a list"),
    "a target as a string": (
        "sweep",
        {"budgets": [{"target_params": "5e6"}]},
        "target_params is '5e6', expected a number",
    ),
    "metric": ("sweep", {"metric": 5}, "metric is 5, expected a string"),
    "direction of the metric": (
        "sweep",
        {"greater_is_better": "yes"},
        "greater_is_better is 'yes', expected True or False",
    ),
    "drop": ("sweep", {"max_drop": "0.03"}, "max_drop is '0.03', expected a number"),
    "refine": ("sweep", {"refine": 1.5}, "refine is 1.5, expected a whole number"),
    "refine below": ("sweep", {"refine": -1}, "refine is -1, expected at least 0"),
    "place": ("sweep", {"output_dir": 5}, "output_dir is 5, expected a string"),
    "sweep's keyword": (
        "sweep",
        {"metrics": "accuracy"},
        "sweep has no option metrics; did you mean metric?",
    ),
    "trials": ("hyperparameter_search", {"n_trials": None}, "n_trials is None, expected a whole number"),
    "no trials": ("hyperparameter_search", {"n_trials": 0}, "n_trials is 0, expected at least 1"),
    "direction": (
        "hyperparameter_search",
        {"direction": "down"},
        "direction is 'down', expected 'minimize' or 'maximize'",
    ),
    "space": ("hyperparameter_search", {"hp_space": {}}, r"hp_space is \{\}, expected a function"),
    "objective": (
        "hyperparameter_search",
        {"compute_objective": "loss"},
        "compute_objective is 'loss', expected a function",
    ),
    "what the space gives": (
        "hyperparameter_search",
        {"hp_space": lambda trial: [], "n_trials": 1},
        r"what hp_space gives is \[\], expected a dict",
    ),
    "evaluation by name": (
        "evaluate",
        {"eval_dataset": "glue"},
        "eval_dataset is 'glue', expected a dataset",
    ),
    "nothing to evaluate": ("evaluate", {}, "eval_dataset is None, expected a dataset"),
    "prefix": (
        "evaluate",
        {"eval_dataset": [], "metric_key_prefix": 5},
        "metric_key_prefix is 5, expected a string",
    ),
    "keys": (
        "evaluate",
        {"eval_dataset": [], "ignore_keys": 5},
        "ignore_keys is 5, expected a list of strings",
    ),
    "evaluate's keyword": (
        "evaluate",
        {"dataset": []},
        "evaluate has no option dataset; did you mean eval_dataset?",
    ),
    "nothing to predict": ("predict", {"test_dataset": None}, "test_dataset is None, expected a dataset"),
    "save": ("save_model", {"output_dir": 5}, "output_dir is 5, expected a string"),
    "card": ("create_model_card", {"tags": 5}, "tags is 5, expected a string or a list of strings"),
    "push": ("push_to_hub", {"blocking": "no"}, "blocking is 'no', expected True or False"),
    "callback": (
        "add_callback",
        {"callback": Teller()},
        "callback is of type Teller, expected a KPruneCallback.*derive it",
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_arguments_of_methods_are_refused_alike(case: str) -> None:
    name, options, message = METHODS[case]
    pruner = KPrunePruner(shallow(), KPruneArguments(use_cpu=True, disable_tqdm=True), rows(), collate)
    with pytest.raises(ArgumentError, match=message):
        getattr(pruner, name)(**options)


def test_budgets_of_numpy_are_budgets() -> None:
    args = KPruneArguments(method="magnitude", use_cpu=True, disable_tqdm=True)
    pruner = KPrunePruner(shallow(), args, rows(), collate)
    fractions: Any = np.array([0.5])
    assert [point.asked for point in pruner.sweep(fractions).points] == [{}, {"sparsity": 0.5}]


@pytest.mark.parametrize(
    ("package", "call", "command"),
    [
        ("optuna", "hyperparameter_search", "pip install optuna"),
        ("matplotlib", "plot", "pip install matplotlib"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, call: str, command: str
) -> None:
    from hf_kprune.sweep import Sweep

    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    pruner = KPrunePruner(shallow(), KPruneArguments(use_cpu=True, disable_tqdm=True), rows(), collate)
    with pytest.raises(ArgumentError, match=command):
        pruner.hyperparameter_search() if call == "hyperparameter_search" else Sweep([]).plot(
            str(tmp_path / "plot.svg")
        )


@pytest.mark.parametrize(
    "value", ["\x1b[2J", "\u202e", "a\nb", "x" * 10_000, ["y" * 1000] * 1000, {"a": torch.ones(500)}]
)
def test_a_value_is_shown_in_one_short_line_without_control_characters(value: Any) -> None:
    line = show(value)
    assert line.isprintable()
    assert len(line) < 1000
