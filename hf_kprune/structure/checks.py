"""What is checked of a model before anything runs: when a pruner is made, and again when it prunes.

`unwrapped` takes off the wrappers of other libraries. `check_model` refuses a model that cannot be pruned as
it is. `check_described`, once it is known where its heads and neurons are, refuses one that would be cut
wrongly or not load again.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import UnsupportedModelError
from ..modeling_kprune import EmptyLinear, has, inner_models, plan_of
from ..progress import unwarned
from .coverage import described
from .experts import are_experts
from .facts import check_problem_type
from .offload import is_dispatched, moves_weights, read_parameters, sources_of
from .projections import bias_of, features_of, oriented
from .sublayers import find_sublayers
from .workbench import in_half_precision


logger = logging.get_logger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D, EmptyLinear)
"""The classes that are known to compute  x W^T + b . Others are run and compared."""

QUANTISERS = (
    "torch.ao.",
    "torchao.",
    "bitsandbytes.",
    "gptqmodel.",
    "auto_gptq.",
    "awq.",
    "optimum.quanto.",
    "hqq.",
)
"""Packages whose modules hold integers, or floats that stand for others."""


def unwrapped(model: object) -> Any:
    """The model inside the wrappers of `torch.compile`, data parallelism or `accelerator.prepare`.

    The wrappers that accelerate has put on the forward of the model itself, autocast and conversions, are
    taken off in place, and so is the quantiser of a model that was read from GGUF into floats.
    """
    if not isinstance(model, nn.Module):
        return model
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    if inside is not model:
        logger.warning(
            f"the model is wrapped in {type(model).__name__}; what is inside is pruned, so wrap that again "
            "afterwards"
        )
    # with keep_fp32_wrapper=False accelerate would take off what Transformers itself has put around the
    # forward, too
    original = inside.__dict__.pop("_original_forward", None)
    if original is not None:
        inside.__dict__["forward"] = original
        if getattr(original, "__func__", None) is type(inside).forward:
            del inside.__dict__["forward"]
    if (
        inside.__dict__.pop("_is_accelerate_prepared", False) or original is not None
    ):  # so that it may be prepared again
        logger.warning(
            f"{type(inside).__name__} was prepared by accelerate; what that has put around its forward is "
            "taken off, so prepare it again afterwards"
        )
    quantisation = getattr(getattr(inside, "config", None), "quantization_config", None)
    if getattr(quantisation, "quant_method", None) == "gguf" and all(
        p.is_floating_point() for p in inside.parameters()
    ):
        inside.hf_quantizer.remove_quantization_config(inside)
        logger.warning(
            f"{type(inside).__name__} was read from GGUF: its weights are plain floats, so it is no longer "
            "noted as quantised, and can be saved"
        )
    return inside


def check_model(model: object) -> None:
    """Raise `UnsupportedModelError`, with the way out, for a model that cannot be pruned as it is."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters, which would not fit the pruned layers; merge "
            "them first: model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, expected a transformers PreTrainedModel or the name or path "
            "of one"
        )
    for inner in inner_models(model):
        field = getattr(inner.config, "kprune", None)
        if field is not None and plan_of(inner.config) is None:
            raise UnsupportedModelError(
                f"the config of {type(inner).__name__} has kprune={field!r}, a field of its own where "
                "hf_kprune writes what is kept; give that field another name"
            )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised; prune it in float32, float16 or bfloat16 first and "
            "quantise the result"
        )
    dispatched = is_dispatched(model)
    for name, module in model.named_modules():
        _check_forward(name or type(model).__name__, module, dispatched)
    _check_tensors(model)
    for _, owner in described(model):
        if getattr(owner.config, "chunk_size_feed_forward", None):
            raise UnsupportedModelError(
                f"config.chunk_size_feed_forward is {owner.config.chunk_size_feed_forward}: feed-forward "
                "layers that run in chunks cannot be measured; load the model with chunk_size_feed_forward=0 "
                "and set it again afterwards"
            )


def _check_forward(name: str, module: nn.Module, dispatched: bool) -> None:
    """Refuse a module with another forward: its copies would call that, with the weights of the original.
    Only what accelerate puts on all modules of a model that it has dispatched is known."""
    if getattr(type(module), "__module__", "").startswith(QUANTISERS):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}, quantised or to be; prune the "
            "model before and quantise the result"
        )
    if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
        raise UnsupportedModelError(
            f"{name} is compiled, and what is cut would have to be compiled anew; prune the model before it "
            "is compiled (load it again, or give the module that torch.compile was called on)"
        )
    hooked = hasattr(module, "_hf_hook")
    if hooked and not (dispatched and moves_weights(module)):
        raise UnsupportedModelError(
            f"{name} carries a hook of accelerate that is not of a device_map of the model; load the model "
            "with or without device_map, or call accelerate.hooks.remove_hook_from_submodules(model)"
        )
    forward = module.__dict__.get("_old_forward" if hooked else "forward")
    if forward is None:
        return
    function = getattr(forward, "__func__", None)
    method = inspect.getattr_static(type(module), getattr(function, "__name__", ""), None)
    if getattr(forward, "__self__", None) is not module or function not in (method, type(module).forward):
        raise UnsupportedModelError(
            f"the forward of {name} was replaced by "
            f"{getattr(forward, '__qualname__', type(forward).__name__)!r}, of which copies would go on "
            "using the weights of now; take it off (del module.forward) or put it into a class"
        )


