"""Greedy continuations of passages of WikiText-2 by a dense model and by pruned ones, side by side in Markdown.

    python benchmarks/continuations.py --pack PACK DENSE PRUNED [PRUNED ...] [--split validation]

A table first tells how much each model repeats itself: the share of the 4-grams of tokens of a continuation that occurred in it
before, as a mean over the prompts and at the most.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_kprune  # noqa: F401  # so that pruned checkpoints load


def repetition(tokens: Sequence[int], length: int = 4) -> float:
    """The share of the n-grams of tokens, each of so many, that occurred before; 0 if there is none."""
    grams = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def draw_prompts(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int) -> list[list[int]]:
    """The first tokens of paragraphs that the seed draws, of those without unknown words that have twice as many words."""
    paragraphs = [text.strip() for text in texts if len(text.split()) >= 2 * length and "<unk>" not in text]
    drawn = random.Random(seed).sample(paragraphs, count)
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in drawn]


@torch.inference_mode()
def continuation(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """The tokens that the model takes for the likeliest, one after the other, until it ends or there are `new`."""
    ids = torch.tensor([prompt], device=model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    tokens: list[int] = written[0, len(prompt) :].tolist()
    return tokens


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="+")
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=32, help="Tokens of a prompt.")
    parser.add_argument("--new", type=int, default=64, help="Tokens of a continuation at the most.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = pd.read_parquet(args.pack / "data" / "wikitext2" / f"{args.split}.parquet")["text"].tolist()
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    prompts = draw_prompts(texts, tokenizer, args.prompts, args.prompt, args.seed)
    written: dict[str, list[list[int]]] = {}
    for path in [args.dense, *args.pruned]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        written[Path(path).name] = [continuation(model, prompt, args.new) for prompt in prompts]
    print("| model | repeated 4-grams, mean | most |\n| --- | ---: | ---: |")
    for name, continuations in written.items():
        shares = [repetition(tokens) for tokens in continuations]
        print(f"| {name} | {sum(shares) / len(shares):.1%} | {max(shares):.1%} |")
    for number, prompt in enumerate(prompts):
        print(f"\n| | {cell(tokenizer.decode(prompt))} ... | repeated |\n| --- | --- | ---: |")
        for name, continuations in written.items():
            tokens = continuations[number]
            text = cell(tokenizer.decode(tokens, skip_special_tokens=True))
            print(f"| {name} | {text} | {repetition(tokens):.0%} |")


if __name__ == "__main__":
    main()
