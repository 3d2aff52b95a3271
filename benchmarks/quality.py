"""Quality of pruned models against the fraction of FLOPs removed, on the evaluation pack.

    python benchmarks/quality.py --pack PACK --task sst2 sts stsb --sparsity 0.4 0.5 0.6 0.7 0.75 0.8 --seeds 0 1 2
    python benchmarks/quality.py --pack PACK --task sst2 --sparsity 0.75 --ablation

Calibrates on a task's train split and evaluates on its validation (sst2) or test split (sts, stsb), with labels used for
evaluation alone. Writes one JSON line per run and prints a table of mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.methods import METHODS, KPrune, Statistics


class RandomScores(KPrune):
    """Ablation: K-prune without knowledge measurement; heads and neurons have the same chance."""

    def __init__(self, args: KPruneArguments):
        super().__init__(args)
        self.generator = torch.Generator().manual_seed(args.seed)

    def score(self, statistics: Statistics) -> Tensor:
        return torch.rand(len(statistics.energy) // statistics.unit_width, generator=self.generator)


class UniformSearch(KPrune):
    """Ablation: K-prune without KPMS; every sublayer keeps the same share of its best units."""

    def search(
        self, scores: Sequence[Tensor], costs: Sequence[float], budget: float, minimum: Sequence[int], multiple: Sequence[int]
    ) -> list[Tensor]:
        masks = []
        for score in scores:
            mask = torch.zeros(len(score), dtype=torch.bool)
            mask[score.cpu().argsort(descending=True)[: int(len(score) * (1 - self.args.sparsity))]] = True
            masks.append(mask)
        return masks


ABLATIONS: dict[str, dict[str, Any]] = {
    "kprune": {},
    "without knowledge": {"method": "random_scores"},
    "without KPMS": {"method": "uniform_search"},
    "without KPWT": {"tune": False},
}
METHODS.update(random_scores=RandomScores, uniform_search=UniformSearch)


def batches(model: PreTrainedModel, tokenizer: Any, texts: list[Any], size: int = 64) -> list[Tensor]:
    """Outputs for every text (or pair of texts), in order: logits, or mean-pooled normalised embeddings."""
    order = sorted(range(len(texts)), key=lambda i: len(str(texts[i])))
    outputs: list[Any] = [None] * len(texts)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(texts), size):
            picked = order[start : start + size]
            pairs = [texts[i] for i in picked]
            columns = [pairs] if isinstance(pairs[0], str) else [list(c) for c in zip(*pairs, strict=True)]
            inputs = tokenizer(*columns, padding=True, truncation=True, max_length=256, return_tensors="pt").to(model.device)
            result = model(**inputs)
            if "logits" in result:
                values = result.logits
            else:
                weight = inputs["attention_mask"].unsqueeze(-1).to(result.last_hidden_state.dtype)
                mean = (result.last_hidden_state * weight).sum(1) / weight.sum(1)
                values = torch.nn.functional.normalize(mean, dim=-1)
            for i, value in zip(picked, values.float().cpu(), strict=True):
                outputs[i] = value
    return outputs


def accuracy(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    predicted = torch.stack(batches(model, tokenizer, rows["sentence"].tolist())).argmax(-1)
    return 100 * float((predicted == torch.tensor(rows["label"].to_numpy())).float().mean())


def cosine_spearman(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    left, right = (torch.stack(batches(model, tokenizer, rows[c].tolist())) for c in ("sentence1", "sentence2"))
    return 100 * float(spearmanr((left * right).sum(1), rows["label"]).statistic)


def score_spearman(model: PreTrainedModel, tokenizer: Any, rows: pd.DataFrame) -> float:
    pairs = list(zip(rows["sentence1"], rows["sentence2"], strict=True))
    return 100 * float(spearmanr(torch.stack(batches(model, tokenizer, pairs)).squeeze(1), rows["label"]).statistic)


Metric = Callable[[PreTrainedModel, Any, pd.DataFrame], float]
TASKS: dict[str, tuple[str, Any, str, str, Metric]] = {
    "sst2": ("minilm-sst2", AutoModelForSequenceClassification, "sst2/train", "sst2/validation", accuracy),
    "sts": ("all-MiniLM-L6-v2", AutoModel, "stsb/train", "stsb/test", cosine_spearman),
    "stsb": ("minilm-stsb", AutoModelForSequenceClassification, "stsb/train", "stsb/test", score_spearman),
}


def calibration_texts(task: str, rows: pd.DataFrame) -> list[Any]:
    if task == "sst2":
        return rows["sentence"].tolist()
    if task == "sts":
        return [*rows["sentence1"], *rows["sentence2"]]
    return list(zip(rows["sentence1"], rows["sentence2"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.7, 0.75, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablation", action="store_true", help="Also without knowledge, without KPMS, without KPWT.")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    parser.add_argument("--output", type=Path, help="File that the JSON lines are appended to.")
    args = parser.parse_args()

    results: dict[tuple[str, str, float], list[float]] = {}
    for task in args.task:
        name, model_class, train, test, metric = TASKS[task]
        path = args.pack / "models" / name
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = calibration_texts(task, pd.read_parquet(args.pack / "data" / f"{train}.parquet"))
        rows = pd.read_parquet(args.pack / "data" / f"{test}.parquet")
        for seed in args.seeds:
            for sparsity in args.sparsity:
                for variant, options in ABLATIONS.items() if args.ablation else [("kprune", {})]:
                    model = model_class.from_pretrained(path)
                    settings = {"sparsity": sparsity, "seed": seed, "disable_tqdm": True, **args.options, **options}
                    pruner = KPrunePruner(model, KPruneArguments(**settings), texts, processing_class=tokenizer)
                    pruner.callback_handler.callbacks.clear()
                    if not results.get((task, "dense", 0.0)):
                        results[task, "dense", 0.0] = [metric(model, tokenizer, rows)]
                        print(f"{task} dense {results[task, 'dense', 0.0][0]:.2f}", flush=True)
                    start = time.perf_counter()
                    report = pruner.prune()
                    seconds = time.perf_counter() - start
                    figure = metric(pruner.model, tokenizer, rows)
                    results.setdefault((task, variant, sparsity), []).append(figure)
                    line = {
                        "task": task,
                        "variant": variant,
                        "sparsity": sparsity,
                        "achieved": report.sparsity,
                        "seed": seed,
                        "metric": figure,
                        "seconds": seconds,
                        "tokens": report.calibration["tokens"],
                        "kept": [len(s.kept) for s in report.sublayers],
                        "device": report.device,
                        "versions": report.versions,
                    }
                    if args.output:
                        with args.output.open("a") as file:
                            file.write(json.dumps(line) + "\n")
                    print(f"{task} {variant} {sparsity:.0%} seed {seed}: {figure:.2f} ({seconds:.0f} s)", flush=True)
    print("\n| task | variant | removed | mean | standard deviation | runs |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for (task, variant, sparsity), figures in results.items():
        spread = f"{statistics.stdev(figures):.2f}" if len(figures) > 1 else "-"
        print(f"| {task} | {variant} | {sparsity:.0%} | {statistics.mean(figures):.2f} | {spread} | {len(figures)} |")


if __name__ == "__main__":
    main()
