"""Quality against time at one sparsity: every method's pruning, and fine-tuning of what some of them leave.

    python benchmarks/pruning_time.py --pack PACK --output pruning_time.jsonl --start magnitude surgeon --minutes 0.25 1 4

Fine-tuning, the retraining-based point: AdamW on the true labels of the whole train split (for squad: of the questions that
calibration draws from), all weights but the embeddings, learning rate falling to nothing over the time that there is. Appends
one JSON line per point to `--output` and leaves out what is there. Run it with nothing else on the machine.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any, cast

import pandas as pd
import torch
from tasks import (
    MAX_LENGTH,
    METHOD_NAMES,
    TASKS,
    append_line,
    calibration_texts,
    embedding,
    facts,
    key_of,
    load_model,
    load_tokenizer,
    make_parser,
    prune,
    read_lines,
    splits,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from hf_kprune import BudgetError


KEY = ("task", "method", "minutes", "sparsity", "seed", "options")


def loss_of(model: PreTrainedModel, tokenizer: Any, task: str, rows: pd.DataFrame) -> Tensor:
    """Loss of a batch of rows against their labels."""

    def encoded(*columns: str) -> Any:
        texts = [rows[column].tolist() for column in columns]
        return tokenizer(
            *texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(model.device)

    if task == "squad":
        inputs, places = encoded("question", "context"), []
        beyond = inputs["input_ids"].shape[1]  # where the model's loss ignores a target
        for i, answers in enumerate(rows["answers"]):
            first = int(answers["answer_start"][0])
            both = (inputs.char_to_token(i, k, 1) for k in (first, first + len(answers["text"][0]) - 1))
            places.append([beyond if place is None else place for place in both])
        starts, ends = torch.tensor(places, device=model.device).unbind(1)
        return cast(Tensor, model(**inputs, start_positions=starts, end_positions=ends).loss)
    labels = torch.tensor(rows["label"].to_numpy(), device=model.device)
    if task == "sts":
        sides = [encoded("sentence1"), encoded("sentence2")]
        one, two = (embedding(model(**inputs), inputs["attention_mask"]) for inputs in sides)
        return F.mse_loss((one * two).sum(1), labels.float() / 5)
    columns = ("sentence",) if task == "sst2" else ("sentence1", "sentence2")
    targets = labels.float() if model.config.num_labels == 1 else labels
    return cast(Tensor, model(**encoded(*columns), labels=targets).loss)


def batches(rows: pd.DataFrame, size: int, generator: torch.Generator) -> Iterator[pd.DataFrame]:
    """Random batches without end, of rows of like length."""
    length = rows.select_dtypes("str").map(len).sum(axis=1).to_numpy()
    while True:
        for chunk in torch.randperm(len(rows), generator=generator).split(16 * size):
            alike = chunk[torch.from_numpy(length[chunk.numpy()]).argsort()].split(size)
            for i in torch.randperm(len(alike), generator=generator).tolist():
                yield rows.iloc[alike[i].numpy()]


def fine_tune(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str,
    rows: pd.DataFrame,
    minutes: float,
    seed: int,
    size: int = 32,
    rate: float = 1e-4,
) -> int:
    """Train `model` in place for so long, and return the steps taken."""
    torch.manual_seed(seed)
    model.train().get_input_embeddings().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    begin, steps = time.perf_counter(), 0
    for some in batches(rows, size, torch.Generator().manual_seed(seed)):
        spent = (time.perf_counter() - begin) / (60 * minutes)
        if spent >= 1:
            return steps
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (steps + 1) / 20) * (1 - spent)
        optimizer.zero_grad()
        loss_of(model, tokenizer, task, some).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1  # noqa: SIM113
    raise AssertionError("batches do not end")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["sst2", "stsb"])
    parser.add_argument("--method", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES)
    parser.add_argument(
        "--start",
        nargs="*",
        choices=METHOD_NAMES,
        default=["magnitude", "surgeon"],
        help="What is fine-tuned.",
    )
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.25, 1, 4], help="Of fine-tuning.")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further KPruneArguments.")
    args = parser.parse_args()

    done = {key_of(line, KEY) for line in read_lines(args.output)}
    for task in args.task:
        tokenizer, (train, test) = load_tokenizer(args.pack, task), splits(args.pack, task)
        texts, metric, dense = calibration_texts(task, train), TASKS[task].metric, None
        for seed, method in ((seed, method) for seed in args.seeds for method in args.method):
            points = [0.0, *(args.minutes if method in args.start else [])]
            lines = [
                dict(zip(KEY, (task, method, minutes, args.sparsity, seed, args.options), strict=True))
                for minutes in points
            ]
            lines = [line for line in lines if key_of(line, KEY) not in done]
            if not lines:
                continue
            pruned = load_model(args.pack, task)
            dense = metric(pruned, tokenizer, test) if dense is None else dense
            try:
                report = prune(
                    pruned, method, texts, tokenizer, sparsity=args.sparsity, seed=seed, **args.options
                )
            except BudgetError as error:  # a method of FFN alone has its limit
                print(f"{task} {method} {error}", flush=True)
                continue
            for line in lines:
                model = copy.deepcopy(pruned)
                steps = (
                    fine_tune(model, tokenizer, task, train, line["minutes"], seed) if line["minutes"] else 0
                )
                line |= {
                    "metric": metric(model, tokenizer, test),
                    "dense": dense,
                    "steps": steps,
                    **facts(report),
                }
                append_line(args.output, line)
                print(
                    f"{task} {method} seed {seed}: {line['metric']:.2f} of {dense:.2f}, pruned in "
                    f"{report.seconds['total']:.0f} s, trained for {60 * line['minutes']:.0f} s ({steps} steps)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
