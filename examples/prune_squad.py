"""Prune a model that answers questions, and compare exact match and F1 with those of the dense one.

python examples/prune_squad.py --model_name_or_path distilbert/distilbert-base-cased-distilled-squad \\
    --max_seq_length 384 --sparsity 0.5 --output_dir pruned

All options of KPruneArguments are options here. Answers are for the comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A fine-tuned model, on the Hub or in a directory."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet to calibrate on, as SQuAD is."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet to compare on."})
    questions: int = field(default=1000, metadata={"help": "How many questions they are compared on."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    args.text_columns = args.text_columns or ["question", "context"]
    files = {"train": script.train_file, "validation": script.validation_file}
    splits = (
        load_dataset("parquet", data_files=files) if script.train_file else load_dataset("rajpurkar/squad")
    )
    validation = splits["validation"].select(range(min(script.questions, len(splits["validation"]))))

    pruner = KPrunePruner(
        AutoModelForQuestionAnswering.from_pretrained(script.model_name_or_path),
        args,
        splits["train"],
        eval_dataset=validation,  # windows of long contexts are made and joined
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    pruner.evaluate()
    report = pruner.prune()
    pruner.evaluate()
    pruner.save_model()
    print(report)


if __name__ == "__main__":
    main()
