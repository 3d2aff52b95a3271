"""What is known about a model without a look into its layers: inputs, limits, precision, modes.

Shapes: B rows, T tokens, S samples of a sound.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import find_labels

from ..errors import ArgumentError, CalibrationError, KPruneError, UnsupportedArchitectureError
from .configs import read, text_config
from .offload import duplicate
from .sublayers import Sublayer
from .surgery import twin
from .workbench import in_half_precision


SENSES = ("input_ids", "decoder_input_ids", "pixel_values", "input_values", "input_features", "bbox")
"""Inputs without which some models do not run."""

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
"""What a sequence head may answer, as `config.problem_type` says it."""

FRAME_MASK = "_get_feature_vector_attention_mask"
"""The method by which models of the wav2vec 2.0 family turn a mask of samples into one of frames."""


# ------------------------------------------------------------------------------------------------------------
# Inputs and limits
# ------------------------------------------------------------------------------------------------------------


def label_names(model: PreTrainedModel) -> set[str]:
    """Names under which `model`, a dataset or a collator may have labels."""
    return {"label", "labels", "label_ids", *find_labels(type(model))}


def input_names(model: PreTrainedModel) -> set[str]:
    """Names of the inputs that the forward pass of `model` takes, without those of labels."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return names - label_names(model)


def main_input(model: PreTrainedModel) -> str:
    """Name of the input that `model` is called with in any case: where it says a name that it does not take,
    that of its encoder, or the first of `SENSES` that it takes (Idefics 3's tower of images), or the first
    argument of all (a part of a model that takes hidden states)."""
    names = model.main_input_name
    name: str = names if isinstance(names, str) else names[0]
    encoder, takes = getattr(model, "encoder", None), input_names(model)
    if name in takes and name in SENSES:
        return name
    if isinstance(encoder, PreTrainedModel) and encoder.main_input_name in takes:
        return str(encoder.main_input_name)
    if name in takes:
        return name
    arguments = (argument for argument in inspect.signature(model.forward).parameters if argument in takes)
    return next((sense for sense in SENSES if sense in takes), next(arguments, name))


def main_of(model: PreTrainedModel, row: Collection[str]) -> str:
    """Name of the input that a row or a batch with these columns is read by: the main one, or, where it has
    them instead, embeddings of tokens."""
    main = main_input(model)
    instead = main not in row and "inputs_embeds" in row and "inputs_embeds" in input_names(model)
    return "inputs_embeds" if instead else main


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the position embeddings of `model` can tell apart; None if nothing limits them."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # models that number positions from padding_idx + 1 (RoBERTa's kin) lose the first ones
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    config = text_config(model.config)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    return None if limit is None else int(limit)


def vocabulary(model: PreTrainedModel, part: Any) -> int | None:
    """Token ids that a part of `model` (itself, its decoder) can embed; None if it does not say."""
    try:
        return int(part.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):  # two towers, or a plain module
        return getattr(text_config(model.config), "vocab_size", None)


@cache
def classes_in(table: str) -> frozenset[str]:
    """Names of the classes in an auto-model table of Transformers, such as `"MODEL_FOR_MASKED_LM"`."""
    entries = getattr(modeling_auto, f"{table}_MAPPING_NAMES").values()
    return frozenset(name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry))


def auto_tables() -> dict[str, Mapping[str, Any]]:
    """The tables of the `AutoModel...` classes of Transformers, by the name of the class: from model type to
    name of class, or names."""
    mappings = ((name, getattr(auto, "_model_mapping", None)) for name, auto in vars(modeling_auto).items())
    return {
        name: mapping._model_mapping
        for name, mapping in mappings
        if name.startswith("AutoModel") and mapping is not None
    }


def auto_class(name: str) -> str:
    """The `AutoModel...` class of the head that the name of a model class ends with, such as
    `AutoModelForCausalLM` for `MllamaForCausalLM`, which no table lists."""
    auto = f"AutoModelFor{name.rpartition('For')[2]}"
    return auto if hasattr(modeling_auto, auto) else "AutoModel"


def is_causal(model: PreTrainedModel) -> bool:
    """Whether `model` is a causal language model, whose labels are those of its own inputs."""
    return any(cls.__name__ in classes_in("MODEL_FOR_CAUSAL_LM") for cls in type(model).__mro__)


def check_problem_type(config: Any) -> None:
    """Raise `ArgumentError` if a config contradicts itself, so that there would be nothing to preserve."""
    problem = getattr(config, "problem_type", None)
    if problem is not None and problem not in PROBLEMS:
        raise ArgumentError(
            f"config.problem_type is {problem!r}, expected None or one of {', '.join(PROBLEMS)}"
        )
    if problem == "single_label_classification" and config.num_labels == 1:
        raise ArgumentError(
            "config.problem_type is 'single_label_classification' and config.num_labels is 1, of which every "
            "prediction is certain; set config.problem_type = 'regression', or 'multi_label_classification' "
            "for one yes or no"
        )


