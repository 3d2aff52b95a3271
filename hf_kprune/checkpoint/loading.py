"""Load a model and its tokenizer by name or path alone."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..calibration.embeddings import read_folder
from ..errors import ArgumentError
from ..progress import quiet
from ..structure.checks import safe_on_meta
from ..structure.offload import Folder, device_map
from ..structure.sublayers import find_sublayers
from ..validation import show
from .remote_code import brings_code


TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)


def check_stock(config: object, name: str) -> None:
    """Refuse a config that names code of its own: by name alone none is run, and the stock class would be
    another model.
    """
    if brings_code(config):
        raise ArgumentError(
            f"{name or 'the model'} brings model code of its own, which is not run unless you ask for it: "
            "load the model by an AutoModel class with trust_remote_code=True and give it to KPrunePruner"
        )


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class that a config names; the base model if it names none."""
    check_stock(config, config.name_or_path)
    if not config.architectures:
        return cast(type[PreTrainedModel], MODEL_MAPPING[type(config)])
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        raise ArgumentError(
            f"the config of {config.name_or_path or 'the model'} names the architecture "
            f"{config.architectures[0]!r}, which transformers lacks; load the model yourself"
        )
    return cast(type[PreTrainedModel], kind)


@dataclass(frozen=True)
class Offload:
    """Where the layers of a model wait until they are worked on.

    Args:
        place: `"disk"`: in its checkpoint, from which the model is never read as a whole. `"cpu"`: in the
            memory of the machine. None: on the device.
        device: Where the model is worked on.
    """

    place: str | None = None
    device: torch.device = torch.device("cpu")

    def read(self, kind: Any, config: Any, name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load a model, and what Transformers says of it.

        Args:
            kind: Its class, or an auto class.
            config: Its config.
            name: A directory or a name on the Hub.
        """
        if self.place is None or (self.place == "cpu" and self.device.type == "cpu"):
            model, info = kind.from_pretrained(name, output_loading_info=True)
            return model, info
        with torch.device("meta"), safe_on_meta():
            empty = kind(config) if isinstance(kind, type(PreTrainedModel)) else kind.from_config(config)
        stacks = {id(s.layers): s.layers for s in find_sublayers(empty)}.values()
        rest = self.device.type if self.device.index is None else self.device.index
        places, folder = device_map(empty, list(stacks), self.place, rest), Folder()
        options = {"device_map": places, "offload_folder": folder.place(), "output_loading_info": True}
        model, info = kind.from_pretrained(name, **options)
        model.__dict__["kprune_folder"] = folder  # which goes with the model
        return model, info


ON_DEVICE = Offload()
"""A model that lies on the device as a whole."""


def load_model(name: str, offload: Offload = ON_DEVICE) -> PreTrainedModel:
    """Load a model with the class that its config names; of a sentence-transformers folder what that runs."""
    check_place(name)
    with quiet(), reading(name):
        folder = read_folder(name)
        place = name if folder is None else folder.transformer
        config = AutoConfig.from_pretrained(place)
        kind = (folder and folder.transformer_class(config)) or model_class(config)
        model, info = offload.read(kind, config, place)
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        tensors = model.state_dict() if offload.place == "disk" else {}
        nowhere = [key for key in names if key in tensors and tensors[key].device.type == "meta"]
        if nowhere:
            raise ArgumentError(
                f"{name} has no weights for {len(nowhere)} tensors of layers of {kind.__name__}, such as "
                f"{nowhere[0]}, and with offload='disk' layers are read from there alone; load it with the "
                "class that it was saved by, or leave offload out, with which such tensors are random"
            )
        warnings.warn(
            f"{name} has no weights for {len(names)} tensors of {kind.__name__}, such as {names[0]}, which "
            "are random now; load it with the class that it was saved by",
            stacklevel=2,
        )
    return model


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Say of a model that cannot be read whether it is missing or damaged."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(name):
            raise ArgumentError(
                f"cannot load the model in {name!r}: a file of it is missing or damaged; save or download it "
                "again"
            ) from error
        raise ArgumentError(
            f"there is no directory {name!r}, and no such model could be fetched from the Hub; check the "
            "name, the connection, and, if it is private, hf auth login"
        ) from error


def check_place(name: str) -> None:
    """Raise `ArgumentError` for a path where there is no model, which would be taken for a name on the Hub
    otherwise.
    """
    path = Path(name).expanduser()
    if os.path.isfile(path):
        raise ArgumentError(
            f"{name!r} is a file, expected the directory of a model, with its config.json, or a name on the "
            "Hub"
        )
    if os.path.isdir(path):
        if not any(
            (path / file).is_file() for file in ("config.json", "modules.json", "adapter_config.json")
        ):
            raise ArgumentError(
                f"the directory {name!r} holds no config.json, expected the directory of a model"
            )
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ArgumentError(f"there is no directory {name!r}, and a name on the Hub is written as owner/name")


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer saved with a model; None if there is none, where transformers would make one without
    words.
    """
    with quiet():
        folder = read_folder(name)
        name = name if folder is None else folder.transformer
        if not any(
            cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES
        ):
            return None
        return AutoTokenizer.from_pretrained(name)


def check_is_model(model: object) -> None:
    """Raise `ArgumentError`, with the way out, for what is neither a module nor a name."""
    if isinstance(model, (torch.nn.Module, os.PathLike)) or (isinstance(model, str) and model.strip()):
        return
    way_out = ""
    if isinstance(model, PreTrainedConfig):
        way_out = ": AutoModel.from_config() makes one of a config, from_pretrained() loads a trained one"
    elif isinstance(model, type):
        way_out = f": {model.__name__}.from_pretrained() loads one"
    elif isinstance(getattr(model, "model", None), PreTrainedModel):
        way_out = ": pass its .model"
    raise ArgumentError(
        f"model is {show(model)}, expected a transformers PreTrainedModel or the name or path of one{way_out}"
    )


def check_offload(model: object, place: str | None) -> None:
    """Raise `ArgumentError` if the place where layers wait is chosen for a model that is there already."""
    if place is not None and not isinstance(model, (str, os.PathLike)):
        raise ArgumentError(
            f"offload is {place!r}, which is about a model that is loaded here, and model is a "
            f"{type(model).__name__}; pass its name or path, or load it with a device_map"
        )
