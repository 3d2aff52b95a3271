"""The command line as it is read: its options, their help, and how a message names them. Standard library
only.

What the commands do is in commands.py, which is imported when one runs, so that `--help` and `--version`
answer at once.
"""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from ..arguments import TARGETS, KPruneArguments
from ..errors import ArgumentError
from ..validation import checked, suggestion
from ..version import __version__
from .options import (
    CompareArguments,
    DataArguments,
    EvaluateArguments,
    RecoverArguments,
    ResumeArguments,
    SweepArguments,
)
from .output import say
from .run_file import add_config, as_yaml, with_config


QUESTIONS: dict[str, tuple[str, ...]] = {
    "what is pruned": ("model_name_or_path", "task", "offload"),
    "how small": (
        "sparsity",
        *TARGETS,
        "latency_batch_size",
        "latency_length",
        "flops_length",
        "prune_heads",
        "prune_ffn",
        "prune_experts",
        "towers",
        "min_heads",
        "min_neurons",
        "round_to",
        "head_unit",
        "expert_unit",
        "uniform",
    ),
    "how small (sweep)": ("budgets", "compare_by", "lower_is_better", "max_drop", "refine", "plot"),
    "with what data": (
        "dataset_file",
        "dataset_name",
        "dataset_config_name",
        "dataset_split",
        "text_columns",
        "num_tokens",
        "num_measure_tokens",
        "max_seq_length",
        "packing",
        "per_device_batch_size",
        "remove_unused_columns",
        "seed",
    ),
    "how good it is (evaluation)": (
        "eval_file",
        "eval_dataset_name",
        "eval_dataset_config_name",
        "eval_dataset_split",
        "label_column",
        "metric",
        "per_device_eval_batch_size",
    ),
    "where to": (
        "output_dir",
        "overwrite_output_dir",
        "max_shard_size",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_private_repo",
        "card_metadata",
        "hub_revision",
    ),
    "how": (
        "method",
        "method_kwargs",
        "tune",
        "measure_dtype",
        "statistics_dtype",
        "temperature",
        "pooling",
        "recover_minutes",
        "use_cpu",
    ),
    "how, with --method surgeon or kprune": ("ridge", "tune_bias", "tune_inputs"),
    "what is printed": ("verbose", "disable_tqdm", "html_report", "report_to", "run_name"),
    "old names": ("lambda_pred", "lambda_rep", "mu"),
}
"""The options by the question that they answer, in the order of the help. Those in no group come last."""

COMMANDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prune": (
        (DataArguments, KPruneArguments, ResumeArguments, RecoverArguments),
        "Prune a model, save it to --output_dir and print what was done.",
    ),
    "plan": (
        (DataArguments, KPruneArguments),
        "Print what prune would cut with the same options. Nothing is changed or written.",
    ),
    "sweep": (
        (DataArguments, KPruneArguments, SweepArguments, ResumeArguments),
        "Prune for many budgets from one measurement and print a table. Save all models, or the smallest "
        "good enough.",
    ),
    "evaluate": (
        (EvaluateArguments,),
        "Print how good a model is, pruned or not, on data with labels.",
    ),
    "compare": (
        (CompareArguments,),
        "Print how large and how fast two models are, such as a dense and a pruned one, and, with data, how "
        "good they are and how often they answer the same.",
    ),
    "inspect": (
        (),
        "Print the sizes of a model, layer by layer, and whether it can be pruned. Its weights are not "
        "loaded.",
    ),
    "report": (
        (),
        "Write a page that shows what was done to a pruned model, with pictures. It needs no network.",
    ),
    "export": (
        (),
        "Write a model, pruned or dense, for another runtime: ONNX Runtime, OpenVINO or llama.cpp.",
    ),
    "convert": (
        (),
        "Save a checkpoint whose heads were pruned by transformers 2 to 4 (pruned_heads) so that today's can "
        "load it.",
    ),
}
"""The commands, the options that each takes, and what it does."""

OFF = {
    "prune_heads": "Keep all attention heads.",
    "prune_ffn": "Keep all FFN neurons.",
    "prune_experts": "Keep all experts as they are.",
    "tune": "Leave the weights of the units that stay as they are. Otherwise they are tuned.",
    "remove_unused_columns": "Refuse columns that the model does not take. Otherwise they are dropped.",
}
"""What the switch does that turns off an option that is on by default."""

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}
ENDINGS = {
    "dir": "DIR",
    "checkpoint": "DIR",
    "file": "FILE",
    "kwargs": "JSON",
    "metadata": "JSON",
    "plot": "FILE",
}


