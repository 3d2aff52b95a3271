"""Prune a model that answers questions by spans of a context, without answers to calibrate on.

    python examples/prune_squad.py --model_name_or_path distilbert/distilbert-base-cased-distilled-squad \
        --sparsity 0.4 --output_dir pruned

With `--train_file` and `--validation_file` (parquet, CSV or JSON lines, with the columns of SQuAD) nothing is taken from the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Fine-tuned model: a folder or a name on the Hub."})
    dataset_name: str = field(default="rajpurkar/squad", metadata={"help": "Questions on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Questions to calibrate on."})
    validation_file: str | None = field(default=None, metadata={"help": "Questions to evaluate on."})
    max_eval_samples: int = field(default=1000, metadata={"help": "Evaluate on so many questions at most."})


def rows(script: ScriptArguments, split: str, file: str | None) -> datasets.Dataset:
    """The rows of a file, or those of a split on the Hub."""
    if file is None:
        return datasets.load_dataset(script.dataset_name, split=split)
    return datasets.load_dataset(FORMATS[Path(file).suffix], data_files=file, split="train")


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    questions = rows(script, "validation", script.validation_file)
    pruner = KPrunePruner(
        AutoModelForQuestionAnswering.from_pretrained(script.model_name_or_path),
        args,
        calibration_dataset=rows(script, "train", script.train_file).select_columns(["question", "context"]),
        eval_dataset=questions.select(range(min(len(questions), script.max_eval_samples))),
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    dense = pruner.evaluate()
    report = pruner.prune()
    pruned = pruner.evaluate()
    pruner.save_model()
    print(f"{report.sparsity:.1%} of the prunable FLOPs removed in {report.seconds['total']:.0f} s")
    for name in ("eval_exact_match", "eval_f1"):
        print(f"{name}: {dense[name]:.2f} dense, {pruned[name]:.2f} pruned")


if __name__ == "__main__":
    main()
