"""Measured speed-up of each method's smallest model within 3 points of the dense one, over tasks.

    python benchmarks/speedup.py --pack PACK --quality quality.jsonl --output speedup.jsonl --threads 2

Takes from the lines of `quality.py`, for each task and method, the largest sparsity whose mean over seeds is within
`--drop` points, gives dense models the sizes kept there (weights do not matter for time), and runs them all in turns with the
dense one, at a task's mean length and at 128 tokens. A method with no such point counts as the dense model, 1x. Writes
`--output` anew. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tasks import append_line, load_model, read_lines

from hf_kprune.calibration.tasks import text_inputs
from hf_kprune.latency.timing import compare, cut_to


Line = dict[str, Any]


def smallest_within(lines: Sequence[Line], drop: float) -> dict[str, list[Line]]:
    """Of a task's lines, for each method those of its largest sparsity within `drop` points of dense; [] if there is none."""
    points: dict[str, dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if not line["variant"]:
            points[line["method"]][line["sparsity"]].append(line)
    found = {}
    for method, by_sparsity in points.items():
        near = [
            s
            for s, at in by_sparsity.items()
            if statistics.mean(line["dense"] - line["metric"] for line in at) <= drop
        ]
        found[method] = by_sparsity[max(near)] if near else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--quality", type=Path, required=True, help="File that quality.py wrote.")
    parser.add_argument("--output", type=Path, required=True, help="File for the JSON lines.")
    parser.add_argument("--drop", type=float, default=3.0, help="Points of the metric that may be lost.")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    by_task = defaultdict(list)
    for line in read_lines(args.quality):
        by_task[line["task"]].append(line)
    args.output.write_text("")
    for task, lines in by_task.items():
        dense = load_model(args.pack, task).eval().to(args.device)
        found = smallest_within(lines, args.drop)
        models = [dense, *(cut_to(dense, line["kept"]) for points in found.values() for line in points)]
        mean = round(statistics.mean(line["tokens_per_sequence"] for line in lines))
        for batch, length in ((batch, length) for batch in args.batch for length in (mean, 128)):
            dense_seconds, *seconds = compare(models, text_inputs(dense, batch, length), args.repeats)
            rest = iter(seconds)
            for method, points in found.items():
                line = {
                    "task": task,
                    "method": method,
                    "batch": batch,
                    "length": length,
                    "of_mean_length": length == mean,
                    "sparsity": points[0]["sparsity"] if points else 0.0,
                    "within": args.drop,
                    "drop": statistics.mean(p["dense"] - p["metric"] for p in points) if points else 0.0,
                    "dense_seconds": dense_seconds,
                    "speed_ups": [dense_seconds / next(rest) for _ in points] or [1.0],
                    "threads": args.threads,
                    "device": args.device,
                    "versions": lines[0]["versions"],
                }
                append_line(args.output, line)
                print(
                    f"{task} {method} at {line['sparsity']:.0%} (drop {line['drop']:.2f}), batch {batch}, {length} tokens: "
                    f"{statistics.mean(line['speed_ups']):.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