def mask_of(model: PreTrainedModel, sublayer: Sublayer) -> str:
    """The input that marks padding of the tokens of the stack of `sublayer`; `""` if there is none.

    A model that is the decoder of another one has its inputs under other names there.
    """
    mask, owner = sublayer.stack.mask, sublayer.owner
    inside = owner is not model and not getattr(owner.config, "is_encoder_decoder", False)
    if mask == "attention_mask" and inside and "decoder_input_ids" in input_names(model):
        decoder = model.get_decoder()
        if isinstance(decoder, nn.Module) and any(module is owner for module in decoder.modules()):
            return f"decoder_{mask}"
    return mask


def masks_frames(model: nn.Module) -> bool:
    """Whether `model` reads a mask of the samples of a sound."""
    return hasattr(model, FRAME_MASK)


def frame_mask(model: nn.Module, mask: Tensor, frames: int) -> Tensor:
    """Which frames that `model`, one that `masks_frames`, makes of sounds are real: (B, S) -> (B, frames)."""
    return cast(Tensor, getattr(model, FRAME_MASK)(frames, mask).bool())


# ------------------------------------------------------------------------------------------------------------
# Precision and modes
# ------------------------------------------------------------------------------------------------------------


def evaluation_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode that shares the weights of `model`, or has those of 16 bits in float32."""
    return (duplicate(model).float() if in_half_precision(model) else twin(model)).eval()


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Give every module of `model` its own mode (training or evaluation) back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set `model` to evaluation mode, and give every module its own mode back at the end."""
    with same_modes(model):
        model.eval()
        yield


# ------------------------------------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------------------------------------


def to_model(inputs: Mapping[str, object], model: PreTrainedModel) -> dict[str, Any]:
    """Inputs on the device of `model`, floats in its dtype."""

    def move(value: object) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)

    return {key: move(value) for key, value in inputs.items()}


def uncached(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of `model` that make it fill no cache, which it may do by itself though nothing is generated."""
    takes = inspect.signature(model.forward).parameters
    return {**inputs, "use_cache": False} if "use_cache" in takes else dict(inputs)


@contextmanager
def first_run(model: PreTrainedModel, inputs: Mapping[str, object]) -> Iterator[None]:
    """Raise `CalibrationError` if `model` does not run on `inputs`, the first that it sees."""
    try:
        yield
    except (KPruneError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        instead = {"input_ids"} if "inputs_embeds" in inputs else set()
        others = sorted(input_names(model) & {*SENSES} - inputs.keys() - instead)
        shapes = [f"{key} {tuple(value.shape)}" for key, value in inputs.items() if isinstance(value, Tensor)]
        raise CalibrationError(
            f"{type(model).__name__} does not run on the first calibration rows, of which it got "
            f"{', '.join(shapes)}: it raised the {type(error).__name__} shown above; give rows as it is used "
            "with"
            + (
                f", it also takes {' and '.join(others)}"
                if others
                else ", or a data_collator that makes its inputs"
            )
        ) from error


def floats(output: object) -> list[Tensor]:
    """The tensors of floats in what a module returned, also inside tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [tensor for value in output for tensor in floats(value)]


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A batch of three random samples that `model` runs on, guessed from names of inputs and its config.

    Raises:
        UnsupportedArchitectureError: If the model runs on none of the guesses.
    """
    takes = inspect.signature(model.forward).parameters
    for guess in _guesses(model.config):
        inputs = uncached(
            model, {key: value.to(model.device) for key, value in guess.items() if key in takes}
        )
        try:
            with torch.no_grad():
                evaluation_copy(model)(**inputs)
            return inputs
        except Exception:  # it wants others
            continue
    raise UnsupportedArchitectureError("it runs on none of the inputs that were made up from its config")


def _guesses(config: Any) -> list[dict[str, Tensor]]:
    """Random inputs, three samples each, that models with such a config may run on."""
    generator = torch.Generator().manual_seed(0)
    text, image = text_config(config), getattr(config, "vision_config", config)

    def noise(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)

    def ids(length: int, prefix: str = "") -> dict[str, Tensor]:
        words = _size(text, "vocab_size", 100)
        tokens = torch.randint(min(4, words // 2), words, (3, length), generator=generator)
        mask = torch.ones(3, length).long()
        mask[1, -2:] = 0
        return {f"{prefix}input_ids": tokens, f"{prefix}attention_mask": mask}

    side, channels = _size(image, "image_size input_size", 32), _size(image, "num_channels", 3)
    bins, frames = (
        _size(config, "num_mel_bins feature_size", 80),
        2 * _size(config, "max_source_positions", 50),
    )
    picture, decoder = noise(channels, side, side), ids(7, "decoder_") if config.is_encoder_decoder else {}
    return [
        {**ids(11), "pixel_values": picture},
        {**ids(11), **decoder},
        {"pixel_values": picture},
        {"pixel_values": noise(_size(image, "num_frames", 2), channels, side, side)},
        {"input_values": noise(_size(config, "max_length", 100), bins)},
        {"input_values": noise(4000), **decoder},
        {"input_features": noise(bins, frames), **decoder},
        {"input_features": noise(frames, bins), **decoder},
    ]


def _size(config: object, names: str, default: int) -> int:
    """The first positive number that a config has under the first of these names that it knows."""
    values = [value for name in names.split() if (value := read(config, name)) is not None]
    return next((number for number in _integers(values[:1]) if number > 0), default)


def _integers(value: object) -> Iterator[int]:
    """The integers in lists in lists."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _integers(entry)
    elif isinstance(value, int):
        yield value
