"""Accuracy of language models, dense and pruned, on questions that they answer by the likeliest of several options.

    python benchmarks/zero_shot.py --pack PACK DENSE PRUNED [PRUNED ...]

The questions are made of data of the evaluation pack that no language model here was calibrated on, without examples in the
prompt: whether a sentence of SST-2 is positive, and which of four answers to questions about a paragraph of SQuAD is that to
the one asked. Prints a table in Markdown, with the standard error.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_kprune  # noqa: F401  # so that pruned checkpoints load


class Question(NamedTuple):
    """What is asked, the options, which begin with a space, and the place of the right one among them."""

    prompt: str
    options: list[str]
    right: int


def of_sentiment(rows: pd.DataFrame, count: int, seed: int) -> list[Question]:
    """Whether sentences of SST-2 that the seed draws are positive."""
    drawn = rows.sample(count, random_state=seed)
    return [
        Question(
            f"{sentence.strip()}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            [" negative", " positive"],
            label,
        )
        for sentence, label in zip(drawn["sentence"], drawn["label"], strict=True)
    ]


def of_paragraphs(rows: pd.DataFrame, count: int, seed: int, options: int = 4) -> list[Question]:
    """Questions of SQuAD that the seed draws, about paragraphs in which so many different answers stand.

    No option is a part of another.
    """
    draw, questions = random.Random(seed), list[Question]()
    groups = [group for _, group in rows.groupby("context")]
    for group in draw.sample(groups, len(groups)):
        asked = draw.choice(group[["context", "question", "answers"]].to_dict("records"))
        texts = [asked["answers"]["text"][0]]
        others = [answers["text"][0] for answers in group["answers"]]
        for text in draw.sample(others, len(others)):
            if len(texts) < options and not any(text in one or one in text for one in texts):
                texts.append(text)
        if len(texts) == options:
            order = draw.sample(range(options), options)
            prompt = f"{asked['context']}\nQuestion: {asked['question'].strip()}\nAnswer:"
            questions.append(Question(prompt, [f" {texts[place]}" for place in order], order.index(0)))
        if len(questions) == count:
            break
    return questions


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, prompt: list[int], options: Sequence[list[int]]) -> Tensor:
    """Of each option after the prompt, the sum over its tokens: (options,). The prompt is read once."""
    read = model(torch.tensor([prompt], device=model.device), use_cache=True)
    first, cache = read.logits[:, -1:].float(), read.past_key_values
    cache.batch_repeat_interleave(len(options))
    ids = pad_sequence([torch.tensor(option) for option in options], batch_first=True).to(model.device)
    later = model(ids, past_key_values=cache, use_cache=True).logits[:, :-1].float()
    logits = torch.cat([first.expand(len(options), -1, -1), later], 1)
    values = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return torch.stack([value[: len(option)].sum() for value, option in zip(values, options, strict=True)])


def accuracy(model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share of questions whose right option is the likeliest, per character."""
    right = 0
    for question in questions:
        prompt, *options = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (question.prompt, *question.options)
        )
        lengths = torch.tensor([len(option) for option in question.options])
        right += int((log_likelihoods(model, prompt, options).cpu() / lengths).argmax()) == question.right
    return right / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="Folders of models, the dense one first.")
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--count", type=int, default=200, help="Questions of each kind.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = args.pack / "data"
    tasks = {
        "SST-2, two options": of_sentiment(
            pd.read_parquet(data / "sst2" / "validation.parquet"), args.count, args.seed
        ),
        "SQuAD, four options": of_paragraphs(
            pd.read_parquet(data / "squad" / "validation.parquet"), args.count, args.seed
        ),
    }
    tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    print(f"| model | {' | '.join(tasks)} |\n| --- |{' ---: |' * len(tasks)}")
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        cells = []
        for questions in tasks.values():
            share = accuracy(model, tokenizer, questions)
            error = math.sqrt(share * (1 - share) / len(questions))
            cells.append(f"{100 * share:.1f} ± {100 * error:.1f}")
        print(f"| {Path(path).name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
