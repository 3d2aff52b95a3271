"""sentence-transformers folders: what their modules make of the transformer's outputs, and everything that lies beside it.

Such a folder has a `modules.json`, a list of modules: the transformer first, then for instance a pooling, a dense layer and a
normalisation. `SentenceTransformer(folder).encode` runs them one after the other. They are read here from their JSON and
weight files, so that pruning knows what `encode` gives without that library, and copied beside the pruned transformer.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import cached_file

from ..arguments import KPruneArguments
from ..errors import ArgumentError, UnsupportedModelError
from .knowledge import NUDGE, Draws, Knowledge


Features = dict[str, Tensor]
Step = Callable[[Features, Tensor], Features]
"""(features by name, valid tokens (B, T)) -> the features with what a module adds to them."""

MODULES = "modules.json"
TRANSFORMER_CONFIGS = ["sentence_bert_config.json"] + [
    f"sentence_{name}_config.json"
    for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The flags of older pooling configurations, in the order in which several are joined, and today's names."""

TABLES = {
    "feature-extraction": ("MODEL_FOR_TEXT_ENCODING_MAPPING", "MODEL_MAPPING"),
    "sequence-classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "fill-mask": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "text-generation": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
}
"""Where the class of the transformer is looked up, by its `transformer_task`: the config may name another class."""

WEIGHTS = re.compile(r"\.(safetensors|bin|h5|msgpack|ot|onnx|gguf|pt|pth|ckpt)(\.index\.json)?$")
EXPORTS = re.compile(r"onnx|openvino|checkpoint-\d+|runs")


def pool(tokens: Tensor, valid: Tensor, modes: Sequence[str], prompt_length: int = 0) -> Tensor:
    """One vector for each sequence, its poolings joined: (B, T, D) -> (B, len(modes) * D).

    Args:
        tokens: Token embeddings, (B, T, D).
        valid: Tokens that are not padding, on whichever side that is, (B, T).
        modes: Of `POOLINGS.values()`.
        prompt_length: So many of the first valid tokens are left out.
    """
    place = torch.arange(valid.shape[1], device=valid.device) - valid.int().argmax(
        1, keepdim=True
    )  # in the sequence
    valid = valid & (place >= prompt_length)
    weight = valid.unsqueeze(-1).to(tokens.dtype)
    rows = torch.arange(len(tokens), device=tokens.device)

    def average(weight: Tensor) -> Tensor:
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)

    poolings: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: tokens[rows, valid.int().argmax(1)],
        "max": lambda: tokens.masked_fill(~valid.unsqueeze(-1), torch.finfo(tokens.dtype).min).amax(1),
        "mean": lambda: average(weight),
        "mean_sqrt_len_tokens": lambda: (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9).sqrt(),
        "weightedmean": lambda: average(weight * (place + 1).unsqueeze(-1)),
        "lasttoken": lambda: tokens[rows, valid.shape[1] - 1 - valid.int().flip(1).argmax(1)],
    }
    return torch.cat([poolings[mode]() for mode in modes], -1)


