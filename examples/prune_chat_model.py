"""Prune a chat model so that it still chats: calibrated on its own answers, and on running text where that matters too.

python examples/prune_chat_model.py MODEL --questions questions.parquet [--texts texts.parquet] [--output_dir DIR]

No answer has to be written by hand: the questions come from a file, and the dense model answers them. Pruning keeps the
next-token distributions that the dense model has on its calibration rows, so these rows should look as the model's work
will. Rows of both kinds may stand in one list, and are drawn from it at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_kprune import KPruneArguments, KPrunePruner


FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SHORT = 200
"""Characters that a text must have more of: a heading or an empty line is no running text."""


def read(path: str, rows: int, seed: int) -> Dataset:
    """So many rows of a file at most, which the seed draws."""
    everything = load_dataset(FORMATS[Path(path).suffix], data_files=path, split="train").shuffle(seed)
    return everything.select(range(min(rows, len(everything))))


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    new: int,
    batch: int = 16,
) -> list[str]:
    """What the model says to each question: its likeliest tokens, `new` at most."""
    answers: list[str] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(questions), batch):
        chats = [[{"role": "user", "content": text}] for text in questions[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        written = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(written[:, prompt:], skip_special_tokens=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Chat model: a folder or a name on the Hub.")
    parser.add_argument("--questions", required=True, help="File of questions: parquet, JSON or CSV.")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=["question"],
        help="Columns that make a question, one after the other.",
    )
    parser.add_argument("--texts", help="File with a column `text`, in which the model should stay good too.")
    parser.add_argument("--rows", type=int, default=100, help="Questions, and as many texts.")
    parser.add_argument(
        "--show", type=int, default=3, help="Further questions, to compare the models' answers."
    )
    parser.add_argument("--new", type=int, default=128, help="Tokens of an answer at the most.")
    parser.add_argument("--sparsity", type=float, default=0.2, help="Fraction of prunable FLOPs to remove.")
    parser.add_argument("--num_tokens", type=int, default=40_000, help="Tokens to calibrate on.")
    parser.add_argument("--num_measure_tokens", type=int, help="Of these, tokens to measure units on.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", help="Where to keep the pruned checkpoint.")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    table = read(args.questions, args.rows + args.show, args.seed)
    questions = ["\n\n".join(row[column] for column in args.columns) for row in table]
    answers = answer(model, tokenizer, questions, args.new)
    rows: list[object] = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
        for question, reply in zip(questions[args.show :], answers[args.show :], strict=True)
    ]
    if args.texts:
        texts = read(args.texts, 10 * args.rows, args.seed)["text"]
        rows += [text for text in texts if len(text) > SHORT][: args.rows]

    pruner = KPrunePruner(
        model,
        KPruneArguments(
            output_dir=args.output_dir,
            sparsity=args.sparsity,
            num_tokens=args.num_tokens,
            num_measure_tokens=args.num_measure_tokens,
            max_seq_length=512,
            per_device_batch_size=4,
            seed=args.seed,
        ),
        rows,
        processing_class=tokenizer,
    )
    report = pruner.prune()
    if args.output_dir:
        pruner.save_model()
    again = answer(pruner.model, tokenizer, questions[: args.show], args.new)
    for question, dense, pruned in zip(questions, answers, again, strict=False):
        print(f"\nquestion: {question}\ndense:    {dense}\npruned:   {pruned}")
    print(
        f"\n{report.sparsity:.1%} removed in {report.seconds['total']:.0f} s, calibrated on "
        f"{report.calibration['tokens']:,} tokens of {len(rows)} rows"
    )


if __name__ == "__main__":
    main()
