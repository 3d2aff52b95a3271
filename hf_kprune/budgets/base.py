"""What may be spent on the units of a model, and what each costs: the base of all kinds of budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..entries import Size
from ..errors import BudgetError
from ..methods.base import Method, Statistics
from ..methods.search import TOLERANCE, group_sizes, uniform_search
from ..modeling_kprune import ALIGNED
from ..structure.sublayers import Sublayer
from ..structure.uniform import uniform_choices, uniform_names
from ..structure.units import UNITS


WIDE = 16 * ALIGNED
"""Experts of this width and more keep a multiple of `ALIGNED` neurons, so that kernels for all experts at
once take them."""


class BudgetWarning(UserWarning):
    """A budget that is met and may yet not be what was meant: it asks for nothing, or it leaves next to
    nothing."""


class Budget:
    """A budget of one kind for one model: a kind is a class with a unit cost, a limit, and the words for
    both.

    Costs of units add up to what is spent. Beside the limit there are the numbers of units that each sublayer
    must keep at least (`minimum`), in what steps (`multiple`), and, if all layers are to end alike, which
    numbers the config accepts (`allowed`).

    Args:
        sublayers: The sublayers of the model as it is now, from the lowest to the highest.
        args: The options.
        lengths: Mean tokens of a sequence in each stack.
        before: Size of the model as it is now.

    Raises:
        BudgetError: If what is asked for is out of reach.
    """

    option: ClassVar[str]
    """Name of the option that asks for it."""

    meaning: ClassVar[str]
    """What its value is, in words."""

    of_weights: ClassVar[bool] = False
    """Whether it counts weights, and not what is computed."""

    def __init__(
        self, sublayers: list[Sublayer], args: KPruneArguments, lengths: Mapping[str, float], before: Size
    ):
        self.sublayers, self.args, self.asked = sublayers, args, args.budget[1]
        self.lengths, self.before = lengths, before
        self.costs = [self.unit_cost(sublayer) for sublayer in sublayers]
        self.total = self.cost_from(0)
        self.check_units()
        if not self.total:
            raise BudgetError("the model has no heads and no neurons left to prune")
        self.fixed_cost = self.model_cost() - self.total
        """Cost of what is not prunable."""
        self.limit = self.spendable()
        """What the units may cost together."""
        self.multiple = [self.step(sublayer) for sublayer in sublayers]
        self.alike = uniform_names(sublayers, args) if args.uniform else []
        choices = {(id(s.owner), s.block.output): s for s in sublayers if args.uniform}
        accepted = {key: uniform_choices(s) for key, s in choices.items()}  # the same in all layers
        self.allowed = [accepted.get((id(s.owner), s.block.output)) for s in sublayers]
        self.minimum = [self.least(*each) for each in zip(sublayers, self.allowed, strict=True)]
        self.fixed = False
        """Whether each sublayer keeps exactly its minimum from now on."""
        sizes = zip(sublayers, self.minimum, self.multiple, strict=True)
        self.fewest = [group_sizes(s.num_units, minimum, multiple)[0] for s, minimum, multiple in sizes]
        self.check()

    # ---- what a kind says ---------------------------------------------------------------------------------

    def unit_cost(self, sublayer: Sublayer) -> float:
        """Cost of one unit of a sublayer. Default: FLOPs."""
        return sublayer.unit_flops(self.lengths)

    def model_cost(self) -> float:
        """Cost of the whole model as it is now. Default: that of its units."""
        return self.total

    def spendable(self) -> float:
        """What the units may cost together. Default: what is asked for, less what is not prunable."""
        return self.asked - self.fixed_cost

    def present(self) -> float:
        """What the model comes to now, in terms of what is asked for."""
        return self.fixed_cost + self.cost_from(0)

    def achieved(self, student: PreTrainedModel) -> float:
        """What a pruned model, of which `sublayers` are part, comes to, in terms of what is asked for."""
        return self.present()

    def reach(self, least: float) -> str:
        """What may be asked for, in words, if the units cost `least` at least."""
        return f"{math.ceil(self.fixed_cost + least):,} and more"

    # ---- what all have in common --------------------------------------------------------------------------

    def step(self, sublayer: Sublayer) -> int:
        """The number of which a sublayer keeps a multiple: of each of its parts as many."""
        each = getattr(self.args, sublayer.unit.multiple) if sublayer.unit.multiple else 1
        if sublayer.unit.in_experts and sublayer.num_units >= WIDE * sublayer.parts:
            each = math.lcm(each, ALIGNED)
        return each * sublayer.parts

    def least(self, sublayer: Sublayer, allowed: list[int] | None) -> int:
        """The units that a sublayer keeps at least."""
        args, units = self.args, sublayer.num_units
        least = sublayer.unit.least(args) * sublayer.parts
        if not getattr(args, sublayer.unit.prunes):
            return units
        if args.uniform:  # none is left empty, and the config must accept the number
            numbers = allowed or range(max(least, 1), units)
            least = min((n for n in numbers if n >= least), default=units)
        return min(least, units)

    def check_units(self) -> None:
        """Raise `BudgetError` if units are to go that save nothing of what it counts."""
        spared = self.of_weights or (self.option, self.asked) == ("sparsity", 0)
        idle = [s for s in self.sublayers if not s.unit.saves_flops and getattr(self.args, s.unit.prunes)]
        if idle and not spared:
            prunable = sum(s.num_units * s.unit_parameters for s in self.sublayers)
            raise BudgetError(
                f"{self.option} is {self.asked:,}, {self.meaning}, of which whole experts save nothing: each "
                "token is sent to as many others in their place. Give target_params (the model has "
                f"{self.before.parameters:,} parameters, {prunable:,} of them prunable) or target_bytes, or "
                "pass expert_unit='neuron'"
            )

    def check(self) -> None:
        """Raise `BudgetError` if what must stay costs more than there is."""
        args, least = self.args, sum(self.forced)
        if least > self.limit * (1 + TOLERANCE):
            pairs = zip(self.fewest, self.sublayers, strict=True)
            stay = {count for count, s in pairs if not s.unit.saves_flops}
            experts = f", of which {max(stay)} experts of a layer must stay," if stay else ""
            raise BudgetError(
                f"{self.option} is {self.asked:,}, {self.meaning}; with min_heads={args.min_heads}, "
                f"min_neurons={args.min_neurons}, round_to={args.round_to}, prune_heads={args.prune_heads} "
                f"and prune_ffn={args.prune_ffn} this model{experts} can reach {self.reach(least)}"
            )

    @property
    def forced(self) -> list[float]:
        """What the units that must stay cost, in each sublayer."""
        return [cost * count for cost, count in zip(self.costs, self.fewest, strict=True)]

    @property
    def keeps_all(self) -> bool:
        """Whether what is asked for holds as it is."""
        return self.total <= self.limit * (1 + TOLERANCE)

    def keeps_rest(self, position: int) -> bool:
        """Whether the sublayer at `position` stays as it is, as all from there up fit or as it must stay."""
        sublayer = self.sublayers[position]
        fits = self.cost_from(position) <= self.remaining(position) * (1 + TOLERANCE)
        return fits or self.minimum[position] >= sublayer.num_units

    def cost_from(self, position: int) -> float:
        """Cost of the sublayers from `position` up, as they are now."""
        pairs = zip(self.costs[position:], self.sublayers[position:], strict=True)
        return sum(cost * s.num_units for cost, s in pairs)

    def remaining(self, position: int) -> float:
        """What may be spent on the sublayers from `position` up: never less, by rounding, than what they must
        cost."""
        below = zip(self.costs[:position], self.sublayers[:position], strict=True)
        spent = sum(cost * s.num_units for cost, s in below)
        return max(self.limit - spent, sum(self.forced[position:]))

    def search(
        self, method: Method, statistics: Sequence[Statistics], scores: Sequence[Tensor], position: int = 0
    ) -> list[Tensor]:
        """Keep-masks (U,) of the sublayers from `position` up, within what remains (KPMS)."""
        if self.args.uniform and not self.fixed:
            self.fix(self.alike_counts(scores, position))
        rest = self.minimum[position:], self.multiple[position:]
        return method.search(statistics, scores, self.remaining(position), *rest)

    def alike_counts(
        self,
        scores: Sequence[Tensor],
        position: int = 0,
        allowed: Sequence[Sequence[int] | None] | None = None,
    ) -> list[int]:
        """How many units each sublayer keeps so that all layers end alike, by the scores of those from
        `position` up.

        Raises:
            ValueError: If nothing that is `allowed`, by default what the config accepts, is within the
                budget.
        """
        counts = [s.num_units for s in self.sublayers[:position]]
        return counts + uniform_search(
            scores,
            self.costs[position:],
            self.remaining(position),
            self.minimum[position:],
            self.multiple[position:],
            self.alike[position:],
            (self.allowed if allowed is None else allowed)[position:],
        )

    def ways_alike(self, scores: Sequence[Tensor], most: int) -> dict[str, list[int]]:
        """How many units each sublayer keeps so that all layers end alike, in at most so many ways, each by
        its numbers of heads: that of the best scores, the most that the budget allows, one halfway between
        them, and the next fewer. Neurons take what is left.

        Args:
            scores: Of all sublayers.
            most: How many ways there may be.
        """
        best, above, below = self.alike_counts(scores), dict[int, list[int]](), dict[int, list[int]]()
        for i, sublayer in enumerate(self.sublayers):
            if sublayer.unit.has_heads:
                numbers = self.allowed[i] or range(1, sublayer.num_units + 1)
                above[i] = [n for n in numbers if n >= best[i]]
                below[i] = [n for n in numbers if self.minimum[i] <= n <= best[i]]

        def ways_with(heads: dict[int, int]) -> list[list[int]]:
            allowed = [[heads[i]] if i in heads else each for i, each in enumerate(self.allowed)]
            try:
                return [self.alike_counts(scores, allowed=allowed)]
            except ValueError:  # they are over the budget
                return []

        steps, ways = max((len(numbers) - 1 for numbers in above.values()), default=0), [best]
        for step in range(1, steps + 1):
            ways += ways_with({i: n[round((len(n) - 1) * step / steps)] for i, n in above.items()})
        fewer = ways_with({i: numbers[-2:][0] for i, numbers in below.items()})
        ways = [best, ways[-1], ways[(len(ways) - 1) // 2]]
        ways += [way for way in fewer if any(n > m for n, m in zip(way, best, strict=True))]  # neurons gain
        by_heads = {self._heads(way): way for way in ways}
        return dict(list(by_heads.items())[:most])

    def _heads(self, counts: list[int]) -> str:
        """Its numbers of heads, such as `"3 heads"`, or `"3 + 2 heads"` of two stacks."""
        rows = zip(self.alike, counts, self.sublayers, strict=True)
        numbers = {name: str(n) for name, n, sublayer in rows if sublayer.unit.has_heads}
        text = " + ".join(numbers.values())
        return f"{text} head" if text == "1" else f"{text} heads"

    def fix(self, counts: list[int]) -> None:
        """Let each sublayer keep exactly so many units."""
        self.fixed, self.minimum, self.fewest = True, counts, counts
        self.limit = sum(self.forced)

    def remarks(self) -> list[str]:
        """What of the budget and of its limits has no effect, or another one than may be meant."""
        args, remarks = self.args, []
        if self.keeps_all and self.option != "sparsity":  # sparsity=0 asks for nothing in so many words
            remarks.append(
                f"{self.option} is {self.asked:,.6g}, {self.meaning}; the model is at {self.present():,.6g} "
                "as it is, so nothing is cut"
            )
        if args.expert_unit == "expert" and not any(s.is_mixture for s in self.sublayers):
            remarks.append("expert_unit is 'expert', and the model has no experts: it has no effect")
        for kind in dict.fromkeys(UNITS.values()):
            alike = [s.num_units // s.parts for s in self.sublayers if type(s.unit) is kind]
            largest, least = max(alike, default=0), getattr(args, kind.minimum)
            if getattr(args, kind.prunes) and 0 < largest <= least:
                remarks.append(
                    f"{kind.minimum} is {least:,}, and no {kind.holder} has more than {largest:,} "
                    f"{kind.plural}: none of them is pruned"
                )
        for s, multiple in zip(self.sublayers, self.multiple, strict=True):
            if s.unit.multiple and 0 < s.num_units < multiple and getattr(args, s.unit.prunes):
                remarks.append(
                    f"{s.unit.multiple} is {multiple // s.parts:,}, and {s.name} has "
                    f"{s.num_units // s.parts:,} {s.unit.plural}: it is kept whole or goes whole"
                )
                break
        return remarks
