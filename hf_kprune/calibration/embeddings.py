"""sentence-transformers folders: what `encode` gives is the knowledge of their transformer.

Such a folder has a `modules.json`, a list of modules: the transformer first, then for instance a pooling, a
dense layer and a normalisation. `SentenceTransformer(folder).encode` runs them one after the other. They are
read in sentence_modules.py, so that pruning knows what `encode` gives without that library, and carried to
the pruned transformer in checkpoint/sentence_folder.py.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import cached_file

from ..arguments import KPruneArguments
from ..errors import ArgumentError, UnsupportedModelError
from ..files.scratch import scratch
from ..progress import quiet
from .knowledge import NUDGE, Draws, Knowledge
from .sentence_modules import Features, Step, is_type, read_json, read_steps


MODULES = "modules.json"
TRANSFORMER_CONFIGS = ["sentence_bert_config.json"] + [
    f"sentence_{name}_config.json"
    for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
TABLES = {
    "feature-extraction": ("MODEL_FOR_TEXT_ENCODING_MAPPING", "MODEL_MAPPING"),
    "sequence-classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "fill-mask": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "text-generation": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
}
"""Where the class of the transformer is looked up, by its `transformer_task`; the config may name another."""


@dataclass(frozen=True)
class EmbeddingKnowledge(Knowledge):
    """Squared distance of the embeddings, (B, E), that `embed` makes of outputs and valid tokens.

    The embeddings are what is drawn.
    """

    embed: Callable[[Any, Tensor], Tensor] = field(kw_only=True)

    def __call__(self, student: object, teacher: object, valid: Tensor) -> Tensor:
        target = teacher if isinstance(teacher, Tensor) else self.embed(teacher, valid)
        return (self.embed(student, valid) - target).square().sum(-1)

    def noise(self, outputs: object, draws: Draws) -> dict[str, Tensor]:
        return {"embedding": draws.normal(*self.embed(outputs, draws.valid).shape)}

    def draw(self, outputs: object, noise: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        return self.embed(outputs, valid).detach() + NUDGE * noise["embedding"]


class Prompted:
    """A tokenizer that puts a prompt before each text, before the first of a pair."""

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer, self._prompt = tokenizer, prompt

    def __call__(self, text: Any, *rest: object, **options: object) -> Any:
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
        path: Where its files are.
        kind: The class of sentence-transformers that its config names, such as CrossEncoder; "" for none.
        place: Folder of the transformer in it, "" if that lies at the top.
        task: `transformer_task`, "feature-extraction" for embeddings.
        summary: What its modules do, for the report.
        steps: What they do to the features, the transformer's output first.
        unknown: Why what `encode` gives cannot be computed here; "" if it can.
        max_length: Tokens after which `encode` truncates a text; None if the folder does not say.
        lower_case: Whether `encode` makes texts lower case.
        prompt: Text that `encode` puts before each text by default.
        owner: What must live as long as this, so that its files are there.
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
    owner: object = None

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

    def transformer_class(self, config: object) -> type[PreTrainedModel] | None:
        """The class that sentence-transformers loads the transformer with; None if that is not known."""
        tables = (getattr(modeling_auto, name) for name in TABLES.get(self.task, ()))
        classes = (table.get(type(config), None) for table in tables)
        return next((cls for cls in classes if cls is not None), None)

    def check(self, args: KPruneArguments, has_loss: bool) -> None:
        """Refuse to prune for something else than what `encode` gives, unless the caller has a loss."""
        if has_loss:
            return
        if self.unknown:
            raise UnsupportedModelError(
                f"what encode gives with the sentence-transformers folder {self.name} is not known: "
                f"{self.unknown}; pass compute_loss=(student_outputs, teacher_outputs, valid_tokens) -> "
                "tensor of one loss per sequence, with which its modules are kept as they are"
            )
        if args.pooling is not None and self.task == "feature-extraction":
            warnings.warn(
                f"pooling is {args.pooling!r}, so that is compared, and not what encode gives with "
                f"{self.name}: {self.summary}; leave pooling out for that",
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

    def distance(self, student: object, teacher: object, valid: Tensor) -> Tensor:
        """Squared distance of the embeddings, (B,)."""
        return (self.embed(student, valid) - self.embed(teacher, valid)).square().sum(-1)

    def longest(self, asked: int | None, tokenizer: object) -> int | None:
        """Tokens after which `encode` truncates a text, or `asked` if that is fewer; None for no limit."""
        limits = (asked, self.max_length, getattr(tokenizer, "model_max_length", None))
        return min((limit for limit in limits if limit and limit < LARGE_INTEGER), default=None)

    def reader(self, tokenizer: Any) -> Any:
        """The tokenizer as `encode` uses it: with the default prompt, and in lower case where that is set."""
        if self.lower_case and getattr(tokenizer, "is_fast", False):
            tokenizer = copy.deepcopy(tokenizer)
            normalizer = tokenizer.backend_tokenizer.normalizer
            steps = [] if normalizer is None else [normalizer]
            tokenizer.backend_tokenizer.normalizer = Normalizers([Lowercase(), *steps])
        return Prompted(tokenizer, self.prompt) if self.prompt and tokenizer is not None else tokenizer


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
    at_the_top = ["model*.safetensors", "pytorch_model*.bin"]  # the modules below need theirs
    unused = [*heavy, "onnx/*", "openvino/*", *at_the_top]
    try:
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
    modules = read_modules(path, name)
    first = path / modules[0]["path"]
    if (first / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{name} carries PEFT adapters; load it with SentenceTransformer, call merge_and_unload() on its "
            "transformer, and save it with save_pretrained first"
        )
    configs = (first / file for file in TRANSFORMER_CONFIGS)
    options: dict[str, Any] = next((read_json(file) for file in configs if file.exists()), {})
    general = path / "config_sentence_transformers.json"
    defaults = read_json(general) if general.exists() else {}
    prompt = (defaults.get("prompts") or {}).get(defaults.get("default_prompt_name")) or ""
    task = options.get("transformer_task", "feature-extraction")
    words, steps, unknown = read_steps(path, modules, options, prompt_length(first, prompt))
    pooled = any(is_type(module, "Pooling") for module in modules)
    if not unknown and task == "feature-extraction" and not pooled:
        unknown = "it has no Pooling module, and gives embeddings of tokens"
    if "message" in (options.get("modality_config") or {}):
        warnings.warn(
            f"{name} puts texts into a chat template; pass calibration rows with a column 'messages'",
            stacklevel=3,
        )
    of_texts = (options.get("processing_kwargs") or {}).get("text") or {}
    return SentenceFolder(
        name=name,
        path=path,
        kind=defaults.get("model_type") or "",
        place=modules[0]["path"],
        task=task,
        summary=f"sentence embedding ({', '.join(words)})",
        steps=tuple(steps),
        unknown=unknown,
        max_length=of_texts.get("max_length") or options.get("max_seq_length"),
        lower_case=bool(options.get("do_lower_case", False)),
        prompt=prompt,
    )


def read_modules(path: Path, name: str) -> list[dict[str, Any]]:
    """The entries of the `modules.json` of the folder at `path`, which was asked for by `name`.

    Raises:
        ArgumentError: If it is no list of modules within the folder.
        UnsupportedModelError: If the first one is no transformer.
    """
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
            f"the first module of {name} is {modules[0]['type']}, expected a Transformer of "
            "sentence-transformers; what can be pruned is the PreTrainedModel in it: load that yourself, "
            "pass it, and put it back in its place"
        )
    return list(modules)


def prompt_length(transformer: Path, prompt: str) -> int:
    """Tokens of a prompt, without the special token at its end, by the tokenizer in a folder."""
    if not prompt:
        return 0
    tokenizer = AutoTokenizer.from_pretrained(transformer)
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


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
            f"{type(model).__name__} has a head that the sentence-transformers folder {folder.name}, which "
            "it was loaded from, does not run: it is pruned for that head, and the folder's modules are not "
            "saved with it. To prune what encode gives pass the folder's name; set "
            "model.config.name_or_path = '' if that is not meant",
            stacklevel=3,
        )
        return None
    return folder


def parts_of(model: object) -> tuple[PreTrainedModel, Any, SentenceFolder | None] | None:
    """The transformer in an object of sentence-transformers, its tokenizer, and what its modules do; None for
    what is no such object.

    Its own `save_pretrained` writes what lies beside the transformer, which is saved with it later.

    Raises:
        ArgumentError: If it is a part of one, such as a single module.
    """
    names = [
        cls.__name__ for cls in type(model).__mro__ if cls.__module__.split(".")[0] == "sentence_transformers"
    ]
    if not names:
        return None
    inner = (each for each in cast(Any, model).modules() if isinstance(each, PreTrainedModel))
    transformer = next(inner, None)
    if transformer is None or not {"SentenceTransformer", "CrossEncoder"} & set(names):
        raise ArgumentError(
            f"model is a {type(model).__name__} of sentence-transformers, expected a SentenceTransformer, a "
            "CrossEncoder, a folder, a name or a PreTrainedModel; make one of it, or pass the transformer in "
            "it"
        )
    owner = scratch()
    path = owner.folder()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about cards
        cast(Any, model).save_pretrained(str(path))
    folder = read_folder(str(path))
    for weights in path.joinpath(folder.place if folder else "").glob("*.safetensors"):
        weights.unlink()  # the dense ones are in memory
    if folder is not None:
        folder = replace(folder, name=transformer.config.name_or_path or names[0], owner=owner)
    return transformer, getattr(model, "tokenizer", None), folder
