"""Measured speed-up of a pruned model beside its FLOPs ratio, dense and pruned side by side in one run.

    python benchmarks/latency.py DENSE PRUNED [--batch 1 32] [--length 32 128] [--repeats 30] [--threads 2]

Times are medians of alternating passes, so that a machine that slows down slows both; the ratio is what counts.
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel

from hf_kprune.calibration.tasks import text_inputs
from hf_kprune.checkpoint.loading import load_model
from hf_kprune.latency.timing import compare
from hf_kprune.structure.sublayers import find_sublayers


def prunable_flops(model: PreTrainedModel, length: int) -> float:
    sublayers = find_sublayers(model)
    return sum(
        s.unit_flops({other.stack_name: length for other in sublayers}) * s.num_units for s in sublayers
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--length", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = [load_model(name).to(args.device) for name in (args.dense, args.pruned)]
    print(f"{models[0].config.model_type}, {args.device}, {args.threads} threads, median of {args.repeats}\n")
    print(
        "| batch | tokens | dense ms | pruned ms | speed-up | FLOPs ratio |\n| ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for batch in args.batch:
        for length in args.length:
            dense, pruned = compare(models, text_inputs(models[0], batch, length), args.repeats)
            ratio = prunable_flops(models[0], length) / prunable_flops(models[1], length)
            print(
                f"| {batch} | {length} | {1e3 * dense:.1f} | {1e3 * pruned:.1f} | {dense / pruned:.2f}x | {ratio:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
