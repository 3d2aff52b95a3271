"""Prune the sentiment classifier that comes with the repository and show what that cost and gained. Offline, on a CPU.

python examples/prune_sst2.py [--sparsity 0.5] [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from hf_kprune import KPruneArguments, KPrunePruner


HERE = Path(__file__).parent


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def latency(
    models: list[PreTrainedModel], batch: int = 32, length: int = 32, repeats: int = 20
) -> list[float]:
    """Median milliseconds of a forward pass of each model, taken in turns."""
    ids = torch.randint(1000, 5000, (batch, length))
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for model, times in zip(models, taken, strict=True):
                begin = time.perf_counter()
                model.eval()(input_ids=ids)
                times.extend([1e3 * (time.perf_counter() - begin)] if turn >= 3 else [])
    return [statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.5, help="Fraction of prunable FLOPs to remove.")
    parser.add_argument("--output_dir", help="Where to keep the pruned checkpoint.")
    args = parser.parse_args()

    path = HERE / "sst2-tiny"
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = load_dataset("parquet", data_files=str(HERE / "data/sst2_calibration.parquet"), split="train")[
        "sentence"
    ]
    dev = load_dataset("parquet", data_files=str(HERE / "data/sst2_validation.parquet"), split="train")
    dev = dev.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)

    pruner = KPrunePruner(
        AutoModelForSequenceClassification.from_pretrained(path),
        KPruneArguments(output_dir=args.output_dir, sparsity=args.sparsity),  # is checked before pruning
        calibration_dataset=list(texts),
        eval_dataset=dev,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = pruner.evaluate()["eval_accuracy"]
    report = pruner.prune()

    with tempfile.TemporaryDirectory() as folder:
        out = args.output_dir or f"{folder}/pruned"
        pruner.save_model(out)
        models = [AutoModelForSequenceClassification.from_pretrained(p) for p in (path, out)]
        pruner.model = models[1]  # what is evaluated is what was loaded again
        after = pruner.evaluate()["eval_accuracy"]
        dense_ms, pruned_ms = latency(models)
        models[0].save_pretrained(f"{folder}/dense")
        dense_file, pruned_file = (
            Path(p, "model.safetensors").stat().st_size / 1e6 for p in (f"{folder}/dense", out)
        )

    a, b = report.before, report.after
    print(f"\n{'':34}{'dense':>12}{'pruned':>12}")
    print(f"{'accuracy, 872 dev sentences':34}{before:12.2%}{after:12.2%}")
    print(f"{'parameters':34}{a.parameters:12,}{b.parameters:12,}")
    print(
        f"{'parameters without embeddings':34}{a.parameters_without_embeddings:12,}{b.parameters_without_embeddings:12,}"
    )
    print(f"{'prunable MFLOPs per sentence':34}{a.flops / 1e6:12.1f}{b.flops / 1e6:12.1f}")
    print(f"{'file, float32, MB':34}{dense_file:12.1f}{pruned_file:12.1f}")
    print(f"{'CPU latency, batch 32 x 32, ms':34}{dense_ms:12.1f}{pruned_ms:12.1f}")
    print(
        f"\npruned in {report.seconds['total']:.0f} s"
        + (f", saved to {args.output_dir}" if args.output_dir else "")
    )


if __name__ == "__main__":
    main()
