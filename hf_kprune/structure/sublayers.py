"""The live sublayers of a model: find them as its family describes them, and count what they cost.

Shapes: U units of a sublayer, C = U * unit_width columns, D the width of the residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..modeling_kprune import BlockPlan, Layers, find_layers, get_size, has
from . import experts
from .configs import read
from .coverage import check_experts, check_nothing_left_out, check_projections, described, family_of
from .families import FAMILIES, FEATURES, KEYS, REFUSED, Block, Stack
from .plans import plans_of
from .projections import bias_of, oriented, shape_of
from .units import WHOLE_EXPERTS, Expert, ExpertNeuron, Unit


LEFT_ALONE = "kprune_left_alone"
"""Where a model is noted, while it is pruned, which of its towers or of its lists of layers are not: by their
paths. See reach.py."""


MEMORY = "memory"
"""What cross-attention to another model's output reads is called by the name of its stack, and this."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or FFN of a live model, or the experts of a layer.

    Args:
        name: Path of its layer in the model that owns it, and its kind.
        owner: The model whose config holds it: the model itself, or a tower inside it.
        layers: The list that its layer is in.
        stack: How its family describes that list.
        block: How its family describes it.
        plan: The entry of this block in `config.kprune`, which all layers share whose units are alike.
        index: The place of its layer in the list, and in the plan.
        unit: What one of its units is.
        outlets: The numbers of the layers of the list whose outputs the model reads beside that of the last
            one.
    """

    name: str
    owner: PreTrainedModel = field(repr=False)
    layers: Layers = field(repr=False)
    stack: Stack
    block: Block
    plan: BlockPlan
    index: int
    unit: Unit
    outlets: tuple[int, ...] = ()

    @property
    def layer(self) -> nn.Module:
        return self.layers[self.index]

    @property
    def runs(self) -> list[int]:
        """How often each layer of its list runs in a forward pass."""
        layers = len(self.layers)
        total = int(getattr(self.owner.config, self.stack.runs)) if self.stack.runs else layers
        return [sum(number * layers // total == index for number in range(total)) for index in range(layers)]

    @property
    def uses(self) -> int:
        """How often its own layer does. What is seen of it each time lies one after the other, as if a
        sequence had so many times as many tokens."""
        return self.runs[self.index] if self.stack.runs else 1

    @property
    def kind(self) -> str:
        """`"attention"`, `"cross_attention"`, `"ffn"` or `"experts"`."""
        return self.block.kind

    @property
    def kind_in_reports(self) -> str:
        """A key of `units.KINDS`."""
        return WHOLE_EXPERTS if isinstance(self.unit, Expert) else self.kind

    @property
    def stack_name(self) -> str:
        """Path of the list of layers."""
        return self.name.rsplit(".", 2)[0]

    @property
    def reads(self) -> str:
        """The stack that keys and values come from: another one in cross-attention, or what another model
        gives, as if that were a stack."""
        if self.kind != "cross_attention":
            return self.stack_name
        if self.reads_outside:
            return f"{self.stack_name}.{MEMORY}"
        return self.stack_name.removesuffix(self.stack.layers) + self.stack.reads

    @property
    def reads_outside(self) -> bool:
        """Whether keys and values come from what another model gives."""
        return self.kind == "cross_attention" and find_layers(self.owner, self.stack.reads) is None

    def source_of(self, path: str) -> str:
        """The stack whose tokens the input projection at `path` reads."""
        return self.reads if self.block.inputs[path] in KEYS else self.stack_name

    @property
    def unit_width(self) -> int:
        """Columns of a unit in the output projection."""
        return self.unit.width

    @property
    def output(self) -> nn.Module:
        """The output projection, whose input columns are the units' features."""
        return cast(nn.Module, attrgetter(self.block.output)(self.layer))

    @property
    def weight(self) -> Tensor:
        """Weight of the output projection, (D, C), a view; of experts a copy."""
        return oriented(self.output)

    @property
    def shape(self) -> tuple[int, int]:
        """That of this weight, D and C."""
        return shape_of(self.output)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the output projection, (D,)."""
        return bias_of(self.output)

    @property
    def has_bias_columns(self) -> bool:
        """Whether the last column of each expert is its bias."""
        return self.is_mixture and bool(self.output.has_bias)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its weights."""
        tensors = chain(self.output.parameters(recurse=False), self.output.buffers(recurse=False))
        return next(tensors).element_size()

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.kind == "experts"

    @property
    def experts(self) -> int:
        """Experts that share out the columns among them evenly, one after the other; else 1."""
        return experts.size_of(self.output)[0] if self.is_mixture else 1

    @property
    def parts(self) -> int:
        """Parts that share out the units among them evenly, one after the other, and of which each keeps as
        many: experts, or the groups of whole experts among which a router chooses; else 1."""
        if isinstance(self.unit, Expert):
            return self.unit.groups
        return self.experts if self.unit.in_experts else 1

    @property
    def share(self) -> float:
        """The share of all tokens that one of its units sees: of experts as if each were sent as many."""
        return self.unit.routes / self.experts if isinstance(self.unit, (Expert, ExpertNeuron)) else 1.0

    @property
    def numbers(self) -> Tensor:
        """The number of each unit, (U,): in each of its parts from 0 on, in another order, so that the units
        of some numbers are not in the same places of all."""
        numbers = torch.arange(self.num_units // self.parts)
        return torch.cat([numbers.roll(part) for part in range(self.parts)])

    @property
    def input_projections(self) -> list[str]:
        """Paths of the projections whose rows are the units'; none if no unit is left."""
        return [path for path in self.block.inputs if self.num_units and has(self.layer, path)]

    @property
    def columns(self) -> Tensor:
        """Columns of each unit in the output projection, (U, unit_width)."""
        if self.unit.in_experts:
            return experts.columns_of(self.output)
        return self.unit.columns(self.num_units)

    @property
    def order(self) -> Tensor | slice:
        """Index of these columns that puts those of each unit side by side, on the device of the weight."""
        return self.columns.flatten().to(self.weight.device) if self.unit.strided else slice(None)

    @property
    def magnitude(self) -> Tensor:
        """Sum of the squares of all weights of each unit, (U,), float64."""
        weight = self.weight
        total = weight.double().square().sum(0)[self.columns.to(weight.device)].sum(1)
        if self.is_mixture:
            neurons = experts.magnitude_of(self.output)
            return total + (neurons if self.unit.in_experts else neurons.view(self.experts, -1).sum(1))
        for path in self.input_projections:
            if path in self.plan["rows"]:
                rows = self.unit.rows(self.block.inputs[path], self.num_units).to(total.device)
                total += oriented(self.layer.get_submodule(path)).double().square().sum(1)[rows].sum(1)
        return total

    @property
    def num_units(self) -> int:
        if self.unit.in_experts:
            count, neurons, _ = experts.size_of(self.output)
            return count * neurons
        return self.shape[1] // self.unit_width

    @property
    def residual(self) -> float:
        """What the output is multiplied by before it joins the stream."""
        return float(getattr(self.owner.config, self.stack.residual)) if self.stack.residual else 1.0

    @property
    def unit_parameters(self) -> int:
        """Parameters of one unit."""
        if self.unit.in_experts:
            return experts.entries_of(self.output, biases=True)
        if self.is_mixture:
            tensors = (get_size(self.layer, path) for path in self.plan["slices"])
            return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)) // self.experts
        count = self.unit_width * self.shape[0]
        for path in self.input_projections:
            width, _ = self.plan["rows"].get(path, (0, 0))
            projection = self.layer.get_submodule(path)
            count += width * (oriented(projection).shape[1] + (projection.bias is not None))
        return count

    def unit_flops(self, lengths: Mapping[str, float]) -> float:
        """FLOPs of one unit for one sequence, a multiply-add counted as 2.

        F_head = 8 s d d_h + 4 s^2 d_h,  F_neuron = 4 s d  for plain attention and FFN; here from the shapes,
        so that gated FFNs, grouped queries and cross-attention, whose keys and values are those of the other
        stack's tokens, come out right. A neuron of an expert counts for the share of the tokens that pass one
        of E experts if each passes k, which is k / E, and so does a whole expert: without some of E, the
        others are passed by more. Where its layer runs several times, so does it.

        Args:
            lengths: Tokens of a sequence, for each stack; and, by the name of a sublayer, how many of them
                each token reads there, if those are not all.
        """
        tokens = self.uses * lengths[self.stack_name]
        if self.is_mixture:
            neurons = 1 if self.unit.in_experts else experts.size_of(self.output)[1]
            return 2 * tokens * neurons * experts.entries_of(self.output) * self.share
        entries = tokens * self.unit_width * self.shape[0]
        for path in self.input_projections:
            width, _ = self.plan["rows"].get(path, (0, 0))
            length = self.uses * lengths[self.source_of(path)]
            entries += length * width * oriented(self.layer.get_submodule(path)).shape[1]
        return 2 * entries + self.unit_products(lengths)

    def unit_products(self, lengths: Mapping[str, float]) -> float:
        """FLOPs of one unit between tokens, where no weight takes part, see `Unit.token_flops`."""
        keys = lengths.get(self.name, lengths[self.reads])
        return self.uses * self.unit.token_flops(lengths[self.stack_name], keys)


