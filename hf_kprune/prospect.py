"""What is known of a student before it is there: what decides about it, and its report as far as it goes."""

from __future__ import annotations

import hashlib
import json
import statistics

import torch

from .arguments import KPruneArguments
from .calibration.batch import tokens_of
from .calibration.rows import row_tokens
from .checkpoint.lineage import earlier_cuts
from .combinations import TIMES
from .evaluation import figures_of
from .memory import Memory
from .methods import METHODS
from .pruning import Pruning
from .report import PruningReport
from .sizes import model_size, prunable_flops
from .state import Pruner
from .structure.sublayers import find_sublayers
from .text import public_name
from .version import versions


MAY_DIFFER = (
    "output_dir",
    "overwrite_output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "html_report",
    "card_metadata",
)
"""Options that change nothing of the result, and that some scripts set on the main process only."""

MAY_CHANGE = (
    *(*MAY_DIFFER, "verbose", "max_shard_size", "per_device_batch_size", "per_device_eval_batch_size"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
)
"""Options that a run which goes on may have otherwise than it began with: the result is the same, up to
rounding where batches are of another size."""


def facts_of(
    pruner: Pruner, pruning: Pruning, args: KPruneArguments, hold_out: bool, weights: str
) -> dict[str, object]:
    """What decides about a student, by the names that a message may give.

    Args:
        pruner: It holds the teacher.
        pruning: Of the teacher.
        args: The budget is in them.
        hold_out: Whether students are made without the rows that they are judged by.
        weights: Checksum of the teacher.
    """
    accelerator = pruner.accelerator
    rows, config, device = pruning.calibration.rows, pruner.model.config.to_dict(), accelerator.device
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "kprune")}
    used = versions()
    facts = {name: value for name, value in args.to_dict().items() if name not in MAY_CHANGE}
    facts |= {name: used[name] for name in ("hf_kprune", "torch", "transformers")}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts["number of processes"] = accelerator.num_processes
    facts["attention"] = pruner.model.config._attn_implementation
    for name in ("compute_loss", "data_collator"):
        own = getattr(pruner, name)
        facts[name] = None if own is None else getattr(own, "__qualname__", type(own).__name__)
    facts["knowledge"], facts["held out"] = pruning.loss.name, hold_out
    facts["rows"] = {name: value for name, value in rows.fingerprint.items() if name != "dataset"}
    facts["config"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    facts["weights"] = weights
    return facts


def report_of(pruner: Pruner, pruning: Pruning, args: KPruneArguments) -> PruningReport:
    """The report of a student, as far as it is known beforehand."""
    model, calibration = pruner.model, pruning.calibration
    sublayers = find_sublayers(model, *args.units)
    lengths = calibration.flops_lengths
    place = None if args.output_dir is None else public_name(args.output_dir)
    figures = figures_of(pruner)
    return PruningReport(
        model=f"{public_name(model.config.name_or_path or 'a model')} ({type(model).__name__})",
        method=args.method,
        knowledge=pruning.loss.name,
        compared=pruning.compared,
        ignored=pruning.ignored,
        asked=dict([args.budget]),
        before=model_size(model, sublayers, prunable_flops(sublayers, lengths)),
        sequence_length=statistics.mean(lengths[name] for name in {s.stack_name for s in sublayers}),
        calibration=calibration.rows.fingerprint,
        arguments={**args.to_dict(), "output_dir": place},
        versions=versions(),
        device=f"{pruner.accelerator.device}, {pruner.accelerator.num_processes} process(es)",
        lineage=earlier_cuts(model, pruner.report),
        metrics={"before": figures} if figures else {},
    )


def estimate(pruner: Pruner, pruning: Pruning, memory: Memory) -> tuple[str, dict[str, int]]:
    """What a plan is estimated from, and what pruning does otherwise, without how long that takes; counts of
    rows and tokens measured."""
    calibration, args = pruning.calibration, pruning.args
    method = METHODS[args.method]
    count = tokens_of(pruner.model, pruner.data_collator, pruner.processing_class)
    tokens = sum(row_tokens(row, count) for row in calibration.rows.rows[: calibration.sample])
    text = (
        f"Estimated from {tokens:,} tokens ({calibration.sample:,} of {len(calibration.rows.rows):,} "
        "calibration rows), measured on the dense model, by one search and without tuning. "
    )
    if not method.one_shot:
        text += "prune() decides sublayer by sublayer, on what is pruned so far"
    else:
        ways = len(method.exponents)
        what = "numbers of heads" if args.uniform else "ways to split the budget over depth"
        trials = f" and tries up to {ways} {what}" if ways > 1 else ""
        text += f"prune() measures {calibration.rows.measured:,} rows{trials}"
    text += ": a sublayer may keep other units than here, and more or fewer of them."
    if args.budget[0] in TIMES:
        text += " Times are those of the look-up table; prune() measures cut models against them."
    text += f" It takes {memory}"
    return text, {"rows_measured": calibration.sample, "tokens_measured": tokens}
