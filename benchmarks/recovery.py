"""What a pruned model gets back when it learns from the dense one for some minutes, without labels.

    python benchmarks/recovery.py --pack PACK --output recovery.jsonl --models FOLDER --task sts sst2 squad --seeds 0 1 2
    python benchmarks/recovery.py --pack PACK --output recovery.jsonl --models FOLDER --task wikitext --model SmolLM2-135M-Instruct \
        --sparsity 0.2 --tokens 39936 --minutes 60 --max_steps 72

Prunes as quality.py does, and a language model as perplexity.py, keeps the pruned models in a folder, lets each recover, keeps it there too, and appends one JSON line per run to `--output`.
Labels are used for evaluation alone. Seconds of the processor tell more than minutes where other programs run beside.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from perplexity import draw_blocks, first_tokens, perplexity
from tasks import (
    MAX_LENGTH,
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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_kprune import KPruneArguments, KPrunePruner


WINDOW = 512
"""Tokens of a window of running text, and of a calibration row of it."""

KEY = ("task", "seed", "sparsity", "minutes", "max_steps", "tokens")


class Subject(NamedTuple):
    """What is pruned and recovers: a dense model, its calibration rows, of how many tokens at most, how it is pruned on them,
    and what a model comes to on rows that it has not seen."""

    dense: PreTrainedModel
    tokenizer: Any
    rows: list[Any]
    length: int
    options: dict[str, Any]
    metric: Callable[[PreTrainedModel], float]


def subject_of(args: argparse.Namespace, task: str, seed: int) -> Subject:
    """The subject of a task of the pack, or the language model `--model` on the test split of WikiText-2."""
    if task in TASKS:
        tokenizer, (train, test) = load_tokenizer(args.pack, task), splits(args.pack, task)
        rows, dense = calibration_texts(task, train), load_model(args.pack, task)
        metric = TASKS[task].metric
        options = {"num_tokens": 30_000}
        return Subject(dense, tokenizer, rows, MAX_LENGTH, options, lambda m: metric(m, tokenizer, test))
    train, test = (
        pd.read_parquet(args.pack / "data" / "wikitext2" / f"{name}.parquet")["text"].tolist()
        for name in ("train", "test")
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = draw_blocks(train, tokenizer, args.tokens // WINDOW, WINDOW, seed)
    ids = first_tokens(test, tokenizer, 20_481)
    options = {"num_tokens": args.tokens, "per_device_batch_size": 4}
    return Subject(dense, tokenizer, rows, WINDOW, options, partial(perplexity, ids=ids, window=WINDOW))


def run(args: argparse.Namespace, line: dict[str, Any]) -> dict[str, Any]:
    """Prune, unless that is done, and recover: `line` with what came of it."""
    task, seed = line["task"], line["seed"]
    subject = subject_of(args, task, seed)
    dense, tokenizer = subject.dense, subject.tokenizer
    folder = args.models / f"{task}-{seed}"
    if not folder.exists():
        model, options = copy.deepcopy(dense), {"sparsity": args.sparsity, "seed": seed, **subject.options}
        prune(model, "surgeon", subject.rows, tokenizer, **options)
        model.save_pretrained(folder)
    model = type(dense).from_pretrained(folder)
    line |= {"dense": subject.metric(dense), "pruned": subject.metric(model)}
    arguments = KPruneArguments(
        num_tokens=args.tokens, max_seq_length=subject.length, seed=seed, disable_tqdm=True
    )
    pruner = KPrunePruner(model, arguments, subject.rows, processing_class=tokenizer)
    begin = time.process_time()
    recovery = pruner.recover(args.minutes, dense_model=dense, max_steps=args.max_steps)
    pruner.model.save_pretrained(args.models / f"{task}-{seed}-recovered")
    return line | {
        "recovered": subject.metric(pruner.model),
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
    parser.add_argument("--task", nargs="+", choices=[*TASKS, "wikitext"], default=["sts", "sst2", "squad"])
    parser.add_argument("--model", type=Path, help="Folder of the language model of the task wikitext.")
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
