"""What units cost, what may be spent, and what a model weighs and pruning takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import TIMES, KPruneArguments
from .errors import BudgetError
from .latency.table import LatencyTable
from .methods.search import TOLERANCE, group_sizes
from .report import Size
from .structure.sublayers import Sublayer, find_sublayers
from .structure.uniform import uniform_choices
from .structure.units import UNITS


MEANING = {
    "sparsity": "the fraction of prunable FLOPs to remove",
    "target_flops": "the FLOPs that the prunable sublayers may keep",
    "target_params": "the parameters that the model may keep",
    "target_bytes": "the bytes that its weights may take",
    "target_latency": "the seconds that a forward pass may take",
    "target_speedup": "how many times as fast a forward pass is to be",
}


class BudgetWarning(UserWarning):
    """A budget that is met and may yet not be what was meant: it asks for nothing, or it leaves next to nothing."""


class BudgetTerms:
    """What units cost, how many sublayers must keep, and, of a uniform plan, which numbers they may.

    Args:
        sublayers: Of the model as it is now.
        args: Options.
        lengths: Mean tokens of a sequence in each stack.
        before: Size of the model as it is now.
        table: What its sublayers take, if the budget is a time.

    Raises:
        BudgetError: If what `args` ask for is out of reach.
    """

    def __init__(
        self,
        sublayers: list[Sublayer],
        args: KPruneArguments,
        lengths: Mapping[str, float],
        before: Size,
        table: LatencyTable | None = None,
    ):
        self.sublayers, self.args = sublayers, args
        name, asked = args.budget
        self.name, self.asked = name, asked
        self.table = table if name in TIMES else None
        if name in ("sparsity", "target_flops", *TIMES):
            self.costs = [s.unit_flops(lengths) for s in sublayers]
        else:
            size = before.bytes / before.parameters if name == "target_bytes" else 1.0
            self.costs = [size * s.unit_parameters for s in sublayers]
        self.total = self.cost_from(0)
        whole = {"target_params": before.parameters, "target_bytes": before.bytes}.get(name, self.total)
        self.fixed_cost = whole - self.total  # of what is not prunable
        self.budget = (1 - asked) * self.total if name == "sparsity" else asked - self.fixed_cost
        self.seconds = math.inf
        if name in TIMES:
            assert table is not None
            self.budget, self.seconds = self.total, table.dense / asked if name == "target_speedup" else asked
        self.fixed = False
        self.minimum, self.multiple = [], []
        choices = {(id(s.owner), s.block.output): s for s in sublayers if args.uniform}
        accepted = {of: uniform_choices(s) for of, s in choices.items()}  # the same in all layers
        self.allowed = [accepted.get((id(s.owner), s.block.output)) for s in sublayers]
        for s, allowed in zip(sublayers, self.allowed, strict=True):
            free, least = getattr(args, s.unit.prunes), getattr(args, s.unit.minimum)
            self.multiple.append(getattr(args, s.unit.multiple) if s.unit.multiple else 1)
            if args.uniform and free:  # none is left empty, and the config must accept the number
                numbers = allowed or range(max(least, 1), s.num_units)
                least = min((n for n in numbers if n >= least), default=s.num_units)
            self.minimum.append(min(least, s.num_units) if free else s.num_units)
        sizes = [
            group_sizes(s.num_units, m, r)
            for s, m, r in zip(sublayers, self.minimum, self.multiple, strict=True)
        ]
        self.forced = [cost * of[0] for cost, of in zip(self.costs, sizes, strict=True)]
        least_cost = sum(self.forced)
        if not self.total:
            raise BudgetError("the model has no heads and no neurons left to prune")
        if self.table is not None and (fastest := self.table.predict([g[0] for g in sizes])) > self.seconds:
            raise BudgetError(
                f"{name} is {asked}, {MEANING[name]}; the model takes {self.table.dense:.4g} s as it is and {fastest:.4g} s "
                f"with the least that min_heads={args.min_heads}, min_neurons={args.min_neurons} and round_to={args.round_to} "
                "leave"
            )
        if least_cost > self.budget * (1 + TOLERANCE):
            reach = (
                math.floor(1e4 * (1 - least_cost / self.total)) / 1e4
            )  # rounded down, so that it can be asked for
            within = (
                f"0 to {reach:.4f}"
                if name == "sparsity"
                else f"{math.ceil(self.fixed_cost + least_cost):,} and more"
            )
            raise BudgetError(
                f"{name} is {asked:,}, {MEANING[name]}; with min_heads={args.min_heads}, min_neurons={args.min_neurons}, "
                f"round_to={args.round_to}, prune_heads={args.prune_heads} and prune_ffn={args.prune_ffn} this model can "
                f"reach {within}"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether what is asked for holds as it is."""
        fast = self.table is None or self.table.dense <= self.seconds
        return fast and self.total <= self.budget * (1 + TOLERANCE)

    def remarks(self) -> list[str]:
        """What of the budget and of its limits has no effect, or another one than may be meant."""
        args, found = self.args, []
        if self.keeps_all and self.name != "sparsity":  # sparsity=0 asks for nothing in so many words
            dense = {"target_latency": self.table.dense, "target_speedup": 1.0} if self.table else {}
            found.append(
                f"{self.name} is {self.asked:,.6g}, {MEANING[self.name]}; the model is at "
                f"{dense.get(self.name, self.fixed_cost + self.total):,.6g} as it is, so nothing is cut"
            )
        for kind in dict.fromkeys(UNITS.values()):
            alike = [s for s in self.sublayers if isinstance(s.unit, kind)]
            largest, least = max((s.num_units for s in alike), default=0), getattr(args, kind.minimum)
            if getattr(args, kind.prunes) and 0 < largest <= least:
                found.append(
                    f"{kind.minimum} is {least:,}, and no {kind.holder} has more than {largest:,} {kind.plural}: none of them "
                    "is pruned"
                )
        for s, multiple in zip(self.sublayers, self.multiple, strict=True):
            if 0 < s.num_units < multiple and getattr(args, s.unit.prunes):
                found.append(
                    f"{s.unit.multiple} is {multiple:,}, and {s.name} has {s.num_units:,} {s.unit.plural}: it is kept whole "
                    "or goes whole"
                )
                break
        return found

    def achieved(self) -> float:
        """What the sublayers now come to, in terms of what was asked for. A time is measured elsewhere."""
        cost = self.cost_from(0)
        return 1 - cost / self.total if self.name == "sparsity" else self.fixed_cost + cost

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


