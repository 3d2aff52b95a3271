"""What a model weighs and takes: parameters, bytes, FLOPs, cache, and the peak of memory so far."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .entries import Size
from .structure.sublayers import Sublayer, find_sublayers


def prunable_flops(sublayers: Sequence[Sublayer], lengths: Mapping[str, float]) -> float:
    """FLOPs of attention and FFN sublayers for one sequence, as they are now."""
    return sum(s.num_units * s.unit_flops(lengths) for s in sublayers)


def cache_bytes_per_token(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> int:
    """What the cache of a model that generates grows by with each token: keys and values of every
    self-attention of its decoder, the last stack. An emptied one still counts tokens, by one number each.
    Those of attentions that stay as they are, which are no sublayers, are not counted."""
    if not model.can_generate():
        return 0
    total = 0
    for s in sublayers:
        if s.stack_name == sublayers[-1].stack_name and s.kind == "attention":
            numbers = s.unit.cached(s.num_units) if s.num_units else 2
            total += numbers * s.itemsize
    return total


def model_size(model: PreTrainedModel, sublayers: Sequence[Sublayer] = (), flops: float = 0.0) -> Size:
    """Parameters and bytes (tied ones once), also without the embedding tables, the given FLOPs, and cache
    per token."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    rest = [p for p in parameters if id(p) not in tables]
    return Size(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in rest),
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.numel() * p.element_size() for p in rest),
        flops,
        cache_bytes_per_token(model, sublayers),
        sum(s.num_units * s.unit_parameters for s in sublayers),
    )


def expected_bytes(model: PreTrainedModel, args: KPruneArguments) -> float:
    """What the weights will take on disk after pruning: about, for a sparsity; at the least, for FLOPs and
    times."""
    size, sublayers = model_size(model), find_sublayers(model, *args.units)
    name, asked = args.budget
    if name in ("target_params", "target_bytes"):
        return min(size.bytes, asked * (size.bytes / size.parameters if name == "target_params" else 1))
    prunable = sum(s.num_units * s.unit_parameters * s.itemsize for s in sublayers)
    return size.bytes - prunable * (asked if name == "sparsity" else 1)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
