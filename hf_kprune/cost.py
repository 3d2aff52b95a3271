"""What units cost, what may be spent, and what a model weighs and pruning takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .errors import BudgetError
from .report import Size
from .search import TOLERANCE, group_sizes
from .sublayers import Sublayer, uniform_choices


class BudgetTerms:
    """What units cost, how many sublayers must keep, and, of a uniform plan, which numbers they may.

    Raises:
        BudgetError: If `args.sparsity` is out of reach.
    """

    def __init__(self, sublayers: list[Sublayer], args: KPruneArguments, lengths: Mapping[str, float]):
        self.sublayers = sublayers
        self.costs = [s.unit_flops(lengths) for s in sublayers]
        self.fixed = False
        self.minimum, self.multiple = [], []
        choices = {(id(s.owner), s.block.output): s for s in sublayers if args.uniform}
        accepted = {of: uniform_choices(s) for of, s in choices.items()}  # the same in all layers
        self.allowed = [accepted.get((id(s.owner), s.block.output)) for s in sublayers]
        for s, allowed in zip(sublayers, self.allowed, strict=True):
            heads = s.kind != "ffn"
            free, least = (args.prune_heads, args.min_heads) if heads else (args.prune_ffn, args.min_neurons)
            self.multiple.append(1 if heads else args.round_to)
            if args.uniform and free:  # none is left empty, and the config must accept the number
                numbers = allowed or range(max(least, 1), s.num_units)
                least = min((n for n in numbers if n >= least), default=s.num_units)
            self.minimum.append(min(least, s.num_units) if free else s.num_units)
        self.total = self.cost_from(0)
        self.budget = (1 - args.sparsity) * self.total
        groups = (group_sizes(s.num_units, m, r) for s, m, r in zip(sublayers, self.minimum, self.multiple, strict=True))
        self.forced = [cost * sizes[0] for cost, sizes in zip(self.costs, groups, strict=True)]
        least_cost = sum(self.forced)
        if not self.total:
            raise BudgetError("the model has no heads and no neurons left to prune")
        if least_cost > self.budget * (1 + TOLERANCE):
            reach = math.floor(1e4 * (1 - least_cost / self.total)) / 1e4  # rounded down, so that it can be asked for
            raise BudgetError(
                f"sparsity is {args.sparsity}, the fraction of prunable FLOPs to remove; with min_heads={args.min_heads}, "
                f"min_neurons={args.min_neurons}, round_to={args.round_to}, prune_heads={args.prune_heads} and "
                f"prune_ffn={args.prune_ffn} this model can reach 0 to {reach:.4f}"
            )

    def fix(self, counts: Sequence[int]) -> None:
        """From now on each sublayer keeps exactly so many units, and the budget is what that costs."""
        self.fixed, self.minimum = True, list(counts)
        self.forced = [cost * count for cost, count in zip(self.costs, counts, strict=True)]
        self.budget = sum(self.forced)

    def remaining(self, spent: float, position: int) -> float:
        """What may be spent on the sublayers from `position` up: never less, by rounding, than what they must cost."""
        return max(self.budget - spent, sum(self.forced[position:]))

    def cost_from(self, position: int) -> float:
        """FLOPs of the sublayers from `position` up, as they are now."""
        pairs = zip(self.costs[position:], self.sublayers[position:], strict=True)
        return sum(cost * s.num_units for cost, s in pairs)


def cache_bytes_per_token(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> int:
    """What the cache of a model that generates grows by with each token: keys and values of every self-attention of its
    decoder, the last stack. An emptied one still counts tokens, by one number each."""
    if not model.can_generate():
        return 0
    total = 0
    for s in sublayers:
        if s.stack_name == sublayers[-1].stack_name and s.kind == "attention":
            width = s.unit.q if s.unit.strided else s.num_units * s.unit.kv
            total += 2 * (width if s.num_units else 1) * s.weight.element_size()
    return total


def model_size(model: PreTrainedModel, sublayers: Sequence[Sublayer] = (), flops: float = 0.0) -> Size:
    """Parameters and bytes (tied ones once), also without the embedding tables, the given FLOPs, and cache per token."""
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
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
