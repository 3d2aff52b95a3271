"""What the modules of a sentence-transformers folder make of the transformer's outputs, read from files.

Shapes: B sequences, T tokens, D width of a token, E width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..errors import ArgumentError


Features = dict[str, Tensor]
Step = Callable[[Features, Tensor], Features]
"""(features by name, valid tokens (B, T)) -> the features with what a module adds to them."""

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The flags of older pooling configurations, in the order in which several are joined, and today's names."""


def pool(tokens: Tensor, valid: Tensor, modes: Sequence[str], prompt_length: int = 0) -> Tensor:
    """One vector for each sequence, its poolings joined: (B, T, D) -> (B, len(modes) * D).

    Args:
        tokens: Token embeddings, (B, T, D).
        valid: Tokens that are not padding, on whichever side that is, (B, T).
        modes: Of `POOLINGS.values()`.
        prompt_length: So many of the first valid tokens are left out.
    """
    first = valid.int().argmax(1, keepdim=True)
    place = torch.arange(valid.shape[1], device=valid.device) - first  # in the sequence
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


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `ArgumentError` if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{path} cannot be read as JSON ({error}), expected what sentence-transformers saves"
        ) from error


def is_type(module: Mapping[str, object], name: str) -> bool:
    """Whether an entry of `modules.json` is this class of sentence-transformers, of whatever version."""
    package, *_, kind = str(module["type"]).split(".")
    return package == "sentence_transformers" and kind == name


@dataclass(frozen=True)
class Module:
    """A module of a folder.

    Args:
        config: Its configuration, empty if it has none.
        folder: Where its files are.
        prompt_length: Tokens of the default prompt of the folder.
    """

    config: Mapping[str, Any]
    folder: Path
    prompt_length: int

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the feature that it reads and of that which it gives."""
        source = self.config.get("module_input_name") or "sentence_embedding"
        return source, self.config.get("module_output_name") or source

    @property
    def weights(self) -> dict[str, Tensor]:
        """Its weights, on the CPU."""
        if (self.folder / "model.safetensors").exists():
            return load_file(self.folder / "model.safetensors")
        file = self.folder / "pytorch_model.bin"
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return weights


def read_steps(
    path: Path, modules: Sequence[Mapping[str, Any]], options: Mapping[str, Any], prompt_length: int
) -> tuple[list[str], list[Step], str]:
    """What modules do, in words and as functions; and why that cannot be known, or "".

    Args:
        path: The folder.
        modules: The entries of its `modules.json`.
        options: The configuration of its transformer.
        prompt_length: Tokens of its default prompt.
    """
    text = (options.get("modality_config") or {}).get("text") or {}
    task = options.get("transformer_task", "feature-extraction")
    default = "logits" if task == "sequence-classification" else "last_hidden_state"
    source = text.get("method_output_name", default)
    target = options.get("module_output_name", "token_embeddings")
    if text.get("method", "forward") != "forward" or not isinstance(source, str):
        return [], [], f"its transformer is run by {text.get('method')!r} and gives {source!r}"
    words: list[str] = []
    steps: list[Step] = [lambda features, _valid: {target: features[source]}]
    for entry in modules[1:]:
        folder = path / entry["path"]
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        reader = next((reader for name, reader in READERS.items() if is_type(entry, name)), None)
        if reader is None:
            return words, steps, f"its module {entry['type']} is not known here"
        step = reader(Module(config, folder, prompt_length))
        if isinstance(step, str):
            return words, steps, step
        words.append(step[0])
        steps.append(step[1])
    return words, steps, ""


def read_pooling(module: Module) -> tuple[str, Step] | str:
    """Join poolings of the tokens' embeddings, see `pool`."""
    config = module.config
    flags = [mode for flag, mode in POOLINGS.items() if config.get(flag)]
    modes = config.get("pooling_mode") or flags or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not set(modes) <= set(POOLINGS.values()):
        return f"its pooling {'+'.join(map(str, modes))} is not known here"
    skip = 0 if config.get("include_prompt", True) else module.prompt_length

    def step(features: Features, valid: Tensor) -> Features:
        return {**features, "sentence_embedding": pool(features["token_embeddings"], valid, modes, skip)}

    return " and ".join(modes) + (" without the prompt" if skip else ""), step


def read_dense(module: Module) -> tuple[str, Step] | str:
    """Apply a linear layer and an activation, and add the input where the module says so."""
    name = str(module.config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = getattr(nn, name.rsplit(".", 1)[-1], None)
    if not name.startswith("torch.nn.") or activation is None:
        return f"the activation {name} of its Dense module is not known here"
    (source, target), function, weights = module.ends, activation(), module.weights

    def step(features: Features, _valid: Tensor) -> Features:
        x = features[source]
        w = {key: value.to(x.device, x.dtype) for key, value in weights.items()}
        y = function(F.linear(x, w["linear.weight"], w.get("linear.bias")))
        if module.config.get("use_residual"):
            y = y + (F.linear(x, w["residual.weight"]) if "residual.weight" in w else x)
        return {**features, target: y}

    return "dense {} to {}".format(*reversed(weights["linear.weight"].shape)), step


def read_layer_norm(module: Module) -> tuple[str, Step]:
    """Normalise the embedding by mean and variance, with weight and bias."""
    weights = module.weights

    def step(features: Features, _valid: Tensor) -> Features:
        x = features["sentence_embedding"]
        weight, bias = (weights[f"norm.{name}"].to(x.device, x.dtype) for name in ("weight", "bias"))
        return {**features, "sentence_embedding": F.layer_norm(x, weight.shape, weight, bias)}

    return "layer norm", step


def read_normalize(module: Module) -> tuple[str, Step]:
    """Scale the embedding to length 1."""
    source, target = module.ends
    return "normalised", lambda features, _valid: {**features, target: F.normalize(features[source], dim=-1)}


def read_dropout(_module: Module) -> tuple[str, Step]:
    """Change nothing, as in evaluation mode."""
    return "dropout", lambda features, _valid: features


READERS: dict[str, Callable[[Module], tuple[str, Step] | str]] = {
    "Pooling": read_pooling,
    "Dense": read_dense,
    "LayerNorm": read_layer_norm,
    "Normalize": read_normalize,
    "Dropout": read_dropout,
}
"""By the class of a module: what gives a word for it and what it does, or why that is not known."""
