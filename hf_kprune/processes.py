"""Several processes: an error on one ends all of them with its message, and all of them do the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from .errors import ArgumentError, CalibrationError


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Let an error on any process end all of them, with its message, before they would wait for each
    other."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:  # Ctrl-C too: told to the others below, then raised
        error = caught
    if accelerator.num_processes > 1:
        message = None if error is None else f"{type(error).__name__}: {error}"
        for rank, reason in enumerate(gather_object([message])):
            if reason is not None and error is None:
                error = CalibrationError(f"process {rank} failed: {reason}")
    if error is not None:
        raise error


@contextmanager
def accompanied(accelerator: Accelerator) -> Iterator[None]:
    """Say in words that another process is gone, where the library that joins them says that a connection was
    closed."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if accelerator.num_processes == 1 or not lost:
            raise
        raise CalibrationError(
            f"process {accelerator.process_index} waited for another one that has ended; its own output "
            "says why it did"
        ) from error


def check_alike(accelerator: Accelerator, model: nn.Module, options: Mapping[str, object]) -> None:
    """Raise `ArgumentError` on every process if they hold different options or weights, whose sums would mean
    nothing.

    Args:
        accelerator: Device and processes.
        model: Of this process; each of its tensors is hashed.
        options: By the names that a message may give.
    """
    if accelerator.num_processes == 1:
        return
    tensors = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    first, *others = gather_object([({name: repr(value) for name, value in options.items()}, tensors)])
    for rank, entry in enumerate(others, start=1):
        for name in dict.fromkeys([*first[0], *entry[0]]):
            if first[0].get(name) != entry[0].get(name):
                raise ArgumentError(
                    f"{name} is {first[0].get(name)} on process 0 and {entry[0].get(name)} on process "
                    f"{rank}; give all processes the same options"
                )
        differing = sorted(
            name for name in first[1].keys() | entry[1].keys() if first[1].get(name) != entry[1].get(name)
        )
        if differing:
            raise ArgumentError(
                f"processes 0 and {rank} hold different models ({len(differing)} tensors, such as "
                f"{differing[0]}); load one checkpoint on all of them, and set one seed before a new head "
                "is made: transformers.set_seed(42)"
            )


def fingerprint(tensor: torch.Tensor) -> str:
    """Checksum of the shape, the dtype and all bits of a tensor."""
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + bits.tobytes()).hexdigest()
