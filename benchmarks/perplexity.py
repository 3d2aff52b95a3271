"""Perplexity of pruned language models on WikiText-2, with and without weight tuning, against the fraction removed.

    python benchmarks/perplexity.py --pack PACK --sparsity 0.05 0.1 0.15 0.2 0.3 0.4 --seeds 0 1 2

Calibrates on blocks of the train split, packed, and evaluates on the whole test split in windows of `--window` tokens that do
not overlap, in bfloat16 autocast, the dense model too. "untuned" is the dense model with the same cuts and its own weights.
Writes one JSON line per run and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.sublayers import cut, find_sublayers


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(ids) - window - 1, window)
    for first in range(0, len(starts), 4):
        rows = torch.stack([ids[start : start + window + 1] for start in starts[first : first + 4]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--model", default="opt-wikitext2", help="Model of the pack.")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    parser.add_argument("--output", type=Path, help="File that the JSON lines are appended to.")
    parser.add_argument("--save", type=Path, help="Folder for the pruned models.")
    args = parser.parse_args()

    path, data = args.pack / "models" / args.model, args.pack / "data" / "wikitext2"
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text in pd.read_parquet(data / "train.parquet")["text"] if text]
    test = [text for text in pd.read_parquet(data / "test.parquet")["text"] if text]
    ids = torch.cat(
        [
            torch.tensor(tokenizer("".join(test[k : k + 500]), add_special_tokens=False, verbose=False)["input_ids"])
            for k in range(0, len(test), 500)
        ]
    )
    dense = perplexity(AutoModelForCausalLM.from_pretrained(path), ids, args.window)
    print(f"dense {dense:.2f}", flush=True)
    results: dict[tuple[float, str], list[float]] = {}
    for seed in args.seeds:
        for sparsity in args.sparsity:
            settings = {"sparsity": sparsity, "seed": seed, "packing": True, "disable_tqdm": True}
            options = KPruneArguments(**{**settings, "max_seq_length": 256, "per_device_batch_size": 8, **args.options})
            pruner = KPrunePruner(AutoModelForCausalLM.from_pretrained(path), options, texts, processing_class=tokenizer)
            pruner.callback_handler.callbacks.clear()
            start = time.perf_counter()
            report = pruner.prune()
            seconds = time.perf_counter() - start
            if args.save:
                pruner.save_model(str(args.save / f"{args.model}-{sparsity}-{seed}"))
            untuned = AutoModelForCausalLM.from_pretrained(path)
            for sublayer, entry in zip(find_sublayers(untuned), report.sublayers, strict=True):
                cut(sublayer, torch.zeros(entry.units, dtype=torch.bool).index_fill(0, torch.tensor(entry.kept), True))
            for variant, model in (("kprune", pruner.model), ("untuned", untuned)):
                figure = perplexity(model, ids, args.window)
                results.setdefault((sparsity, variant), []).append(figure)
                print(f"{variant} {sparsity:.0%} seed {seed}: {figure:.2f} ({seconds:.0f} s)", flush=True)
                if args.output:
                    line = {
                        "model": args.model,
                        "variant": variant,
                        "sparsity": sparsity,
                        "achieved": report.sparsity,
                        "seed": seed,
                        "perplexity": figure,
                        "dense": dense,
                        "seconds": seconds,
                        "tokens": report.calibration["tokens"],
                        "kept": [len(s.kept) for s in report.sublayers],
                        "cache_bytes_per_token": report.after.cache_bytes_per_token,
                    }
                    with args.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    print("\n| removed | " + " | ".join(f"{s:.0%}" for s in args.sparsity) + " |\n| --- |" + " ---: |" * len(args.sparsity))
    for variant in ("kprune", "untuned"):
        cells = []
        for sparsity in args.sparsity:
            figures = results[sparsity, variant]
            spread = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
            cells.append(f"{statistics.mean(figures):.2f}{spread}")
        print(f"| {variant} | " + " | ".join(cells) + " |")
    print(f"\ndense {dense:.2f}; mean ± standard deviation over {len(args.seeds)} seeds")


if __name__ == "__main__":
    main()
