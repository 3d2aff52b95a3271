"""Two models side by side, such as a dense and a pruned one: how large they are, how long they take, how good
they are, and how often they answer the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from .arguments import KPruneArguments
from .calibration.losses import embedding
from .calibration.tasks import task_of, text_inputs
from .checkpoint.loading import load_tokenizer
from .entries import Size
from .errors import ArgumentError
from .evaluation import plain_figures, trainer_of
from .latency.timing import WARM_UP, take_turns
from .pruner import KPrunePruner
from .reports import Document, Table, fragment, to_markdown
from .sizes import model_size
from .structure.facts import in_eval_mode, to_model
from .structure.probes import matrix_flops
from .structure.sublayers import find_sublayers
from .structure.surroundings import plain_modes
from .validation import checked_arguments


FASTER = 1.1
"""A model that is not so many times as fast as another is called no faster."""

ROUNDS = 20
"""Timed passes of each model, in turns."""

ROWS_AT_A_TIME = 1_000
"""Rows whose nearest ones are looked for at once."""


@dataclass
class Timing:
    """How long a forward pass of two models takes, on a batch of sequences of one length.

    Args:
        batch_size: Sequences.
        length: Tokens of each.
        flops: Of one sequence, of both models.
        seconds: Median of both.
        spread: Difference of the third and the first quartile, of both.
        speedup: Median over the rounds of how many times as fast the second is.
    """

    batch_size: int
    length: int
    flops: list[float]
    seconds: list[float]
    spread: list[float]
    speedup: float


@dataclass
class Comparison:
    """What `hf_kprune.compare` finds. `print(comparison)` gives Markdown tables.

    Args:
        names: Of both models.
        sizes: Of both models.
        timings: For each size of batch and length.
        circumstances: Device, threads, rounds and the like.
        metrics: Figures of both models by name, where rows with labels were passed.
        agreement: The share of the answers, of all rows, that are the same, or the correlation of numbers; of
            embeddings, the share of the rows whose nearest one is the same. None if it was not measured.
        remarks: Where no speed-up is to be expected, and why.

    Example:

        >>> from hf_kprune import Comparison, compare
        >>> name = "examples/sst2-tiny"
        >>> result = compare(name, name, batch_sizes=[1], lengths=[8], rounds=2)
        >>> isinstance(result, Comparison), len(result.timings), result.agreement
        (True, 1, None)
    """

    names: list[str]
    sizes: list[Size]
    timings: list[Timing] = field(default_factory=list)
    circumstances: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    agreement: float | None = None
    remarks: list[str] = field(default_factory=list)

    def document(self) -> Document:
        """The whole of it: sizes and figures, times, and what is to be said of them."""
        first, second = self.sizes
        sizes: tuple[tuple[str, float, float, str], ...] = (
            ("parameters", first.parameters, second.parameters, ",.0f"),
            ("megabytes", first.bytes / 1e6, second.bytes / 1e6, ",.1f"),
            *((name, old, new, ".4f") for name, (old, new) in self.metrics.items()),
        )
        rows = [(name, f"{old:{form}}", f"{new:{form}}") for name, old, new, form in sizes]
        if self.agreement is not None:
            rows.append(("agreement", "", f"{self.agreement:.4f}"))
        times = [
            (
                f"{each.batch_size} x {each.length}",
                *(f"{flops / 1e9:.4g}" for flops in each.flops),
                *(
                    f"{1e3 * middle:.4g} ± {1e3 * spread:.2g}"
                    for middle, spread in zip(each.seconds, each.spread, strict=True)
                ),
                f"{each.speedup:.2f}x",
            )
            for each in self.timings
        ]
        columns = ("batch x tokens", "GFLOPs", "GFLOPs, pruned", "ms", "ms, pruned", "speed-up")
        return [
            Table(("", *self.names), rows, "lrr"),
            Table(columns, times, "lrrrrr"),
            [self.circumstances],
            self.remarks,
        ]

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        return to_markdown(self.document())

    def to_json(self) -> str:
        """All numbers."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return fragment(self.document())


