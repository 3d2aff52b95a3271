"""What a pruned model gets back when it learns from the dense one for some minutes, without labels.

    python benchmarks/recovery.py --pack PACK --output recovery.jsonl --models FOLDER --task sts sst2 squad --seeds 0 1 2

Prunes as quality.py does, keeps the pruned models in a folder, lets each recover, and appends one JSON line per run to `--output`.
Labels are used for evaluation alone. Seconds of the processor tell more than minutes where other programs run beside.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tasks import (
    TASKS,
    append_line,
    calibration_texts,
    key_of,
    load_model,
    load_tokenizer,
    make_parser,
    prune,
    read_lines,
    splits,
)

from hf_kprune import KPruneArguments, KPrunePruner


KEY = ("task", "seed", "sparsity", "minutes", "max_steps", "tokens")


def run(args: argparse.Namespace, line: dict[str, Any]) -> dict[str, Any]:
    """Prune, unless that is done, and recover: `line` with what came of it."""
    task, seed = line["task"], line["seed"]
    tokenizer, (train, test) = load_tokenizer(args.pack, task), splits(args.pack, task)
    dense, texts, metric = load_model(args.pack, task), calibration_texts(task, train), TASKS[task].metric
    folder = args.models / f"{task}-{seed}"
    if not folder.exists():
        model = load_model(args.pack, task)
        prune(model, "surgeon", texts, tokenizer, sparsity=args.sparsity, seed=seed, num_tokens=30_000)
        model.save_pretrained(folder)
    model = TASKS[task].model_class.from_pretrained(folder)
    line |= {"dense": metric(dense, tokenizer, test), "pruned": metric(model, tokenizer, test)}
    options = KPruneArguments(num_tokens=args.tokens, max_seq_length=256, seed=seed, disable_tqdm=True)
    pruner = KPrunePruner(model, options, texts, processing_class=tokenizer)
    begin = time.process_time()
    recovery = pruner.recover(args.minutes, dense_model=dense, max_steps=args.max_steps)
    return line | {
        "recovered": metric(pruner.model, tokenizer, test),
        "processor_seconds": time.process_time() - begin,
        "seconds": recovery.seconds,
        "steps": recovery.steps,
        "looks": recovery.looks,
        "distances": [recovery.distance_before, recovery.distance_after],
        "arguments": recovery.arguments,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=Path, required=True, help="Folder of the pruned models.")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["sts", "sst2", "squad"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--max_steps", type=int, default=-1, help="Steps, which end it if they come first.")
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="Calibration tokens that are learnt from."
    )
    args = parser.parse_args()
    done = {key_of(line, KEY) for line in read_lines(args.output)}
    shared = {name: getattr(args, name) for name in ("sparsity", "minutes", "max_steps", "tokens")}
    for task in args.task:
        for seed in args.seeds:
            line = {"task": task, "seed": seed, **shared}
            if key_of(line, KEY) not in done:
                result = run(args, line)
                append_line(args.output, result)
                figures = " -> ".join(f"{result[name]:.2f}" for name in ("dense", "pruned", "recovered"))
                print(f"{task} seed {seed}: {figures}, {result['processor_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