# ------------------------------------------------------------------------------------------------------------
# Finding them
# ------------------------------------------------------------------------------------------------------------


def find_sublayers(
    model: PreTrainedModel, head_unit: str | None = None, expert_unit: str | None = None
) -> list[Sublayer]:
    """The sublayers of `model`, bottom to top, as its family in `families.py` describes them.

    Args:
        model: Any.
        head_unit: With grouped queries, what a unit is, see `Unit.of`. None: as the model was pruned before,
            or `"group"`.
        expert_unit: What a unit of a mixture of experts is, `"neuron"` or `"expert"`. None: as the model was
            pruned before, or `"neuron"`.

    Raises:
        UnsupportedArchitectureError: If there is no family for its `model_type`, or if the family does not
            describe every projection of every layer.
    """
    owners = described(model)
    if not owners:
        model_type = f"{model.config.model_type!r} ({type(model).__name__})"
        if reason := REFUSED.get(model.config.model_type):
            raise UnsupportedArchitectureError(f"{model_type} cannot be pruned: {reason}")
        raise UnsupportedArchitectureError(
            f"no family describes model_type {model_type}; known: {', '.join(sorted(FAMILIES))}. Describe "
            "one of its layers in ten lines with hf_kprune.register_family: docs/add_a_family.md"
        )
    units = head_unit, expert_unit
    sublayers = {path: _sublayers_of(model, path, owner, *units) for path, owner in owners}
    check_nothing_left_out(model, {id(s.layers) for tower in sublayers.values() for s in tower})
    left_alone = model.__dict__.get(LEFT_ALONE, ())
    return [
        s
        for path, tower in sublayers.items()
        for s in tower
        if path not in left_alone and f"{s.stack_name}." not in left_alone
    ]


