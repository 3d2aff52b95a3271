"""Time and memory of ordering the neurons of a wide FFN and of fitting those that stay, by number of columns.

    python benchmarks/wide.py --columns 1024 2048 4096 8192 --device cpu

Random sums of as many tokens as there are columns. Squares are of float64: `squares` is the most memory that was taken beyond the sums
themselves, in units of such a square of 8 C^2 bytes. Each line is a process of its own; the last tells the exponent of the seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import torch

from hf_kprune.methods.least_squares import NormalEquations, tune_weight
from hf_kprune.methods.surgeon import SHRINKAGE, eliminate, inverse_covariance


WIDTH = 256
"""Residual width: what is wide here are the columns."""


class Cost:
    """The most memory that was taken within a context, in bytes, and its seconds: on a CPU of its work alone."""

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.over = device, 0, threading.Event()
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.thread = threading.Thread(target=self.watch)

    def resident(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def watch(self) -> None:
        while not self.over.wait(0.01):
            self.bytes = max(self.bytes, self.resident() - self.start)

    def __enter__(self) -> Cost:
        self.start = self.resident()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.thread.start()
        self.seconds = -self.clock()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
        self.seconds += self.clock()
        self.over.set()
        self.thread.join()


def measure(columns: int, device: torch.device) -> dict[str, Any]:
    """Order the neurons, and fit half of them."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, columns, device=device)
    halves = []
    for _ in range(2):
        sums = NormalEquations.zeros(columns, WIDTH, device)
        for _ in range(4):
            features = torch.randn(columns // 8, columns, device=device)
            target = features @ weight.T + torch.randn(columns // 8, WIDTH, device=device)
            sums.add(features, target, torch.float32)
        halves.append(sums)
    root = torch.eye(WIDTH, dtype=torch.float64, device=device)
    line: dict[str, Any] = {"columns": columns, "device": device.type, "threads": torch.get_num_threads()}
    with Cost(device) as order:
        inverse, _ = inverse_covariance(halves[0].gram, halves[0].feature_sum, columns, False, SHRINKAGE)
        eliminate(inverse, weight, root, 1)
        del inverse
    with Cost(device) as fit:
        tune_weight(halves[1].join(halves[0]), weight, None, None)
    for name, cost in (("order", order), ("fit", fit)):
        line[name] = {"seconds": cost.seconds, "squares": cost.bytes / (8 * columns**2)}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.columns[0], args.device)))
        return
    lines = []
    for columns in args.columns:
        words = [sys.executable, __file__, "--child", "--columns", str(columns), "--device", str(args.device)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(lines[-1]), flush=True)
    if len(lines) > 1:
        x = [math.log(line["columns"]) for line in lines]
        slopes = {
            part: statistics.linear_regression(x, [math.log(line[part]["seconds"]) for line in lines]).slope
            for part in ("order", "fit")
        }
        print(json.dumps({"exponents": slopes}))


if __name__ == "__main__":
    main()
