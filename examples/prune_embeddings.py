"""Prune an embedding model: a sentence-transformers folder or name, whose `encode` is what is preserved.

    python examples/prune_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --sparsity 0.5 \
        --output_dir pruned

With `--train_file` and `--test_file` (parquet, CSV or JSON lines with the columns of STS-B) nothing is taken from the Hub. What is
printed is Spearman's correlation of cosine similarities with people's scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from transformers import HfArgumentParser

import hf_kprune  # noqa: F401  # so that SentenceTransformer can load what was pruned
from hf_kprune import KPruneArguments, KPrunePruner


FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Embedding model: a folder or a name on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Sentences to calibrate on."})
    test_file: str | None = field(default=None, metadata={"help": "Pairs with scores to evaluate on."})


def rows(split: str, file: str | None) -> datasets.Dataset:
    """The rows of a file, or those of a split of STS-B."""
    if file is None:
        return datasets.load_dataset("nyu-mll/glue", "stsb", split=split)
    return datasets.load_dataset(FORMATS[Path(file).suffix], data_files=file, split="train")


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    if args.output_dir is None:
        raise SystemExit("Name an --output_dir for the pruned model, which is loaded from there.")
    train, test = rows("train", script.train_file), rows("validation", script.test_file)
    pruner = KPrunePruner(script.model_name_or_path, args, [*train["sentence1"], *train["sentence2"]])
    report = pruner.prune()
    pruner.save_model()
    print(f"{report.sparsity:.1%} of the prunable FLOPs removed in {report.seconds['total']:.0f} s")
    evaluate = EmbeddingSimilarityEvaluator(test["sentence1"], test["sentence2"], test["label"])
    for name, place in (("dense", script.model_name_or_path), ("pruned", args.output_dir)):
        figures = evaluate(SentenceTransformer(place, device="cpu" if args.use_cpu else None))
        print(f"{name}: Spearman {figures['spearman_cosine']:.4f}")


if __name__ == "__main__":
    main()
