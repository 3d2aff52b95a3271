"""Budgets of size: FLOPs, parameters and bytes."""

from __future__ import annotations

import math

from ..structure.sublayers import Sublayer
from .base import Budget


class Sparsity(Budget):
    """A fraction of the prunable FLOPs is removed."""

    option = "sparsity"
    meaning = "the fraction of prunable FLOPs to remove"

    def spendable(self) -> float:
        return (1 - self.asked) * self.total

    def present(self) -> float:
        return 1 - self.cost_from(0) / self.total

    def reach(self, least: float) -> str:
        # rounded down, so that it can be asked for
        return f"0 to {math.floor(1e4 * (1 - least / self.total)) / 1e4:.4f}"


class TargetFlops(Budget):
    """So many FLOPs are left to the prunable sublayers."""

    option = "target_flops"
    meaning = "the FLOPs that the prunable sublayers may keep"


class TargetParams(Budget):
    """So many parameters are left to the model."""

    option = "target_params"
    of_weights = True
    meaning = "the parameters that the model may keep"

    def unit_cost(self, sublayer: Sublayer) -> float:
        return float(sublayer.unit_parameters)

    def model_cost(self) -> float:
        return self.before.parameters


class TargetBytes(Budget):
    """So many bytes are left to the weights of the model."""

    option = "target_bytes"
    of_weights = True
    meaning = "the bytes that its weights may take"

    def unit_cost(self, sublayer: Sublayer) -> float:
        return self.before.bytes / self.before.parameters * sublayer.unit_parameters

    def model_cost(self) -> float:
        return self.before.bytes
