"""What tests compare: outputs, weights, files, plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from data import collate, rows
from models import shallow
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_kprune import KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.calibration.batches import Calibration
from hf_kprune.calibration.collate import collate as make_batch
from hf_kprune.calibration.rows import Rows, row_tokens
from hf_kprune.structure.sublayers import Sublayer


def logits(model: PreTrainedModel, head: str = "SEQUENCE_CLASSIFICATION", seed: int = 5) -> torch.Tensor:
    """All float outputs of a model on one padded batch, flattened, with padded positions left out."""
    batch = collate(rows(6, seed, choices=3 if head == "MULTIPLE_CHOICE" else 0))
    with torch.no_grad():
        outputs = model.eval()(**batch)
    parts = []
    for value in outputs.to_tuple():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            by_token = value.shape[:2] == batch["input_ids"].shape and head != "MULTIPLE_CHOICE"
            parts.append(value[batch["attention_mask"].bool()].flatten() if by_token else value.flatten())
    return torch.cat(parts)


def by_column(sublayers: Sequence[Sublayer], masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Masks of units as masks of the columns of the output projections."""
    columns = []
    for sublayer, mask in zip(sublayers, masks, strict=True):
        unit, d = sublayer.unit, sublayer.unit.head_dim
        if unit.in_experts:
            columns.append(mask.float())
        elif unit.strided:  # unit j is query head j of every group
            columns.append(mask.view(1, -1, 1).expand(unit.heads, -1, d).flatten().float())
        else:
            columns.append(mask.repeat_interleave(unit.width).float())
    return columns


@contextmanager
def masked(sublayers: Sequence[Sublayer], masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Multiply the features of each sublayer by its mask, broadcastable to (B, T, C): what cutting must be equal to."""
    with ExitStack() as stack:
        for sublayer, mask in zip(sublayers, masks, strict=True):
            if sublayer.unit.in_experts:  # to multiply the columns that read them is the same
                experts: Any = sublayer.output
                each = mask.expand(sublayer.num_units).view(sublayer.experts, -1)
                stack.callback(setattr, experts, "down_proj", experts.down_proj)
                factor = each.unsqueeze(2 if experts.is_transposed else 1)
                experts.down_proj = torch.nn.Parameter(experts.down_proj * factor)
                continue

            def scale(
                _: torch.nn.Module, args: tuple[Any, ...], mask: torch.Tensor = mask
            ) -> tuple[Any, ...]:
                return (args[0] * mask, *args[1:])

            stack.callback(sublayer.output.register_forward_pre_hook(scale).remove)
        yield


def report() -> PruningReport:
    return PruningReport(model="a model", method="kprune", knowledge="kl", asked={"sparsity": 0.5})


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def close(one: Tensor, other: Tensor) -> None:
    """The same numbers, up to the alignment of memory."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def assert_same(one: PreTrainedModel, other: PreTrainedModel, head: str = "SEQUENCE_CLASSIFICATION") -> None:
    assert_same_state(one.state_dict(), other.state_dict())
    close(logits(one, head), logits(other, head))


def files(directory: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def edit_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return write


KEY = "bert.encoder.layer.0.attention.self.query.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"
NORM = "bert.embeddings.LayerNorm.weight"
Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def calibration(
    model: PreTrainedModel,
    data: list[dict[str, Any]],
    collator: Collator | None = collate,
    measured: int = -1,
    **options: Any,
) -> Calibration:
    """Of all rows in order, whatever their number of tokens."""
    tokens = sum(map(row_tokens, data))
    drawn_rows = Rows(data, len(data) if measured < 0 else measured, tokens, {})
    return Calibration(
        Accelerator(cpu=True),
        drawn_rows,
        lambda part: make_batch(part, collator, None, model),
        model,
        KPruneArguments(**options),
    )


def plan_and_weights(dataset: Any, **kwargs: Any) -> tuple[list[list[int]], dict[str, Tensor]]:
    options = {"sparsity": 0.5, "disable_tqdm": True, "use_cpu": True, **kwargs.pop("options", {})}
    pruner = KPrunePruner(shallow(), KPruneArguments(**options), dataset, **kwargs)
    report = pruner.prune()
    return [s.kept for s in report.sublayers], pruner.model.state_dict()


def assert_same_plan_and_weights(one: Any, other: Any, rtol: float = 0, atol: float = 0) -> None:
    assert one[0] == other[0]
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=rtol, atol=atol)


def kept(report: PruningReport) -> dict[str, list[int]]:
    return {s.name: s.kept for s in report.sublayers}


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that must stay when it is refused: bits, flags, hooks, config, overridden forwards."""
    return {
        "tensors": {
            k: v.detach().contiguous().view(torch.uint8).clone() for k, v in model.state_dict().items()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "forwards": sum("forward" in vars(m) for m in model.modules()),
        "config": model.config.to_dict(),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, bits in before["tensors"].items():
        assert torch.equal(bits, after["tensors"][name]), name
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    before = state(model)
    yield
    assert_unchanged(before, state(model))


def plans(sublayers: Sequence[Sublayer]) -> dict[str, list[Tensor]]:
    """Keep-masks: complementary ones, so that every unit is cut once and kept once; sublayers emptied: each, all, both ends."""
    numbers = [s.numbers for s in sublayers]
    masks = {
        "even": [n % 2 == 0 for n in numbers],
        "odd": [n % 2 == 1 for n in numbers],
        "nothing": [n < 0 for n in numbers],
    }
    for name, gone in [
        ("without ends", {0, len(numbers) - 1}),
        *((f"without {i}", {i}) for i in range(len(numbers))),
    ]:
        masks[name] = [n < 0 if k in gone else n % 2 == k % 2 for k, n in enumerate(numbers)]
    return masks