@checked_arguments(
    dense="a PreTrainedModel, or the name or path of one", pruned="a PreTrainedModel, or its name or path"
)
@plain_modes()
def compare(  # noqa: PLR0913
    dense: PreTrainedModel | str | os.PathLike[str],
    pruned: PreTrainedModel | str | os.PathLike[str],
    eval_dataset: Any = None,
    processing_class: Any = None,
    batch_sizes: Sequence[int] = (1, 32),
    lengths: Sequence[int] = (16, 128),
    rounds: int = ROUNDS,
    **kwargs: Any,
) -> Comparison:
    """Compare a dense and a pruned model: parameters, bytes, FLOPs, time, figures, and agreement.

    Times are those of forward passes on random tokens, in evaluation mode, on the device where the models
    are; the models take turns, after a pass that is not counted.

    Args:
        dense: A model, or its name or path.
        pruned: Another one.
        eval_dataset: As for `KPrunePruner.evaluate`. Default: figures and agreement are left out.
        processing_class: The tokenizer. Default: the one beside `dense`, if that is a name.
        batch_sizes: Sequences of the batches that are timed.
        lengths: Tokens of their sequences.
        rounds: Timed passes of each model, for each size of batch and length.
        kwargs: What else `KPrunePruner` takes for `evaluate`: `args`, `data_collator`, `compute_metrics`.

    Raises:
        ArgumentError: If a model does not take so many tokens, or takes no token ids.

    Example:

        >>> import hf_kprune
        >>> name = "examples/sst2-tiny"
        >>> comparison = hf_kprune.compare(name, name, batch_sizes=[1], rounds=2)
        >>> comparison.sizes[0] == comparison.sizes[1], [each.length for each in comparison.timings]
        (True, [16, 128])
    """
    if rounds < 1:
        raise ArgumentError(f"rounds is {rounds}, expected at least 1")
    names = [each if isinstance(each, str) else type(each).__name__ for each in (dense, pruned)]
    if processing_class is None and eval_dataset is not None and not isinstance(dense, PreTrainedModel):
        processing_class = load_tokenizer(os.fspath(dense))
    args = kwargs.pop("args", None) or KPruneArguments(disable_tqdm=True)
    pruners = [
        KPrunePruner(model, replace(args), processing_class=processing_class, **kwargs)
        for model in (dense, pruned)
    ]
    models = [pruner.model for pruner in pruners]
    labels = ["dense", "pruned"] if names[0] == names[1] else names
    comparison = Comparison(labels, [model_size(model, find_sublayers(model)) for model in models])
    comparison.timings = [time(models, size, length, rounds) for size in batch_sizes for length in lengths]
    device = models[0].device
    comparison.circumstances = (
        f"Forward passes on random tokens on {device}, {torch.get_num_threads()} threads, "
        f"{models[0].dtype} and {models[1].dtype}: median ± difference of the quartiles of {rounds} passes "
        f"of each in turns, after {WARM_UP} that are not counted. FLOPs are of one sequence."
    )
    if eval_dataset is not None:
        comparison.metrics, comparison.agreement = judge(pruners, eval_dataset)
    comparison.remarks = reasons(comparison.timings)
    return comparison


@torch.no_grad()
def time(models: Sequence[PreTrainedModel], batch_size: int, length: int, rounds: int) -> Timing:
    """FLOPs and seconds of two models on random tokens."""
    inputs = text_inputs(models[0], batch_size, length)
    flops = []
    for model in models:
        sublayers = find_sublayers(model)
        lengths = {name: float(length) for s in sublayers for name in (s.stack_name, s.reads)}
        with in_eval_mode(model):
            products = sum(s.num_units * s.unit_products(lengths) for s in sublayers)
            flops.append(matrix_flops(model, inputs) / batch_size + products)
    each = list(zip(*take_turns(models, inputs, rounds), strict=True))
    quarters = [quantiles(seconds, n=4) if rounds > 1 else [seconds[0]] * 3 for seconds in each]
    return Timing(
        batch_size,
        length,
        flops,
        [median(seconds) for seconds in each],
        [quarter[2] - quarter[0] for quarter in quarters],
        median(first / second for first, second in zip(*each, strict=True)),
    )


def judge(pruners: Sequence[KPrunePruner], eval_dataset: Any) -> tuple[dict[str, list[float]], float | None]:
    """Figures of both models, and how far they agree; None where `predict` does not give answers."""
    if {"exact_match", "perplexity"} & set(task_of(pruners[0].model).figures):
        figures = [plain_figures(pruner.evaluate(eval_dataset), "eval") for pruner in pruners]
        return {name: [each[name] for each in figures] for name in figures[0]}, None
    embeddings = [embeddings_of(pruner, eval_dataset) for pruner in pruners if embeds(pruner)]
    agreed = same_neighbours(*embeddings) if embeddings else None
    if embeddings and pruners[0].compute_metrics is None:
        return {}, agreed
    results = [pruner.predict(eval_dataset) for pruner in pruners]
    figures = [plain_figures(dict(result.metrics or {}), "test") for result in results]
    answers = [np.asarray(first_of(result.predictions)) for result in results]
    agreed = agreed if embeddings else agreement(*answers)
    return {name: [each[name] for each in figures] for name in figures[0]}, agreed


