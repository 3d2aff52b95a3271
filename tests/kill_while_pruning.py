"""Run by test_resumption.py: kill a process that prunes and saves, at random moments and again and again, and let each run
go on until it has ended; count the runs whose result differs from that of one without interruption.

    python tests/kill_while_pruning.py FOLDER KILLS
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import torch
from data import collate, rows
from models import tiny
from safetensors.torch import load_file

from hf_kprune import KPruneArguments, KPrunePruner


METHODS = ("surgeon", "kprune", "kwon")


def run(out: Path, method: str, resume: bool) -> None:
    """Prune a model and save it."""
    args = KPruneArguments(
        output_dir=str(out),
        overwrite_output_dir=True,
        method=method,
        sparsity=0.6,
        num_tokens=200,
        per_device_batch_size=8,
        disable_tqdm=True,
        use_cpu=True,
    )
    pruner = KPrunePruner(tiny(num_hidden_layers=2), args, rows(), data_collator=collate)
    pruner.prune(resume_from_checkpoint=resume)
    pruner.save_model()


def result(out: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What was saved: weights, and what is said of sublayers and trials, without seconds."""
    report = json.loads((out / "kprune_report.json").read_text())
    entries = [{**entry, "seconds": 0.0} for entry in report["sublayers"]]
    return load_file(out / "model.safetensors"), (entries, report["trials"], report["sparsity"])


def differs(one: Any, other: Any) -> bool:
    return (
        one[1] != other[1]
        or one[0].keys() != other[0].keys()
        or not all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    )


def in_a_child(out: Path, method: str, seconds: float) -> bool:
    """Go on in a fork for so long, and return whether it was killed then; it may have ended before."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(out.parent / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        try:
            run(out, method, resume=True)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, (out.parent / "errors").read_text()[-4000:]
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(words: list[str]) -> None:
    folder, kills = Path(words[0]).resolve(), int(words[1])
    torch.set_num_threads(1)
    draw, counted = random.Random(0), Counter[str](kills=0, runs=0, differing=0, longest=0)
    expected, spans = {}, {}
    for method in METHODS:
        run(folder / method, method, resume=False)  # so that all is imported
        begin = time.perf_counter()
        run(folder / method, method, resume=False)
        spans[method] = time.perf_counter() - begin
        expected[method] = result(folder / method)
    out = folder / "work" / "out"
    for method in cycle(METHODS):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        killed = 0  # the more often, the more time there is, as what is left may take longer than the longest
        while in_a_child(out, method, draw.uniform(0.1, 1 + 0.1 * killed) * spans[method]):
            killed += 1
        counted.update(runs=1, kills=killed)
        counted["longest"] = max(counted["longest"], killed)
        counted["differing"] += differs(result(out), expected[method])
        left = sorted(name for name in os.listdir(out.parent) if name != "errors")
        assert left == ["out"], left
        if counted["kills"] >= kills:
            break
    print(json.dumps(counted))


if __name__ == "__main__":
    main(sys.argv[1:])