def _sublayers_of(
    model: PreTrainedModel,
    path: str,
    owner: PreTrainedModel,
    head_unit: str | None,
    expert_unit: str | None,
) -> list[Sublayer]:
    """The sublayers of one model, which lies at `path` inside `model`, or at `""`."""
    stacks = family_of(owner) or ()
    for flag, why in ((flag, why) for stack in stacks for flag, why in stack.refuses.items()):
        name, _, value = flag.partition("=")
        there = read(owner.config, name)
        if there == value if value else there:
            raise UnsupportedArchitectureError(
                f"{type(owner).__name__} with {name}={there} cannot be pruned: {why}"
            )
    # an encoder may come without its decoder
    lists = [(stack, layers) for stack in stacks if (layers := find_layers(owner, stack.layers))]
    if not lists:
        raise UnsupportedArchitectureError(
            f"{type(owner).__name__} has no list of layers at {' or '.join(repr(s.layers) for s in stacks)}, "
            f"where its family {owner.config.model_type!r} says; describe this variant with "
            "hf_kprune.register_family: docs/add_a_family.md"
        )
    units = head_unit, expert_unit
    return [
        replace(s, outlets=outlets)
        for stack, layers in lists
        for outlets in [outlets_of(model, owner, stack, layers)]
        for s in _sublayers_in(path, owner, stack, layers, *units)
    ]


def outlets_of(
    model: PreTrainedModel, owner: PreTrainedModel, stack: Stack, layers: Layers
) -> tuple[int, ...]:
    """The numbers of the layers of a list whose outputs are read beside that of the last one: by the model
    that owns them, or, of a tower of images, by the one around it."""
    numbers = set(getattr(owner.config, stack.outlets)) if stack.outlets else set[int]()
    if owner is not model and owner.main_input_name == "pixel_values":
        read_by_model = [read(model.config, name) for name in FEATURES]
        states = [n for each in read_by_model for n in (each if isinstance(each, (list, tuple)) else [each])]
        # of the hidden states the first is what the lowest layer reads
        numbers |= {n % (len(layers) + 1) - 1 for n in states if isinstance(n, int)}
    return tuple(sorted(numbers & set(range(len(layers) - 1))))


def _sublayers_in(
    path: str,
    owner: PreTrainedModel,
    stack: Stack,
    layers: Layers,
    head_unit: str | None,
    expert_unit: str | None,
) -> Iterator[Sublayer]:
    """The sublayers of one list of layers."""
    for layer in layers:
        check_projections(owner, layer, stack)
        check_experts(layer, stack)
    plans = [
        entry
        for block in stack.blocks
        for entry in plans_of(owner.config, stack, layers, block, head_unit, expert_unit)
    ]
    reads_nothing = not path and find_layers(owner, stack.reads) is None
    for index in range(len(layers)):
        numbers: Counter[str] = Counter()
        for block, unit, plan in plans:
            if plan["kept"][index] is None or (block.kind == "cross_attention" and reads_nothing):
                continue
            numbers[block.kind] += 1
            suffix = f"_{numbers[block.kind]}" if numbers[block.kind] > 1 else ""
            name = f"{path}{stack.layers}.{index}.{block.kind}{suffix}"
            yield Sublayer(name, owner, layers, stack, block, plan, index, unit)
