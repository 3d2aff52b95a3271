"""Tiny random models of every family, batches for them, and the evaluation pack. No hub, one thread."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from zoo import ENCODER, make

from hf_kprune.modeling_kprune import has
from hf_kprune.structure.sublayers import Sublayer, cut, find_sublayers, write_plan


torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
PACK = Path(os.environ.get("HF_KPRUNE_PACK", ROOT.parent / "shared" / "pack"))

BERT_LIKE = {**ENCODER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "xlm-roberta": BERT_LIKE,
    "camembert": BERT_LIKE,
    "electra": {**BERT_LIKE, "embedding_size": 8},
    "distilbert": {
        "vocab_size": 60,
        "dim": 16,
        "n_heads": 4,
        "hidden_dim": 12,
        "n_layers": 3,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    },
    "mpnet": BERT_LIKE,
}
MODEL_TYPES = list(CONFIGS)
HEADS = (
    "",
    "CAUSAL_LM",
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "PRETRAINING",
    "QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
)


def classes(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """Every class of the AutoModel tables for a model type, by table (`""` is the base model)."""
    tables = {head: f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES" for head in HEADS}
    names = {head: getattr(modeling_auto, table).get(model_type) for head, table in tables.items()}
    return {head: getattr(transformers, name) for head, name in names.items() if name}


def tiny(
    model_type: str = "bert", head: str = "SEQUENCE_CLASSIFICATION", seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A tiny random model whose every parameter, biases and norms too, is away from its initial value."""
    settings = {**CONFIGS[model_type], **({"is_decoder": True} if head == "CAUSAL_LM" else {}), **config}
    torch.manual_seed(seed)
    model = classes(model_type)[head](AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def rows(count: int = 24, seed: int = 0, choices: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Tokenised rows of different lengths; with `choices`, of that many sequences each, padded to one length."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        shape = (choices, length) if choices else (length,)
        ids = torch.randint(2, 60, shape, generator=generator)
        made.append({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows, of one or several sequences, to the longest."""
    longest = max(torch.tensor(row["input_ids"]).shape[-1] for row in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(row[key]) for row in batch]
        return torch.stack(
            [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors]
        )

    return {"input_ids": padded("input_ids", 1), "attention_mask": padded("attention_mask", 0)}


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


def cut_all(model: PreTrainedModel, masks: Sequence[torch.Tensor], by: str | None = None) -> PreTrainedModel:
    """A copy that keeps the units of each sublayer that `masks` tell."""
    student = copy.deepcopy(model)
    sublayers = find_sublayers(student, by)
    for sublayer, mask in zip(sublayers, masks, strict=True):
        cut(sublayer, mask)
    write_plan(student, sublayers)
    return student


def by_column(sublayers: Sequence[Sublayer], masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Masks of units as masks of the columns of the output projections."""
    columns = []
    for sublayer, mask in zip(sublayers, masks, strict=True):
        unit, d = sublayer.unit, sublayer.unit.head_dim
        if unit.strided:  # unit j is query head j of every group
            columns.append(mask.view(1, -1, 1).expand(unit.q // d, -1, d).flatten().float())
        else:
            columns.append(mask.repeat_interleave(unit.q).float())
    return columns


@contextmanager
def masked(sublayers: Sequence[Sublayer], masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Multiply the features of each sublayer by its mask, broadcastable to (B, T, C): what cutting must be equal to."""
    with ExitStack() as stack:
        for sublayer, mask in zip(sublayers, masks, strict=True):

            def scale(
                _: torch.nn.Module, args: tuple[Any, ...], mask: torch.Tensor = mask
            ) -> tuple[Any, ...]:
                return (args[0] * mask, *args[1:])

            stack.callback(sublayer.output.register_forward_pre_hook(scale).remove)
        yield


NEVER_CUT = (
    "What stands under *never cut* lies in the layers and stays as it is, whatever the budget: of a mixture of experts only "
    "attention, dense FFNs and shared experts are pruned, and the report says what share of the model that is."
)


def untouched(name: str) -> str:
    """What the layers of a model of the zoo hold that its family leaves as it is."""
    paths = [path for s in find_sublayers(make(name)) for path in s.stack.untouched if has(s.layer, path)]
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "-"


def pytest_configure(config: pytest.Config) -> None:
    # tiny models are cut deeply in most tests; here, as naming the category in pyproject.toml would import the package early
    config.addinivalue_line("filterwarnings", "ignore::hf_kprune.BudgetWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", action="store_true", help="Write docs/supported_models.md from the results of test_zoo.py."
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of families x what was proved of them, from the results of this run."""
    if not config.getoption("--table"):
        return
    cells: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    for outcome, mark in (("passed", "yes"), ("skipped", "-"), ("failed", "**no**")):
        for report in terminalreporter.getreports(outcome):
            for key, value in report.user_properties:
                if key == "family":
                    cells.setdefault(value[0], {})[value[1]] = mark
                elif key == "refused":
                    refused[value[0]] = value[1]
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [
        "| model type | " + " | ".join([*columns, "never cut"]) + " |",
        "| --- |" + " :---: |" * len(columns) + " --- |",
    ]
    for name, row in sorted(cells.items()):
        lines.append(
            f"| {name} | " + " | ".join([*(row.get(c, "-") for c in columns), untouched(name)]) + " |"
        )
    green = sum("**no**" not in row.values() for row in cells.values())
    lines += ["", f"{green} of {len(cells)} green, {len({n.split(':')[0] for n in cells})} model types.", ""]
    lines += [
        "| refused | because |",
        "| --- | --- |",
        *(f"| {name} | {why} |" for name, why in sorted(refused.items())),
    ]
    command = 'pytest -m "slow or not slow" tests/test_zoo.py tests/test_generation.py tests/test_uniform.py --table'
    head = f"# Supported models\n\nWritten by `{command}`; `type:variant` is another config of a type. {NEVER_CUT}\n\n"
    (ROOT / "docs" / "supported_models.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def pack() -> Path:
    if not PACK.is_dir():
        pytest.skip(f"no evaluation pack at {PACK}; set HF_KPRUNE_PACK")
    return PACK
