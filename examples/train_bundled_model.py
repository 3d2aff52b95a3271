"""Makes the small SST-2 classifier and the two data files that this repository ships, so that the demo runs offline.

A 4-layer, 256-wide BERT is distilled from a fine-tuned BERT teacher and starts from the teacher's own weights: PCA of
the hidden states narrows them, and every kept layer keeps its largest heads and FFN neurons. The vocabulary is the
teacher's, trimmed to the pieces most frequent in the training sentences plus all single characters.

Usage, with the SST-2 splits as parquet files (columns `sentence` and `label`) and a fine-tuned BERT in `teacher/`:

    python examples/train_bundled_model.py --teacher teacher --train sst2/train.parquet \\
        --validation sst2/validation.parquet --output_dir examples/sst2-tiny --data_dir examples/data

It runs for a fixed number of epochs; the validation split is scored once, at the end.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, set_seed


HIDDEN, HEADS, FFN, MAX_LENGTH = 256, 8, 1024, 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="folder of the fine-tuned BERT classifier")
    for name in ("--train", "--validation"):
        parser.add_argument(name, required=True, help="parquet file with columns sentence, label")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/sst2-tiny"))
    parser.add_argument("--data_dir", type=Path, default=Path("examples/data"))
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[0, 1, 3, 5], help="teacher layers the student keeps"
    )
    options = {"vocab_size": 7500, "epochs": 1, "batch_size": 64, "learning_rate": 3e-4, "temperature": 2.0}
    options |= {"label_weight": 0.2, "seed": 0}  # the weight is of the cross-entropy with the labels
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def write_data(train: pd.DataFrame, validation: pd.DataFrame, args: argparse.Namespace) -> None:
    """The shipped data: an unlabelled sample of the training sentences, and the validation split."""
    args.data_dir.mkdir(parents=True, exist_ok=True)
    sentences = (
        train[["sentence"]].drop_duplicates().loc[lambda rows: rows["sentence"].str.split().str.len() >= 4]
    )
    sentences.sample(2000, random_state=args.seed).to_parquet(
        args.data_dir / "sst2_calibration.parquet", index=False
    )
    validation[["sentence", "label"]].to_parquet(args.data_dir / "sst2_validation.parquet", index=False)


def trim_vocabulary(tokenizer, sentences: list[str], size: int) -> tuple[BertTokenizer, list[int]]:
    """A tokenizer with about `size` of the pieces, and the ids that these had before, in their new order."""
    counts = Counter(i for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"] for i in ids)
    # With every single character at hand, a word whose piece is dropped still splits into shorter pieces.
    characters = {i for piece, i in tokenizer.get_vocab().items() if len(piece.removeprefix("##")) == 1}
    always = characters | set(tokenizer.all_special_ids)
    frequent = [i for i in sorted(counts, key=lambda i: (-counts[i], i)) if i not in always]
    kept = sorted(
        always | set(frequent[: size - len(always)]), key=lambda i: (i != tokenizer.pad_token_id, i)
    )
    vocab = {piece: i for i, piece in enumerate(tokenizer.convert_ids_to_tokens(kept))}
    return BertTokenizer(vocab, do_lower_case=True, model_max_length=MAX_LENGTH), kept


def batches(
    tokenizer, sentences: list[str], batch_size: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of sentences of similar length, in random order, each with the positions of its sentences."""
    ids = tokenizer(sentences, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    groups = torch.tensor(sorted(range(len(ids)), key=lambda i: len(ids[i]))).split(batch_size)
    for k in torch.randperm(len(groups)).tolist():
        rows = groups[k].tolist()
        yield rows, tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")


@torch.no_grad()
def predict(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    logits = torch.empty(len(sentences), 2)
    for rows, batch in batches(tokenizer, sentences, 64):
        logits[rows] = model.eval()(**batch.to(model.device)).logits.float().cpu()
    return logits


@torch.no_grad()
def make_student(teacher, tokenizer, kept: list[int], layers: list[int], sentences: list[str]):
    """A student whose weights are the teacher's, projected on the main directions of its hidden states."""
    names = {m: name for name, m in teacher.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    inputs, outputs = (
        {name: [] for name in names.values()} for _ in range(2)
    )  # hidden states around LayerNorms

    def record(module, args, output):
        inputs[names[module]].append(args[0][mask])
        outputs[names[module]].append(output[mask])

    for module in names:
        module.register_forward_hook(record)
    for _, batch in batches(tokenizer, sentences, 64):
        mask = batch["attention_mask"].bool().to(teacher.device)
        teacher.eval()(**batch.to(teacher.device))
    inputs, outputs = ({name: torch.cat(v) for name, v in d.items()} for d in (inputs, outputs))
    pca = torch.linalg.eigh(sum(y.T @ y for y in outputs.values()))[1][
        :, -HIDDEN:
    ].T  # rows: orthonormal directions

    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": len(layers), "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": FFN, "max_position_embeddings": MAX_LENGTH, "vocab_size": len(kept)}
    student = type(teacher)(type(teacher.config)(**teacher.config.to_dict() | sizes)).to(teacher.device)
    for name, ids in {"word": kept, "position": range(MAX_LENGTH), "token_type": range(2)}.items():
        name = f"bert.embeddings.{name}_embeddings"
        student.get_submodule(name).weight.copy_(teacher.get_submodule(name).weight[list(ids)] @ pca.T)

    def select(scores: torch.Tensor, count: int) -> torch.Tensor:
        return torch.eye(len(scores), device=scores.device)[scores.topk(count).indices.sort().values]

    # Every linear layer W becomes rows @ W @ columns.T, where the two matrices project (pca) or select units.
    pooled = select(teacher.classifier.weight.norm(dim=0), HIDDEN)
    rules = {"bert.pooler.dense": (pooled, pca), "classifier": (torch.eye(2, device=pca.device), pooled)}
    for layer in layers:
        block, size = teacher.bert.encoder.layer[layer], HIDDEN // HEADS
        heads = select(block.attention.self.value.weight.unflatten(0, (-1, size)).norm(dim=(1, 2)), HEADS)
        heads = torch.kron(heads, torch.eye(size, device=pca.device))
        ffn = select(block.intermediate.dense.weight.norm(dim=1) * block.output.dense.weight.norm(dim=0), FFN)
        prefix = f"bert.encoder.layer.{layer}."
        rules |= {f"{prefix}attention.self.{name}": (heads, pca) for name in ("query", "key", "value")}
        rules |= {f"{prefix}attention.output.dense": (pca, heads)}
        rules |= {f"{prefix}intermediate.dense": (ffn, pca), f"{prefix}output.dense": (pca, ffn)}
    for name, module in student.named_modules():
        source = re.sub(r"(?<=layer\.)\d+", lambda match: str(layers[int(match[0])]), name)
        if isinstance(module, torch.nn.Linear):
            rows, columns = rules[source]
            module.weight.copy_(rows @ teacher.get_submodule(source).weight @ columns.T)
            module.bias.copy_(rows @ teacher.get_submodule(source).bias)
        elif isinstance(module, torch.nn.LayerNorm):  # scale and shift by least squares
            x, y = functional.layer_norm(inputs[source] @ pca.T, (HIDDEN,)), outputs[source] @ pca.T
            module.weight.copy_(((x - x.mean(0)) * (y - y.mean(0))).mean(0) / x.var(0, correction=0))
            module.bias.copy_(y.mean(0) - module.weight * x.mean(0))
    return student


def distil(
    student, tokenizer, sentences: list[str], labels: torch.Tensor, targets: torch.Tensor, args
) -> None:
    """Trains on the KL divergence to the teacher's logits (`targets`), plus cross-entropy with the labels."""
    device, t, lr = student.device, args.temperature, args.learning_rate
    steps = -(-len(sentences) // args.batch_size) * args.epochs
    optimizer = torch.optim.AdamW(student.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.06, cycle_momentum=False)
    student.train()
    for epoch in range(args.epochs):
        start, losses = time.time(), []
        for chunk in torch.randperm(len(sentences)).split(32 * args.batch_size):
            for rows, batch in batches(tokenizer, [sentences[i] for i in chunk], args.batch_size):
                with torch.autocast(device.type, torch.bfloat16):
                    logits = student(**batch.to(device)).logits.float()
                soft, target = (
                    functional.log_softmax(x / t, -1) for x in (logits, targets[chunk[rows]].to(device))
                )
                loss = t * t * functional.kl_div(soft, target, log_target=True, reduction="batchmean")
                loss = loss + args.label_weight * functional.cross_entropy(
                    logits, labels[chunk[rows]].to(device)
                )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        print(
            f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}, {time.time() - start:.0f} s",
            flush=True,
        )


def main() -> None:
    args, start = parse_args(), time.time()
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, validation = pd.read_parquet(args.train), pd.read_parquet(args.validation)
    write_data(rows, validation, args)
    rows = rows.drop_duplicates("sentence")
    sentences, labels = rows["sentence"].tolist(), torch.tensor(rows["label"].tolist())

    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        targets = predict(teacher, tokenizer, sentences)
    student_tokenizer, kept = trim_vocabulary(tokenizer, sentences, args.vocab_size)
    student = make_student(teacher, tokenizer, kept, args.layers, sentences[:2000])
    distil(student, student_tokenizer, sentences, labels, targets, args)

    student_tokenizer.save_pretrained(args.output_dir)
    halves = {name: tensor.half() for name, tensor in student.state_dict().items()}
    student.save_pretrained(
        args.output_dir, state_dict=halves
    )  # fp16 on disk, which from_pretrained loads as fp32

    model = AutoModelForSequenceClassification.from_pretrained(args.output_dir).to(device)
    logits = predict(model, AutoTokenizer.from_pretrained(args.output_dir), validation["sentence"].tolist())
    accuracy = (logits.argmax(-1).numpy() == validation["label"]).mean()
    log = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, list))},
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "seconds": round(time.time() - start),
        "train_sentences": len(sentences),
        "validation_sentences": len(validation),
        "validation_accuracy": round(accuracy, 4),
    }
    (args.output_dir / "train_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log, indent=2))


if __name__ == "__main__":
    main()