def _check_tensors(model: PreTrainedModel) -> None:
    elsewhere = sources_of(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta" and id(tensor) not in elsewhere:
            raise UnsupportedModelError(
                f"{name} is not in memory (device meta), and accelerate does not know where it is; load the "
                "model with from_pretrained"
            )
        if type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
            raise UnsupportedModelError(
                f"{name} is a {type(tensor).__module__}.{type(tensor).__name__}, expected a plain tensor: "
                "quantise or shard the model after it is pruned"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}, in which least squares cannot be solved; load the model with "
                "dtype=torch.float32 (or float16, bfloat16)"
            )
    for name, tensor in read_parameters(model):
        if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all()):
            raise UnsupportedModelError(
                f"{name} holds NaN or Inf, so nothing that the model computes can be measured; load the "
                "weights again, or train with a smaller learning rate"
            )


def check_described(model: PreTrainedModel, head_unit: str | None = None) -> None:
    """Refuse a model whose projections are more than weights and biases, or which its config alone does not
    make.

    Args:
        model: One that `find_sublayers` knows.
        head_unit: What a unit is where queries are grouped, see `find_sublayers`.

    Raises:
        UnsupportedModelError: If it is such a model; the error names the module or the tensor.
    """
    for name, projection in _projections(model, head_unit):
        _check_projection(model, name, projection)
    check_problem_type(model.config)
    check_built_again(model)


