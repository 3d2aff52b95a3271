"""How good a model is at its task: accuracy, F1, Matthews, Pearson, Spearman, SQuAD's figures, perplexity.

What needs labelled classes or numbers is a `compute_metrics` of `Trainer`. Questions about contexts and
running text are evaluated from the texts themselves, as their figures need offsets and windows:
`evaluate_texts`. torchmetrics does the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..arguments import KPruneArguments
from ..errors import ArgumentError
from ..structure.facts import in_eval_mode, max_positions, to_model
from .sources import text_columns
from .tasks import task_of


ALIASES = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews_correlation": "matthews",
    "matthews": "matthews",
    "pearsonr": "pearson",
    "pearson": "pearson",
    "spearmanr": "spearman",
    "spearman": "spearman",
    "exact_match": "exact_match",
    "squad": "exact_match",
    "perplexity": "perplexity",
}
"""Names that metrics go by elsewhere, and those of the figures here."""

QA_LENGTH, LM_LENGTH = 384, 1024
"""Tokens of a window at most: of a question and its context, and of running text."""

ANSWER_TOKENS = 30
"""Tokens of an answer at most, as in the scripts of SQuAD."""

QA_COLUMNS = ("question", "context", "answers")


def metrics_of(model: PreTrainedModel) -> Callable[[Any], dict[str, float]] | None:
    """`compute_metrics` for the labels of a classifier, a regressor or a tagger; None for other models."""
    names = task_of(model).figures
    if not names or {"exact_match", "perplexity"} & set(names):
        return None

    def compute(prediction: Any) -> dict[str, float]:
        scores = (
            prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        )
        scores, labels = torch.as_tensor(scores).float(), torch.as_tensor(prediction.label_ids)
        if "pearson" in names:
            return correlations(scores.flatten(), labels.flatten().float())
        if model.config.problem_type == "multi_label_classification":
            return multi_label_figures(scores > 0, labels > 0.5)
        classes, counted = scores.argmax(-1).flatten(), labels.flatten() != -100
        figures = class_figures(classes[counted], labels.flatten()[counted].long(), scores.shape[-1])
        return {name: figures[name] for name in names}

    return compute


def class_figures(classes: Tensor, labels: Tensor, count: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of classes (N,) among `count`.

    F1 is that of class 1 of two, else the mean of all classes.
    """
    from torchmetrics.functional import classification as tm  # takes seconds to import

    task: dict[str, Any] = {"task": "multiclass", "num_classes": max(count, 2)}
    pair = (classes, labels)
    f1 = tm.f1_score(*pair, task="binary") if count == 2 else tm.f1_score(*pair, average="macro", **task)
    accuracy = tm.accuracy(*pair, average="micro", **task)
    return {
        "accuracy": float(accuracy),
        "f1": float(f1),
        "matthews": float(tm.matthews_corrcoef(*pair, **task)),
    }


def multi_label_figures(answers: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of rows (N, K) that are right as a whole, and F1 over all their yes-or-no answers."""
    from torchmetrics.functional import classification as tm

    f1 = tm.f1_score(answers.flatten().int(), labels.flatten().int(), task="binary")
    return {"accuracy": float((answers == labels).all(-1).float().mean()), "f1": float(f1)}


def correlations(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers (N,); NaN if either are all the same."""
    if len(values) < 2 or bool((values == values[0]).all()) or bool((labels == labels[0]).all()):
        return {"pearson": math.nan, "spearman": math.nan}
    from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

    pair = values.double(), labels.double()
    return {"pearson": float(pearson_corrcoef(*pair)), "spearman": float(spearman_corrcoef(*pair))}


def named_metric(name: str, model: PreTrainedModel) -> Callable[[Any], dict[str, float]] | None:
    """`compute_metrics` for a name of `ALIASES`, under that name; None if none here fits the model."""
    compute, figure = metrics_of(model), ALIASES.get(name)
    if compute is None or figure not in task_of(model).figures:
        return None
    return lambda prediction: {name: compute(prediction)[str(figure)]}


# ------------------------------------------------------------------------------------------------------------
# From the texts themselves
# ------------------------------------------------------------------------------------------------------------


def evaluate_texts(
    model: PreTrainedModel, dataset: Any, tokenizer: object, args: KPruneArguments
) -> dict[str, float] | None:
    """Figures of a model that answers questions or continues text, on rows of texts; None for others.

    Args:
        model: In evaluation mode or not, which is left as it is.
        dataset: Rows with `question`, `context` and `answers`, or texts, or rows with a column of texts.
        tokenizer: The model's.
        args: `max_seq_length`, `text_columns` and `per_device_eval_batch_size` count.
    """
    first = next(iter(dataset), None)
    if tokenizer is None or first is None or (isinstance(first, Mapping) and "input_ids" in first):
        return None
    with in_eval_mode(model), torch.no_grad():
        if "exact_match" in task_of(model).figures:
            return answer_figures(model, list(dataset), tokenizer, args)
        if "perplexity" in task_of(model).figures:
            return {"perplexity": perplexity(model, texts_of(dataset, first, args), tokenizer, args)}
    return None


def texts_of(dataset: Iterable[Any], first: Any, args: KPruneArguments) -> Iterator[str]:
    """The texts of a dataset of strings, or of rows with a column of them."""
    if isinstance(first, str):
        yield from dataset
        return
    columns = text_columns(list(first), args.text_columns, False) if isinstance(first, Mapping) else ()
    if len(columns) != 1:
        raise ArgumentError(
            f"perplexity is of one column of texts, the evaluation data have {sorted(first)}: set "
            "text_columns"
        )
    for row in dataset:
        yield row[columns[0]]


def perplexity(model: PreTrainedModel, texts: Iterable[str], tokenizer: Any, args: KPruneArguments) -> float:
    """Exponential of the mean loss of a token, in windows without overlap, of all texts one after another.

    Each window has as many tokens as the model takes, `max_seq_length` or 1,024, whatever is fewest. Texts
    that do not end a line themselves are kept apart by an empty one.
    """
    limits = (max_positions(model), args.max_seq_length, LM_LENGTH)
    length = min(limit for limit in limits if limit is not None)
    tokens: list[int] = []
    lines = [text for text in texts if text]
    gap = "" if any(text.endswith("\n") for text in lines) else "\n\n"
    for start in range(0, len(lines), 500):  # a tokenizer takes long for very long texts
        part = gap.join(lines[start : start + 500]) + (gap if start + 500 < len(lines) else "")
        tokens += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise ArgumentError(
            f"the evaluation data hold {len(tokens)} tokens, expected at least 2 for a perplexity"
        )
    total = 0.0
    ids = torch.tensor(tokens)
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1].unsqueeze(0)
        logits = model(**to_model({"input_ids": window[:, :-1]}, model)).logits[0].float()
        total += float(F.cross_entropy(logits, window[0, 1:].to(logits.device), reduction="sum"))
    return math.exp(min(total / (len(ids) - 1), 700.0))


