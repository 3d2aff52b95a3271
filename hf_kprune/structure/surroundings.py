"""Settings around a call: those of the caller do not reach in, and those made inside are undone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .facts import same_modes


@contextmanager
def plain_modes() -> Iterator[None]:
    """Compute as torch does by default, whatever the caller has set: gradients, inference mode, autocast,
    dtype and device.

    Measurements need gradients, and least squares needs what is left of numbers that are nearly equal.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        accelerator = torch.accelerator.current_accelerator()
        for device in {"cpu", *([] if accelerator is None else [accelerator.type])}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


CPUS: Any = torch.backends.mkldnn

GPUS: Any = torch.backends.cudnn

PRODUCTS = (torch.backends.cuda.matmul, GPUS.conv, GPUS.rnn, CPUS.matmul, CPUS.conv, CPUS.rnn)
"""Where torch keeps the precision in which it multiplies numbers of float32, on GPUs and on CPUs."""

INHERITED = "none"
"""What is set there if the setting of all of them holds."""


def product_precisions() -> list[str]:
    """What holds there: "ieee", "tf32" or "bf16"."""
    return ["ieee" if each.fp32_precision == INHERITED else each.fp32_precision for each in PRODUCTS]


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply and convolve in float32 as exactly as torch can, whatever the caller has set, as by
    `torch.set_float32_matmul_precision`, or torch by itself, as for convolutions on GPUs.

    What is proved or checked compares numbers that are equal up to rounding.
    """
    before = [each.fp32_precision for each in PRODUCTS]
    for each in PRODUCTS:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, precision in zip(PRODUCTS, before, strict=True):
            each.fp32_precision = INHERITED
            if each.fp32_precision != precision:  # it is a setting of its own
                each.fp32_precision = precision


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Take back what `Trainer` sets for itself: seeds of all generators, the verbosity, values in configs and
    of the model, and the mode of each module."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    holders: dict[int, Any] = {id(holder): holder for holder in (model, *configs)}
    if getattr(model, "generation_config", None) is not None:
        holders[id(model.generation_config)] = model.generation_config
    values = [(holder, dict(holder.__dict__)) for holder in holders.values()]
    verbosity, states = logging.get_verbosity(), (random.getstate(), np.random.get_state())
    try:
        with same_modes(model), torch.random.fork_rng(devices=range(torch.accelerator.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        logging.set_verbosity(verbosity)
        for holder, before in values:
            holder.__dict__.clear()
            holder.__dict__.update(before)
