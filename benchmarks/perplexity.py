"""Perplexity of pruned language models on WikiText-2 against the fraction of FLOPs removed.

    python benchmarks/perplexity.py --pack PACK --model SmolLM2-135M-Instruct --output perplexity.jsonl --sparsity 0.2 0.3 \\
        --seeds 0 1 2 --untuned --save pruned

Calibrates on blocks of the train split, which the seed draws, and evaluates in float32, in windows that do not overlap, on
the first tokens of another split: decide on the validation split, and look at the test split once. Each run is appended
to `--output` as a line of JSON, and left out if its line is there; `figures.py` makes tables and plots of the lines.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from tasks import append_line, facts, key_of, make_parser, prune, read_lines
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_kprune import BudgetError, PruningReport
from hf_kprune.methods import METHODS
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut


KEY = (
    "model",
    "method",
    "sparsity",
    "seed",
    "uniform",
    "window",
    "split",
    "tokens_of_split",
    "calibration",
    "options",
)

CHARACTERS = 8
"""Characters of a piece of text for each token that is drawn from it: more than any tokenizer takes on average."""


def first_tokens(texts: Sequence[str], tokenizer: Any, count: int) -> torch.Tensor:
    """The first tokens of the texts, joined: as many as are asked for, or all."""
    ids: list[int] = []
    for start in range(0, len(texts), 900):
        if len(ids) < count:
            part = "".join(texts[start : start + 900])
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:count])


def draw_blocks(
    texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int
) -> list[dict[str, list[int]]]:
    """Calibration rows: `count` blocks of `length` tokens from places of the joined texts that the seed draws.

    A block begins with a word, as a window of the evaluation may in the middle of a sentence. No other text than that of the
    blocks is tokenised.
    """
    text, size = "".join(texts), CHARACTERS * length
    places = random.Random(seed).sample(range(0, len(text) - size, size), count)
    pieces = [text[text.index(" ", place) : place + size] for place in places]
    encoded = tokenizer(pieces, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
    assert all(len(ids) == length for ids in encoded)
    return [{"input_ids": ids} for ids in encoded]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(ids) - window, window):
        row = ids[start : start + window + 1].to(model.device)
        logits = model(row[None, :-1], use_cache=False).logits[0].float()
        total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
        count += window
    return math.exp(total / count)


def of_experts(model: PreTrainedModel, share: float) -> dict[str, Any]:
    """The options by which whole experts go with a share of their parameters, and nothing else does."""
    mixtures = [s for s in find_sublayers(model, expert_unit="expert") if s.is_mixture]
    gone = share * sum(s.num_units * s.unit_parameters for s in mixtures)
    target = {"sparsity": None, "target_params": math.ceil(model.num_parameters() - gone)}
    return {"expert_unit": "expert", "prune_heads": False, "prune_ffn": False, **target}


def untuned(dense: PreTrainedModel, report: PruningReport) -> PreTrainedModel:
    """The dense model without the units that a run removed; the weights that are left are its own."""
    model = copy.deepcopy(dense)
    sublayers = find_sublayers(model, expert_unit=report.arguments["expert_unit"])
    for sublayer, entry in zip(sublayers, report.sublayers, strict=True):
        mask = torch.zeros(entry.units, dtype=torch.bool)
        mask[entry.kept] = True
        cut(sublayer, mask)
    return model


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="Folder of the dense model; its name stands in the lines."
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["surgeon"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--uniform", action="store_true", help="Leave all layers alike, a stock checkpoint.")
    parser.add_argument(
        "--experts",
        action="store_true",
        help="Remove whole experts of a mixture, and so much of the parameters of all of them.",
    )
    parser.add_argument(
        "--untuned", action="store_true", help="Also the same cuts with the dense model's own weights."
    )
    parser.add_argument("--window", type=int, default=512, help="Tokens of a window, and of a block.")
    parser.add_argument("--calibration", type=int, default=40_960, help="Tokens to calibrate on.")
    parser.add_argument("--tokens", type=int, default=20_480, help="Tokens to evaluate on.")
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--save", type=Path, help="Folder to keep the pruned models in.")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    args = parser.parse_args()

    data = args.pack / "data" / "wikitext2"
    train, held_out = (
        pd.read_parquet(data / f"{name}.parquet")["text"].tolist() for name in ("train", args.split)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = first_tokens(held_out, tokenizer, args.tokens + 1)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(Accelerator().device)
    of_dense: float | None = None
    done = {key_of(line, KEY) for line in read_lines(args.output)}
    for seed, method, sparsity in itertools.product(args.seeds, args.method, args.sparsity):
        values = (args.model.name, method, sparsity, seed, args.uniform, args.window, args.split)
        named = {"expert_unit": "expert", **args.options} if args.experts else args.options
        line = dict(zip(KEY, (*values, args.tokens, args.calibration, named), strict=True))
        if key_of(line, KEY) in done:
            continue
        of_dense = perplexity(dense, ids, args.window) if of_dense is None else of_dense
        rows = draw_blocks(train, tokenizer, args.calibration // args.window, args.window, seed)
        options = {"num_tokens": args.calibration, "per_device_batch_size": 4, "uniform": args.uniform}
        options |= {"sparsity": sparsity, "seed": seed, **args.options}
        options |= of_experts(dense, sparsity) if args.experts else {}
        model, begin = copy.deepcopy(dense), time.process_time()
        try:
            report = prune(model, method, rows, tokenizer, **options)
        except BudgetError as error:
            print(f"{method} {sparsity:.0%} seed {seed}: {error}", flush=True)
            continue
        line |= {"cpu_seconds": time.process_time() - begin, **facts(report), "dense": of_dense}
        line |= {"perplexity": perplexity(model, ids, args.window)}
        line |= {
            f"cache_bytes_per_token{when}": size.cache_bytes_per_token
            for when, size in (("_of_dense", report.before), ("", report.after))
        }
        if args.untuned:
            line["untuned"] = perplexity(untuned(dense, report), ids, args.window)
        if args.save:
            folder = args.save / f"{method}{'-uniform' * args.uniform}-{sparsity:g}-seed{seed}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        append_line(args.output, line)
        print(
            f"{method}{', uniform' * args.uniform} {sparsity:.0%} seed {seed}: {line['perplexity']:.2f} of {of_dense:.2f}, "
            f"{line['cpu_seconds']:.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
