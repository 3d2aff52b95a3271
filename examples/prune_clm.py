"""Prune a language model, compare its perplexity with that of the dense one, and let both go on with a prompt.

python examples/prune_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --packing --sparsity 0.2 --output_dir pruned

All options of KPruneArguments are options here. Chat models are better calibrated on their answers: prune_chat_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_kprune import KPruneArguments, KPrunePruner


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A language model, on the Hub or in a directory."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet with a column of texts."})
    validation_file: str | None = field(default=None, metadata={"help": "Parquet with a column of texts."})
    text_column: str = field(default="text", metadata={"help": "That column."})
    prompt: str = field(default="The city", metadata={"help": "What both go on with."})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, KPruneArguments)).parse_args_into_dataclasses()
    if script.train_file is None:
        splits = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    else:
        files = {"train": script.train_file, "validation": script.validation_file}
        splits = load_dataset("parquet", data_files=files)
    texts = {name: [text for text in splits[name][script.text_column] if text.strip()] for name in splits}

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path)
    pruner = KPrunePruner(
        model, args, texts["train"], eval_dataset=texts["validation"], processing_class=tokenizer
    )

    def go_on() -> str:
        tokens = tokenizer(script.prompt, return_tensors="pt").to(pruner.model.device)
        return tokenizer.decode(pruner.model.generate(**tokens, max_new_tokens=20, do_sample=False)[0])

    pruner.evaluate()
    dense = go_on()
    report = pruner.prune()
    pruner.evaluate()
    pruner.save_model()
    print(report)
    print(f"dense: {dense}\npruned: {go_on()}")


if __name__ == "__main__":
    main()