@dataclass(frozen=True)
class EmbeddingKnowledge(Knowledge):
    """Squared distance of the embeddings, (B, E), that `embed` makes of outputs and valid tokens. They are what is drawn."""

    embed: Callable[[Any, Tensor], Tensor] = field(kw_only=True)

    def __call__(self, student: Any, teacher: Any, valid: Tensor) -> Tensor:
        target = teacher if isinstance(teacher, Tensor) else self.embed(teacher, valid)
        return (self.embed(student, valid) - target).square().sum(-1)

    def noise(self, outputs: Any, draws: Draws) -> dict[str, Tensor]:
        return {"embedding": draws.normal(*self.embed(outputs, draws.valid).shape)}

    def draw(self, outputs: Any, noise: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        return self.embed(outputs, valid).detach() + NUDGE * noise["embedding"]


class Prompted:
    """A tokenizer that puts a prompt before each text, before the first of a pair."""

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer, self._prompt = tokenizer, prompt

    def __call__(self, text: Any, *rest: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        texts = [self._prompt + t if isinstance(t, str) else [self._prompt + t[0], *t[1:]] for t in texts]
        return self._tokenizer(texts[0] if isinstance(text, str) else texts, *rest, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class SentenceFolder:
    """A sentence-transformers folder, as far as pruning its transformer has to know it.

    Args:
        name: What it was asked for by.
        path: Where it is on this machine.
        kind: The class of sentence-transformers that its config names, such as CrossEncoder; "" if it names none.
        place: Folder of the transformer in it, "" if that lies at the top.
        task: `transformer_task`, "feature-extraction" for embeddings.
        summary: What its modules do, for the report.
        steps: What they do to the features, the transformer's output first.
        unknown: Why what `encode` gives cannot be computed here; "" if it can.
        max_length: Tokens after which `encode` truncates a text; None if the folder does not say.
        lower_case: Whether `encode` makes texts lower case.
        prompt: Text that `encode` puts before each text by default.
    """

    name: str
    path: Path
    kind: str
    place: str
    task: str
    summary: str
    steps: tuple[Step, ...]
    unknown: str
    max_length: int | None
    lower_case: bool
    prompt: str

    @property
    def transformer(self) -> str:
        """What `from_pretrained` takes to load the transformer."""
        return str(self.path / self.place) if self.place else self.name

    @property
    def library_class(self) -> str:
        """The class of sentence-transformers that loads the folder."""
        return self.kind or (
            "CrossEncoder" if self.task == "sequence-classification" else "SentenceTransformer"
        )

    def transformer_class(self, config: Any) -> type[PreTrainedModel] | None:
        """The class that sentence-transformers loads the transformer with, whatever the config names; None if unknown."""
        tables = (getattr(modeling_auto, name) for name in TABLES.get(self.task, ()))
        classes = (table.get(type(config), None) for table in tables)
        return next((cls for cls in classes if cls is not None), None)

    def check(self, args: KPruneArguments, has_loss: bool) -> None:
        """Refuse what would prune for something else than what `encode` gives, unless the caller has a loss for it."""
        if has_loss:
            return
        if self.unknown:
            raise UnsupportedModelError(
                f"what encode gives with the sentence-transformers folder {self.name} is not known: {self.unknown}; pass "
                "compute_loss=(student_outputs, teacher_outputs, valid_tokens) -> tensor of one loss per sequence, with which "
                "its modules are kept as they are"
            )
        if args.pooling is not None and self.task == "feature-extraction":
            warnings.warn(
                f"pooling is {args.pooling!r}, so that is compared, and not what encode gives with {self.name}: "
                f"{self.summary}; leave pooling out for that",
                stacklevel=3,
            )

    def knowledge(self, temperature: float) -> Knowledge | None:
        """The distance of what `encode` gives; None for a cross-encoder, whose head tells its loss."""
        if self.task == "sequence-classification" and not self.unknown:
            return None
        return EmbeddingKnowledge(self.summary, self.distance, temperature, {}, embed=self.embed)

    def embed(self, outputs: Any, valid: Tensor) -> Tensor:
        """What `encode` makes of the transformer's outputs, (B, E)."""
        features: Features = dict(outputs)
        for step in self.steps:
            features = step(features, valid)
        return features["sentence_embedding"]

    def distance(self, student: Any, teacher: Any, valid: Tensor) -> Tensor:
        """Squared distance of the embeddings, (B,)."""
        return (self.embed(student, valid) - self.embed(teacher, valid)).square().sum(-1)

    def longest(self, asked: int | None, tokenizer: Any) -> int | None:
        """Tokens after which `encode` truncates a text, or earlier if that is asked for; None if nothing limits them."""
        limits = (asked, self.max_length, getattr(tokenizer, "model_max_length", None))
        return min((limit for limit in limits if limit and limit < LARGE_INTEGER), default=None)

    def reader(self, tokenizer: Any) -> Any:
        """The tokenizer as `encode` uses it: after the default prompt, and in lower case where the folder says so."""
        if self.lower_case and getattr(tokenizer, "is_fast", False):
            tokenizer = copy.deepcopy(tokenizer)
            normalizer = tokenizer.backend_tokenizer.normalizer
            steps = [] if normalizer is None else [normalizer]
            tokenizer.backend_tokenizer.normalizer = Normalizers([Lowercase(), *steps])
        return Prompted(tokenizer, self.prompt) if self.prompt and tokenizer is not None else tokenizer

    def beside(self) -> Iterator[tuple[Path, Path]]:
        """Each file beside the transformer, and its place in a folder that has the transformer at the top.

        Weights of the dense transformer, their exports, hidden files and checkpoints of training are left out.
        """
        for top in dict.fromkeys((self.path / self.place, self.path)):
            for entry in sorted(top.iterdir()):
                another = entry.is_dir() and (entry / MODULES).exists()
                if (
                    entry.name.startswith(".")
                    or entry.name == "config.json"
                    or entry == self.path / self.place
                    or another
                ):
                    continue
                if entry.is_dir() and not EXPORTS.fullmatch(entry.name):
                    yield from (
                        (file, file.relative_to(top)) for file in sorted(entry.rglob("*")) if file.is_file()
                    )
                elif entry.is_file() and not WEIGHTS.search(entry.name):
                    yield entry, Path(entry.name)

    def carry(self, directory: str) -> None:
        """Copy what lies beside the transformer into `directory`. What is there already stays."""
        for source, place in self.beside():
            target = directory / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(source, target)
        if self.place:
            modules = read_json(self.path / MODULES)
            modules[0]["path"] = ""
            Path(directory, MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")

    def card(self, text: str) -> str:
        """The model card `text` with the metadata of the folder's card, whose text follows."""
        ours, source = ModelCard(text), self.path / "README.md"
        theirs = ModelCard(
            source.read_text(encoding="utf-8") if source.exists() else "", ignore_metadata_errors=True
        )
        new: dict[str, Any] = ours.data.to_dict()  # type: ignore[no-untyped-call]
        old: dict[str, Any] = theirs.data.to_dict()  # type: ignore[no-untyped-call]
        old.pop("model-index", None)  # results of the dense model
        tags = ["sentence-transformers", *(old.get("tags") or []), *(new.get("tags") or [])]
        first = {"base_model": new["base_model"]} if new.get("base_model") else {}
        data = {
            **new,
            "library_name": "sentence-transformers",
            **old,
            **first,
            "tags": list(dict.fromkeys(tags)),
        }
        metadata = ModelCardData(**data).to_yaml()
        loading = f"import hf_kprune\nfrom sentence_transformers import {self.library_class}\n\n"
        loading += f"model = {self.library_class}(path)"
        body = f"{ours.text.rstrip()}\n\nWith sentence-transformers:\n\n```python\n{loading}\n```\n"
        body += f"\n## The card of the dense model\n\n{theirs.text.strip()}\n" if theirs.text.strip() else ""
        return f"---\n{metadata}\n---\n{body}"


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `ArgumentError` if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{path} cannot be read as JSON ({error}), expected what sentence-transformers saves"
        ) from error


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model with a `modules.json`, fetched if it is on the Hub; None if it has none."""
    path = Path(name)
    if path.is_dir():
        return path if (path / MODULES).is_file() else None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    try:
        listed = cached_file(name, MODULES, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no such name, or no connection: whoever loads the model will say so
        return None
    if listed is None:
        return None
    heavy = [f"*.{ending}" for ending in ("onnx", "h5", "ot", "msgpack", "gguf", "ckpt")]
    try:
        unused = [
            *heavy,
            "onnx/*",
            "openvino/*",
            "model*.safetensors",
            "pytorch_model*.bin",
        ]  # those at the top only
        return Path(snapshot_download(name, revision=revision, ignore_patterns=unused))
    except OSError as error:
        raise ArgumentError(f"cannot fetch the modules of {name!r} from the Hub: {error}") from error


def read_folder(name: str, revision: str | None = None) -> SentenceFolder | None:
    """Read a sentence-transformers folder, or a name on the Hub; None if it is none.

    Raises:
        ArgumentError: If its files contradict each other.
        UnsupportedModelError: If its first module is no transformer, so that there is nothing to prune.
    """
    path = local_folder(name, revision)
    if path is None:
        return None
    modules = read_json(path / MODULES)
    listed = isinstance(modules, list) and all(
        isinstance(m, dict) and {"path", "type"} <= m.keys() for m in modules
    )
    if not listed or not modules:
        raise ArgumentError(
            f"{path / MODULES} is no list of modules with path and type, as sentence-transformers saves"
        )
    for module in modules:
        place = Path(module["path"])
        if place.is_absolute() or ".." in place.parts:
            raise ArgumentError(
                f"{path / MODULES} names the folder {module['path']!r}, expected one in {str(path)!r}"
            )
    if not is_type(modules[0], "Transformer"):
        raise UnsupportedModelError(
            f"the first module of {name} is {modules[0]['type']}, expected a Transformer of sentence-transformers; what can "
            "be pruned is the PreTrainedModel in it: load that yourself, pass it, and put it back in its place"
        )
    first = path / modules[0]["path"]
    if (first / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{name} carries PEFT adapters; load it with SentenceTransformer, call merge_and_unload() on its transformer, and "
            "save it with save_pretrained first"
        )
    options: dict[str, Any] = next(
        (read_json(first / file) for file in TRANSFORMER_CONFIGS if (first / file).exists()), {}
    )
    general = path / "config_sentence_transformers.json"
    defaults = read_json(general) if general.exists() else {}
    prompt = (defaults.get("prompts") or {}).get(defaults.get("default_prompt_name")) or ""
    task = options.get("transformer_task", "feature-extraction")
    length = 0
    if prompt:
        tokenizer = AutoTokenizer.from_pretrained(first)
        ids = tokenizer(prompt)["input_ids"]
        length = len(ids) - (ids[-1] in tokenizer.all_special_ids)
    words, steps, unknown = read_steps(path, modules, options, length)
    if (
        not unknown
        and task == "feature-extraction"
        and not any(is_type(module, "Pooling") for module in modules)
    ):
        unknown = "it has no Pooling module, and gives embeddings of tokens"
    if "message" in (options.get("modality_config") or {}):
        warnings.warn(
            f"{name} puts texts into a chat template; pass calibration rows with a column 'messages'",
            stacklevel=3,
        )
    longest = ((options.get("processing_kwargs") or {}).get("text") or {}).get("max_length") or options.get(
        "max_seq_length"
    )
    return SentenceFolder(
        name,
        path,
        defaults.get("model_type") or "",
        modules[0]["path"],
        task,
        f"sentence embedding ({', '.join(words)})",
        tuple(steps),
        unknown,
        longest,
        bool(options.get("do_lower_case", False)),
        prompt,
    )


def folder_of(model: PreTrainedModel) -> SentenceFolder | None:
    """The sentence-transformers folder that a model was loaded from, if it is what that folder runs."""
    name = model.config.name_or_path
    if not name:
        return None
    folder = read_folder(name, getattr(model.config, "_commit_hash", None))
    above = Path(name).parent
    if folder is None and Path(name).is_dir() and (above / MODULES).is_file():
        folder = read_folder(str(above))
        folder = folder if folder is not None and Path(name).name == folder.place else None
    if folder is None:
        return None
    expected = folder.transformer_class(model.config)
    if expected is not None and not isinstance(model, expected):
        warnings.warn(
            f"{type(model).__name__} has a head that the sentence-transformers folder {folder.name}, which it was loaded "
            "from, does not run: it is pruned for that head, and the folder's modules are not saved with it. To prune what "
            "encode gives pass the folder's name; set model.config.name_or_path = '' if that is not meant",
            stacklevel=3,
        )
        return None
    return folder


def refuse_wrapper(model: Any) -> None:
    """Raise `ArgumentError` for an object of sentence-transformers, which holds a model that can be pruned."""
    names = [
        cls.__name__ for cls in type(model).__mro__ if cls.__module__.split(".")[0] == "sentence_transformers"
    ]
    if names:
        raise ArgumentError(
            f"model is a {type(model).__name__} of sentence-transformers, expected a folder, a name or a PreTrainedModel; "
            "save it with save_pretrained('folder') and pass 'folder': its modules are kept"
        )


def is_type(module: Mapping[str, Any], name: str) -> bool:
    """Whether an entry of `modules.json` is this class of sentence-transformers, of whatever version."""
    package, *_, kind = str(module["type"]).split(".")
    return package == "sentence_transformers" and kind == name


def read_steps(
    path: Path, modules: Sequence[Mapping[str, Any]], options: Mapping[str, Any], prompt_length: int
) -> tuple[list[str], list[Step], str]:
    """What modules do, in words and as functions; and why that cannot be known, or ""."""
    text = (options.get("modality_config") or {}).get("text") or {}
    task = options.get("transformer_task", "feature-extraction")
    source = text.get(
        "method_output_name", "logits" if task == "sequence-classification" else "last_hidden_state"
    )
    target = options.get("module_output_name", "token_embeddings")
    if text.get("method", "forward") != "forward" or not isinstance(source, str):
        return [], [], f"its transformer is run by {text.get('method')!r} and gives {source!r}"
    words: list[str] = []
    steps: list[Step] = [lambda features, valid: {target: features[source]}]
    for module in modules[1:]:
        folder = path / module["path"]
        file = folder / "config.json"
        config = read_json(file) if file.exists() else {}
        kind = next((name for name in READERS if is_type(module, name)), None)
        step = (
            READERS[kind](config, folder, prompt_length)
            if kind
            else f"its module {module['type']} is not known here"
        )
        if isinstance(step, str):
            return words, steps, step
        words.append(step[0])
        steps.append(step[1])
    return words, steps, ""


Reader = Callable[[Mapping[str, Any], Path, int], tuple[str, Step] | str]
"""(a module's config, its folder, tokens of the default prompt) -> its name and what it does; or why that is not known."""


def ends(config: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the feature that a module reads and of that which it gives."""
    source = config.get("module_input_name") or "sentence_embedding"
    return source, config.get("module_output_name") or source


def read_pooling(config: Mapping[str, Any], folder: Path, prompt_length: int) -> tuple[str, Step] | str:
    flags = [mode for flag, mode in POOLINGS.items() if config.get(flag)]
    modes = config.get("pooling_mode") or flags or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not set(modes) <= set(POOLINGS.values()):
        return f"its pooling {'+'.join(map(str, modes))} is not known here"
    skip = 0 if config.get("include_prompt", True) else prompt_length

    def step(features: Features, valid: Tensor) -> Features:
        return {**features, "sentence_embedding": pool(features["token_embeddings"], valid, modes, skip)}

    return " and ".join(modes) + (" without the prompt" if skip else ""), step


def read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    weights: dict[str, Tensor] = torch.load(
        folder / "pytorch_model.bin", map_location="cpu", weights_only=True
    )
    return weights


def read_dense(config: Mapping[str, Any], folder: Path, prompt_length: int) -> tuple[str, Step] | str:
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = getattr(nn, name.rsplit(".", 1)[-1], None)
    if not name.startswith("torch.nn.") or activation is None:
        return f"the activation {name} of its Dense module is not known here"
    (source, target), function, weights = ends(config), activation(), read_weights(folder)

    def step(features: Features, valid: Tensor) -> Features:
        x = features[source]
        w = {key: value.to(x.device, x.dtype) for key, value in weights.items()}
        y = function(F.linear(x, w["linear.weight"], w.get("linear.bias")))
        if config.get("use_residual"):
            y = y + (F.linear(x, w["residual.weight"]) if "residual.weight" in w else x)
        return {**features, target: y}

    return "dense {} to {}".format(*reversed(weights["linear.weight"].shape)), step


def read_layer_norm(config: Mapping[str, Any], folder: Path, prompt_length: int) -> tuple[str, Step] | str:
    weights = read_weights(folder)

    def step(features: Features, valid: Tensor) -> Features:
        x = features["sentence_embedding"]
        weight, bias = (weights[f"norm.{name}"].to(x.device, x.dtype) for name in ("weight", "bias"))
        return {**features, "sentence_embedding": F.layer_norm(x, weight.shape, weight, bias)}

    return "layer norm", step


def read_normalize(config: Mapping[str, Any], folder: Path, prompt_length: int) -> tuple[str, Step] | str:
    source, target = ends(config)
    return "normalised", lambda features, valid: {**features, target: F.normalize(features[source], dim=-1)}


def read_dropout(config: Mapping[str, Any], folder: Path, prompt_length: int) -> tuple[str, Step] | str:
    return "dropout", lambda features, valid: features


READERS: dict[str, Reader] = {
    "Pooling": read_pooling,
    "Dense": read_dense,
    "LayerNorm": read_layer_norm,
    "Normalize": read_normalize,
    "Dropout": read_dropout,
}
