"""Prune a sequence classifier, or a regressor, of a task of GLUE or of your own sentences, without labels.

    python examples/prune_glue.py --model_name_or_path textattack/bert-base-uncased-SST-2 --task_name sst2 \
        --sparsity 0.5 --output_dir pruned

With `--train_file` and `--validation_file` (parquet, CSV or JSON lines) nothing is taken from the Hub. The columns of the task's
sentences are read from both, and a column `label` from the second. Calibration never reads a label.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


SENTENCES = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
}
FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Fine-tuned model: a folder or a name on the Hub."})
    task_name: str = field(default="sst2", metadata={"help": f"One of {', '.join(SENTENCES)}."})
    train_file: str | None = field(default=None, metadata={"help": "Sentences to calibrate on."})
    validation_file: str | None = field(default=None, metadata={"help": "Labelled sentences to evaluate on."})


def rows(script: ScriptArguments, split: str, file: str | None) -> datasets.Dataset:
    """The rows of a file, or those of a split of GLUE."""
    if file is None:
        return datasets.load_dataset("nyu-mll/glue", script.task_name, split=split)
    return datasets.load_dataset(FORMATS[Path(file).suffix], data_files=file, split="train")


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    columns = SENTENCES[script.task_name]
    validation = "validation_matched" if script.task_name == "mnli" else "validation"
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=128))

    labelled = rows(script, validation, script.validation_file).map(encode, batched=True)
    pruner = KPrunePruner(
        AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path),
        args,
        calibration_dataset=rows(script, "train", script.train_file).select_columns(columns),
        eval_dataset=labelled,
        processing_class=tokenizer,
    )
    dense = pruner.evaluate()
    report = pruner.prune()
    pruned = pruner.evaluate()
    pruner.save_model()
    print(f"{report.sparsity:.1%} of the prunable FLOPs removed in {report.seconds['total']:.0f} s")
    for name in (name for name in dense if name in pruned and not name.endswith(("runtime", "per_second"))):
        print(f"{name}: {dense[name]:.4f} dense, {pruned[name]:.4f} pruned")


if __name__ == "__main__":
    main()
