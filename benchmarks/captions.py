"""Train a small model that captions drawn shapes, in minutes on one core, and prune it by several methods.

    python benchmarks/captions.py --model captioner --output captions.jsonl --method surgeon magnitude random \\
        --sparsity 0.25 0.5 0.75 --seeds 0 1 2

A picture of 32 x 32 shows two shapes of different colours and sizes on a noisy ground, and its caption says which is left of the other,
or above it: "a red circle left of a blue square". An encoder of images (ViT, 4 layers, 96 wide) and a decoder of texts (GPT-2, 3 layers) are
trained together from scratch on pictures of one seed, unless they are in the folder already. They are pruned with pictures of
another seed and the captions that they give to these themselves, without labels. Exact match of greedy captions, and the
perplexity of the true ones, are of pictures of a third seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    get_cosine_schedule_with_warmup,
)

from hf_kprune import KPruneArguments, KPrunePruner


COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
}
SHAPES = ("circle", "square", "cross")
WORDS = ("<pad>", "<s>", "</s>", "a", "left", "above", "of", *COLOURS, *SHAPES)
SIDE, LONGEST = 32, 10
"""Pixels of a picture, and words of a caption with what begins and ends it."""


def inside(shape: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Which points, seen from the middle of a shape of half a side `size`, are in it."""
    if shape == "circle":
        return np.asarray(x**2 + y**2 <= size**2)
    if shape == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) <= 0.85 * size)
    return np.asarray((np.minimum(abs(x), abs(y)) <= size / 3) & (np.maximum(abs(x), abs(y)) <= size))


def draw_picture(generator: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A picture, (3, SIDE, SIDE), and the words of its caption."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    picture = generator.normal(0.2, 0.1, (3, SIDE, SIDE))
    beside = bool(generator.integers(2))
    names = generator.choice(list(COLOURS), 2, replace=False)
    kinds = generator.choice(SHAPES, 2)
    for place, (colour, shape) in enumerate(zip(names, kinds, strict=True)):
        along, across = (middle + generator.uniform(-1, 1) for middle in (8 + 16 * place, SIDE / 2))
        size = generator.uniform(5, 7)
        middle = (along, across) if beside else (across, along)
        points = inside(str(shape), x - middle[0], y - middle[1], size)
        picture[:, points] = np.array(COLOURS[str(colour)])[:, None] * generator.uniform(0.8, 1)
    words = [
        "<s>",
        "a",
        names[0],
        kinds[0],
        *(("left", "of") if beside else ("above",)),
        "a",
        names[1],
        kinds[1],
        "</s>",
    ]
    return picture, [WORDS.index(str(word)) for word in words]


def draw_pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, (count, 3, SIDE, SIDE), and their captions, (count, LONGEST), padded with 0."""
    generator = np.random.default_rng(seed)
    pairs = [draw_picture(generator) for _ in range(count)]
    captions = torch.tensor([words + [0] * (LONGEST - len(words)) for _, words in pairs])
    return torch.from_numpy(np.array([picture for picture, _ in pairs])).float(), captions


def make_model() -> PreTrainedModel:
    encoder = AutoConfig.for_model(
        "vit",
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=SIDE,
        patch_size=8,
    )
    decoder = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(WORDS),
        n_embd=96,
        n_layer=3,
        n_head=4,
        n_positions=LONGEST,
        is_decoder=True,
        add_cross_attention=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return VisionEncoderDecoderModel(config)


def loss_of(model: PreTrainedModel, pictures: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """The mean loss of the words of captions after the first one."""
    labels = captions[:, 1:].masked_fill(captions[:, 1:] == 0, -100)
    logits = model(pixel_values=pictures, decoder_input_ids=captions[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train(model: PreTrainedModel, steps: int, batch: int, seed: int) -> None:
    """Train on pictures that are drawn anew for each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in range(steps):
        loss = loss_of(model, *draw_pictures(batch, seed + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def captions_of(model: PreTrainedModel, pictures: torch.Tensor) -> torch.Tensor:
    """Greedy captions, (count, LONGEST), padded with 0."""
    parts = [model.generate(part, max_length=LONGEST, do_sample=False) for part in pictures.split(250)]
    wide = [torch.nn.functional.pad(part, (0, LONGEST - part.shape[1])) for part in parts]
    return torch.cat(wide)


@torch.no_grad()
def figures_of(model: PreTrainedModel, pictures: torch.Tensor, captions: torch.Tensor) -> dict[str, float]:
    """How many of its captions are word by word the true ones, and how little it wonders about these."""
    right = (captions_of(model, pictures) == captions).all(1).double().mean()
    return {
        "exact_match": float(right),
        "perplexity": math.exp(float(loss_of(model, pictures, captions))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Folder of the model.")
    parser.add_argument("--output", type=Path, required=True, help="File to add lines to.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="Pictures of a step.")
    parser.add_argument("--method", nargs="*", default=["surgeon", "magnitude", "random"])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=300, help="That models are pruned with.")
    args = parser.parse_args()

    if not args.model.exists():
        torch.manual_seed(0)
        model = make_model()
        print(f"{model.num_parameters():,} parameters")
        train(model, args.steps, args.batch, seed=10_000_000)
        model.save_pretrained(args.model)
    held_out = draw_pictures(1000, seed=2)
    load = VisionEncoderDecoderModel.from_pretrained
    dense = figures_of(load(args.model).eval(), *held_out)
    print("dense", dense)
    for seed in args.seeds:
        pictures, _ = draw_pictures(args.pictures, seed=1_000 + seed)
        answers = captions_of(load(args.model).eval(), pictures)
        rows: list[dict[str, Any]] = [
            {"pixel_values": picture, "labels": words[1:][words[1:] != 0].tolist()}
            for picture, words in zip(pictures, answers, strict=True)
        ]
        for method in args.method:
            for sparsity in args.sparsity:
                model, start = load(args.model).eval(), time.process_time()
                options = KPruneArguments(
                    sparsity=sparsity,
                    method=method,
                    seed=seed,
                    num_tokens=10**9,
                    disable_tqdm=True,
                    use_cpu=True,
                )
                report = KPrunePruner(model, options, rows).prune()
                line = {
                    "model": args.model.name,
                    "method": method,
                    "sparsity": sparsity,
                    "seed": seed,
                    "pictures": args.pictures,
                    "cpu_seconds": time.process_time() - start,
                    "achieved": report.sparsity,
                    "dense": dense,
                    **figures_of(model, *held_out),
                    "kept": [entry.kept for entry in report.sublayers],
                    "versions": report.versions,
                }
                print(json.dumps({k: line[k] for k in ("method", "sparsity", "seed", "exact_match")}))
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
