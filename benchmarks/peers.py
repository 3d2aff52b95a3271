"""Other packages, run as themselves on the data that this one calibrates on."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning
from tasks import TORCH_PRUNING, embedding
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from hf_kprune import KPruneArguments
from hf_kprune.calibration.draw import draw_rows
from hf_kprune.entries import SublayerReport
from hf_kprune.modeling_kprune import shrink_layer
from hf_kprune.report import PruningReport
from hf_kprune.structure.sublayers import Sublayer, find_sublayers
from hf_kprune.version import versions


def drawn_loss(outputs: Any, inputs: Any) -> Tensor:
    """Loss against targets drawn from what the model predicts itself, summed over sequences; of a language model, against the
    tokens of the text. No label is seen."""
    valid = inputs["attention_mask"]
    if "start_logits" in outputs:
        places = [outputs[name].masked_fill(valid == 0, -1e9) for name in ("start_logits", "end_logits")]
        return sum((drawn_class_loss(logits) for logits in places), torch.zeros((), device=valid.device))
    if "logits" not in outputs:
        return drawn_normal_loss(embedding(outputs, valid))
    if outputs.logits.dim() == 3:
        return F.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="sum"
        )
    return (drawn_normal_loss if outputs.logits.shape[1] == 1 else drawn_class_loss)(outputs.logits)


def drawn_class_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(
        logits, torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1), reduction="sum"
    )


def drawn_normal_loss(values: Tensor) -> Tensor:
    return (values - values.detach() - torch.randn_like(values)).square().sum()


def uniform_counts(sublayers: list[Sublayer], lengths: dict[str, float], sparsity: float) -> dict[str, int]:
    """Heads and neurons that every layer keeps: as near to the asked share of heads as whole heads can be, and as many neurons
    as the FLOPs that are left then pay for."""
    costs = {"attention": 0.0, "ffn": 0.0}
    for s in sublayers:
        costs[s.kind] += s.unit_flops(lengths)
    units = {s.kind: s.num_units for s in sublayers}  # all layers of these models are alike
    heads = max(1, round((1 - sparsity) * units["attention"]))
    budget = (1 - sparsity) * sum(costs[kind] * units[kind] for kind in costs) * (1 + 1e-9)
    neurons = int((budget - costs["attention"] * heads) / costs["ffn"])
    return {"attention": heads, "ffn": min(max(1, neurons), units["ffn"])}


def prune_by_torch_pruning(
    model: PreTrainedModel, args: KPruneArguments, texts: list[Any], tokenizer: Any
) -> PruningReport:
    """Torch-Pruning (Fang et al., DepGraph, CVPR 2023), in place: whole heads and FFN neurons, the same share in every layer,
    by its first-order Taylor importance, without the fine-tuning that it expects.

    The gradient is that of `drawn_loss` on the rows that this package would measure. Shares are solved for so that the FLOPs,
    as this package counts them, are those asked.
    """
    begin = time.perf_counter()
    rows = draw_rows(model, texts, tokenizer, args, keep_labels=False)
    sublayers, length = find_sublayers(model), rows.tokens / len(rows.rows)
    lengths = {s.stack_name: length for s in sublayers}
    units, costs = [s.num_units for s in sublayers], [s.unit_flops(lengths) for s in sublayers]
    assert args.sparsity is not None
    counts = uniform_counts(sublayers, lengths, args.sparsity)

    torch.manual_seed(args.seed)
    model.eval().requires_grad_(True).zero_grad()
    model.get_input_embeddings().requires_grad_(False)
    measured = sorted(rows.rows[: rows.measured], key=lambda row: len(row["input_ids"]))
    for start in range(0, len(measured), args.per_device_batch_size):
        some = measured[start : start + args.per_device_batch_size]
        inputs = tokenizer.pad(some, return_tensors="pt").to(model.device)
        drawn_loss(model(**inputs), inputs).backward()
    for parameter in model.parameters():
        if parameter.grad is None:  # embeddings, a pooler that nothing reads
            parameter.grad = torch.zeros_like(parameter)

    ratios, heads = {}, {}
    for s in sublayers:
        for path in s.block.inputs:
            module = s.layer.get_submodule(path)
            # half a unit away from where rounding, up for heads and down for neurons, would take one more or one less
            ratios[module] = 1 - (counts[s.kind] + 0.5) / s.num_units
            if s.kind == "attention":
                heads[module] = s.num_units
    pruner = torch_pruning.BasePruner(
        model.base_model,  # it does not follow how the head of question answering takes its outputs apart
        {name: value[:1] for name, value in inputs.items()},
        torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        num_heads=heads,
        out_channel_groups={},  # the default is one dictionary for all pruners, which each writes to
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=max(0.0, *(ratios[module] for module in heads)),
        output_transform=lambda outputs: outputs[0].sum(),
    )
    gone: dict[Any, set[int]] = {s.output: set() for s in sublayers}
    for group in pruner.step(interactive=True):
        for dependency, columns in group:
            if dependency.target.module in gone and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                gone[dependency.target.module].update(columns)
        group.prune()
    model.requires_grad_(True).zero_grad()

    report = PruningReport(
        type(model).__name__, TORCH_PRUNING, "loss against drawn targets", dict([args.budget])
    )
    for s, of in zip(find_sublayers(model), units, strict=True):
        shrink_layer(s.layer, s.plan, s.index)  # attributes that tell sizes
        kept = sorted(set(range(of)) - {column // s.unit_width for column in gone[s.output]})
        assert len(kept) == s.num_units == counts[s.kind]
        report.sublayers.append(SublayerReport(s.name, s.kind, of, kept))
    report.before.flops = sum(cost * of for cost, of in zip(costs, units, strict=True))
    report.after.flops = sum(cost * len(s.kept) for cost, s in zip(costs, report.sublayers, strict=True))
    report.sparsity = 1 - report.after.flops / report.before.flops
    report.sequence_length, report.calibration = length, rows.fingerprint
    report.versions = {**versions(), TORCH_PRUNING: version(TORCH_PRUNING)}
    report.seconds, report.device = {"total": time.perf_counter() - begin}, f"{model.device}, 1 process(es)"
    return report
