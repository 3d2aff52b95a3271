"""Prune a classifier of images, and compare its accuracy with that of the dense one.

python examples/prune_vision.py --model_name_or_path google/vit-base-patch16-224 --dataset_dir images \\
    --sparsity 0.4 --output_dir pruned

The directory has a folder for each class in `train` and in `validation`, as `datasets` reads an "imagefolder"; folders
are called as the model calls its classes. All options of KPruneArguments are options here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
    HfArgumentParser,
)

from hf_kprune import KPruneArguments, KPrunePruner


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A fine-tuned model, on the Hub or in a directory."})
    dataset_dir: str = field(metadata={"help": "Directory of images."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    model = AutoModelForImageClassification.from_pretrained(script.model_name_or_path)
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    splits = load_dataset("imagefolder", data_dir=script.dataset_dir)

    def prepared(rows: Dataset) -> Dataset:
        names = rows.features["label"].names

        def row(example: dict) -> dict:
            pixels = processor(example["image"].convert("RGB"), return_tensors="np")["pixel_values"][0]
            return {"pixel_values": pixels, "labels": model.config.label2id[names[example["label"]]]}

        return rows.map(row, remove_columns=rows.column_names)

    pruner = KPrunePruner(
        model,
        args,
        prepared(splits["train"]),
        DefaultDataCollator(),
        eval_dataset=prepared(splits["validation"]),
        processing_class=processor,
    )
    pruner.evaluate()
    report = pruner.prune()
    pruner.evaluate()
    pruner.save_model()
    print(report)


if __name__ == "__main__":
    main()