@dataclass
class Window:
    """A part of a context with its question: which row it is of, the model's inputs, and the characters of
    each token of the context, None for other tokens.
    """

    row: int
    inputs: dict[str, list[int]]
    characters: list[tuple[int, int] | None]


def windows_of(rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int) -> Iterator[Window]:
    """Each row as one or more windows of at most `length` tokens, which overlap by a quarter."""
    right = tokenizer.padding_side == "right"
    for number, row in enumerate(rows):
        pair = (row["question"].strip(), row["context"])
        encoded = tokenizer(
            *(pair if right else pair[::-1]),
            truncation="only_second" if right else "only_first",
            max_length=length,
            stride=length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, offsets in enumerate(encoded["offset_mapping"]):
            of_context = [part == (1 if right else 0) for part in encoded.sequence_ids(i)]
            characters = [tuple(o) if inside else None for o, inside in zip(offsets, of_context, strict=True)]
            names = [name for name in tokenizer.model_input_names if name in encoded]
            yield Window(number, {name: encoded[name][i] for name in names}, characters)


def answer_figures(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], tokenizer: Any, args: KPruneArguments
) -> dict[str, float]:
    """Exact match and F1 of SQuAD, in per cent: the best span of all windows of a row against its answers.

    An answer has at most 30 tokens. Where rows have no answer, as in SQuAD 2, none is given if the first
    token is more likely.
    """
    missing = [column for column in QA_COLUMNS if column not in rows[0]]
    if missing:
        raise ArgumentError(
            f"the evaluation data have the columns {', '.join(rows[0])}, expected question, context and "
            "answers, as SQuAD has"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"{type(tokenizer).__name__} tells no character offsets, expected a fast tokenizer"
        )
    from torchmetrics.functional.text import squad

    limits = (max_positions(model), args.max_seq_length, tokenizer.model_max_length, QA_LENGTH)
    length = min(limit for limit in limits if limit is not None)
    windows = sorted(windows_of(rows, tokenizer, length), key=lambda window: len(window.characters))
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    size = args.per_device_eval_batch_size
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        inputs = tokenizer.pad([window.inputs for window in batch], padding_side="right", return_tensors="pt")
        outputs = model(**to_model(inputs, model), return_dict=True)
        for window, first, last in zip(
            batch, outputs.start_logits.float(), outputs.end_logits.float(), strict=True
        ):
            score, text = best_span(first.cpu(), last.cpu(), window.characters, rows[window.row]["context"])
            none = float(first[0] + last[0])
            null[window.row] = min(null.get(window.row, math.inf), none)
            if window.row not in best or score > best[window.row][0]:
                best[window.row] = (score, text)
    answers = [list(row["answers"]["text"]) for row in rows]
    some_without = not all(answers)
    predictions: list[Any] = []
    targets: list[Any] = []
    for number, texts in enumerate(answers):
        score, text = best[number]
        text = "" if some_without and null[number] > score else text
        predictions.append({"id": str(number), "prediction_text": text})
        texts = texts or [""]
        targets.append({"id": str(number), "answers": {"text": texts, "answer_start": [0] * len(texts)}})
    figures = squad(predictions, targets)
    return {"exact_match": float(figures["exact_match"]), "f1": float(figures["f1"])}


def best_span(
    first: Tensor, last: Tensor, characters: Sequence[tuple[int, int] | None], context: str
) -> tuple[float, str]:
    """Score and text of the likeliest span of context tokens, by logits of first and last, (T,) each."""
    inside = torch.tensor(
        [place is not None for place in characters] + [False] * (len(first) - len(characters))
    )
    scores = first.masked_fill(~inside, -math.inf)[:, None] + last.masked_fill(~inside, -math.inf)[None, :]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(ANSWER_TOKENS - 1)
    score, place = scores.masked_fill(~allowed, -math.inf).flatten().max(0)
    begin, end = (characters[i] for i in divmod(int(place), len(first)))
    return float(score), context[begin[0] : end[1]] if begin is not None and end is not None else ""