def _projections(model: PreTrainedModel, head_unit: str | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose rows or columns are the units', with their names in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    for sublayer in find_sublayers(model, head_unit):
        for path in (*sublayer.block.inputs, sublayer.block.output):
            if has(sublayer.layer, path):
                projection = sublayer.layer.get_submodule(path)
                yield names[id(projection)], projection


def _check_projection(model: PreTrainedModel, name: str, projection: nn.Module) -> None:
    name_of_weight = "down_proj" if are_experts(projection) else "weight"
    emptied = {
        key: value for key, value in projection._buffers.items() if value is not None and not value.numel()
    }
    weight: Any = {**emptied, **projection._parameters}.get(name_of_weight)
    if weight is None or parametrize.is_parametrized(projection):
        raise UnsupportedModelError(
            f"the weight of {name} is computed from other tensors, so it cannot be cut; make it plain first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or remove of "
            "torch.nn.utils.prune, torch.nn.utils.remove_weight_norm or remove_spectral_norm"
        )
    if weight.dtype != model.dtype and not (weight.dtype == torch.float32 and _stays_in_float32(model, name)):
        raise UnsupportedModelError(
            f"{name} is {weight.dtype} in a model of {model.dtype}; give all layers one dtype: "
            f"model.to({model.dtype})"
        )
    if are_experts(projection):  # they are tried out on real inputs, see prove_projections
        return
    if type(projection) not in LINEAR and weight.device.type == "meta":
        raise UnsupportedModelError(
            f"{_described(name, projection)} is no nn.Linear, and cannot be tried out while its weight is "
            "not in memory; load the model without offload or device_map"
        )
    if type(projection) not in LINEAR:
        wide = oriented(projection)
        try:
            with torch.no_grad():
                x = torch.randn(2, 3, wide.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
                y = projection.forward(x)  # hooks are tried out on real inputs, see prove_projections
        except Exception as error:
            raise UnsupportedModelError(
                f"{_described(name, projection)} is no plain linear layer: it does not take (batch, tokens, "
                "width) alone, so it cannot be cut and fitted; replace it by nn.Linear"
            ) from error
        _check_linear(_described(name, projection), projection, (x,), y)


def _is_bare(projection: nn.Module) -> bool:
    return type(projection) in LINEAR and not projection._forward_hooks and not projection._forward_pre_hooks


def _described(name: str, projection: nn.Module) -> str:
    kind, hooked = type(projection), projection._forward_hooks or projection._forward_pre_hooks
    return f"{name}, a {kind.__module__}.{kind.__name__}{' with hooks' if hooked else ''},"


@torch.no_grad()
def _check_linear(what: str, projection: nn.Module, arguments: Sequence[Tensor], y: Any) -> None:
    """Raise `UnsupportedModelError` unless a module gives  y = x W^T + b  for the features x of its
    arguments."""
    features = features_of(projection, arguments)
    expected = linear(features, oriented(projection), bias_of(projection))
    like = isinstance(y, Tensor) and y.shape == expected.shape
    apart = (
        float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if like and y.numel()
        else 1.0 - like
    )
    if apart > (1e-2 if in_half_precision(expected) else 1e-4):
        raise UnsupportedModelError(
            f"{what} does not compute x W' + b of its weight and bias ({apart:.2%} off), so it cannot "
            "be fitted; merge what it adds into the weight, take hooks off, or replace it by nn.Linear"
        )


def prove_projections(model: PreTrainedModel, inputs: Mapping[str, Any], head_unit: str | None) -> None:
    """Refuse a model with a projection that, run on these inputs, does not compute  x W^T + b ."""
    doubtful = [
        (name, projection) for name, projection in _projections(model, head_unit) if not _is_bare(projection)
    ]
    with ExitStack() as hooks, torch.no_grad():
        for name, projection in doubtful:

            def see(
                module: nn.Module, args: Any, output: object, what: str = _described(name, projection)
            ) -> None:
                _check_linear(what, module, args, output)

            hooks.callback(projection.register_forward_hook(see).remove)
        if doubtful:
            model(**inputs)


def _stays_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether a model of half precision, or one inside it, keeps this module in float32."""
    kept: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept |= set(getattr(module, attribute, None) or ())
    return any(part in name for part in kept)


def check_built_again(model: PreTrainedModel) -> None:
    """Refuse a model whose config makes other tensors: what is saved is loaded into those."""
    kind, classes = type(model).__name__, cast("tuple[Any, Any]", (type(model), type(model.config)))
    try:
        expected, ties = _built(*classes, json.dumps(model.config.to_dict(), default=str))
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind} cannot be built from its config alone, so what is saved could not be loaded; let its "
            "class take the config as its one argument, and let the config say all that the model is made of"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    of = f"the config of {kind}"
    for name in sorted(shapes.keys() & expected.keys()):
        if shapes[name] != expected[name]:
            raise UnsupportedModelError(
                f"{name} is {shapes[name]}, but {of} makes it {expected[name]}, so what is saved could not "
                "be loaded; change the config to what the model is (config.num_labels for a new head, "
                "config.vocab_size for new embeddings)"
            )
    surplus, missing = sorted(shapes.keys() - expected.keys()), sorted(expected.keys() - shapes.keys())
    if surplus or missing:
        which = (
            f"holds {surplus[0]}, which {of} does not make"
            if surplus
            else f"lacks {missing[0]}, which {of} makes"
        )
        raise UnsupportedModelError(
            f"{kind} {which}, so what is saved could not be loaded ({len(surplus) + len(missing)} such "
            "tensors); merge or remove what was added (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations), and put back what was taken away"
        )
    try:
        strange = unread(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"Transformers gives the weights of {kind} another form in a checkpoint, which "
            "they do not fit, as the error above shows, so it cannot be saved; prune the model inside it by "
            "itself"
        ) from error
    if strange:
        raise UnsupportedModelError(
            f"Transformers writes {strange[0]} into a checkpoint of {kind}, a name that it does not read "
            f"there, so what is saved could not be loaded, nor could the model as it is ({len(strange)} such "
            "tensors); prune the model inside it by itself, or load the weights into another class"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for first, *others in ties:
        for other in others:
            if parameters[first] is not parameters[other] and not torch.equal(
                parameters[first], parameters[other]
            ):
                raise UnsupportedModelError(
                    f"{first} and {other} differ, but {of} ties them, so one of them would be lost; set "
                    "config.tie_word_embeddings=False, or tie them: model.tie_weights()"
                )


def checkpoint_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What Transformers would write into a checkpoint of a model, of shapes alone: it may put weights
    together, in another order or under other names there, by sizes in the config."""
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    tensors: dict[str, Tensor] = revert_weight_conversion(model, shapes)
    return tensors


def unread(model: PreTrainedModel) -> list[str]:
    """Names that Transformers would write into a checkpoint of a model, and that it would not find in the
    model when it reads them again."""
    weights = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings, converters = (
        [each for each in conversions if isinstance(each, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    ways = renamings, converters, model.base_model_prefix, weights
    names = checkpoint_of(model) if conversions else ()
    return sorted(n for n in names if not {n, rename_source_key(n, *ways)[0]} & weights.keys())


@lru_cache(maxsize=16)  # a pruner asks when it is made and for every run
def _built(
    kind: type[PreTrainedModel], config_kind: type[PreTrainedConfig], config: str
) -> tuple[dict[str, tuple[int, ...]], list[list[str]]]:
    """The shapes of the tensors that a class makes of a config in JSON, and names of one parameter."""
    with unwarned(), torch.random.fork_rng(devices=[]), torch.device("meta"), safe_on_meta():
        model = kind(config_kind.from_dict(json.loads(config)))
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, [names for names in tied.values() if len(names) > 1]


def safe_on_meta() -> Any:
    """The context in which Transformers builds models on the device meta, in releases that have it."""
    return getattr(initialization, "meta_device_safe_creation_ops", nullcontext)()
