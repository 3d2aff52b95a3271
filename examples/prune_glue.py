"""Prune a model that was fine-tuned on a task of GLUE, or on files like it, and compare it with the dense one.

python examples/prune_glue.py --model_name_or_path textattack/bert-base-uncased-SST-2 --task_name sst2 \\
    --sparsity 0.5 --output_dir pruned

All options of KPruneArguments are options here. Labels are for the comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


COLUMNS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A fine-tuned model, on the Hub or in a directory."})
    task_name: str = field(default="sst2", metadata={"help": "The task of GLUE.", "choices": list(COLUMNS)})
    train_file: str | None = field(default=None, metadata={"help": "Parquet to calibrate on instead."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet to compare on instead."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    args.text_columns = args.text_columns or COLUMNS[script.task_name]
    if script.train_file is None:
        splits = load_dataset("nyu-mll/glue", script.task_name)
        validation = splits["validation_matched" if script.task_name == "mnli" else "validation"]
    else:
        files = {"train": script.train_file, "validation": script.validation_file}
        splits = load_dataset("parquet", data_files=files)
        validation = splits["validation"]

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path)
    validation = validation.map(
        lambda rows: tokenizer(*(rows[name] for name in args.text_columns), truncation=True), batched=True
    )
    pruner = KPrunePruner(model, args, splits["train"], eval_dataset=validation, processing_class=tokenizer)
    pruner.evaluate()
    report = pruner.prune()
    pruner.evaluate()
    pruner.save_model()
    print(report)  # the figures of both, too


if __name__ == "__main__":
    main()
