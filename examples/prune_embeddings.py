"""Prune an embedding model of sentence-transformers, and compare it with the dense one on pairs of sentences.

python examples/prune_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --sparsity 0.5 --output_dir pruned

All options of KPruneArguments are options here. What `encode` gives is what is preserved; scores are for the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from transformers import HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A sentence-transformers model."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet with sentence1 and sentence2."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, with score."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    if script.train_file is None:
        splits = load_dataset("sentence-transformers/stsb")
    else:
        files = {"train": script.train_file, "validation": script.validation_file}
        splits = load_dataset("parquet", data_files=files)
    texts = [*splits["train"]["sentence1"], *splits["train"]["sentence2"]]
    dev = splits["validation"]
    evaluator = EmbeddingSimilarityEvaluator(
        list(dev["sentence1"]), list(dev["sentence2"]), list(dev["score"]), write_csv=False
    )

    pruner = KPrunePruner(script.model_name_or_path, args, texts)
    report = pruner.prune()
    pruner.save_model()
    print(report)
    for name in (script.model_name_or_path, args.output_dir):
        scores = evaluator(SentenceTransformer(name, device="cpu"))
        print(f"{name}: Spearman's correlation {scores['spearman_cosine']:.4f}")


if __name__ == "__main__":
    main()
