"""Tokens per second of generate(), dense and pruned in turns, and the bytes of their KV caches.

python benchmarks/generation.py DENSE PRUNED [PRUNED ...] [--batch 1 8] [--prompt 64] [--new 128]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_kprune.sizes import cache_bytes_per_token
from hf_kprune.structure.sublayers import find_sublayers


@torch.inference_mode()
def seconds_of(model: PreTrainedModel, batch: int, prompt: int, new: int) -> float:
    ids = torch.randint(
        4, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)
    )
    begin = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False
    )
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="+")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [args.dense, *args.pruned]
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in names]
    print(
        "| model | batch | tokens/s | speed-up | KV-cache bytes per token |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for batch in args.batch:
        taken: list[list[float]] = [[] for _ in models]
        for turn in range(args.repeats + 2):
            for model, seconds in zip(models, taken, strict=True):
                value = seconds_of(model, batch, args.prompt, args.new)
                if turn >= 2:  # the first ones warm up
                    seconds.append(value)
        medians = [statistics.median(seconds) for seconds in taken]
        for name, model, median in zip(names, models, medians, strict=True):
            cache = cache_bytes_per_token(model, find_sublayers(model))
            rate, speed_up = batch * args.new / median, medians[0] / median
            print(
                f"| {name.rstrip('/').split('/')[-1]} | {batch} | {rate:.0f} | {speed_up:.2f}x | {cache} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
