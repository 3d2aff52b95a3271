"""Placeholder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def compare(models: Sequence[PreTrainedModel], inputs: Mapping[str, Any], rounds: int) -> list[float]:
    """Median seconds of a forward pass of each model, all in turn."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, held in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(**inputs)
            held.append(time.perf_counter() - begin)
    return [statistics.median(held[1:]) for held in times]
