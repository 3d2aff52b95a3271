"""Perplexity of pruned language models on WikiText-2 against the fraction of FLOPs removed.

    python benchmarks/perplexity.py --pack PACK --output perplexity.jsonl --sparsity 0.05 0.1 0.15 0.2 --seeds 0 1 2

Calibrates on blocks of the train split, packed, and evaluates on the test split in windows of `--window` tokens that do not
overlap, in bfloat16 autocast, the dense model too. Appends one JSON line per run to `--output` and leaves out the runs
that are there; `figures.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tasks import METHOD_NAMES, append_line, facts, key_of, prune_each, read_lines
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_kprune import PruningReport
from hf_kprune.structure.sublayers import find_sublayers
from hf_kprune.structure.surgery import cut


KEY = ("model", "method", "sparsity", "seed", "window", "split", "tokens_of_split", "options")


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int, half: bool = True) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(ids) - window, window)
    for first in range(0, len(starts), 4):
        rows = torch.stack([ids[start : start + window + 1] for start in starts[first : first + 4]]).to(
            model.device
        )
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            logits = model(rows[:, :-1], use_cache=False).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument(
        "--output", type=Path, required=True, help="File that the JSON lines are appended to."
    )
    parser.add_argument(
        "--model", default="opt-wikitext2", help="Model of the pack, or the folder of another one."
    )
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, help="Tokens of the test split. By default all of it.")
    parser.add_argument(
        "--split", default="test", choices=["validation", "test"], help="Decide on validation, once on test."
    )
    parser.add_argument(
        "--float32", action="store_true", help="Evaluate in float32, in place of bfloat16 autocast."
    )
    parser.add_argument(
        "--untuned", action="store_true", help="Also the same cuts with the dense model's own weights."
    )
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    args = parser.parse_args()

    path, data = Path(args.model), args.pack / "data" / "wikitext2"
    if not path.is_dir():
        path = args.pack / "models" / args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [text for text in pd.read_parquet(data / "train.parquet")["text"] if text]
    test = [text for text in pd.read_parquet(data / f"{args.split}.parquet")["text"] if text]
    ids = torch.cat(
        [
            torch.tensor(
                tokenizer("".join(test[k : k + 900]), add_special_tokens=False, verbose=False)["input_ids"]
            )
            for k in range(0, len(test), 900)
        ]
    )[: None if args.tokens is None else args.tokens + 1]
    done, dense = (
        {key_of(line, KEY) for line in read_lines(args.output)},
        AutoModelForCausalLM.from_pretrained(path),
    )
    of_dense = perplexity(dense, ids, args.window, not args.float32)
    options = {"packing": True, "max_seq_length": 256, "per_device_batch_size": 8, **args.options}
    for seed, method in itertools.product(args.seeds, args.method):
        line = {
            "model": path.name,
            "method": method,
            "seed": seed,
            "window": args.window,
            "split": args.split,
            "tokens_of_split": args.tokens,
            "options": args.options,
        }
        left = [
            sparsity for sparsity in args.sparsity if key_of(line | {"sparsity": sparsity}, KEY) not in done
        ]

        def record(report: PruningReport, model: PreTrainedModel, line: dict[str, Any] = line) -> None:
            found = line | {"sparsity": report.asked["sparsity"], "dense": of_dense, **facts(report)}
            found["perplexity"] = perplexity(model, ids, args.window, not args.float32)
            if args.untuned:
                untuned = copy.deepcopy(dense)
                for sublayer, entry in zip(find_sublayers(untuned), report.sublayers, strict=True):
                    cut(
                        sublayer,
                        torch.zeros(entry.units, dtype=torch.bool).index_fill(
                            0, torch.tensor(entry.kept), True
                        ),
                    )
                found["untuned"] = perplexity(untuned, ids, args.window, not args.float32)
            append_line(args.output, found)
            print(
                f"{line['method']} {found['sparsity']:.0%} seed {line['seed']}: {found['perplexity']:.2f} of {of_dense:.2f}",
                flush=True,
            )

        if left:
            prune_each(dense, method, left, record, texts, tokenizer, seed=seed, **options)


if __name__ == "__main__":
    main()