def prunable_flops(sublayers: Sequence[Sublayer], lengths: Mapping[str, float]) -> float:
    """FLOPs of attention and FFN sublayers for one sequence, as they are now."""
    return sum(s.num_units * s.unit_flops(lengths) for s in sublayers)


def cache_bytes_per_token(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> int:
    """What the cache of a model that generates grows by with each token: keys and values of every self-attention of its
    decoder, the last stack. An emptied one still counts tokens, by one number each."""
    if not model.can_generate():
        return 0
    total = 0
    for s in sublayers:
        if s.stack_name == sublayers[-1].stack_name and s.kind == "attention":
            numbers = s.unit.cached(s.num_units) if s.num_units else 1
            total += 2 * numbers * s.weight.element_size()
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
        sum(s.num_units * s.unit_parameters for s in sublayers),
    )


def expected_bytes(model: PreTrainedModel, args: KPruneArguments) -> float:
    """What the weights will take on disk after pruning: about, for a sparsity; at the least, for FLOPs and times."""
    size, sublayers = model_size(model), find_sublayers(model, args.head_unit)
    name, asked = args.budget
    if name in ("target_params", "target_bytes"):
        return min(size.bytes, asked * (size.bytes / size.parameters if name == "target_params" else 1))
    prunable = sum(s.num_units * s.unit_parameters * s.weight.element_size() for s in sublayers)
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
