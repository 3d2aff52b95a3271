"""Quality and cost of K-prune against the number of sublayers between two measurements of the student.

    python benchmarks/measure_every.py --pack PACK --output measure_every.jsonl --task sst2 sts --seeds 0 1

The paper measures before every sublayer, so that its cost grows with the square of the depth. Judged on rows that neither calibration
nor a test of other benchmarks sees: the validation split of STS-B, and the end of the train split of SST-2. Appends one JSON line per run to
`--output`, leaves out what is there, and prints a table of all lines.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pandas as pd
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


KEY = ("task", "measure_every", "seed", "sparsity")

HELD_OUT = 2000
"""Rows of a train split that are taken from its end where there is no other split."""


def judged_on(pack: Path, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows for calibration and for evaluation."""
    train, _ = splits(pack, task)
    if task == "sts":
        return train, pd.read_parquet(pack / "data/stsb/validation.parquet")
    return train[:-HELD_OUT], train[-HELD_OUT:]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--task", nargs="+", choices=["sst2", "sts"], default=["sst2", "sts"])
    parser.add_argument("--measure_every", nargs="+", type=int, default=[1, 2, 3, 4, 6, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--sparsity", type=float, default=0.75)
    args = parser.parse_args()

    done = {key_of(line, KEY) for line in read_lines(args.output)}
    for seed, task, every in itertools.product(args.seeds, args.task, args.measure_every):
        line = dict(zip(KEY, (task, every, seed, args.sparsity), strict=True))
        if key_of(line, KEY) in done:
            continue
        tokenizer, (train, held_out) = load_tokenizer(args.pack, task), judged_on(args.pack, task)
        model, begin = load_model(args.pack, task), time.process_time()
        report = prune(
            model,
            "kprune",
            calibration_texts(task, train),
            tokenizer,
            sparsity=args.sparsity,
            seed=seed,
            num_tokens=15_700,
            num_measure_tokens=5_000,
            method_kwargs={"measure_every": every},
        )
        line |= {"cpu_seconds": time.process_time() - begin, "seconds": report.seconds}
        line |= {"metric": TASKS[task].metric(model, tokenizer, held_out), "threads": torch.get_num_threads()}
        append_line(args.output, line)
    frame = pd.DataFrame(read_lines(args.output)).groupby(["task", "measure_every"])
    print(frame[["metric", "cpu_seconds"]].agg(["mean", "std", "count"]).round(2).to_string())


if __name__ == "__main__":
    main()
