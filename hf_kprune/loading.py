"""Load a model and its tokenizer by name or path alone."""

from __future__ import annotations

from typing import Any, cast

import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from .embeddings import read_folder
from .errors import ArgumentError
from .remote_code import brings_code


TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)


def check_stock(config: Any, name: str) -> None:
    """Refuse a config that names code of its own: by name alone none is run, and the stock class would be another model."""
    if brings_code(config):
        raise ArgumentError(
            f"{name or 'the model'} brings model code of its own, which is not run unless you ask for it: load the model by "
            "an AutoModel class with trust_remote_code=True and give it to KPrunePruner"
        )


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class that a config names; the base model if it names none."""
    check_stock(config, config.name_or_path)
    if not config.architectures:
        return cast(type[PreTrainedModel], MODEL_MAPPING[type(config)])
    found = getattr(transformers, config.architectures[0], None)
    if found is None:
        raise ArgumentError(
            f"the config of {config.name_or_path or 'the model'} names the architecture {config.architectures[0]!r}, which "
            "transformers lacks; load the model yourself"
        )
    return cast(type[PreTrainedModel], found)


def load_model(name: str) -> PreTrainedModel:
    """Load a model with the class that its config names; of a sentence-transformers folder what that runs."""
    folder = read_folder(name)
    if folder is None:
        return model_class(AutoConfig.from_pretrained(name)).from_pretrained(name)
    config = AutoConfig.from_pretrained(folder.transformer)
    return (folder.transformer_class(config) or model_class(config)).from_pretrained(folder.transformer)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer saved with a model; None if there is none, where transformers would make one without words."""
    folder = read_folder(name)
    name = name if folder is None else folder.transformer
    if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(name)
