"""What the benchmarks share: tasks of the evaluation pack with their data and metrics, a pruning run, files of results."""

from __future__ import annotations

import argparse
import copy
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_kprune import BudgetError, KPruneArguments, KPrunePruner, PruningReport
from hf_kprune.methods import METHODS


MAX_LENGTH = 256
"""Tokens after which texts are truncated, in calibration as in evaluation; a longer context is evaluated in windows."""

Record = Callable[[PruningReport, PreTrainedModel], None]

TORCH_PRUNING = "torch-pruning"
"""The method that is another package."""

METHOD_NAMES = [*METHODS, TORCH_PRUNING]

logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------------------------------
# Metrics, in percent
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(
    model: PreTrainedModel,
    tokenizer: Any,
    encoded: Any,
    read: Callable[[Any, Tensor], Tensor],
    size: int = 64,
) -> list[Tensor]:
    """What `read(outputs, attention_mask)` makes of each row of tokenised inputs, in their order."""
    model.eval()
    ids = encoded["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    made: list[Any] = [None] * len(ids)
    for start in range(0, len(ids), size):
        picked = order[start : start + size]
        rows = {name: [encoded[name][i] for i in picked] for name in tokenizer.model_input_names}
        inputs = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        for i, value in zip(
            picked, read(model(**inputs), inputs["attention_mask"]).float().cpu(), strict=True
        ):
            made[i] = value
    return made


def embedding(result: Any, mask: Tensor) -> Tensor:
    """Mean over tokens, of length 1."""
    weight = mask.unsqueeze(-1).to(result.last_hidden_state.dtype)
    return F.normalize((result.last_hidden_state * weight).sum(1) / weight.sum(1), dim=-1)


def logits_of(model: PreTrainedModel, tokenizer: Any, *columns: pd.Series) -> Tensor:
    encoded = tokenizer(*(list(column) for column in columns), truncation=True, max_length=MAX_LENGTH)
    return torch.stack(outputs(model, tokenizer, encoded, lambda result, mask: result.logits))


def accuracy(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    predicted = logits_of(model, tokenizer, rows["sentence"]).argmax(-1)
    return 100 * float((predicted == torch.tensor(rows["label"].to_numpy())).float().mean())


def rank_correlation(values: Tensor, labels: pd.Series) -> float:
    """Spearman's; 0 where all values are the same, as of a model that is pruned to nothing."""
    return 100 * float(spearmanr(values, labels).statistic) if values.min() != values.max() else 0.0


def score_spearman(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    return rank_correlation(
        logits_of(model, tokenizer, rows["sentence1"], rows["sentence2"]).squeeze(1), rows["label"]
    )


def cosine_spearman(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    sides = []
    for column in ("sentence1", "sentence2"):
        encoded = tokenizer(rows[column].tolist(), truncation=True, max_length=MAX_LENGTH)
        sides.append(torch.stack(outputs(model, tokenizer, encoded, embedding)))
    return rank_correlation((sides[0] * sides[1]).sum(1), rows["label"])


def words(text: str) -> list[str]:
    """As SQuAD compares answers: lower case, no punctuation, no articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def overlap(answer: str, truth: str) -> float:
    """F1 of the words of two answers."""
    given, true = words(answer), words(truth)
    common = (Counter(given) & Counter(true)).total()
    return 2 * common / (len(given) + len(true)) if common else 0.0


def answer_f1(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame, longest: int = 30) -> float:
    """F1 of SQuAD 1.1: the span of highest start + end logit, of at most `longest` tokens, in windows over the context."""
    encoded = tokenizer(
        [question.strip() for question in rows["question"]],
        rows["context"].tolist(),
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=64,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )

    def start_and_end(result: Any, mask: Tensor) -> Tensor:
        return torch.stack([result.start_logits, result.end_logits], -1)

    contexts = rows["context"].tolist()
    best = [(-torch.inf, "")] * len(rows)
    for window, values in enumerate(outputs(model, tokenizer, encoded, start_and_end, 32)):
        row, spans = encoded["overflow_to_sample_mapping"][window], encoded["offset_mapping"][window]
        context = torch.tensor([part == 1 for part in encoded.sequence_ids(window)])
        start, end = values[: len(context)].masked_fill(~context.unsqueeze(1), -torch.inf).unbind(1)
        allowed = torch.ones(len(context), len(context), dtype=torch.bool).triu().tril(longest - 1)
        score, place = (start.unsqueeze(1) + end).masked_fill(~allowed, -torch.inf).flatten().max(0)
        first, last = divmod(int(place), len(context))
        best[row] = max(best[row], (float(score), contexts[row][spans[first][0] : spans[last][1]]))
    figures = [
        max(overlap(text, str(truth)) for truth in answers["text"])
        for (_, text), answers in zip(best, rows["answers"], strict=True)
    ]
    return 100 * sum(figures) / len(figures)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------

Metric = Callable[[PreTrainedModel, Any, pd.DataFrame], float]


class Task(NamedTuple):
    """Model and data of the pack, by name, and how what the model says of the test data is judged."""

    model: str
    model_class: Any
    train: str
    test: str
    metric: Metric


TASKS: dict[str, Task] = {
    "sst2": Task(
        "minilm-sst2", AutoModelForSequenceClassification, "sst2/train", "sst2/validation", accuracy
    ),
    "sts": Task("all-MiniLM-L6-v2", AutoModel, "stsb/train", "stsb/test", cosine_spearman),
    "stsb": Task(
        "minilm-stsb", AutoModelForSequenceClassification, "stsb/train", "stsb/test", score_spearman
    ),
    "squad": Task(
        "minilm-squad", AutoModelForQuestionAnswering, "squad/validation", "squad/validation_1k", answer_f1
    ),
}


def load_model(pack: Path, task: str) -> PreTrainedModel:
    """The dense model of a task, anew."""
    model: PreTrainedModel = TASKS[task].model_class.from_pretrained(pack / "models" / TASKS[task].model)
    return model


def load_tokenizer(pack: Path, task: str) -> Any:
    return AutoTokenizer.from_pretrained(pack / "models" / TASKS[task].model)


def splits(pack: Path, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows for calibration and for evaluation, without a context in common: SQuAD's both come from its validation split."""
    train, test = (
        pd.read_parquet(pack / "data" / f"{name}.parquet") for name in (TASKS[task].train, TASKS[task].test)
    )
    if "context" in train:
        train = train[~train["context"].isin(test["context"])]
    return train, test


def calibration_texts(task: str, rows: pd.DataFrame) -> list[Any]:
    """What the model reads: texts, or pairs of them."""
    if task == "sst2":
        return [*rows["sentence"]]
    if task == "sts":
        return [*rows["sentence1"], *rows["sentence2"]]
    first, second = ("question", "context") if task == "squad" else ("sentence1", "sentence2")
    return list(zip(rows[first].str.strip(), rows[second], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# A pruning run
# ---------------------------------------------------------------------------------------------------------------------


class Recorded(KPrunePruner):
    """A pruner whose sweep hands each model to `record` as it is made."""

    def __init__(self, record: Record, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.clear()
        self.record = record

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.report is not None:  # as of the dense model, with which a sweep begins
            self.record(self.report, self.model)
        return {}


def prune_each(
    model: PreTrainedModel,
    method: str,
    sparsities: Sequence[float],
    record: Record,
    texts: list[Any],
    tokenizer: Any,
    **options: Any,
) -> None:
    """Prune copies of `model`, one for each of `sparsities`, from shared measurements where the method is one-shot.

    Args:
        model: Dense.
        method: Of `METHOD_NAMES`.
        sparsities: What a method of FFN alone cannot reach is left out, and printed.
        record: Called with the report and the pruned model, which does not outlive the call.
        texts: Calibration data.
        tokenizer: For them.
        options: Of `KPruneArguments`.
    """
    if method != TORCH_PRUNING and METHODS[method].one_shot:
        arguments = KPruneArguments(method=method, disable_tqdm=True, **options)
        left, made = sorted(sparsities), list[float]()

        def recorded(report: PruningReport, pruned: PreTrainedModel) -> None:
            made.append(report.sparsity)
            record(report, pruned)

        while left and not made:  # the search of some methods is what finds that a budget is out of reach
            pruner = Recorded(
                recorded,
                copy.deepcopy(model),
                arguments,
                texts,
                eval_dataset=texts,
                processing_class=tokenizer,
            )
            try:
                pruner.sweep(left)
            except BudgetError as error:
                print(f"{method} {left[len(made)]:.0%}: {error}", flush=True)
                left = left[:-1]
        return
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        record(prune(pruned, method, texts, tokenizer, sparsity=sparsity, **options), pruned)


def prune(
    model: PreTrainedModel, method: str, texts: list[Any], tokenizer: Any, **options: Any
) -> PruningReport:
    """Prune `model` in place.

    Args:
        model: Dense.
        method: Of `METHOD_NAMES`.
        texts: Calibration data.
        tokenizer: For them.
        options: Of `KPruneArguments`.

    Raises:
        BudgetError: If the method cannot remove so much.
    """
    if method == TORCH_PRUNING:
        from peers import prune_by_torch_pruning  # here, so that all else runs without that package

        return prune_by_torch_pruning(model, KPruneArguments(**options), texts, tokenizer)
    arguments = KPruneArguments(method=method, disable_tqdm=True, **options)
    pruner = KPrunePruner(model, arguments, texts, processing_class=tokenizer)
    pruner.callback_handler.callbacks.clear()
    return pruner.prune()


def facts(report: PruningReport) -> dict[str, Any]:
    """What a line of results says about a pruning run."""
    return {
        "achieved": report.sparsity,
        "seconds": report.seconds,
        "tokens": report.calibration["tokens"],
        "tokens_per_sequence": report.sequence_length,
        "kept": [len(s.kept) for s in report.sublayers],
        "device": report.device,
        "threads": torch.get_num_threads(),
        "versions": report.versions,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files of results, one JSON object a line
# ---------------------------------------------------------------------------------------------------------------------


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser for what a benchmark takes in any case: the evaluation pack, and the file of its lines."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument(
        "--output", type=Path, required=True, help="File that the JSON lines are appended to."
    )
    return parser


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def key_of(line: dict[str, Any], names: Iterable[str]) -> str:
    """What tells a run from others."""
    return json.dumps([line[name] for name in names], sort_keys=True)
