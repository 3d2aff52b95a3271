"""Prune a causal language model on running text.

    python examples/prune_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --sparsity 0.2 --num_tokens 40000 \
        --output_dir pruned

With `--train_file` and `--validation_file` (parquet, CSV or JSON lines with a column `text`) nothing is taken from the Hub. A chat
model is better calibrated on chats: see prune_chat_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Language model: a folder or a name on the Hub."})
    dataset_name: str = field(default="Salesforce/wikitext", metadata={"help": "Texts on the Hub."})
    dataset_config_name: str = field(default="wikitext-2-raw-v1", metadata={"help": "Their configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Texts to calibrate on."})
    validation_file: str | None = field(default=None, metadata={"help": "Texts to evaluate on."})
    max_eval_samples: int = field(default=300, metadata={"help": "Evaluate on so many texts at most."})


def rows(script: ScriptArguments, split: str, file: str | None) -> datasets.Dataset:
    """The texts of a file, or those of a split on the Hub, without headings and empty lines."""
    if file is None:
        texts = datasets.load_dataset(script.dataset_name, script.dataset_config_name, split=split)
    else:
        texts = datasets.load_dataset(FORMATS[Path(file).suffix], data_files=file, split="train")
    return texts.filter(lambda row: len(row["text"]) > 200).select_columns(["text"])


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    texts = rows(script, "validation", script.validation_file)
    pruner = KPrunePruner(
        AutoModelForCausalLM.from_pretrained(script.model_name_or_path),
        args,
        calibration_dataset=rows(script, "train", script.train_file),
        eval_dataset=texts.select(range(min(len(texts), script.max_eval_samples))),
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    dense = pruner.evaluate()["eval_perplexity"]
    report = pruner.prune()
    pruned = pruner.evaluate()["eval_perplexity"]
    pruner.save_model()
    print(f"{report.sparsity:.1%} of the prunable FLOPs removed in {report.seconds['total']:.0f} s")
    print(f"perplexity: {dense:.2f} dense, {pruned:.2f} pruned")


if __name__ == "__main__":
    main()