def options_of(command: str) -> dict[str, Field[Any]]:
    """The options of a command by name."""
    return {option.name: option for kind in COMMANDS[command][0] for option in fields(kind)}


def kinds_of(command: str) -> dict[str, Any]:
    """What is read of its options: the annotation without None, text where it can be text."""
    hints = {
        name: hint for kind in COMMANDS[command][0] for name, hint in typing.get_type_hints(kind).items()
    }
    kinds = {}
    for name, hint in hints.items():
        parts = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
        kinds[name] = str if str in parts else next((part for part in parts if part is not type(None)), hint)
    return kinds


def reader(kind: Any) -> Callable[[str], Any]:
    """A function that reads a value of a kind from the command line."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            try:
                checked("", text, kind)
            except ArgumentError as error:
                message = str(error).strip().replace(", without quotes", "")
                raise argparse.ArgumentTypeError(message) from error

    return read


def one_spelling(argv: Sequence[str]) -> list[str]:
    """The words of a command line, its options with underscores, its switches without a value.

    `--prune-heads false`, `--prune_heads=false` and `--no-prune-heads` all become `--no_prune_heads`.
    """
    kinds = kinds_of(argv[0]) if argv and argv[0] in COMMANDS else {}
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("-", "_").replace("__", "--", 1)
        if kinds.get(flag[2:]) is not bool:
            words.append(flag + equals + value)
            continue
        if not equals and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if value.lower() not in (*TRUE, *FALSE, *([] if equals else [""])):
            raise ArgumentError(f"{flag} is {value!r}, expected true or false")
        words.append(flag if value.lower() not in FALSE else f"--no_{flag[2:]}")
    return words


class CommandParser(argparse.ArgumentParser):
    """Options of one command. What argparse finds wrong with them is an error like any other."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+): is ", r"\1 is ", message)
        raise ArgumentError(f"{message}; see {self.prog} --help")


def add_option(group: Any, option: Field[object], kind: Any) -> None:
    """Add an option as a person would write it: a switch by what it changes."""
    flag, required = f"--{option.name}", option.default is MISSING and option.default_factory is MISSING
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    default = None if required else default
    text = as_options(option.metadata["help"], list(options_of("sweep")))
    if default is not None and kind is not bool:
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    shared: dict[str, Any] = {"dest": option.name, "default": default, "help": text.replace("%", "%%")}
    hidden = {**shared, "help": argparse.SUPPRESS}
    if kind is bool:
        if default is None:
            shared["help"] += f" --no_{option.name} turns it off."
        group.add_argument(flag, action="store_true", **(hidden if default else shared))
        if default:
            shared["help"] = OFF.get(option.name, f"Not so: {text}")
        group.add_argument(f"--no_{option.name}", action="store_false", **(shared if default else hidden))
        return
    if "positional" in option.metadata:
        group.add_argument(option.name, help=shared["help"], metavar=option.name.upper())
        return
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
        shared |= {"nargs": "+", "action": Listing, "item": reader(kind)}
    else:
        shared |= {"required": required, "type": reader(kind)}
    if "const" in option.metadata:
        shared |= {"nargs": "?", "const": option.metadata["const"]}
    if "choices" in option.metadata:
        shared["choices"] = option.metadata["choices"]
    else:
        ending = option.name.rpartition("_")[2]
        shared["metavar"] = ENDINGS.get(ending, METAVARS[kind])
    group.add_argument(flag, **shared)


