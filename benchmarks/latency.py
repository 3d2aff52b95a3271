"""Measured speed-up of a pruned model beside its FLOPs ratio, dense and pruned side by side in one run.

    python benchmarks/latency.py DENSE PRUNED [--batch 1 32] [--length 32 128] [--repeats 30] [--threads 2]

Times are medians of alternating passes, so that a machine that slows down slows both; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_kprune.loading import load_model
from hf_kprune.sublayers import find_sublayers


def alternate(models: list[PreTrainedModel], batch: int, length: int, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each model, taken in turns."""
    device = models[0].device
    vocabulary = models[0].get_input_embeddings().num_embeddings
    inputs = {
        "input_ids": torch.randint(vocabulary, (batch, length), device=device),
        "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
    }
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for model, taken in zip(models, seconds, strict=True):
                begin = time.perf_counter()
                model(**inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 3:  # the first passes warm up
                    taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in seconds]


def prunable_flops(model: PreTrainedModel, length: int) -> float:
    return sum(s.unit_flops({s.stack_name: length}) * s.num_units for s in find_sublayers(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--length", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = [load_model(name).eval().to(args.device) for name in (args.dense, args.pruned)]
    kind = AutoConfig.from_pretrained(args.dense).model_type
    print(f"{kind}, {args.device}, {args.threads} threads, median of {args.repeats}\n")
    print("| batch | tokens | dense ms | pruned ms | speed-up | FLOPs ratio |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    for batch in args.batch:
        for length in args.length:
            dense, pruned = alternate(models, batch, length, args.repeats)
            ratio = prunable_flops(models[0], length) / prunable_flops(models[1], length)
            print(
                f"| {batch} | {length} | {1e3 * dense:.1f} | {1e3 * pruned:.1f} | {dense / pruned:.2f}x | {ratio:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
