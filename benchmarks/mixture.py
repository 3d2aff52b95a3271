"""Train a small mixture of experts on WikiText-2, in minutes on one core, to prune by `perplexity.py`.

    python benchmarks/mixture.py --pack PACK --output mixtral-wikitext2
    python benchmarks/perplexity.py --pack PACK --model mixtral-wikitext2 --output mixture.jsonl --split test --window 128 \\
        --calibration 20480 --untuned --method surgeon magnitude random wanda_sp --sparsity 0.25 0.5 --seeds 0 1 2

It is shaped as Mixtral: 4 layers, 128 wide, in each 8 experts of 256 neurons of which a token passes 2, and a vocabulary of
2,000 pieces of words that is made from the same text. It is trained with the loss by which Mixtral's experts get tokens
evenly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from perplexity import first_tokens, perplexity
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, get_cosine_schedule_with_warmup


def train(model: MixtralForCausalLM, ids: torch.Tensor, steps: int, window: int, batch: int) -> None:
    """Train on windows of `ids` from places that PyTorch's seed draws."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - window, (batch, 1))
        rows = ids[starts + torch.arange(window)]
        loss = model(rows, labels=rows, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, required=True, help="Folder of the evaluation pack.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write the model to.")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=8, help="Windows of a step.")
    parser.add_argument("--window", type=int, default=128, help="Tokens of a window.")
    args = parser.parse_args()

    data = args.pack / "data" / "wikitext2"
    train_texts, held_out = (
        pd.read_parquet(data / f"{name}.parquet")["text"].tolist() for name in ("train", "validation")
    )
    byte_level = AutoTokenizer.from_pretrained(args.pack / "models" / "opt-wikitext2")
    tokenizer = byte_level.train_new_from_iterator(train_texts, 2000, show_progress=False)
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.02,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters")
    ids = first_tokens(train_texts, tokenizer, 10**9)
    train(model, ids, args.steps, args.window, args.batch)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    ids = first_tokens(held_out, tokenizer, 20_481)
    print(f"perplexity of the validation split: {perplexity(model, ids, args.window):.2f}")


if __name__ == "__main__":
    main()
