"""Run by test_distributed.py in one or several processes: prune, then let the main process write plan and weights.

python -m torch.distributed.run --nproc_per_node 2 tests/distributed_prune.py OUT [MODEL] --world_size 2 [--fail RANK]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.utils import gather_object
from data import PACK, collate, rows
from models import CONFIGS, shallow
from zoo import make

from hf_kprune import KPruneArguments, KPrunePruner
from hf_kprune.algorithm import Job
from hf_kprune.entries import SublayerReport
from hf_kprune.resumption import Record
from hf_kprune.structure.sublayers import Sublayer


shallow()  # the modules of transformers that a model needs are imported by now, once for all processes that are forked


class Failing:
    """A dataset that fails on one process only."""

    def __init__(self, data: list[Any], fails: bool):
        self.data, self.fails = data, fails

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.fails:
            raise RuntimeError("the disk of this process is gone")
        return self.data[index]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?", default="bert")
    parser.add_argument("--rows", type=int, default=31)
    parser.add_argument("--method", default="surgeon")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--fail", type=int, help="Rank of the process whose dataset fails.")
    parser.add_argument("--split", action="store_true", help="Each process gets rows of its own.")
    parser.add_argument("--fail_late", action="store_true", help="It fails in the middle of pruning.")
    parser.add_argument("--world_size", type=int, required=True, help="Processes that there must be.")
    parser.add_argument("--seeds", action="store_true", help="Each process makes a head of its own.")
    parser.add_argument("--sparsities", action="store_true", help="Each process has a sparsity of its own.")
    parser.add_argument(
        "--raise_before", action="store_true", help="The last process raises before the first collective."
    )
    parser.add_argument(
        "--die", action="store_true", help="The last process ends without a word, in the middle."
    )
    parser.add_argument("--target_params", type=float, help="In place of a sparsity, and whole experts go.")
    parser.add_argument("--resume", type=Path, help="Where states are kept and gone on from.")
    parser.add_argument("--stop_after", type=int, help="Sublayers after which every process ends.")
    return parser.parse_args(arguments)


def make_pruner(args: argparse.Namespace) -> KPrunePruner:
    options = KPruneArguments(
        method=args.method,
        sparsity=0.6,
        per_device_batch_size=4,
        statistics_dtype="float64",
        disable_tqdm=True,
        use_cpu=True,
        verbose=True,  # a line for each sublayer, which tests count
    )
    if args.target_params is not None:
        options.sparsity, options.target_params, options.expert_unit = None, args.target_params, "expert"
    options.ridge = args.ridge  # the least squares of so few tokens would magnify rounding
    options.output_dir = str(args.out / "model")
    if args.model == "pack":
        import pandas as pd

        texts = pd.read_parquet(PACK / "data/sst2/train.parquet")["sentence"][:600].tolist()
        options.num_tokens, options.num_measure_tokens, options.per_device_batch_size = 2000, 500, 32
        return KPrunePruner(str(PACK / "models/minilm-sst2"), options, texts)
    options.num_measure_tokens = 130
    model = make(args.model) if args.model not in CONFIGS else shallow(args.model)
    return KPrunePruner(model, options, rows(args.rows), data_collator=collate)


def fail_at_call_20(model: torch.nn.Module, dies: bool) -> None:
    """Make the forward of the model's class raise, or end the process without a word, when it runs for the 20th time."""
    forward, calls = type(model).forward, 0

    @functools.wraps(forward)
    def counted(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20 and dies:
            os._exit(7)
        if calls == 20:
            raise RuntimeError("the disk of this process is gone")
        return forward(self, *inputs, **kwargs)

    type(model).forward = counted


def stop_after(sublayers: int) -> None:
    """Make the process end as soon as so many sublayers are done and kept."""
    keep = Record.keep_sublayer

    def keep_and_stop(
        self: Record, job: Job, position: int, sublayer: Sublayer, entry: SublayerReport
    ) -> None:
        keep(self, job, position, sublayer, entry)
        if position + 1 == sublayers:
            os._exit(7)

    Record.keep_sublayer = keep_and_stop  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    pruner = make_pruner(args)
    rank = pruner.accelerator.process_index
    assert pruner.accelerator.num_processes == args.world_size
    if args.seeds:
        torch.manual_seed(rank)
        torch.nn.init.normal_(pruner.model.classifier.weight)
    if args.sparsities and rank:
        pruner.args.sparsity = 0.5
    last = rank == args.world_size - 1
    if last and args.raise_before:
        raise RuntimeError("this process raises before all others wait")
    if args.split:
        pruner.calibration_dataset = rows(args.rows, seed=rank)
    if args.fail is not None and not args.fail_late:
        pruner.calibration_dataset = Failing(pruner.calibration_dataset, rank == args.fail)
    if (args.die and last) or (args.fail_late and rank == args.fail):
        fail_at_call_20(pruner.model, args.die)

    if args.stop_after is not None:
        stop_after(args.stop_after)

    report = pruner.prune(resume_from_checkpoint=args.resume)
    pruner.save_model()
    digest = [float(p.detach().double().square().sum()) for p in pruner.model.parameters()]
    everywhere = gather_object([digest])
    assert all(d == everywhere[0] for d in everywhere), "processes hold different weights"
    if pruner.accelerator.is_main_process:
        assert report.calibration["rows"] == len(pruner.calibration_dataset) or args.model == "pack"
        torch.save(pruner.model.state_dict(), args.out / "weights.pt")
        kept = {s.name: s.kept for s in report.sublayers}
        (args.out / "plan.json").write_text(json.dumps({"kept": kept, "calibration": report.calibration}))
    pruner.accelerator.end_training()


def run_as(rank: int, port: int, out: str, arguments: list[str]) -> None:
    """Be process `rank` of those that `arguments` count, as a launcher would have started it."""
    count = arguments[arguments.index("--world_size") + 1]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    main([out, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
