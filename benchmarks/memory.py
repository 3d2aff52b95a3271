"""Peak memory of `prune()`, and what it grows by when the model is made deeper by repeating its layers.

    python benchmarks/memory.py MODEL TEXTS.parquet COLUMN [--depth 1 2] [--num_tokens 100000]

Each depth is measured in a process of its own. "above" is the peak over what the process held, model included, when
pruning began; the weights of the copy that is pruned are in it, and are shown beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys

import pandas as pd
import psutil
import torch
from transformers import AutoTokenizer

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.checkpoint.loading import load_model
from hf_kprune.sizes import peak_memory
from hf_kprune.structure.sublayers import find_sublayers


def measure(args: argparse.Namespace, times: int) -> dict[str, float]:
    model = load_model(args.model)
    layers = find_sublayers(model)[0].layers
    for layer in [copy.deepcopy(layer) for _ in range(times - 1) for layer in layers]:
        layers.append(layer)
    model.config.num_hidden_layers = len(layers)
    texts = pd.read_parquet(args.texts)[args.column].tolist()
    options = KPruneArguments(
        sparsity=args.sparsity,
        num_tokens=args.num_tokens,
        num_measure_tokens=args.num_measure_tokens,
        disable_tqdm=True,
    )
    pruner = KPrunePruner(model, options, texts, processing_class=AutoTokenizer.from_pretrained(args.model))
    pruner.callback_handler.callbacks.clear()
    before = psutil.Process().memory_info().rss
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    report = pruner.prune()
    peak = peak_memory(torch.device("cpu"))
    return {
        "layers": len(layers),
        "weights": weights,
        "before": before,
        "peak": peak,
        "above": peak - before,
        "tokens": report.calibration["tokens"],
        "seconds": report.seconds["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("column")
    parser.add_argument("--depth", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num_tokens", type=int, default=100_000)
    parser.add_argument("--num_measure_tokens", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    print(
        "| layers | tokens | weights MB | peak MB | above MB | above less a copy of the weights MB | seconds |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for times in args.depth:
        command = [sys.executable, *sys.argv, "--one", str(times)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ})
        m = json.loads(done.stdout.splitlines()[-1])
        figures = [m[key] / 1e6 for key in ("weights", "peak", "above")] + [(m["above"] - m["weights"]) / 1e6]
        cells = " | ".join(f"{figure:.0f}" for figure in figures)
        print(f"| {m['layers']} | {m['tokens']:,} | {cells} | {m['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