class Listing(argparse.Action):
    """A list whose items are separated by spaces or commas."""

    def __init__(self, item: Callable[[str], Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.item = item

    def __call__(self, parser: Any, namespace: object, values: Any, _: str | None = None) -> None:
        try:
            parts = [part.strip() for part in ",".join(values).replace(",,", ",").split(",")]
            items = [self.item(part) for part in parts if part]
        except argparse.ArgumentTypeError as error:
            parser.error(f"{self.option_strings[0]} {error}")
        setattr(namespace, self.dest, items)


def as_options(message: str, names: Sequence[str]) -> str:
    """A message that names options as Python does, with their names as they are on the command line.

    `raise num_tokens` becomes `raise --num_tokens`, and `prune_ffn=False` becomes `--no_prune_ffn`. A name of
    one word, which may be meant as a word, only where a value follows. Text in quotes, such as a path, stays.
    """
    if not names:
        return message
    every = "|".join(sorted(names, key=len, reverse=True))
    plain = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    setting = re.compile(rf"(?<![\w./-])({every})=(\"[^\"]*\"|'[^']*'|[^\s,;:)]*[^\s,;:).])")
    subject = re.compile(
        rf"(?:(?<=^)|(?<=; )|(?<=, )|(?<= and ))({every})(?= (?:is|are|names|and|takes|joins) )"
    )
    name = re.compile(rf"(?<![\w./-])({plain})(?![\w/(=]|\.\w)")

    def set_as(match: re.Match[str]) -> str:
        value = match[2].strip("\"'")
        return {"True": f"--{match[1]}", "False": f"--no_{match[1]}"}.get(value, f"--{match[1]} {value}")

    parts = re.split(r"((?<![\w=])'[^']*'(?!\w)|(?<![\w=])\"[^\"]*\"(?!\w))", message)
    for i in range(0, len(parts), 2):
        part = subject.sub(r"--\1", setting.sub(set_as, parts[i]))
        parts[i] = name.sub(r"--\1", part)
    return "".join(parts)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-kprune",
        description="Prune Transformers models without retraining (K-prune).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf-kprune {__version__}")
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names, parser_class=CommandParser)
    for name, (classes, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if DataArguments in classes:
            add_config(command)
            command.usage = (
                "%(prog)s --model_name_or_path MODEL (--dataset_name NAME | --dataset_file FILE) [options]"
            )
        options, kinds = options_of(name), kinds_of(name)
        grouped = {option for group in QUESTIONS.values() for option in group}
        for title, members in {
            **QUESTIONS,
            "more": tuple(name for name in options if name not in grouped),
        }.items():
            group = command.add_argument_group(title)
            for option in (options[member] for member in members if member in options):
                add_option(group, option, kinds[option.name])
    commands.choices["inspect"].add_argument("model_name_or_path", help="A directory or a name on the Hub.")
    verify = (
        "Read the weight files too. They must be those that were saved, byte by byte, and hold no NaN or Inf."
    )
    commands.choices["inspect"].add_argument("--verify", action="store_true", help=verify)
    batch = (
        "A safetensors file with inputs of the model by name, several samples each, on which a type that is "
        "not listed is run and proved. By default they are made up from its config."
    )
    commands.choices["inspect"].add_argument("--batch", metavar="FILE", help=batch)
    commands.choices["report"].add_argument(
        "directory", help="The pruned model: its directory, or its name on the Hub."
    )
    commands.choices["report"].add_argument(
        "file", nargs="?", help="The page to write. By default it is kprune_report.html in that directory."
    )
    export = commands.choices["export"]
    export.add_argument("model_name_or_path", help="A directory or a name on the Hub.")
    export.add_argument("output_dir", help="Directory to write to, which is empty or not there yet.")
    export.add_argument("--format", default="onnx", help="onnx, openvino or gguf. By default it is onnx.")
    commands.choices["convert"].add_argument(
        "old", help="The old checkpoint: a directory or a name on the Hub."
    )
    commands.choices["convert"].add_argument("new", help="Directory to write to.")
    return parser


def parse(argv: Sequence[str]) -> tuple[str, list[Any]]:
    """The command, and what it takes: objects with its options, or its arguments in order.

    Raises `ArgumentError` for what cannot be, and `SystemExit` after help.
    """
    takers = [name for name, (classes, _) in COMMANDS.items() if DataArguments in classes]
    parser = make_parser()
    namespace, unknown = parser.parse_known_args(one_spelling(with_config(argv, takers)))
    values = vars(namespace)
    command, prints = values.pop("command"), values.pop("save_config", False)
    if unknown:
        near = [
            suggestion(word.partition("=")[0], [f"--{name}" for name in values])
            for word in unknown
            if word[:2] == "--"
        ]
        way_out = "".join(near) or f"; see hf-kprune {command} --help"
        raise ArgumentError(f"no such options: {' '.join(unknown)}{way_out}")
    if command in ("prune", "sweep") and values["output_dir"] is None:
        raise ArgumentError(
            f"--output_dir is missing: name a directory to write to; see hf-kprune {command} --help"
        )
    if command == "sweep":
        evaluated = values["eval_file"] or values["eval_dataset_name"]
        if values["compare_by"] is not None and not evaluated:
            raise ArgumentError("--compare_by needs evaluation data: --eval_file or --eval_dataset_name")
        if values["lower_is_better"] and values["compare_by"] is None and values["metric"] is None:
            raise ArgumentError("--lower_is_better is said of a metric: name it by --metric")
    classes = COMMANDS[command][0]
    if not classes:
        return command, list(values.values())
    options = [kind(**{option.name: values[option.name] for option in fields(kind)}) for kind in classes]
    if prints:
        plain = vars(parser.parse_args([command, "--model_name_or_path", ""]))
        say(as_yaml(command, {name: value for name, value in values.items() if value != plain[name]}))
        parser.exit()
    return command, options
