"""Prune an image classifier on images without labels.

    python examples/prune_vision.py --model_name_or_path google/vit-base-patch16-224 --image_dir images --sparsity 0.4 \
        --output_dir pruned

`--image_dir` is a folder of images, in folders of any names or in none; `--dataset_name` takes them from the Hub. What is printed is on
how many of the images that were kept apart the pruned model says what the dense one says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
)

from hf_kprune import KPruneArguments, KPrunePruner


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Fine-tuned model: a folder or a name on the Hub."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of images."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images on the Hub, in place of a folder."}
    )
    image_column: str = field(default="image", metadata={"help": "The column of images."})
    max_samples: int = field(default=600, metadata={"help": "Take so many images at most."})


@torch.inference_mode()
def answers(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The likeliest class of each image, (N,)."""
    batches = pixels.to(model.device).split(32)
    return torch.cat([model.eval()(pixel_values=batch).logits.argmax(-1) for batch in batches])


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    if (script.image_dir is None) == (script.dataset_name is None):
        raise SystemExit("Name either an --image_dir or a --dataset_name.")
    name, options = script.dataset_name or "imagefolder", {}
    if script.image_dir is not None:
        options = {"data_dir": script.image_dir, "drop_labels": True}
    images = datasets.load_dataset(name, split="train", **options).shuffle(args.seed)
    images = images.select(range(min(len(images), script.max_samples)))
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    pixels = torch.cat(
        [
            processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            for image in images[script.image_column]
        ]
    )
    apart = max(1, len(pixels) // 5)
    calibration = [{"pixel_values": image} for image in pixels[apart:]]
    pruner = KPrunePruner(
        AutoModelForImageClassification.from_pretrained(script.model_name_or_path),
        args,
        calibration,
        processing_class=processor,
    )
    dense = answers(pruner.model, pixels[:apart])
    report = pruner.prune()
    same = (answers(pruner.model, pixels[:apart]) == dense).float().mean()
    pruner.save_model()
    print(f"{report.sparsity:.1%} of the prunable FLOPs removed in {report.seconds['total']:.0f} s")
    print(f"the same answer on {same:.1%} of {apart} other images")


if __name__ == "__main__":
    main()
