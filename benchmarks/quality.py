"""Quality of pruned models against the fraction of FLOPs removed, on the evaluation pack.

    python benchmarks/quality.py --pack PACK --output quality.jsonl --sparsity 0.4 0.5 0.6 0.7 0.75 0.8 --seeds 0 1 2
    python benchmarks/quality.py --pack PACK --output quality.jsonl --method surgeon kprune --sparsity 0.75 --ablation

Calibrates on a task's train split and evaluates on its validation (sst2) or test split (sts, stsb), or, for squad, on
questions on other paragraphs than those evaluated; labels are used for evaluation alone. Appends one JSON line per run to
`--output` and leaves out the runs that are there; `figures.py` makes tables and plots of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tasks import (
    METHOD_NAMES,
    TASKS,
    append_line,
    calibration_texts,
    facts,
    key_of,
    load_model,
    load_tokenizer,
    make_parser,
    prune_each,
    read_lines,
    splits,
)
from torch import Tensor
from transformers import PreTrainedModel

from hf_kprune import KPruneArguments, PruningReport
from hf_kprune.methods import METHODS, Statistics
from hf_kprune.methods.kprune import KPrune
from hf_kprune.methods.surgeon import Surgeon


KEY = ("task", "method", "variant", "sparsity", "seed", "options")


class RandomScores(KPrune):
    """Ablation: K-prune without knowledge measurement; heads and neurons have the same chance."""

    def __init__(self, args: KPruneArguments):
        super().__init__(args)
        self.generator = torch.Generator().manual_seed(args.seed)

    def score(self, statistics: Statistics) -> Tensor:
        return torch.rand(len(statistics.energy) // statistics.unit_width, generator=self.generator)


def search_alike(
    method: Any, measured: Sequence[Statistics], scores: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """Every sublayer keeps the same share of its best units: the budget is spent by their ranks."""
    return KPrune.search(
        method, measured, [score.argsort().argsort().add(1) / len(score) for score in scores], *rest
    )


class KPruneAlike(KPrune):
    """Ablation: K-prune without KPMS."""

    def search(self, *arguments: Any) -> list[Tensor]:
        return search_alike(self, *arguments)


class Alike(Surgeon):
    """Ablation: our method with the same share for every sublayer."""

    exponents = (1.0,)

    def search(self, *arguments: Any) -> list[Tensor]:
        return search_alike(self, *arguments)


class NoSplit(Surgeon):
    """Ablation: our method with the split that the sum of losses gives."""

    exponents = (1.0,)


class NoMetric(Surgeon):
    """Ablation: our method with the plain distance of outputs as loss."""

    def score(self, statistics: Statistics) -> Tensor:
        assert statistics.metric is not None
        identity = statistics.samples * torch.eye(len(statistics.metric), dtype=statistics.metric.dtype)
        return super().score(replace(statistics, metric=identity.to(statistics.metric.device)))


METHODS.update(
    random_scores=RandomScores, kprune_alike=KPruneAlike, alike=Alike, no_split=NoSplit, no_metric=NoMetric
)
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "kprune": {
        "without knowledge": {"method": "random_scores"},
        "without KPMS": {"method": "kprune_alike"},
        "without KPWT": {"tune": False},
    },
    "surgeon": {
        "without the Fisher metric": {"method": "no_metric"},
        "without trying splits": {"method": "no_split"},
        "the same share everywhere": {"method": "alike"},
        "without intercept": {"tune_bias": False},
        "without ridge": {"ridge": 0.0},
        "without tuning inputs": {"tune_inputs": False},
        "without tuning": {"tune": False},
    },
}


class Data(NamedTuple):
    """What all runs of a task share."""

    tokenizer: Any
    texts: list[Any]
    judge: Callable[[PreTrainedModel], float]
    dense: float


def load(pack: Path, task: str) -> Data:
    tokenizer, (train, test) = load_tokenizer(pack, task), splits(pack, task)

    def judge(model: PreTrainedModel) -> float:
        return TASKS[task].metric(model, tokenizer, test)

    return Data(tokenizer, calibration_texts(task, train), judge, judge(load_model(pack, task)))


def run(
    pack: Path,
    data: Data,
    line: dict[str, Any],
    sparsities: Sequence[float],
    changes: dict[str, Any],
    output: Path,
) -> None:
    """Prune for all of `sparsities`, and append `line` with what came of each to `output`."""

    def record(report: PruningReport, model: PreTrainedModel) -> None:
        sparsity = report.asked["sparsity"]
        metric = data.judge(model)
        append_line(
            output, line | {"sparsity": sparsity, "metric": metric, "dense": data.dense, **facts(report)}
        )
        name = f"{line['task']} {line['method']} {line['variant']}".strip()
        print(f"{name} {sparsity:.0%} seed {line['seed']}: {metric:.2f} of {data.dense:.2f}", flush=True)

    options = {"seed": line["seed"], **line["options"], **changes}
    method = options.pop("method", line["method"])
    prune_each(
        load_model(pack, line["task"]), method, sparsities, record, data.texts, data.tokenizer, **options
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.7, 0.75, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--ablation", action="store_true", help="Also without each ingredient of kprune and of surgeon."
    )
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    args = parser.parse_args()

    done = {key_of(line, KEY) for line in read_lines(args.output)}
    variants: list[tuple[str, str, dict[str, Any]]] = [(method, "", {}) for method in args.method]
    if args.ablation:
        variants += [
            (method, *variant) for method in args.method for variant in ABLATIONS.get(method, {}).items()
        ]
    for task in args.task:
        data = None
        for seed, (method, variant, changes) in itertools.product(args.seeds, variants):
            line = {"task": task, "method": method, "variant": variant, "seed": seed, "options": args.options}
            left = [
                sparsity
                for sparsity in args.sparsity
                if key_of(line | {"sparsity": sparsity}, KEY) not in done
            ]
            if left:
                data = data or load(args.pack, task)
                run(args.pack, data, line, left, changes, args.output)


if __name__ == "__main__":
    main()