def embeds(pruner: KPrunePruner) -> bool:
    """Whether the model of a pruner is used for one embedding of each row, made of its hidden states."""
    if pruner.sentence_folder is not None:
        return pruner.sentence_folder.task == "feature-extraction" and not pruner.sentence_folder.unknown
    pooling = pruner.args.pooling or "mean"
    return pooling != "none" and task_of(pruner.model, pooling=pooling).variant == pooling


@torch.no_grad()
def embeddings_of(pruner: KPrunePruner, dataset: Any) -> Tensor:
    """The embeddings of all rows, (N, E), of length 1."""
    model, folder, embeddings = pruner.model, pruner.sentence_folder, []
    pooling = pruner.args.pooling or "mean"
    with trainer_of(pruner) as trainer, in_eval_mode(model):
        for batch in trainer.get_test_dataloader(dataset):
            inputs = to_model({name: value for name, value in batch.items() if name != "labels"}, model)
            outputs = model(**inputs)
            valid = inputs.get("attention_mask", torch.ones_like(inputs[model.main_input_name])).bool()
            each = folder.embed(outputs, valid) if folder else embedding(outputs, valid, pooling)
            embeddings.append(F.normalize(each.float(), dim=-1).cpu())
    return torch.cat(embeddings)


def same_neighbours(first: Tensor, second: Tensor) -> float | None:
    """The share of the rows whose nearest other one is the same by both embeddings, (N, E) each, of length 1.
    None for fewer than three rows."""
    if len(first) < 3:
        return None
    same = [nearest(first, start) == nearest(second, start) for start in range(0, len(first), ROWS_AT_A_TIME)]
    return float(torch.cat(same).float().mean())


def nearest(embeddings: Tensor, start: int) -> Tensor:
    """The other row that is nearest to each of some rows, from `start` on."""
    some = embeddings[start : start + ROWS_AT_A_TIME]
    cosines = some @ embeddings.T
    cosines[torch.arange(len(some)), start + torch.arange(len(some))] = -2.0
    return cosines.argmax(-1)


def first_of(predictions: Any) -> Any:
    """The first output of a model, where `predict` gives several."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def agreement(first: Any, second: Any) -> float | None:
    """The share of rows, or of tokens, for which two models answer the same class; of numbers (N, 1), their
    correlation. None for what is neither, such as hidden states.

    Args:
        first: Logits of a model, (N, K) or (N, T, K), in which -100 is padding.
        second: Those of another one.
    """
    if first.shape != second.shape or first.ndim < 2 or first.dtype.kind != "f":
        return None
    if first.shape[1:] == (1,):
        return float(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) if len(first) > 1 else None
    real = ~(first == -100).all(-1)
    return float((first.argmax(-1) == second.argmax(-1))[real].mean())


def reasons(timings: Sequence[Timing]) -> list[str]:
    """For each batch on which the second model is not faster: that this was to be expected, and why."""
    pace = max((each.flops[0] * each.batch_size / each.seconds[0] for each in timings), default=0.0)
    return [
        f"{each.batch_size} x {each.length} tokens: no speed-up is to be expected here, because "
        f"{why(each, pace)}."
        for each in timings
        if each.speedup < FASTER
    ]


def why(timing: Timing, pace: float) -> str:
    """Why a model is not faster than another one.

    Args:
        timing: Of both.
        pace: FLOPs that the first does in a second, at best.
    """
    left = timing.flops[1] / max(timing.flops[0], 1e-9)
    if left > 1 / FASTER:
        return f"{left:.0%} of the FLOPs are left"
    reached = timing.flops[0] * timing.batch_size / timing.seconds[0]
    if reached < pace / 2:
        return (
            "the batch is so small that the time goes into what does not become less, such as the calls of "
            f"modules: the first model does {reached / 1e9:.3g} GFLOPs a second here, and {pace / 1e9:.3g} "
            "at best"
        )
    return (
        f"{left:.0%} of the FLOPs are left, but products of these sizes are slower for their size on this "
        "device; round_to=8 or 64, or a budget in time (target_speedup), suits it better"
    )
